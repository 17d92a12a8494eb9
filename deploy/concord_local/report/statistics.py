"""report.html of a run that trained no model: what all nodes' rows are like, together."""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from concord_shared.plan.schema import Column

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
    asked = [Column.model_validate_json(json.dumps(each)) for each in plan["data"]["columns"]]
    words: dict[str, Any] = {column.name: column.words for column in asked}
    words[plan["data"]["target"]] = plan["data"]["classes"]
    columns: Mapping[str, Any] = summary["statistics"]["columns"]
    return environment.get_template("statistics.html.j2").render(
        plan=plan,
        summary=summary,
        found=summary["statistics"],
        numbers={name: about for name, about in columns.items() if about["kind"] == "number"},
        categories={name: about for name, about in columns.items() if about["kind"] == "category"},
        words=words,
        records=records,
        lost=sorted({name for record in records for name in (*record["failures"], *record["silent"])}),
    )
