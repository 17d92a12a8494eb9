"""`concord plans`: what comes with concord."""

from collections.abc import Sequence
from importlib import resources
from typing import Any

from concord_shared.models.registry import MODELS
from concord_shared.plan import load_plan, shipped_plans

__all__ = ["list_plans", "one_plan", "show_plans"]

WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""


def list_plans() -> list[dict[str, Any]]:
    """One entry a shipped plan. `needs` names an extra or a wheel that its model is built with; nothing is imported."""
    return [_entry(name) for name in shipped_plans()]


def one_plan(name: str) -> dict[str, Any]:
    loaded = load_plan(name)
    shipped = resources.files("concord_shared") / "plans" / f"{name}.toml"
    text = shipped.read_text("utf-8") if shipped.is_file() else ""
    return _entry(name) | {"text": text, "document": loaded.plan.document()}


def show_plans(plans: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("plan", "family", "model", "task", "data", "target", "needs"):
        table.add_column(heading)
    for plan in plans:
        table.add_row(
            plan["name"],
            plan["family"],
            plan["model"],
            plan["task"],
            plan["data"],
            plan["target"],
            ", ".join(plan["needs"]),
        )
    console = Console(width=None if Console().is_terminal else WIDTH)
    console.print(table)


def _entry(name: str) -> dict[str, Any]:
    loaded = load_plan(name)
    plan, about = loaded.plan, loaded.about
    info = MODELS.get(plan.model.name)
    return {
        "name": plan.name,
        "title": about.title,
        "title_zh": about.title_zh,
        "family": about.family,
        "model": plan.model.name,
        "task": plan.data.task,
        "data": about.data,
        "target": about.target,
        "needs": [*about.needs, *(info.needs if info else ())],
        "plan_digest": plan.digest,
    }
