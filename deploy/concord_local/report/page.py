"""report.html: one file that asks for nothing else, in English and Chinese, without a script."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from concord_local.report.charts import LineChart, Scale, line_chart, participation, scale_of
from concord_local.report.figures import (
    PERCENTAGES,
    NodeFigures,
    Versus,
    compared,
    format_bytes,
    format_count,
    format_figure,
    format_gain,
    format_seconds,
    node_figures,
    number_of,
    pooled_course,
    series_of,
    tally,
    wilson_interval,
)
from concord_local.report.reading import Record, Run
from concord_local.report.words import FIGURES, REASONS, STEPS, Words, own_model_in_words, plan_in_words
from concord_shared.guarantee import guarantee_of

__all__ = ["render"]

ROWS_SHOWN = 20
EVENTS_SHOWN = 25
CELLS_MAX = 1000
CLASSES_MAX = 20
REASON_LETTERS = 180
NAME_LETTERS = 60


def render(run: Run, plots: Mapping[str, bytes]) -> str:
    """The page. Whatever comes from a file is escaped by the template."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    folder = files("concord_local.report")
    sources = {name: (folder / name).read_text("utf-8") for name in ("report.html.j2", "report.css")}
    environment = Environment(
        loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"bytes": format_bytes, "seconds": format_seconds, "count": format_count, "short": _short}
    environment.globals |= {
        "figure": format_figure,
        "gain": format_gain,
        "PERCENTAGES": PERCENTAGES,
        "FIGURES": {name: (name, name) for name in run.plan.data.scores} | dict(FIGURES),
        "STEPS": STEPS,
        "REASONS": REASONS,
    }
    return environment.get_template("report.html.j2").render(_context(run, plots))


def _context(run: Run, plots: Mapping[str, bytes]) -> dict[str, Any]:
    nodes = node_figures(run)
    return {
        "run": run,
        "plan": run.plan,
        "summary": run.summary,
        "environment": run.environment,
        "told": plan_in_words(run),
        "own_model": own_model_in_words(run.plan),
        "guarantee": guarantee_of(run.plan),
        "nodes": nodes,
        "worst": next((node for node in nodes if node.worst), None),
        "overall": number_of(run.metrics.get(run.headline)),
        "rows_evaluated": run.metrics.get("rows", 0),
        "shown": ROWS_SHOWN,
        "node_scale": _node_scale(run, nodes),
        "others": _beside_headline(run, (*run.plan.data.scores, *FIGURES)),
        "beside": _beside_headline(run, ("f1_macro", "auc", "mae", "r2", "loss")),
        "interval": _interval(run),
        "train_rows": sum(node.train_rows for node in nodes),
        "curves": _curves(run),
        "answer": _answer(run) if run.comparison else None,
        "confusion": _confusion(run) if run.metrics.get("confusion") else None,
        "holdings": _holdings(run),
        "standing": _standing(run),
        "coefficients": _coefficients(run.coefficients, run.plan.data.classes) if run.coefficients else None,
        "bars": participation(run.trainings),
        "events": _events(run.records),
        "images": {name: base64.b64encode(png).decode("ascii") for name, png in plots.items()},
    }


def _beside_headline(run: Run, wanted: Iterable[str]) -> list[str]:
    """Those that the run has, each once."""
    return [name for name in dict.fromkeys(wanted) if name in run.metrics and name != run.headline]


def _interval(run: Run) -> tuple[float, float] | None:
    value, rows = number_of(run.metrics.get(run.headline)), run.metrics.get("rows")
    return wilson_interval(value, rows) if run.counts_rows and value is not None and rows else None


def _node_scale(run: Run, nodes: Sequence[NodeFigures]) -> Scale:
    values = [value for node in nodes if node.value is not None for value in (node.value, *(node.interval or ()))]
    if run.higher_is_better:
        return scale_of(min(values, default=0.0), 1.0)
    return scale_of(0.0, max(values, default=1.0))


