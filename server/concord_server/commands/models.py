"""`concord model …`."""

from pathlib import Path
from typing import Annotated

import typer

from concord_server.commands.output import coordinator, show_items, show_record
from concord_server.commands.signing import Key, signing_key
from concord_shared.commands import Json

__all__ = ["register"]

group = typer.Typer(help="Trained models.", no_args_is_help=True)
Digest = Annotated[str, typer.Argument(metavar="DIGEST", help="From `concord model list`.")]
OfRun = Annotated[
    str | None, typer.Option("--run", metavar="RUN", help="Where several runs ended with the same model.")
]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="model")


@group.command("list", epilog="**Example**\n\n`concord model list --run heart-disease-1f3a`")
def list_all(
    run: Annotated[str | None, typer.Option(metavar="RUN")] = None,
    study: Annotated[str | None, typer.Option(metavar="STUDY")] = None,
    rounds: Annotated[bool, typer.Option("--rounds", help="Also the models after every round.")] = False,
    as_json: Json = False,
) -> None:
    """List the models of your studies' runs, the newest first."""
    columns = ("digest", "run", "round", "released", "created_at")
    with coordinator() as api:
        found = api.pages("/api/v1/models", run=run, study=study, final=None if rounds else True)
        show_items(found, columns, as_json)


@group.command()
def show(digest: Digest, run: OfRun = None, as_json: Json = False) -> None:
    """Show where a model comes from: run, plan, study, round, and its figures."""
    with coordinator() as api:
        show_record(api.get(f"/api/v1/models/{digest}", run=run), as_json)


@group.command(epilog="**Example**\n\n`concord model download DIGEST --out models/heart`")
def download(
    digest: Digest,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Made where it is not there.")],
    run: OfRun = None,
    as_json: Json = False,
) -> None:
    """Download a model's files, and verify each of them."""
    from concord_server.client_nouns import download_model

    with coordinator() as api:
        found = download_model(api, digest, out, run)
    told = {"model_digest": digest, "out": found["out"], "files": [file["name"] for file in found["files"]]}
    show_record(told, as_json)


@group.command(epilog="**Example**\n\n`concord model release DIGEST --key keys/organisation.key`")
def release(digest: Digest, run: OfRun = None, key: Key = None, as_json: Json = False) -> None:
    """Clear a model for use by the study's organisations, signed by the one that started its run."""
    from concord_server.client_nouns import release_model

    signer = signing_key(key)
    with coordinator() as api:
        show_record(release_model(api, signer, digest, run), as_json)
