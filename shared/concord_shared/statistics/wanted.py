"""What statistics are asked for."""

import math
from dataclasses import dataclass
from fractions import Fraction

from concord_shared.plan.schema import Plan

__all__ = ["RANK_BINS", "Wanted", "wanted_of"]

RANK_BINS = 1024
"""Into how many parts an interval is split in which a value is looked for, at least; refined ones exactly so."""


@dataclass(frozen=True)
class Wanted:
    """Rows, and by column how many values there are, are missing or outside, with the mean or each category's count,
    always. Besides:

    spread: variances of number columns. target: the target is one column more.
    quantiles: levels in (0, 1). A quantile is the smallest value that at least that share of the values does not
    exceed (numpy's `inverted_cdf`), told within `resolution`, a share of the column's range.
    extremes: the smallest and the largest value, told in the same way; with a minimum_count of k, the k-th of each.
    bins: of a histogram over the column's range; 0: none.
    correlation: of all pairs of number columns, over rows that have both.
    sites: the share of each variance that lies between nodes, and how far nodes' own shares of categories or bins are
    from those of all (total variation), both without any node's own figure.
    minimum_count: smaller counts are not told.
    """

    spread: bool = False
    target: bool = False
    quantiles: tuple[float, ...] = ()
    extremes: bool = False
    bins: int = 0
    correlation: bool = False
    sites: bool = False
    resolution: float = 1e-3
    minimum_count: int = 1

    @property
    def ranks(self) -> bool:
        return bool(self.quantiles) or self.extremes

    @property
    def shown_bins(self) -> int:
        """Of the histogram that is told, or only compared."""
        return self.bins or (16 if self.sites else 0)

    @property
    def coarse(self) -> int:
        """Bins of the first stage: a whole number of them in each that is shown."""
        shown = self.shown_bins
        if not self.ranks:
            return shown
        return max(1, shown) * math.ceil(RANK_BINS / max(1, shown))

    @property
    def depth(self) -> int:
        """Stages until bins are as narrow as the resolution."""
        if not self.ranks:
            return 1
        depth = 1
        while self.coarse * RANK_BINS ** (depth - 1) < 1 / self.resolution * (1 - 1e-9):
            depth += 1
        return depth

    @property
    def stages(self) -> int:
        centred = self.spread or self.correlation or self.sites
        return max(2 if centred else 1, self.depth)

    def rank_names(self) -> tuple[str, ...]:
        return (*map(level_name, self.quantiles), *(("minimum", "maximum") if self.extremes else ()))

    def rank_of(self, name: str, count: int) -> int:
        """Which of `count` values in order, from 1; 0 where it would stand for fewer than minimum_count."""
        fewest = self.minimum_count
        if count < max(1, fewest):
            return 0
        if name == "minimum":
            return fewest
        if name == "maximum":
            return count - fewest + 1
        rank = max(1, math.ceil(Fraction(name) * count))
        return rank if rank >= fewest and count - rank + 1 >= fewest else 0


def level_name(level: float) -> str:
    return repr(level)


def wanted_of(plan: Plan) -> Wanted:
    """What a plan asks for: by its section, or what its preprocessing is fitted by."""
    asked = plan.statistics
    if asked is None:
        return Wanted(spread=True)
    return Wanted(
        spread="moments" in asked.of,
        target="classes" in asked.of,
        quantiles=asked.quantiles,
        extremes="extremes" in asked.of,
        bins=asked.bins,
        correlation="correlation" in asked.of,
        sites="sites" in asked.of,
        resolution=asked.resolution,
        minimum_count=asked.minimum_count,
    )