def _curves(run: Run) -> list[tuple[str, LineChart, str, str]]:
    """(figure, drawing, first value, last value) of the headline and the loss, where they have a course. Of nodes' own
    models the level of models trained alone is left out: it is of everybody's rows, the line of each one's own.
    """
    totals = run.comparison["all"] if run.comparison else {}
    known = (("pooled", "pooled"),) if run.personal else (("pooled", "pooled"), ("alone", "alone_mean"))
    levels = {name: number_of(totals.get(key)) for name, key in known}
    drawn = []
    for figure in run.curves:
        series = series_of(run, figure)
        course = pooled_course(run, figure)
        chart = line_chart(series, levels if figure == run.headline and not course else {}, course)
        if chart:
            ends = (format_figure(figure, series.values[0]), format_figure(figure, series.values[-1]))
            drawn.append((figure, chart, *ends))
    return drawn


@dataclass(frozen=True)
class Answer:
    """Alone, federated or pooled: over all, and for each node. gain: over all, federated over alone; None where it is
    not known, or of models that were not asked of the same rows.
    """

    figure: str
    totals: Sequence[tuple[str, Words, Any]]
    widest: float
    rows: Sequence[Versus]
    scale: Scale
    tally: tuple[int, int, int]
    gain: float | None


TOTALS: Sequence[tuple[str, str, Words]] = (
    ("alone_mean", "alone", ("Alone, mean of the nodes", "各自单独训练：平均")),
    ("alone_best", "alone", ("Alone, the best node", "各自单独训练：最好的节点")),
    ("federated", "federated", ("Federated: this run", "联邦训练：本次运行")),
    ("pooled", "pooled", ("Pooled: all rows in one place", "集中训练：全部数据放在一处")),
    ("popularity", "popularity", ("By popularity alone, without a model", "仅凭流行度，不用模型")),
)


FEDERATED_OWN: Words = (
    "Federated: each node’s own model, on its own rows",
    "联邦训练：各节点自己的模型，在各自的测试行上",
)


def _answer(run: Run) -> Answer:
    assert run.comparison is not None
    totals = run.comparison["all"]
    rows = compared(run.comparison, run.higher_is_better)
    values = [value for row in rows for value in (row.alone, row.federated, row.pooled) if value is not None]
    federated, alone = number_of(totals.get("federated")), number_of(totals.get("alone_mean"))
    sign = 1 if run.higher_is_better else -1
    known = [number_of(totals.get(key)) or 0.0 for key, _, _ in TOTALS]
    return Answer(
        figure=str(run.comparison["headline"]),
        totals=[
            (kind, FEDERATED_OWN if run.personal and key == "federated" else words, totals[key])
            for key, kind, words in TOTALS
            if key in totals
        ],
        widest=1.0 if run.higher_is_better else max(known) or 1.0,
        rows=rows,
        scale=scale_of(min(values, default=0.0), max(values, default=1.0)),
        tally=tally(rows),
        gain=None if federated is None or alone is None or run.personal else sign * (federated - alone),
    )


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix with its margins; `cells` holds (count, share of the true class)."""

    classes: Sequence[str]
    cells: Sequence[Sequence[tuple[int, float]]]
    recall: Sequence[float | None]
    precision: Sequence[float | None]
    confused: tuple[str, str, int] | None
    small: bool


def _confusion(run: Run) -> Matrix:
    matrix, classes = run.metrics["confusion"], run.plan.data.classes
    size = range(len(matrix))
    columns = [sum(row[index] for row in matrix) for index in size]
    wrong = [(matrix[true][guess], true, guess) for true in size for guess in size if true != guess]
    worst = max(wrong, key=lambda item: item[0], default=(0, 0, 0))
    return Matrix(
        classes,
        [[(count, count / max(1, sum(row))) for count in row] for row in matrix],
        [matrix[index][index] / sum(matrix[index]) if sum(matrix[index]) else None for index in size],
        [matrix[index][index] / columns[index] if columns[index] else None for index in size],
        (classes[worst[1]], classes[worst[2]], worst[0]) if worst[0] else None,
        small=len(matrix) <= CLASSES_MAX,
    )


@dataclass(frozen=True)
class Holding:
    """What one node has. `cells`: (rows, share of the node's rows) by class."""

    name: str
    train_rows: int
    share: float
    cells: Sequence[tuple[int, float]]
    mean: float | None
    deviation: float | None


def _holdings(run: Run) -> dict[str, Any]:
    most = max((int(node.get("train", 0)) for node in run.nodes.values()), default=1) or 1
    found = [_holding(name, node, most) for name, node in run.nodes.items()]
    ends = [item.mean + sign * (item.deviation or 0) for item in found if item.mean is not None for sign in (-1, 1)]
    lacking = sum(any(count == 0 for count, _ in item.cells) for item in found)
    return {
        "rows": found,
        "table": max(1, len(run.plan.data.classes)) * len(found) <= CELLS_MAX
        and len(run.plan.data.classes) <= CLASSES_MAX
        and len(found) <= 2 * ROWS_SHOWN,
        "scale": scale_of(min(ends, default=0.0), max(ends, default=1.0)),
        "lacking": lacking,
        "fewest": min((item.train_rows for item in found), default=0),
        "most": most,
    }


def _holding(name: str, node: Record, most: int) -> Holding:
    counts = [int(count) for count in node.get("classes", ())]
    rows = int(node.get("train", 0))
    cells = [(count, count / max(1, sum(counts))) for count in counts]
    mean, deviation = (number_of(node.get(key)) for key in ("target_mean", "target_deviation"))
    return Holding(name, rows, rows / most, cells, mean, deviation)


def _standing(run: Run) -> list[tuple[str, Record]]:
    """Of a robust run, as many nodes as there is room for, those that stood out most often first."""
    nodes: Mapping[str, Record] = (run.summary.get("robust") or {}).get("nodes", {})
    return sorted(nodes.items(), key=lambda item: (-item[1]["flagged"], item[0]))[: 2 * ROWS_SHOWN]


@dataclass(frozen=True)
class Coefficients:
    """A linear model as a table: a row a feature, a column an output. Two classes: also their difference."""

    outputs: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[float | None, float | None]]]]
    reach: float
    with_errors: bool
    log_odds: bool


