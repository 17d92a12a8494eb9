"""`concord server …`: on the coordinator's own machine, over its directory."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from concord_server.commands.output import show_record
from concord_shared.commands import Json, show
from concord_shared.errors import UnreachableError, UsageError

__all__ = ["register"]

group = typer.Typer(help="Make and run a coordinator.", no_args_is_help=True)
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="The coordinator's directory.")]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="server")


@group.command(
    epilog="**Example**\n\n`concord server init /srv/concord --federation hearts --public-host fl.example.org`"
)
def init(
    directory: Directory,
    federation: Annotated[str, typer.Option(help="The federation's name: a-z, 0-9 and -.")],
    public_host: Annotated[str, typer.Option(help="The name or address that nodes and people reach.")],
    sans: Annotated[
        list[str] | None, typer.Option("--san", help="A further name or address of the certificate; repeatable.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    control_port: Annotated[int, typer.Option(help="For people and nodes; 0 for a free one.")] = 8443,
    superlink_port: Annotated[int, typer.Option(help="For rounds; 0 for a free one.")] = 9443,
    database_url: Annotated[
        str, typer.Option(metavar="URL", help="postgresql://USER@HOST/NAME; default SQLite in DIR.")
    ] = "",
    organisation: Annotated[
        str | None, typer.Option(help="The first organisation, which the administrator belongs to.")
    ] = None,
    admin: Annotated[str, typer.Option(help="The first administrator's name.")] = "admin",
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the token there, for you alone, and do not print it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a coordinator: keys, certificates, settings, database, and the first administrator's token."""
    from dataclasses import asdict

    from concord_server.initialise import initialise

    settings: dict[str, Any] = {
        "federation": federation,
        "public_host": public_host,
        "sans": sans or [],
        "host": host,
        "control_port": control_port,
        "superlink_port": superlink_port,
        "database_url": database_url,
    }
    if token_file is None:
        show(asdict(initialise(directory, settings, admin, organisation)), as_json, _show_made)
        return
    with _secret_file(token_file) as file:
        made = asdict(initialise(directory, settings, admin, organisation))
        file.write(made["token"] + "\n")
    show(made | {"token": f"in {token_file}"}, as_json, _show_made)


@group.command(epilog="**Examples**\n\n`concord server up /srv/concord`\n\n`concord server up DIR --only control`")
def up(
    directory: Directory,
    only: Annotated[
        list[str] | None, typer.Option(help="control, superlink or worker; repeatable. Default: all.")
    ] = None,
) -> None:
    """Run the coordinator until Ctrl-C or SIGTERM; what dies is started again."""
    from concord_server.supervisor import CHILDREN, supervise

    unknown = set(only or ()) - set(CHILDREN)
    if unknown:
        raise UsageError(f"--only: expected {', '.join(CHILDREN)}, got {', '.join(sorted(unknown))}")
    supervise(directory, only or ())


@group.command(epilog="**Example**\n\n`concord server status /srv/concord --wait 30`")
def status(
    directory: Directory,
    wait_s: Annotated[float, typer.Option("--wait", metavar="SECONDS", help="Wait until it is healthy.")] = 0,
    as_json: Json = False,
) -> None:
    """Say what runs, on which ports, and until when the certificates hold. Exit code 1 where it is not healthy."""
    from concord_server.status import status as look

    found = look(directory, wait_s)
    show_record(found, as_json)
    if not found["running"]:
        raise UnreachableError(f"the coordinator is not up; start it: concord server up {directory}")
    if not found["healthy"]:
        raise UnreachableError("the coordinator is up, and not all of it answers; its log says why")


@group.command(epilog="**Example**\n\n`concord server upgrade /srv/concord`")
def upgrade(directory: Directory, as_json: Json = False) -> None:
    """Bring the database to this version's schema. Make a backup first."""
    from concord_server.settings import Home

    home = Home.open(directory)
    home.database().upgrade()
    home.database().check()
    show_record({"directory": str(home.path), "schema": "up to date"}, as_json)


@group.command(
    "renew-membership", epilog="**Example**\n\n`concord server renew-membership DIR --root-key /media/usb/root-key.pem`"
)
def renew_membership(
    directory: Directory,
    root_key: Annotated[Path, typer.Option(metavar="FILE", help="The root key, from where it is kept.")],
    as_json: Json = False,
) -> None:
    """Make a new membership key, at the latest every 90 days. Nodes are told; a running coordinator takes it up."""
    from concord_server.renewal import renew_membership as renew

    show_record(renew(directory, root_key), as_json)


@contextmanager
def _secret_file(path: Path) -> Iterator[TextIO]:
    """A new file that only its owner may read; taken away again where what it is for fails."""
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
    except OSError as error:
        raise UsageError(f"cannot make {path}: {error.strerror}; name a file that does not exist yet") from error
    with file:
        try:
            yield file
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _show_made(made: dict[str, Any]) -> None:
    sys.stdout.write(
        f"""The federation {made["federation"]} is ready in {made["directory"]}.

Root key          {made["root_key"]}
                  Move it off this machine now; it is needed only for: concord server renew-membership
Root fingerprint  {made["root_fingerprint"]}
Administrator     {made["admin"]}
Token             {made["token"]}
                  It is kept nowhere else: keep it where only you can read it.

Next:
  concord server up {made["directory"]}
  concord login URL --root {made["root_fingerprint"]} --token-file FILE
"""
    )
