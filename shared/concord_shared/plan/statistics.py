"""`[statistics]`: what a plan of kind statistics tells of all nodes' rows together."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from concord_shared.plan.section import Section

__all__ = ["StatisticsSection"]


class StatisticsSection(Section):
    """Of a plan of kind statistics: what is told of all nodes' rows together.

    of: moments (mean, variance), extremes, categories, classes (the target as one more column), correlation, sites (how
    nodes differ). How many values there are, are missing or outside of the contract's ranges, and each category's
    count, is always told.
    quantiles: levels. bins: of a histogram over each column's range; 0 for none. resolution: of quantiles and extremes,
    as a share of a column's range. minimum_count: smaller counts are not told, nor is anything of fewer rows.
    rows: all that a node has, or those that it would train on.
    """

    of: tuple[Literal["moments", "extremes", "classes", "correlation", "sites"], ...] = ("moments", "classes")
    quantiles: tuple[Annotated[float, Field(ge=0.001, le=0.999)], ...] = Field((), max_length=100)
    bins: int = Field(0, ge=0, le=1024)
    resolution: float = Field(1e-3, ge=1e-9, le=0.1)
    minimum_count: int = Field(5, ge=1, le=1_000_000)
    rows: Literal["all", "train"] = "all"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, values in (("of", self.of), ("quantiles", self.quantiles)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names something twice")
        if self.bins == 1:
            raise ValueError("bins = 1 is the count, which is always told; give 2 or more, or 0 for no histogram")
        return self