def _coefficients(rows: Sequence[Record], classes: Sequence[str]) -> Coefficients:
    outputs = list(dict.fromkeys(str(row["output"]) for row in rows))
    table: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    for row in rows:
        pair = (number_of(row["coefficient"]), number_of(row.get("standard_error")))
        table.setdefault(str(row["feature"]), {})[str(row["output"])] = pair
    lines = [(feature, [cells.get(output, (None, None)) for output in outputs]) for feature, cells in table.items()]
    log_odds = len(outputs) == 2 == len(classes)
    if log_odds:
        lines = [(feature, [*cells, (_difference(cells), None)]) for feature, cells in lines]
    ends = [
        abs(value) + 1.96 * (error or 0)
        for feature, cells in lines
        for value, error in cells[-1:]
        if value is not None and feature != "(intercept)"
    ]
    errors = any(error is not None for _, cells in lines for _, error in cells)
    return Coefficients(outputs, lines, max(ends, default=1.0) or 1.0, errors, log_odds)


def _difference(cells: Sequence[tuple[float | None, float | None]]) -> float | None:
    (first, _), (second, _) = cells
    return None if first is None or second is None else second - first


@dataclass(frozen=True)
class Event:
    """One step that did not go as planned."""

    kind: str
    number: int
    aborted: str
    failures: Sequence[tuple[str, Sequence[str]]]
    silent: Sequence[str]


def _events(records: Sequence[Record]) -> dict[str, Any]:
    found = [_event(record) for record in records if any(record.get(key) for key in ("aborted", "failures", "silent"))]
    return {
        "all": found,
        "shown": _most_telling(found),
        "aborted": sum(bool(event.aborted) for event in found),
        "failures": sum(len(names) for event in found for _, names in event.failures),
        "silent": sum(len(event.silent) for event in found),
        "scaled_down": sum(int(record.get("scaled_down", 0)) for record in records),
        "rows_above_cap": max((int(record.get("rows_above_cap", 0)) for record in records), default=0),
    }


def _most_telling(events: Sequence[Event]) -> list[Event]:
    """As many as there is room for, in their order; aborted rounds go before others."""
    kept = sorted(range(len(events)), key=lambda index: not events[index].aborted)[:EVENTS_SHOWN]
    return [events[index] for index in sorted(kept)]


def _event(record: Record) -> Event:
    by_reason: dict[str, list[str]] = {}
    for name, reason in (record.get("failures") or {}).items():
        by_reason.setdefault(_shortened(str(reason)), []).append(name)
    return Event(
        str(record.get("kind", "")),
        int(record.get("round", 0)),
        _shortened(str(record.get("aborted") or "")),
        [*by_reason.items()],
        list(record.get("silent", ())),
    )


def _short(name: str) -> str:
    return _shortened(name, NAME_LETTERS)


def _shortened(text: str, letters: int = REASON_LETTERS) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
