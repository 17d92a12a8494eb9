"""Geometry of the drawings inside the page: numbers in, coordinates out. The template draws them as SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from concord_local.report.figures import PERCENTAGES, Series
from concord_local.report.reading import Record

__all__ = ["Bar", "LineChart", "Scale", "line_chart", "participation", "scale_of"]

WIDTH, HEIGHT = 560, 310
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 14, 44
POINTS_MAX = 400
BARS_MAX = 120
BARS_WIDTH = 720
OUTLIER = 3.0


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high` with round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def share(self, value: float) -> float:
        """Where `value` lies, 0 at `low` and 1 at `high`, never outside."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def percent(self, value: float) -> str:
        return f"{100 * self.share(value):.2f}%"


def scale_of(low: float, high: float, steps: int = 5) -> Scale:
    """The smallest scale of about `steps` round steps that holds both."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    rough = (high - low) / steps
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(number * step, 12) for number in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks)


@dataclass(frozen=True)
class LineChart:
    """A line with its spread, in the units of a 560 × 310 view. course: another line beside it; empty for none."""

    x_ticks: tuple[tuple[str, str], ...]
    y_ticks: tuple[tuple[str, str], ...]
    line: str
    spread: str
    middle: str
    end: tuple[str, str]
    references: tuple[tuple[str, str], ...]
    course: str = ""


def line_chart(
    series: Series, references: Mapping[str, float | None], course: Sequence[tuple[int, float]] = ()
) -> LineChart | None:
    """The drawing of a series with at least two points, and of level lines and a course of rounds and values to compare
    with; None for fewer points.
    """
    if len(series.rounds) < 2:
        return None
    levels = {name: value for name, value in references.items() if value is not None}
    first, last = series.rounds[0], series.rounds[-1]
    beside = [(number, value) for number, value in course if first <= number <= last]
    y = _value_scale(series, [*levels.values(), *(value for _, value in beside)])

    def point(number: float, value: float) -> tuple[str, str]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (number - first) / (last - first)
        return f"{across:.1f}", f"{TOP + (HEIGHT - TOP - BOTTOM) * (1 - y.share(value)):.1f}"

    kept = _thinned(len(series.rounds))

    def path(values: Sequence[float], order: Sequence[int] = kept) -> str:
        return " ".join(",".join(point(series.rounds[index], values[index])) for index in order)

    return LineChart(
        x_ticks=tuple((point(number, y.low)[0], str(number)) for number in _round_ticks(first, last)),
        y_ticks=tuple((point(first, tick)[1], _tick(series.figure, tick)) for tick in y.ticks),
        line=path(series.values),
        spread=f"{path(series.high)} {path(series.low, kept[::-1])}",
        middle=f"{path(series.third_quartile)} {path(series.first_quartile, kept[::-1])}",
        end=point(last, series.values[-1]),
        references=tuple((name, point(first, value)[1]) for name, value in levels.items()),
        course=" ".join(",".join(point(*beside[index])) for index in _thinned(len(beside))) if beside else "",
    )


def _value_scale(series: Series, levels: Sequence[float]) -> Scale:
    """Room for everything, but a single node far outside may not flatten the line: it is cut off at the edge."""
    line_low, line_high = min(*series.values, *levels), max(*series.values, *levels)
    reach = OUTLIER * ((line_high - line_low) or abs(line_high) or 1.0)
    low, high = max(min(series.low), line_low - reach), min(max(series.high), line_high + reach)
    scale = scale_of(min(low, line_low), max(high, line_high))
    if series.figure not in PERCENTAGES:
        return scale
    ticks = tuple(tick for tick in scale.ticks if -1e-9 <= tick <= 1 + 1e-9)
    return Scale(max(0.0, scale.low), min(1.0, scale.high), ticks)


def _thinned(count: int) -> list[int]:
    """At most about 400 indices, the last one among them."""
    stride = -(-count // POINTS_MAX)
    return sorted({*range(0, count, stride), count - 1})


def _round_ticks(first: int, last: int) -> list[int]:
    step = max(1, round(scale_of(first, last).ticks[1] - scale_of(first, last).ticks[0]))
    inner = [number for number in range(step, last, step) if first + step / 2 < number < last - step / 2]
    return [first, *inner, last]


def _tick(figure: str, value: float) -> str:
    return (f"{100 * value:g}%" if figure in PERCENTAGES else f"{value:g}").replace("-", "−")


@dataclass(frozen=True)
class Bar:
    """One train round, or a few neighbouring ones: shares of the asked nodes that answered, failed, kept silent."""

    x: str
    width: str
    rounds: str
    answered: float
    failed: float
    silent: float
    aborted: int


def participation(trainings: Sequence[Record]) -> list[Bar]:
    """Who answered, round by round, over a width of 720."""
    size = -(-len(trainings) // BARS_MAX) or 1
    groups = [trainings[start : start + size] for start in range(0, len(trainings), size)]
    step = BARS_WIDTH / max(1, len(groups))
    return [_bar(group, index * step, step * 0.82) for index, group in enumerate(groups)]


def _bar(group: Sequence[Record], x: float, width: float) -> Bar:
    counts = [sum(len(record.get(key, ())) for record in group) for key in ("survivors", "failures", "silent")]
    answered, failed, silent = (round(100 * count / (sum(counts) or 1), 2) for count in counts)
    first, last = group[0]["round"], group[-1]["round"]
    rounds = str(first) if first == last else f"{first}–{last}"
    aborted = sum("aborted" in record for record in group)
    return Bar(f"{x:.1f}", f"{width:.1f}", rounds, answered, failed, silent, aborted)
