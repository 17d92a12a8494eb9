"""plots/*.png: the run's drawings for slides and papers. Drawn without pyplot, so without any global state.

Colours are those of Okabe and Ito (2008), which the colour-blind can tell apart; what differs by colour differs by
shape as well. A name that the font cannot draw appears as its node's number: the page shows it in full.
"""

import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from concord_local.report.figures import (
    PERCENTAGES,
    Series,
    Versus,
    compared,
    format_figure,
    number_of,
    pooled_course,
    series_of,
)
from concord_local.report.reading import Record, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_all"]

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#6b7280"
MARKS = {"alone": (ORANGE, "o", 6.0), "pooled": (GREEN, "s", 8.0), "federated": (BLUE, "D", 4.5)}
OVERALL = (
    ("popularity", "popularity", GREY),
    ("pooled", "pooled", GREEN),
    ("federated", "federated", BLUE),
    ("alone_best", "alone, best", ORANGE),
    ("alone_mean", "alone, mean", ORANGE),
)
DPI = 150
NAMED_MAX = 30
NUMBERED_MAX = 20
LETTERS_MAX = 22


def draw_all(run: Run) -> dict[str, bytes]:
    """PNG bytes by name; only what the run has something for."""
    figures = {"curves": _curves(run), "data": _data(run)}
    if run.metrics.get("confusion"):
        figures["confusion"] = _confusion(run.metrics["confusion"], run.plan.data.classes)
    if run.comparison:
        figures["comparison"] = _comparison(run.comparison, run.higher_is_better, run.personal)
    return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def _png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


# The figures over rounds


def _curves(run: Run) -> "Figure | None":
    found = [series for series in (series_of(run, figure) for figure in run.curves) if series.rounds]
    if not found:
        return None
    figure = _figure(10, 3.8)
    for axes, series in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        _draw_series(axes, series)
        _draw_pooled(axes, series.figure, pooled_course(run, series.figure))
    return figure


