"""`concord-node verify`: the capsule of a run, by a partner."""

from pathlib import Path
from typing import Annotated

import typer

from concord_client.commands.common import Home, at_home
from concord_shared.commands import Json, show

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    app.command("verify", epilog="**Example**\n\n`concord-node verify heart-1.capsule`")(verify)


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="From `concord run export`.")],
    root: Annotated[
        str | None,
        typer.Option(
            metavar="FINGERPRINT", help="Of a federation's root key; by default the one that this node pinned."
        ),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Verify the capsule of a run, without asking anybody: signatures, receipts, audit log, model. Says what fails."""
    from concord_shared.evidence.chain import plain_fingerprint
    from concord_shared.evidence.commands import show_capsule
    from concord_shared.evidence.verify import verify_capsule

    if root is None:
        with at_home(home) as (opened, _):
            root = opened.config.root
    show(verify_capsule(file, plain_fingerprint(root)) | {"verified": True}, as_json, show_capsule)
