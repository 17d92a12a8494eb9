"""`pretrained add` and `pretrained list`, the same in `concord` and `concord-node`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from concord_shared.commands import Json, new_app, show
from concord_shared.text import printable

__all__ = ["register"]

pretrained = new_app(
    "pretrained", "Models that others trained, from local Hugging Face directories; nothing is downloaded."
)


@pretrained.command("add", epilog="**Example**\n\n`concord pretrained add ~/models/all-MiniLM-L6-v2`")
def add_directory(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="With config.json, tokenizer.json, *.safetensors.")],
    name: Annotated[str, typer.Option(help="What plans and people call it; the directory's own name by default.")] = "",
    as_json: Json = False,
) -> None:
    """Check a directory, and copy what makes its model to this machine's store. Files that can run are refused."""
    from concord_shared.pretrained.store import add

    show(add(directory, name).document(), as_json, _describe)


@pretrained.command("list", epilog="**Example**\n\n`concord pretrained list --json`")
def list_all(as_json: Json = False) -> None:
    """List what this machine has, and the hash by which a plan names each."""
    from concord_shared.pretrained.store import kept, store_folder

    def text(told: Any) -> None:
        for each in told["pretrained"]:
            _describe(each)
        if not told["pretrained"]:
            typer.echo(f"no pretrained model is in {store_folder()}; add one: concord pretrained add DIR")

    show({"pretrained": [each.document() for each in kept()]}, as_json, text)


def _describe(each: dict[str, Any]) -> None:
    typer.echo(f"{printable(each['name'])}: {printable(each['architecture'])}, {each['bytes'] / 1e6:.1f} MB")
    typer.echo(f"  sha256 = {each['sha256']}")


def register(app: typer.Typer) -> None:
    app.add_typer(pretrained)
