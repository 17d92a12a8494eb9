"""report.html of a run that trained no model: what all nodes' rows are like, together."""

from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from concord_shared.plan.data import Column
from concord_shared.statistics import columns_by_name

__all__ = ["render_statistics"]


def render_statistics(plan: Mapping[str, Any], summary: Mapping[str, Any], records: list[Mapping[str, Any]]) -> str:
    """The page. Whatever comes from a file is escaped by the template."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    folder = files("concord_local.report")
    sources = {name: (folder / name).read_text("utf-8") for name in ("statistics.html.j2", "report.css")}
    environment = Environment(
        loader=DictLoader(sources), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["real"] = lambda value: "·" if value is None else f"{value:.4g}"
    environment.filters["cell"] = lambda value: "·" if value is None else str(value)
    asked = columns_by_name(plan["data"])
    columns: Mapping[str, Any] = summary["statistics"]["columns"]
    return environment.get_template("statistics.html.j2").render(
        plan=plan,
        summary=summary,
        found=summary["statistics"],
        numbers={name: about for name, about in columns.items() if about["kind"] == "number"},
        categories={name: about for name, about in columns.items() if about["kind"] == "category"},
        bars={name: list(_bars(asked[name], about)) for name, about in columns.items()},
        records=records,
        lost=sorted({name for record in records for name in (*record["failures"], *record["silent"])}),
    )


def _bars(column: Column, about: Mapping[str, Any]) -> Iterator[tuple[str, int | None, float]]:
    """What each bar of a column stands for, how many rows, and how long it is in percent; of hashed words only bins
    that are told.
    """
    counts: list[int | None] = about.get("counts") or about.get("histogram") or []
    most = max((count or 0 for count in counts), default=0) or 1
    low, high = column.range or (0.0, 0.0)
    edges = [low + (high - low) * place / len(counts) for place in range(len(counts) + 1)] if counts else []
    for place, count in enumerate(counts):
        if column.bins and not count:
            continue
        label = column.words[place] if column.words else f"{edges[place]:.4g} – {edges[place + 1]:.4g}"
        yield label, count, 100 * (count or 0) / most
