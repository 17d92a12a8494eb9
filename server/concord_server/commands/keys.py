"""`concord keys …`: an organisation's own signing key, made by its people and never shown to the coordinator."""

from pathlib import Path
from typing import Annotated

import typer

from concord_server.commands.output import show_record
from concord_shared.commands import Json

__all__ = ["register"]

group = typer.Typer(help="The key that an organisation signs with.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="keys")


@group.command(epilog="**Example**\n\n`concord keys init keys` then `concord org key hospital-a keys/organisation.pub`")
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made where it is not there.")],
    as_json: Json = False,
) -> None:
    """Make organisation.key (keep it safe, it is the organisation's word) and organisation.pub (to be registered)."""
    from concord_shared.errors import ArtefactError
    from concord_shared.files import explain, write_atomically
    from concord_shared.signing import fingerprint, new_identity_key, public_text, write_private_key

    key = new_identity_key()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ArtefactError(f"cannot make {directory}: {explain(error)}") from error
    secret, public = directory / "organisation.key", directory / "organisation.pub"
    write_private_key(secret, key)
    write_atomically(public, _pem(public_text(key.public_key())))
    made = {"key": str(secret), "public": str(public), "fingerprint": fingerprint(key.public_key())}
    show_record(made, as_json)


def _pem(text: str) -> str:
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return "\n".join(["-----BEGIN PUBLIC KEY-----", *lines, "-----END PUBLIC KEY-----", ""])
