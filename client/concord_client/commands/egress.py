"""`concord-node egress`: everything that left this machine."""

import datetime
from typing import Annotated, Any

import typer

from concord_client.commands.common import Home, at_home, lines, write
from concord_shared.commands import Json, show

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command("egress", epilog="**Example**\n\n`concord-node egress --limit 20`")(egress)


def egress(
    limit: Annotated[int, typer.Option(min=0, help="How many of the last entries; 0 for all.")] = 50,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List what left: when, to whom, what, how many bytes, and their SHA-256. Written before it left."""
    with at_home(home) as (_, store):
        found = store.egress(limit or None)
    entries = [
        {
            "at": datetime.datetime.fromtimestamp(each.at, datetime.UTC).isoformat(timespec="milliseconds"),
            "to": each.to,
            "kind": each.kind,
            "subject": each.subject,
            "bytes": each.bytes,
            "sha256": each.sha256,
        }
        for each in found
    ]

    def text(_: Any) -> None:
        if not entries:
            write("nothing has left this machine")
            return
        rows = [tuple(entries[0])]
        rows += [tuple(str(item)[:16] if key == "sha256" else str(item) for key, item in e.items()) for e in entries]
        lines(rows)

    show({"egress": entries}, as_json, text)
