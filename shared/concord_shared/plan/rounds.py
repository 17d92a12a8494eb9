"""`[rounds]`, `[evaluation]` and `[compression]`: what goes between nodes and coordinator, and when."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from concord_shared.plan.section import Fraction, Positive, Section

__all__ = ["Compression", "Evaluation", "Rounds", "Share", "share_of"]


def _share(value: Any) -> Any:
    """`"all"`, a count of nodes, or a fraction of them between 0 and 1."""
    if value == "all":
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise ValueError('expected "all", a whole number of at least 1, or a fraction between 0 and 1')


Share = Annotated[int | float | Literal["all"], PlainValidator(_share)]


def share_of(share: int | float | str, total: int) -> int:
    """The number of nodes that a `Share` means among `total`: of a fraction never less than it says."""
    if share == "all":
        return total
    if isinstance(share, int):
        return share
    assert isinstance(share, float)
    return math.ceil(round(share * total, 6))


class Rounds(Section):
    """How many rounds, who is asked, how many must answer, and how large an Update may be."""

    count: int = Field(10, ge=1, le=100_000)
    cohort: Share = "all"
    quorum: Share = 0.5
    grace_s: Positive = 30.0
    deadline_s: Positive = 3600.0
    update_bound: Positive = 10.0
    weight_cap: int = Field(1000, ge=1, le=1 << 31)
    ring_bits: Literal[32, 64] = 32
    aborts_max: int = Field(3, ge=1)


class Compression(Section):
    """Fewer bytes of an Update. What a round leaves out, the node adds to its next one.

    kind: fp16 and int8 send each coordinate with fewer bits (not under masks, which need integers of one ring); rand-k
    sends one of `one_in` coordinates, drawn for each round; narrow sums in a ring of 16 bits.
    """

    kind: Literal["fp16", "int8", "rand-k", "narrow"]
    one_in: int = Field(10, ge=2, le=1000)


class Evaluation(Section):
    """`every`: an evaluate round over all nodes after every k-th round (0: only at the end).

    `incoming`: the cohort also evaluates the model that it is sent, on the training message.
    """

    every: int = Field(1, ge=0)
    incoming: bool = False
    validation_fraction: Fraction = 0.0
    on: Literal["test", "validation"] = "test"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.on == "validation" and self.validation_fraction == 0:
            raise ValueError('on = "validation" needs validation_fraction above 0')
        return self