def _draw_series(axes: "Axes", series: Series) -> None:
    from matplotlib.ticker import MaxNLocator

    factor = 100 if series.figure in PERCENTAGES else 1
    scaled = {name: np.multiply(getattr(series, name), factor) for name in ("values", "low", "high")}
    quartiles = np.multiply((series.first_quartile, series.third_quartile), factor)
    axes.fill_between(series.rounds, scaled["low"], scaled["high"], color=BLUE, alpha=0.12, lw=0, label="all nodes")
    axes.fill_between(series.rounds, *quartiles, color=BLUE, alpha=0.25, lw=0, label="middle half of nodes")
    marker = "o" if len(series.rounds) <= NAMED_MAX else None
    axes.plot(series.rounds, scaled["values"], color=BLUE, lw=2, marker=marker, ms=3.5, label="over all rows")
    axes.set_xlabel("round")
    axes.set_ylabel(series.figure + (" (%)" if factor == 100 else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)
    axes.legend(frameon=False, fontsize=8)


def _draw_pooled(axes: "Axes", figure: str, course: Sequence[tuple[int, float]]) -> None:
    if course:
        factor = 100 if figure in PERCENTAGES else 1
        rounds, values = zip(*course, strict=True)
        axes.plot(rounds, np.multiply(values, factor), color=GREEN, lw=1.5, ls="--", label="pooled")
        axes.legend(frameon=False, fontsize=8)


# Who has what


def _data(run: Run) -> "Figure | None":
    if not run.nodes:
        return None
    if run.plan.data.task == "language-model":
        return _texts(run.nodes)
    return _classes(run) if run.plan.data.task == "classification" else _targets(run.nodes)


def _texts(nodes: Mapping[str, Record]) -> "Figure":
    figure = _figure(10, 3.2)
    axes = figure.subplots()
    where = np.arange(len(nodes))
    axes.bar(where, [node["train"] for node in nodes.values()], width=0.86 if len(nodes) <= 100 else 1.0, color=GREY)
    axes.set_ylabel("training rows")
    _label(axes, "x", list(nodes), "nodes")
    _plain(axes)
    return figure


def _classes(run: Run) -> "Figure":
    """A heat map, nodes across and classes down, the colour a class's share of the node's rows; above it the rows."""
    from matplotlib.ticker import PercentFormatter

    names, counts = _ordered_counts(run)
    figure = _figure(10, 3.6 + min(5.0, 0.22 * counts.shape[1]))
    rows, heat = figure.subplots(2, 1, sharex=True, height_ratios=[1, 2])
    rows.bar(range(len(names)), counts.sum(1), width=0.86 if len(names) <= 100 else 1.0, color=GREY)
    rows.set_ylabel("training rows")
    _plain(rows)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = heat.imshow(shares.T, aspect="auto", cmap="Blues", vmin=0, vmax=shares.max() or 1, interpolation="nearest")
    figure.colorbar(image, ax=heat, label="share of the node's rows", format=PercentFormatter(1.0, decimals=0))
    _label(heat, "x", names, "nodes" if len(names) <= NAMED_MAX else "nodes, sorted by their largest class")
    _label(heat, "y", run.plan.data.classes, "classes")
    return figure


def _ordered_counts(run: Run) -> tuple[list[str], Any]:
    """Names and (nodes, classes) counts. Many nodes are sorted by their largest class: neighbours are alike."""
    names = list(run.nodes)
    counts = np.array([run.nodes[name]["classes"] for name in names], np.int64)
    if len(names) <= NAMED_MAX:
        return names, counts
    order = np.lexsort((-counts.max(1) / np.maximum(counts.sum(1), 1), counts.argmax(1)))
    return [names[index] for index in order], counts[order]


def _targets(nodes: Mapping[str, Record]) -> "Figure":
    figure = _figure(10, 4.4)
    rows, targets = figure.subplots(2, 1, sharex=True)
    where = np.arange(len(nodes))
    rows.bar(where, [node["train"] for node in nodes.values()], width=0.86 if len(nodes) <= 100 else 1.0, color=GREY)
    rows.set_ylabel("training rows")
    means = [number_of(node.get("target_mean")) or 0.0 for node in nodes.values()]
    deviations = [number_of(node.get("target_deviation")) or 0.0 for node in nodes.values()]
    size = 5 if len(nodes) <= NAMED_MAX else 2
    targets.errorbar(where, means, yerr=deviations, fmt="D", ms=size, color=BLUE, ecolor=ORANGE, elinewidth=size / 3)
    targets.set_ylabel("target: mean ± deviation")
    _label(targets, "x", list(nodes), "nodes")
    _plain(rows)
    _plain(targets)
    return figure


# The confusion matrix


def _confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> "Figure":
    from matplotlib.ticker import PercentFormatter

    counts = np.array(matrix, np.int64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(8.0, 3.2 + 0.36 * len(counts))
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the true class", format=PercentFormatter(1.0, decimals=0))
    for row, column in np.argwhere(counts > 0) if len(counts) <= NUMBERED_MAX else ():
        colour = "white" if shares[row, column] > 0.6 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    _label(axes, "x", classes, "predicted")
    _label(axes, "y", classes, "true")
    return figure


# Alone, federated, pooled


def _comparison(comparison: Mapping[str, Any], higher_is_better: bool, personal: bool) -> "Figure":
    figure = _figure(10, 4.2)
    overall, nodes = figure.subplots(1, 2, width_ratios=[1, 2])
    _draw_overall(overall, comparison, personal)
    rows = compared(comparison, higher_is_better)[::-1]
    _draw_nodes(nodes, rows, str(comparison["headline"]))
    nodes.set_title("each node, on its own rows", fontsize=10)
    overall.set_title("on everybody's rows", fontsize=10)
    return figure


def _draw_overall(axes: "Axes", comparison: Mapping[str, Any], personal: bool) -> None:
    figure, totals = str(comparison["headline"]), comparison["all"]
    keys, labels, colours = zip(*(bar for bar in OVERALL if bar[0] in totals), strict=True)
    factor = 100 if figure in PERCENTAGES else 1
    values = [(number_of(totals[key]) or 0.0) * factor for key in keys]
    own = {"federated": "federated,\nown models\non own rows"} if personal else {}
    bars = axes.barh([own.get(label, label) for label in labels], values, color=colours)
    axes.bar_label(bars, [format_figure(figure, totals[key]) for key in keys], padding=3, fontsize=9)
    axes.set_xlim(0, 1.22 * (max(values) or 1))
    axes.set_xlabel(figure + (" (%)" if factor == 100 else ""))
    _plain(axes)


def _draw_nodes(axes: "Axes", rows: Sequence[Versus], figure: str) -> None:
    factor = 100 if figure in PERCENTAGES else 1
    few = len(rows) <= NAMED_MAX
    for name, (colour, marker, size) in MARKS.items():
        values = [np.nan if (value := getattr(row, name)) is None else value * factor for row in rows]
        fill = "none" if few and name == "pooled" else colour
        drawn = axes.plot(
            values, range(len(rows)), ls="", marker=marker, color=colour, markerfacecolor=fill, label=name
        )
        drawn[0].set_markersize(size if few else 2.5)
    axes.set_xlabel(figure + (" (%)" if factor == 100 else ""))
    _label(axes, "y", [row.name for row in rows], "nodes, the largest gain on top")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, -0.32))
    _plain(axes)


# Axes


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#d7d9de", lw=0.6)
    axes.set_axisbelow(True)


def _label(axes: "Axes", which: str, names: Sequence[str], title: str) -> None:
    """Names at the ticks where there is room for them, else numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_label_text(title)
    if len(names) > NAMED_MAX:
        return
    labels = [_drawable(name, index) for index, name in enumerate(names)]
    crowded = which == "x" and sum(map(len, labels)) > 70
    axis.set_ticks(range(len(names)), labels, fontsize=8, parse_math=False)
    if crowded:
        axes.tick_params(axis="x", labelrotation=90)


def _drawable(name: str, index: int) -> str:
    """The name, shortened; its number where the font lacks a character."""
    if not set(map(ord, name)) <= _characters():
        return f"#{index + 1}"
    return name if len(name) <= LETTERS_MAX else name[: LETTERS_MAX - 1] + "…"


@lru_cache(1)
def _characters() -> frozenset[int]:
    """The code points that the default font can draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())
