"""`concord dataset …`: the catalogue."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from concord_server.commands.output import coordinator, show_items, show_record
from concord_server.commands.signing import Key, OnBehalf, signing_key
from concord_shared.commands import Json

__all__ = ["register"]

group = typer.Typer(help="The catalogue: datasets that nodes told of.", no_args_is_help=True)
Organisation = Annotated[str | None, typer.Option(metavar="NAME", help="Of this owner only.")]
Dataset = Annotated[str, typer.Argument(metavar="NODE/DATASET")]
Outputs = Annotated[
    list[str] | None,
    typer.Option("--output", metavar="release|commercial|none", help="What models are for; repeatable."),
]
COLUMNS = ("name", "organisation", "title", "rows", "input", "licence", "updated_at")


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="dataset")


@group.command("list", epilog="**Example**\n\n`concord dataset list --organisation hospital-a`")
def list_all(organisation: Organisation = None, as_json: Json = False) -> None:
    """List datasets: what their owners chose to tell."""
    _show({"organisation": organisation}, as_json)


@group.command(
    epilog="**Examples**\n\n`concord dataset search cardiology --column age --rows-min 300`\n\n"
    "`concord dataset search --purpose research --licence CC-BY-4.0`"
)
def search(
    words: Annotated[list[str] | None, typer.Argument(help="Each is somewhere in a card.")] = None,
    organisation: Organisation = None,
    input: Annotated[str | None, typer.Option("--input", metavar="KIND", help="table, image or text.")] = None,
    licence: Annotated[str | None, typer.Option(metavar="SPDX", help="As the card has it.")] = None,
    purpose: Annotated[str | None, typer.Option(metavar="WORD", help="Allowed by its terms.")] = None,
    rows_min: Annotated[int | None, typer.Option("--rows-min", min=0, help="At least so many rows.")] = None,
    column: Annotated[str | None, typer.Option(metavar="NAME", help="With a column of this name.")] = None,
    as_json: Json = False,
) -> None:
    """Search the catalogue. Upper and lower case are the same."""
    wanted = {
        "q": " ".join(words or ()) or None,
        "organisation": organisation,
        "input": input,
        "licence": licence,
        "purpose": purpose,
        "rows_min": rows_min,
        "column": column,
    }
    _show(wanted, as_json)


@group.command(
    epilog="**Examples**\n\n`concord dataset show ward-3/heart`\n\n`concord dataset show ward-3/heart --croissant`"
)
def show(
    dataset: Dataset,
    croissant: Annotated[bool, typer.Option("--croissant", help="As Croissant JSON-LD.")] = False,
    as_json: Json = False,
) -> None:
    """Show a dataset's card."""
    with coordinator() as api:
        found = api.get(f"/api/v1/datasets/{dataset}{'/croissant' if croissant else ''}")
    if croissant:
        show_record(found, True)
        return
    show_record(found if as_json else {key: value for key, value in found.items() if key != "card"}, as_json)


@group.command(epilog="**Example**\n\n`concord dataset compare ward-a/heart ward-b/heart`")
def compare(
    datasets: Annotated[list[str], typer.Argument(metavar="NODE/DATASET NODE/DATASET…")], as_json: Json = False
) -> None:
    """Lay cards side by side: rows, terms, and columns with their kinds and units; * marks what is not the same."""
    from concord_server.client_catalogue import compared
    from concord_shared.errors import UsageError

    if len(set(datasets)) < 2:
        raise UsageError("expected two datasets or more to compare")
    with coordinator() as api:
        found = compared([api.get(f"/api/v1/datasets/{name}") for name in dict.fromkeys(datasets)])
    show_record(found, as_json, _side_by_side)


@group.command(
    epilog="**Example**\n\n`concord dataset request heart ward-a/heart --purpose research --key keys/organisation.key`"
)
def request(
    study: Annotated[str, typer.Argument(metavar="STUDY")],
    datasets: Annotated[list[str], typer.Argument(metavar="NODE/DATASET…", help="Of one owner.")],
    purposes: Annotated[
        list[str] | None, typer.Option("--purpose", metavar="WORD", help="What for; repeatable.")
    ] = None,
    outputs: Outputs = None,
    days: Annotated[int, typer.Option(min=1, help="How long it is to hold, at most.")] = 365,
    agreement: Annotated[str | None, typer.Option("--id", help="Its id; made up by default.")] = None,
    key: Key = None,
    organisation: OnBehalf = None,
    as_json: Json = False,
) -> None:
    """Ask for access: requests an agreement on the widest terms that the cards allow."""
    from concord_server.client_catalogue import request_access
    from concord_server.client_nouns import told
    from concord_server.commands.agreements import outputs_of, show_agreement

    signer = signing_key(key)
    with coordinator() as api:
        made = request_access(
            api,
            signer,
            study,
            datasets,
            purposes=purposes or (),
            outputs=outputs_of(outputs),
            days=days,
            agreement=agreement,
            organisation=organisation,
        )
    show_record(told(made), as_json, show_agreement)


def _show(wanted: Mapping[str, Any], as_json: bool) -> None:
    from concord_server.client_catalogue import rows_said

    with coordinator() as api:
        found = list(api.pages("/api/v1/datasets", **wanted))
    show_items(found if as_json else [each | {"rows": rows_said(each)} for each in found], COLUMNS, as_json)


def _side_by_side(found: Mapping[str, Any]) -> None:
    from concord_shared.text import printable

    names = found["datasets"]
    rows = [["", *names], *([what, *(said[name] or "-" for name in names)] for what, said in found["fields"].items())]
    rows += [
        [f"{'* ' if name in found['differing'] else ''}column {name}", *(said[each] or "-" for each in names)]
        for name, said in found["columns"].items()
    ]
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")
