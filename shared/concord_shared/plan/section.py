"""What each section of a plan is: frozen, strict (no text becomes a number) and closed (unknown keys are errors)."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Fraction", "Name", "Positive", "Section", "is_empty", "usually"]

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]


def is_empty(value: Any) -> bool:
    """Of a key that plans did not always have: left out where it says nothing, so that digests stay what they were."""
    return not value


def usually(usual: str | int) -> Callable[[Any], bool]:
    """As `is_empty`, for a key whose usual value is not empty."""
    return lambda value: bool(value == usual)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
