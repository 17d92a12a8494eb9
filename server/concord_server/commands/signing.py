"""The key that a command signs with."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from concord_shared.errors import UsageError

if TYPE_CHECKING:
    from concord_shared.signing import PrivateKey

__all__ = ["Key", "OnBehalf", "signing_key"]

Key = Annotated[
    Path | None,
    typer.Option("--key", metavar="FILE", envvar="CONCORD_KEY", help="organisation.key of `concord keys init`."),
]
OnBehalf = Annotated[
    str | None, typer.Option("--organisation", metavar="NAME", help="On whose behalf; your own by default.")
]


def signing_key(path: Path | None) -> "PrivateKey":
    """Raises: UsageError: none was named. ArtefactError: it cannot be used."""
    from concord_shared.signing import read_private_key

    if path is None:
        raise UsageError("this is signed by your organisation: name its key with --key FILE, or set CONCORD_KEY")
    return read_private_key(path)
