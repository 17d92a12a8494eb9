"""`concord-node preflights`: who asked whether a plan could run here, and what this node answered."""

from typing import TYPE_CHECKING, Any

import typer

from concord_client.commands.common import Home, at_home, lines, write
from concord_shared.commands import Json, show

if TYPE_CHECKING:
    from concord_shared.evidence.log import Entry

__all__ = ["register"]

WORDS = {"preflight:answer": "answered", "preflight:decline": "declined", "preflight:refuse": "refused"}


def register(app: typer.Typer) -> None:
    app.command("preflights", epilog="**Example**\n\n`concord-node preflights`")(preflights)


def preflights(home: Home = None, as_json: Json = False) -> None:
    """List who asked whether a plan could run here, and what was answered: from this node's own audit log.

    How many of a study's questions are answered in a day, and whether two batches are tried, stands in policy.toml.
    """
    with at_home(home) as (_, store):
        entries = [_told(entry) for entry in store.preflight_entries()]

    def text(_: Any) -> None:
        if not entries:
            write("nobody has asked")
            return
        rows = [("when", "study/question", "by", "plan", "dataset", "what", "not ok")]
        rows += [
            (
                each["at"][:16],
                each["subject"],
                each["by"],
                each["plan"][:12],
                each["dataset"],
                each["what"],
                each["reason"]
                or ", ".join(f"{name} {status}" for name, status in each["checks"].items() if status != "ok"),
            )
            for each in entries
        ]
        lines(rows)

    show({"preflights": entries}, as_json, text)


def _told(entry: "Entry") -> dict[str, Any]:
    detail = entry.detail
    told = {"at": entry.at, "what": WORDS[entry.action], "subject": entry.subject, "checks": detail.get("checks", {})}
    return told | {name: str(detail.get(name, "")) for name in ("by", "plan", "dataset", "reason")}
