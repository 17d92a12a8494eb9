"""Numbers as people read them: formats, intervals, and the figures of each node and each round."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from concord_local.report.reading import Record, Run

__all__ = [
    "PERCENTAGES",
    "NodeFigures",
    "Series",
    "Versus",
    "compared",
    "format_bytes",
    "format_count",
    "format_figure",
    "format_gain",
    "format_seconds",
    "node_figures",
    "number_of",
    "series_of",
    "tally",
    "wilson_interval",
]

PERCENTAGES = frozenset({"accuracy", "recall_macro", "precision_macro", "f1_macro", "hit_rate_10"})
COUNTS = frozenset({"tokens"})
NOTHING = "–"
MINUS = "−"
Z_95 = 1.959964


def number_of(value: Any) -> float | None:
    """A finite number, or None for anything else: absent, undefined, NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def format_count(value: Any) -> str:
    """Digits in groups of three: `92,206`."""
    number = number_of(value)
    return NOTHING if number is None else f"{number:,.0f}"


def format_figure(figure: str, value: Any) -> str:
    """`96.4%` for shares of rows, whole numbers for counts, four digits for the others, a dash where the figure is
    undefined.
    """
    number = number_of(value)
    if number is None:
        return NOTHING
    if figure in COUNTS:
        return format_count(number)
    text = f"{100 * number:.1f}%" if figure in PERCENTAGES else f"{number:.4f}" if abs(number) < 10 else f"{number:.4g}"
    return text.replace("-", MINUS)


def format_gain(figure: str, gain: float | None) -> str:
    """A signed difference; of percentages in percentage points."""
    if gain is None:
        return NOTHING
    text = f"{100 * gain:+.1f}" if figure in PERCENTAGES else f"{gain:+.4f}"
    return "0" if float(text) == 0 else text.replace("-", MINUS)


def format_bytes(count: Any) -> str:
    number = number_of(count)
    if number is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}" if unit != "B" else f"{number:.0f} B"
        number /= 1000
    return f"{number:.3g} TB"


def format_seconds(value: Any) -> str:
    number = number_of(value)
    if number is None:
        return NOTHING
    if number < 60:
        return f"{number:.3g} s"
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def wilson_interval(share: float, rows: int) -> tuple[float, float]:
    """The 95 % interval of a share of `rows` rows (Wilson 1927); honest for few rows and for shares of 0 and 1."""
    centre = (share + Z_95**2 / (2 * rows)) / (1 + Z_95**2 / rows)
    half = Z_95 / (1 + Z_95**2 / rows) * math.sqrt(share * (1 - share) / rows + Z_95**2 / (4 * rows**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class NodeFigures:
    """One node: its rows, its figures under the final model, how often it answered."""

    name: str
    train_rows: int
    test_rows: int
    value: float | None
    interval: tuple[float, float] | None
    figures: Record
    answered: int
    missed: int
    worst: bool


def node_figures(run: Run) -> list[NodeFigures]:
    """All nodes, the worst first; those without a figure last."""
    answered, missed = _participation(run.trainings)
    worst = (run.summary.get("worst_node") or {}).get("node")
    nodes = []
    for name in {**run.nodes, **run.per_node}:
        figures = run.per_node.get(name, {})
        value = number_of(figures.get(run.headline))
        has = run.nodes.get(name, {})
        rows = int(figures.get("rows", has.get(run.plan.evaluation.on, 0)))
        interval = wilson_interval(value, rows) if value is not None and run.counts_rows and rows else None
        nodes.append(
            NodeFigures(
                name=name,
                train_rows=int(has.get("train", 0)),
                test_rows=rows,
                value=value,
                interval=interval,
                figures=figures,
                answered=answered.get(name, 0),
                missed=missed.get(name, 0),
                worst=name == worst,
            )
        )
    sign = 1 if run.higher_is_better else -1
    return sorted(nodes, key=lambda node: (node.value is None, sign * (node.value or 0), not node.worst, node.name))


def _participation(trainings: Iterable[Record]) -> tuple[dict[str, int], dict[str, int]]:
    answered: dict[str, int] = {}
    missed: dict[str, int] = {}
    for record in trainings:
        for name in record.get("survivors", ()):
            answered[name] = answered.get(name, 0) + 1
        for name in {*record.get("failures", ()), *record.get("silent", ())}:
            missed[name] = missed.get(name, 0) + 1
    return answered, missed


@dataclass(frozen=True)
class Series:
    """A figure over rounds: over all rows, and its spread over nodes. All of one length; empty where never measured."""

    figure: str
    rounds: tuple[int, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    first_quartile: tuple[float, ...]
    third_quartile: tuple[float, ...]
    high: tuple[float, ...]


def series_of(run: Run, figure: str) -> Series:
    rows = []
    for record in run.evaluations:
        value = number_of(record["metrics"].get(figure))
        if value is not None:
            nodes = [number_of(item.get(figure)) for item in (record.get("per_node") or {}).values()]
            known = [item for item in nodes if item is not None] or [value]
            rows.append((record["round"], value, *np.percentile(known, [0, 25, 75, 100]).tolist()))
    columns = tuple(zip(*rows, strict=True)) if rows else ((),) * 6
    return Series(figure, *columns)


def pooled_course(run: Run, figure: str) -> list[tuple[int, float]]:
    """What one process reached with all rows, round by round, where the comparison followed it; else nothing."""
    course = (run.comparison or {}).get("pooled_course", ())
    return [(each["round"], value) for each in course if (value := number_of(each.get(figure))) is not None]


@dataclass(frozen=True)
class Versus:
    """One node alone, in the federation, and with all data pooled. `gain` is federated over alone, + is better."""

    name: str
    train_rows: int
    test_rows: int
    alone: float | None
    alone_on_all: float | None
    federated: float | None
    pooled: float | None
    gain: float | None


def compared(comparison: Mapping[str, Any], higher_is_better: bool) -> list[Versus]:
    """The nodes of a comparison, where federating gained most first."""
    rows = [_versus(row, 1 if higher_is_better else -1) for row in comparison["rows"]]
    return sorted(rows, key=lambda row: (row.gain is None, -(row.gain or 0), row.name))


def _versus(row: Record, sign: int) -> Versus:
    alone, alone_on_all, federated, pooled = (
        number_of(row.get(key)) for key in ("alone", "alone_on_all", "federated", "pooled")
    )
    gain = None if alone is None or federated is None else sign * (federated - alone)
    train_rows, test_rows = int(row["train_rows"]), int(row["test_rows"])
    return Versus(str(row["node"]), train_rows, test_rows, alone, alone_on_all, federated, pooled, gain)


def tally(rows: Sequence[Versus]) -> tuple[int, int, int]:
    """How many nodes the federation serves better, equally and worse than they would serve themselves."""
    gains = [row.gain for row in rows if row.gain is not None]
    better = sum(gain > 1e-9 for gain in gains)
    worse = sum(gain < -1e-9 for gain in gains)
    return better, len(gains) - better - worse, worse
