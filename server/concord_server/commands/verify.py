"""`concord verify`: the capsule of a run, by anybody."""

from pathlib import Path
from typing import Annotated

import typer

from concord_shared.commands import Json, show

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command(epilog="**Example**\n\n`concord verify heart-1.capsule --root ROOT_FINGERPRINT`")(verify)


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="From `concord run export`.")],
    root: Annotated[
        str | None,
        typer.Option(metavar="FINGERPRINT", help="Of the federation's root key; by default that of `concord login`."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Verify the capsule of a run, without asking anybody: signatures, receipts, audit log, model. Says what fails."""
    from concord_shared.evidence.chain import plain_fingerprint
    from concord_shared.evidence.commands import show_capsule
    from concord_shared.evidence.verify import verify_capsule

    found = verify_capsule(file, plain_fingerprint(root) if root is not None else _own_root())
    show(found | {"verified": True}, as_json, show_capsule)


def _own_root() -> str:
    from concord_server.client import Profile
    from concord_shared.certificates import read_certificate, root_fingerprint
    from concord_shared.errors import UsageError

    try:
        return root_fingerprint(read_certificate(Profile.read().root_pem))
    except UsageError as error:
        raise UsageError("whose capsule is it to be? Name the federation's root key: --root FINGERPRINT") from error
