"""`concord login` and `concord whoami`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from concord_server.commands.output import coordinator, show_record
from concord_shared.commands import Json, SystemCa
from concord_shared.errors import UsageError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command(
        epilog="**Example**\n\n`concord login https://fl.example.org:8443 --root FINGERPRINT --token-file token.txt`"
    )(login)
    app.command()(whoami)


def login(
    url: Annotated[str, typer.Argument(metavar="URL", help="https://HOST:PORT of the coordinator.")],
    root: Annotated[str, typer.Option(metavar="FINGERPRINT", help="Of its root key, as its people told you.")],
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the token; - for standard input. Or set CONCORD_TOKEN.")
    ] = None,
    system_ca: SystemCa = False,
    as_json: Json = False,
) -> None:
    """Name the coordinator that commands speak to. It is checked against the root key before it sees the token."""
    from concord_server.client import log_in

    profile, person = log_in(url, root, _token(token_file), system_ca)
    path = profile.write()
    show_record({"url": profile.url, **person, "profile": str(path)}, as_json)


def whoami(as_json: Json = False) -> None:
    """Say whose token is in use, and what it may do."""
    with coordinator() as api:
        show_record({"url": api.url, **api.get("/api/v1/me")}, as_json)


def _token(file: Path | None) -> str:
    from concord_shared.files import explain

    try:
        if file is None:
            token = os.environ.get("CONCORD_TOKEN", "")
        else:
            token = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = explain(error) if isinstance(error, OSError) else "not text"
        raise UsageError(f"cannot read the token from {file}: {reason}") from error
    if not token.strip():
        raise UsageError("no token; name a file with --token-file, or set CONCORD_TOKEN")
    return token.strip()
