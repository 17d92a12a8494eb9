"""A preflight: could a run of this plan begin at each node? A member of the study asks, each node answers for itself.

    PreflightRequest   an organisation   one plan of one study, and the datasets that would take part
    PreflightReport    the node          a check each: ok, no or unknown, a sentence, and what to do next

A report holds names of the plan's contract, coarse counts, times and sizes. No value of a row, no path and no name that
the plan does not have itself.
"""

from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from concord_shared.documents import NODES_MAX, Count, Digest, Id, Line, Seconds
from concord_shared.plan.section import Name
from concord_shared.signing import Document, Record
from concord_shared.text import printable

__all__ = [
    "DIFFERENCES_MAX",
    "LASTS_MAX_S",
    "NODE_CHECKS",
    "Check",
    "CheckName",
    "Figures",
    "PreflightReport",
    "PreflightRequest",
    "Sentence",
    "Status",
]

LASTS_MAX_S = 3600
"""A request is answered within this time or never: so a node need not remember it for longer."""
DIFFERENCES_MAX = 50
CheckName = Literal["agreement", "policy", "data", "contract", "approval", "budget", "device", "round", "memory"]
NODE_CHECKS: tuple[CheckName, ...] = get_args(CheckName)
Status = Literal["ok", "no", "unknown"]


def _plain(text: str) -> str:
    if printable(text) != text:
        raise ValueError("expected text without control characters")
    return text


Sentence = Annotated[str, Field(max_length=300), AfterValidator(_plain)]


class PreflightRequest(Document):
    """Signed by `organisation`, a member of the study. datasets: who is asked, as `node/dataset`, one of each node.
    participants: how many nodes the run would have.
    """

    SCHEMA: ClassVar[str] = "concord/preflight-request/1"
    preflight: Id
    study: Id
    plan_digest: Digest
    organisation: Name
    datasets: tuple[Line, ...] = Field(min_length=1, max_length=NODES_MAX)
    participants: int = Field(ge=1, le=NODES_MAX)
    issued_at: Seconds
    not_after: Seconds

    def dataset_of(self, node: str) -> str | None:
        """The one dataset that is asked for at a node; None where there is none, or more than one."""
        named = [name.removeprefix(f"{node}/") for name in self.datasets if name.startswith(f"{node}/")]
        return named[0] if len(named) == 1 else None


class Check(Record):
    """unknown: it could not be looked at, or is for a person to say. next: what the node's steward does, unless ok."""

    name: CheckName
    status: Status
    says: Sentence
    next: Sentence = ""


class Figures(Record):
    """What the dry round measured, and what follows from it for whole rounds; None where it was not measured.

    rows: for training, coarse; times follow from it. batch_us: microseconds of one batch. memory_mb: the most that the
    training process held. down_bytes, up_bytes: the model and the node's answer, each round.
    """

    rows: Count | None = None
    batch_us: Count | None = None
    round_ms: Count | None = None
    total_ms: Count | None = None
    down_bytes: Count | None = None
    up_bytes: Count | None = None
    memory_mb: Count | None = None


class PreflightReport(Document):
    """Signed by the node. request_digest: of the very request that it answers. differences: from the plan's contract;
    more: how many are not listed.
    """

    SCHEMA: ClassVar[str] = "concord/preflight-report/1"
    preflight: Id
    request_digest: Digest
    node: Name
    organisation: Name
    dataset: Name
    checks: tuple[Check, ...] = Field(max_length=len(NODE_CHECKS))
    differences: tuple[Sentence, ...] = Field((), max_length=DIFFERENCES_MAX)
    more: Count = 0
    figures: Figures = Figures()
    issued_at: Seconds

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if tuple(check.name for check in self.checks) != NODE_CHECKS:
            raise ValueError(f"checks: expected one each of {', '.join(NODE_CHECKS)}, in this order")
        return self

    @property
    def go(self) -> bool:
        return all(check.status == "ok" for check in self.checks)
