"""How many nodes a masked step needs. Every node computes this itself, from signed documents: nobody sends it."""

from dataclasses import dataclass

from concord_shared.errors import UsageError
from concord_shared.plan.privacy import Private

__all__ = ["NODES_MAX", "Thresholds", "thresholds_for", "thresholds_of"]

NODES_MAX = 128
"""Each node masks towards every other: beyond, the work would outgrow the training."""


@dataclass(frozen=True)
class Thresholds:
    """Of one masked step.

    nodes: n, its participants by the signed manifest, whoever shows up.
    collusion: c, how many of them may work together with the coordinator.
    opening: t, how many must agree on the survivors and give their shares, to open the sum.
    survivors: m, how many Updates must be in a sum.
    """

    nodes: int
    collusion: int
    opening: int
    survivors: int

    @property
    def losses(self) -> int:
        """How many nodes may be lost, at any point, with the sum of the others still opened."""
        return self.nodes - self.survivors


def thresholds_for(nodes: int, collusion: int | None, minimum: int) -> Thresholds:
    """The smallest thresholds that are safe.

    Two openings of one step, or two views of who survived, need t honest words each: an honest node gives one only,
    so 2t > n + c makes them impossible. With m >= c + 2, at least two honest Updates are in every sum.

    Args:
        collusion: None for the default, a third of the others.
        minimum: the smallest number of Updates in a sum that plan and policy allow.

    Raises:
        UsageError: these nodes can never be enough.
    """
    if nodes > NODES_MAX:
        raise UsageError(
            f"a masked step of {nodes} nodes is above the limit of {NODES_MAX}; set rounds.cohort to {NODES_MAX} or "
            "less"
        )
    c = max(0, (nodes - 1) // 3) if collusion is None else collusion
    t = (nodes + c) // 2 + 1
    m = max(minimum, t, c + 2)
    if m > nodes:
        raise UsageError(
            f"a masked step of {nodes} nodes needs {m} of them (minimum cohort {minimum}, collusion {c}): ask more "
            "nodes, or lower privacy.collusion or privacy.minimum_cohort"
        )
    return Thresholds(nodes, c, t, m)


def thresholds_of(privacy: Private, nodes: int) -> Thresholds:
    """Of a step of `nodes` under a plan's [privacy]. Raises: UsageError: as `thresholds_for`."""
    return thresholds_for(nodes, privacy.collusion, privacy.minimum_cohort)
