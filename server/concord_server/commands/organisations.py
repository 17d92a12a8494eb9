"""`concord org …`."""

import base64
from pathlib import Path
from typing import Annotated

import typer

from concord_server.commands.output import coordinator, show_items, show_record
from concord_shared.commands import Json
from concord_shared.errors import UsageError

__all__ = ["register"]

group = typer.Typer(help="Organisations of the federation, and the keys they sign with.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME")]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="org")


@group.command(epilog="**Example**\n\n`concord org create hospital-a --title 'Hospital A'`")
def create(name: Name, title: Annotated[str, typer.Option()] = "", as_json: Json = False) -> None:
    """Admit an organisation to the federation."""
    with coordinator() as api:
        show_record(api.post("/api/v1/organisations", {"name": name, "title": title}), as_json)


@group.command("list")
def list_all(as_json: Json = False) -> None:
    """List organisations."""
    with coordinator() as api:
        show_items(api.pages("/api/v1/organisations"), ("name", "title", "fingerprint"), as_json)


@group.command()
def show(name: Name, as_json: Json = False) -> None:
    """Show an organisation, with the fingerprint of its key."""
    with coordinator() as api:
        show_record(api.get(f"/api/v1/organisations/{name}"), as_json)


@group.command(epilog="**Example**\n\n`concord org key hospital-a keys/organisation.pub`")
def key(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="organisation.pub of `concord keys init`.")],
    replace: Annotated[bool, typer.Option("--replace", help="In the place of another key.")] = False,
    as_json: Json = False,
) -> None:
    """Register the public key that the organisation signs with. For its own org-admin."""
    body = {"key": _public_key(file), "replace": replace}
    with coordinator() as api:
        show_record(api.put(f"/api/v1/organisations/{name}/key", body), as_json)


def _public_key(file: Path) -> str:
    """The key of a PEM file, as documents write it."""
    try:
        lines = file.read_text("ascii").strip().splitlines()
        if lines[0] != "-----BEGIN PUBLIC KEY-----" or lines[-1] != "-----END PUBLIC KEY-----":
            raise ValueError("not a public key in PEM")
        content = base64.b64decode("".join(lines[1:-1]), validate=True)
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{file}: not the public key of an organisation; make one: concord keys init DIR") from error
    return base64.b64encode(content).decode()
