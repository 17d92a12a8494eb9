"""`[privacy]`: what the coordinator may see of a node, and how much of one record or node leaves."""

from typing import Annotated, Literal

from pydantic import Field

from concord_shared.plan.section import Positive, Section

__all__ = ["DifferentialPrivacy", "Plain", "PrivacySection", "Private", "Robust", "robust_problem"]

ROBUST_NODES_MAX = 1000
"""Of a cohort in robust mode: the rules compare every Update with every other."""


class DifferentialPrivacy(Section):
    """How much one record, or all data of one node, can change what leaves: by (epsilon, delta), in the whole run.

    unit: with "record", each node trains by DP-SGD. With "node", noise hides a whole Update: added by the nodes under
    masks (mode "private"), or by the coordinator to the sum.
    clip: the L2 bound of one record's gradient; of an Update where the unit is a node.
    """

    unit: Literal["record", "node"]
    epsilon: float = Field(ge=1e-3, le=100)
    delta: float = Field(gt=0, le=1e-3)
    clip: Positive


class Plain(Section):
    """The coordinator sees each node's Update."""

    mode: Literal["plain"] = "plain"
    dp: DifferentialPrivacy | None = None


class Private(Section):
    """Updates leave a node masked (FSA-1): the coordinator learns the sum of those who survived, and no node's own.

    minimum_cohort: how many Updates must be in a sum. collusion: how many nodes may work together with the coordinator
    without learning more; by default a third of a cohort's others.
    """

    mode: Literal["private"]
    minimum_cohort: int = Field(3, ge=2, le=128)
    collusion: int | None = Field(None, ge=0, le=126)
    dp: DifferentialPrivacy | None = None


class Robust(Section):
    """The coordinator sees each node's Update and combines them so that `attackers` of them cannot steer the model.

    rule: how. attackers: f, how many nodes may send anything at all; a round needs 2f + 1 Updates. quarantine_after:
    a node whose Updates stand out in so many rounds in a row is not asked any more; 0: never.
    """

    mode: Literal["robust"]
    rule: Literal["nnm-trimmed-mean", "trimmed-mean", "median", "clipped-mean"] = "nnm-trimmed-mean"
    attackers: int = Field(1, ge=1, le=ROBUST_NODES_MAX // 2)
    quarantine_after: int = Field(3, ge=0, le=1000)
    dp: DifferentialPrivacy | None = None


PrivacySection = Annotated[Plain | Private | Robust, Field(discriminator="mode")]


def robust_problem(privacy: Robust, nodes: int, what: str) -> str:
    """Why so many Updates cannot be combined in robust mode, or are too many; "" where they can."""
    if nodes > ROBUST_NODES_MAX:
        return f"{what} of {nodes} nodes: robust mode compares at most {ROBUST_NODES_MAX}; set rounds.cohort lower"
    if nodes <= 2 * privacy.attackers:
        return (
            f"{what} of {nodes} nodes cannot outvote privacy.attackers = {privacy.attackers}: expected at least "
            f"{2 * privacy.attackers + 1} (twice the attackers, and one more). Ask more nodes, or tolerate fewer "
            "attackers"
        )
    return ""
