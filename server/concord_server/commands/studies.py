"""`concord study …`."""

from typing import Annotated, Any

import typer

from concord_server.commands.output import coordinator, show_items, show_record
from concord_server.commands.signing import Key, OnBehalf, signing_key
from concord_shared.commands import Json

__all__ = ["register"]

group = typer.Typer(help="Studies: a purpose, and the organisations that pursue it.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="STUDY", help="Its id: a-z, 0-9 and -.")]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="study")


@group.command(
    epilog="**Example**\n\n`concord study create heart --title 'Heart disease' --purpose 'Who is at risk?' "
    "--members hospital-a,hospital-b --key keys/organisation.key`"
)
def create(
    study: Id,
    title: Annotated[str, typer.Option(help="One line.")],
    purpose: Annotated[str, typer.Option(help="What the data are used for; owners decide by it.")],
    members: Annotated[
        str, typer.Option(metavar="A,B", help="Organisations that may see it and start runs, besides your own.")
    ] = "",
    key: Key = None,
    organisation: OnBehalf = None,
    as_json: Json = False,
) -> None:
    """Create a study, signed by your organisation."""
    from concord_server.client_nouns import create_study

    names = tuple(name.strip() for name in members.split(",") if name.strip())
    signer = signing_key(key)
    with coordinator() as api:
        made = create_study(api, signer, study, title=title, purpose=purpose, members=names, organisation=organisation)
    show_record(_told(made, as_json), as_json)


@group.command("list")
def list_all(as_json: Json = False) -> None:
    """List studies of your organisation, and those that asked for its datasets."""
    with coordinator() as api:
        show_items(api.pages("/api/v1/studies"), ("study", "title", "organisation", "created_at"), as_json)


@group.command()
def show(study: Id, as_json: Json = False) -> None:
    """Show a study, and the datasets that serve it."""
    with coordinator() as api:
        found = api.get(f"/api/v1/studies/{study}")
        found["datasets"] = [each["name"] for each in api.get(f"/api/v1/studies/{study}/participants")["items"]]
    show_record(_told(found, as_json), as_json)


@group.command(
    epilog="**Examples**\n\n`concord study preflight heart --plan heart-disease --key keys/organisation.key`\n\n"
    "`concord study preflight heart --plan plan.toml --nodes ward-a,ward-b/heart --json`"
)
def preflight(
    study: Id,
    plan: Annotated[str, typer.Option(metavar="PLAN", help="A TOML file, or a name from `concord plans`.")],
    nodes: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="Who is asked; NODE/DATASET where a node has several. Default: all that agreed."
        ),
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the plan; repeatable.")
    ] = None,
    wait: Annotated[
        int, typer.Option("--wait", min=5, max=3600, help="Seconds; who has not answered then is no go.")
    ] = 120,
    key: Key = None,
    organisation: OnBehalf = None,
    as_json: Json = False,
) -> None:
    """Ask each node whether a run of a plan could begin there: go or no go, and who does what about it.

    Submits the plan to the study if need be. Nothing of the data leaves the nodes. Exit code 1 unless all are go.
    """
    from concord_server.client_nouns import ask_preflight
    from concord_server.commands.preflights import follow, show_matrix
    from concord_shared.plan import load_plan

    loaded, signer = load_plan(plan, overrides or ()).plan, signing_key(key)
    names = tuple(name.strip() for name in nodes.split(",") if name.strip())
    with coordinator() as api:
        asked = ask_preflight(api, signer, study, loaded, nodes=names, wait_s=wait, organisation=organisation)
        found = follow(api, asked, wait)
    show_record(found, as_json, show_matrix)
    if not found["go"]:
        raise typer.Exit(1)


def _told(found: dict[str, Any], as_json: bool) -> dict[str, Any]:
    """The signed document is for programs."""
    return found if as_json else {key: value for key, value in found.items() if key != "document"}
