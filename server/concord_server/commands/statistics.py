"""Statistics over nodes, as tables in a terminal: what a run of such a plan comes to."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from concord_shared.plan.data import Column
from concord_shared.statistics import columns_by_name

__all__ = ["show_statistics"]

WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""
BARS = "▁▂▃▄▅▆▇█"
PAIRS_SHOWN = 10
NOT_TOLD = "·"


def show_statistics(found: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """found: what the last stage gave. plan: its document, for the names of categories."""
    console = Console(width=None if Console().is_terminal else WIDTH)
    columns: Mapping[str, Mapping[str, Any]] = found["columns"]
    asked = columns_by_name(plan["data"])
    numbers = {name: about for name, about in columns.items() if about["kind"] == "number"}
    console.print(f"{found['rows']} rows of all nodes together")
    if numbers:
        console.print(_numbers(numbers))
    for name, about in columns.items():
        if about["kind"] == "category":
            console.print(_heading(name, about))
            console.print(_categories(about, asked[name]))
    if "correlation" in found:
        console.print(_pairs(found["correlation"]))
    minimum = plan["statistics"]["minimum_count"]
    if minimum > 1 and "dp" not in plan["privacy"]:
        console.print(
            f"{NOT_TOLD} stands for a count below {minimum}, or one that would give such a count away; min and max are "
            f"the {minimum} values from each end",
            style="dim",
            soft_wrap=True,
        )


def _numbers(numbers: Mapping[str, Mapping[str, Any]]) -> Table:
    levels = next(iter(numbers.values())).get("quantiles", {})
    shown = [
        (heading, key)
        for heading, key in (
            ("deviation", "scale"),
            ("min", "minimum"),
            ("max", "maximum"),
            ("between nodes", "between"),
        )
        if any(key in about for about in numbers.values())
    ]
    drift = any("drift" in about for about in numbers.values())
    histogram = any("histogram" in about for about in numbers.values())
    table = Table(box=None, pad_edge=False)
    headings = ["column", "values", "missing", "outside", "mean", *(heading for heading, _ in shown[:1])]
    headings += [f"q{float(level):g}" for level in levels] + [heading for heading, _ in shown[1:]]
    headings += ["drift"] * drift + ["histogram"] * histogram
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("column", "histogram") else "right")
    for name, about in numbers.items():
        cells = [_count(about[key]) for key in ("count", "missing", "outside")] + [_real(about["mean"])]
        cells += [_real(about.get(key)) for _, key in shown[:1]]
        cells += [_real(value) for value in about.get("quantiles", {}).values()]
        cells += [_real(about.get(key)) for _, key in shown[1:]]
        cells += [_real(about.get("drift"))] * drift
        cells += [_bars(about.get("histogram", []))] * histogram
        table.add_row(name, *cells)
    return table


def _heading(name: str, about: Mapping[str, Any]) -> str:
    drift = f", drift {_real(about['drift'])}" if about.get("drift") is not None else ""
    return f"{name}: {_count(about['missing'])} missing, {_count(about['unknown'])} of no known category{drift}"


def _categories(about: Mapping[str, Any], column: Column) -> Table:
    """Of hashed words only the bins that are told."""
    table = Table(box=None, pad_edge=False)
    table.add_column("category")
    table.add_column("rows", justify="right")
    counts = list(zip(column.words, about["counts"], strict=True))
    shown = [(word, count) for word, count in counts if count or not column.bins]
    for word, count in shown:
        table.add_row(word, _count(count))
    if len(shown) < len(counts):
        table.add_row(f"… {len(counts) - len(shown)} bins of few rows or none", NOT_TOLD)
    return table


def _pairs(correlation: Mapping[str, Any]) -> Table:
    """The pairs of columns that go most together."""
    names, values = correlation["columns"], correlation["values"]
    pairs = [(values[a][b], names[a], names[b]) for a in range(len(names)) for b in range(a + 1, len(names))]
    known = sorted((pair for pair in pairs if pair[0] is not None), key=lambda pair: -abs(pair[0]))
    table = Table(title="correlation, the strongest first", title_justify="left", box=None, pad_edge=False)
    table.add_column("columns")
    table.add_column("r", justify="right")
    for value, first, second in known[:PAIRS_SHOWN]:
        table.add_row(f"{first} · {second}", f"{value:+.3f}")
    if len(pairs) > PAIRS_SHOWN:
        table.add_row(f"… {len(pairs) - PAIRS_SHOWN} more pairs", "")
    return table


def _count(value: int | None) -> str:
    return NOT_TOLD if value is None else str(value)


def _real(value: float | None) -> str:
    return NOT_TOLD if value is None else f"{value:.4g}"


def _bars(cells: Sequence[int | None]) -> str:
    most = max((cell for cell in cells if cell is not None), default=0) or 1
    return "".join(NOT_TOLD if cell is None else BARS[min(7, cell * 8 // most)] if cell else " " for cell in cells)
