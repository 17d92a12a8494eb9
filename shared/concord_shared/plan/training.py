"""`[training]`: local work between two messages."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from concord_shared.plan.section import Fraction, Positive, Section, is_empty

__all__ = ["Training"]


class Training(Section):
    """Local work between two messages. A fresh optimiser each round; the schedule runs over rounds.

    batch_share: a batch holds this share of a node's rows, one at least and batch_size at most: steps of nodes that
    hold much and little are then those of one process on all rows. micro_batch: rows on the device at once, of a larger
    batch the gradients of parts are added up; 0: a whole batch. recompute_activations: of each block only the input is
    kept for the way back. local_seconds: a node's work of a round ends after so long, with one step at least; 0: never.
    """

    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.1
    schedule: Literal["constant", "cosine", "step"] = "constant"
    schedule_step: int = Field(10, ge=1)
    schedule_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    momentum: Fraction = 0.0
    nesterov: bool = False
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0
    batch_size: int = Field(32, ge=1, le=1 << 20)
    batch_share: Fraction = Field(0.0, exclude_if=is_empty)
    local_epochs: int = Field(1, ge=0, le=10_000)
    local_steps: int = Field(0, ge=0, le=1_000_000)
    local_seconds: float = Field(0.0, ge=0, le=86_400, exclude_if=is_empty)
    micro_batch: int = Field(0, ge=0, le=1 << 20, exclude_if=is_empty)
    recompute_activations: bool = Field(False, exclude_if=is_empty)
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    deterministic: bool = True

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_epochs(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("local_steps") and "local_epochs" not in given:
            return {**given, "local_epochs": 0}
        return given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.local_epochs > 0) == (self.local_steps > 0):
            raise ValueError("give local_epochs or local_steps, one of them above 0")
        if self.local_seconds and self.deterministic:
            raise ValueError("local_seconds lets a clock decide how many steps a node takes: set deterministic = false")
        if self.batch_share and not self.local_steps:
            raise ValueError("batch_share belongs to local_steps: an epoch has as many batches as the share says")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0")
        if self.optimiser != "sgd" and self.momentum:
            raise ValueError('momentum belongs to optimiser = "sgd"; Adam\'s are beta1 and beta2')
        return self

    @property
    def batch_norm_problem(self) -> str:
        """Why BatchNorm cannot be trained so, or "": it needs two rows, and all of a batch at once, and once."""
        if self.batch_size > 1 and not (self.batch_share or self.micro_batch or self.recompute_activations):
            return ""
        return (
            "a model with BatchNorm compares the rows of a batch: expected training.batch_size of 2 or more, no "
            "batch_share, which may make it one row at a node with few, and micro_batch and recompute_activations "
            "off; or use GroupNorm"
        )

    def batch_of(self, rows: int) -> int:
        """The rows of a batch at a node that trains on so many."""
        wanted = max(1, round(self.batch_share * rows)) if self.batch_share else self.batch_size
        return max(1, min(wanted, self.batch_size, rows))
