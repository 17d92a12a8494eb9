"""`concord-node statistics`: which exact statistics left this node, as its differencing guard remembers them."""

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from concord_client.commands.common import Home, Yes, at_home, confirm, day, write
from concord_shared.commands import Json, new_app, show
from concord_shared.text import printable

__all__ = ["register"]

statistics = new_app("statistics", "Exact statistics that this node answered, and what its guard remembers of them.")


def register(app: typer.Typer) -> None:
    app.add_typer(statistics)


@statistics.command("list", epilog="**Example**\n\n`concord-node statistics list --json`")
def list_answers(home: Home = None, as_json: Json = False) -> None:
    """List the exact statistics that were answered, oldest first. New ones that differ too little are refused."""
    from concord_client.statistics_guard import StatisticsGuard

    with at_home(home) as (_, store):
        found = [asdict(answer) for answer in StatisticsGuard(store).answers()]
    show(found, as_json, _show)


@statistics.command("forget", epilog="**Example**\n\n`concord-node statistics forget patients`")
def forget(
    dataset: Annotated[
        str | None, typer.Argument(metavar="DATASET", help="Of this dataset alone; of all where none is given.")
    ] = None,
    yes: Yes = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Forget what was answered: from then on, new answers can be subtracted from those that left before.

    The audit log keeps that you did.
    """
    from concord_client.statistics_guard import StatisticsGuard

    with at_home(home) as (_, store):
        guard = StatisticsGuard(store)
        count = sum(dataset in (None, answer.dataset) for answer in guard.answers())
        what = f"dataset {dataset}" if dataset else "every dataset"
        sys.stderr.write(
            f"warning: {count} answers over {what} left this node and cannot be taken back. Forgotten, a new question "
            "over a row more or less will be answered, and whoever has both answers knows that row\n"
        )
        if count and not confirm("Forget them?", yes):
            raise typer.Exit(1)
        gone = guard.forget(dataset)
    show({"forgotten": gone}, as_json, lambda value: write(f"forgot {value['forgotten']} answers"))


def _show(found: list[dict[str, Any]]) -> None:
    if not found:
        write("no exact statistics were answered")
    for each in found:
        nodes = f" with {len(each['cohort'])} nodes" if each["cohort"] else ""
        line = f"{day(each['at'])}  {each['dataset']}  run {each['run']}{nodes}: {', '.join(each['columns'])}"
        write(printable(line))
