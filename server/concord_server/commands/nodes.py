"""`concord invite`, `concord invitation …` and `concord node …`."""

import sys
from typing import Annotated, Any

import typer

from concord_server.commands.output import coordinator, show_items, show_record
from concord_shared.commands import Json

__all__ = ["register"]

nodes = typer.Typer(help="Nodes of the federation.", no_args_is_help=True)
invitations = typer.Typer(help="Invitations that were made.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NODE")]
Why = Annotated[str, typer.Option("--reason", help="For the audit log.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="**Example**\n\n`concord invite ward-3 --organisation hospital-a --hours 4`")(invite)
    app.add_typer(invitations, name="invitation")
    app.add_typer(nodes, name="node")


def invite(
    node: Name,
    organisation: Annotated[str, typer.Option(metavar="NAME", help="The organisation that the node belongs to.")],
    hours: Annotated[int, typer.Option(min=1, max=24, help="How long the invitation holds.")] = 24,
    as_json: Json = False,
) -> None:
    """Invite a node: prints the one line that its owner needs. It admits once; hand it over where others can't read."""
    body = {"node": node, "organisation": organisation, "hours": hours}
    with coordinator() as api:
        show_record(api.post("/api/v1/invitations", body), as_json, _show_line)


@invitations.command("list")
def list_invitations(as_json: Json = False) -> None:
    """List invitations of the organisations that you administer."""
    columns = ("id", "node", "organisation", "created_by", "expires_at", "used_at")
    with coordinator() as api:
        show_items(api.pages("/api/v1/invitations"), columns, as_json)


@invitations.command("withdraw")
def withdraw_invitation(
    invitation: Annotated[str, typer.Argument(metavar="ID", help="From `concord invitation list`.")],
    as_json: Json = False,
) -> None:
    """Withdraw an invitation that was not used."""
    with coordinator() as api:
        show_record(api.delete(f"/api/v1/invitations/{invitation}"), as_json)


@nodes.command("list")
def list_nodes(
    organisation: Annotated[str | None, typer.Option(metavar="NAME")] = None,
    state: Annotated[str | None, typer.Option(help="enrolled, active, suspended or revoked.")] = None,
    as_json: Json = False,
) -> None:
    """List nodes."""
    columns = ("name", "organisation", "state", "last_seen_at", "certificate_not_after", "fingerprint")
    with coordinator() as api:
        show_items(api.pages("/api/v1/nodes", organisation=organisation, state=state), columns, as_json)


@nodes.command()
def show(node: Name, as_json: Json = False) -> None:
    """Show a node, with the fingerprint to compare before it is activated."""
    with coordinator() as api:
        show_record(api.get(f"/api/v1/nodes/{node}"), as_json)


@nodes.command(epilog="**Example**\n\n`concord node activate ward-3 --fingerprint 3f2a…` as its owner read it to you")
def activate(
    node: Name,
    fingerprint: Annotated[str, typer.Option(help="Of the node's identity key, as its owner read it to you.")],
    as_json: Json = False,
) -> None:
    """Admit a node that enrolled, or one that was suspended."""
    with coordinator() as api:
        show_record(api.post(f"/api/v1/nodes/{node}/activate", {"fingerprint": fingerprint}), as_json)


@nodes.command()
def suspend(node: Name, reason: Why = "", as_json: Json = False) -> None:
    """Take a node out of all work, until it is activated again."""
    with coordinator() as api:
        show_record(api.post(f"/api/v1/nodes/{node}/suspend", {"reason": reason}), as_json)


@nodes.command()
def revoke(node: Name, reason: Why = "", as_json: Json = False) -> None:
    """End a node's membership, at once; it can only come back by a new invitation."""
    with coordinator() as api:
        show_record(api.post(f"/api/v1/nodes/{node}/revoke", {"reason": reason}), as_json)


def _show_line(made: dict[str, Any]) -> None:
    sys.stdout.write(f"concord-node enrol '{made['line']}'\n")
