"""`concord dataset …`."""

from typing import Annotated

import typer

from concord_server.commands.output import coordinator, show_items, show_record
from concord_shared.commands import Json

__all__ = ["register"]

group = typer.Typer(help="Datasets that nodes told of.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="dataset")


@group.command("list", epilog="**Example**\n\n`concord dataset list --organisation hospital-a`")
def list_all(
    organisation: Annotated[str | None, typer.Option(metavar="NAME", help="Of this owner only.")] = None,
    as_json: Json = False,
) -> None:
    """List datasets: what their owners chose to tell."""
    columns = ("name", "organisation", "title", "rows", "input", "licence", "updated_at")
    with coordinator() as api:
        show_items(api.pages("/api/v1/datasets", organisation=organisation), columns, as_json)


@group.command(epilog="**Example**\n\n`concord dataset show ward-3/heart`")
def show(
    dataset: Annotated[str, typer.Argument(metavar="NODE/DATASET")],
    as_json: Json = False,
) -> None:
    """Show a dataset's card."""
    with coordinator() as api:
        found = api.get(f"/api/v1/datasets/{dataset}")
    show_record(found if as_json else {key: value for key, value in found.items() if key != "card"}, as_json)
