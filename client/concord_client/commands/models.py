"""`concord-node models`: released models at this partner: list, pull, evaluate, predict."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concord_client.commands.common import Home, at_home, day, lines, write
from concord_shared.commands import Json, new_app, show
from concord_shared.errors import UsageError

if TYPE_CHECKING:
    from concord_client.home import NodeHome
    from concord_client.inference import TrainedModel
    from concord_client.models import KnownModel
    from concord_client.store import NodeStore

__all__ = ["register"]

models = new_app("models", "Released models: fetch one, check it, and use it here, without the coordinator.")
Digest = Annotated[str, typer.Argument(metavar="DIGEST", help="The model's digest, or the beginning of it.")]
HEADLINES = ("accuracy", "auc", "rmse", "hit_rate_10", "ndcg_10")
SPEC = "csv:FILE, parquet:FILE, npz:FILE, idx:DIR, images:DIR."


def register(app: typer.Typer) -> None:
    app.add_typer(models)


@models.command("list", epilog="**Example**\n\n`concord-node models list`")
def show_list(home: Home = None, as_json: Json = False) -> None:
    """List the models that were released to this node, newest first."""
    from concord_client.models import known_models

    with at_home(home) as (opened, store):
        known = known_models(opened, store)
    show({"models": [_summary(each) for each in known]}, as_json, lambda _: _show_list(known))


@models.command("pull", epilog="**Example**\n\n`concord-node models pull 3f2a9c`")
def pull(digest: Digest, home: Home = None, as_json: Json = False) -> None:
    """Download a released model, and check its signer, its digest and every tensor."""
    from concord_client.models import find_release, pull_model

    with at_home(home) as (opened, store):
        result = pull_model(opened, store, find_release(opened, store, digest))
    show(result, as_json, lambda _: write(f"{result['outcome']}: {result['model_digest']}", result["directory"]))


@models.command("evaluate", epilog="**Example**\n\n`concord-node models evaluate 3f2a9c --dataset patients`")
def evaluate(
    digest: Digest,
    data: Annotated[str, typer.Option(metavar="SPEC", help=SPEC)] = "",
    dataset: Annotated[str, typer.Option(metavar="NAME", help="A registered dataset: its own test rows.")] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Figures of a pulled model on this node's own data. Works offline; nothing is sent."""
    from concord_client.inference import evaluate as evaluate_data
    from concord_client.inference import evaluate_dataset

    if bool(data) == bool(dataset):
        raise UsageError("name the data: --data SPEC, or --dataset NAME for one that is registered here")
    with at_home(home) as (opened, store):
        model, full = _open(opened, store, digest)
        device = _device(opened)
        if dataset:
            figures = evaluate_dataset(model, _registered(opened, store, dataset, model), device)
        else:
            figures = evaluate_data(model, _read(opened, data, model, labelled=True), device)
    result = {"model_digest": full, "data": dataset or data, **figures}
    show(result, as_json, lambda _: _show_figures(result))


@models.command("predict", epilog="**Example**\n\n`concord-node models predict 3f2a9c --data csv:new.csv`")
def predict(
    digest: Digest,
    data: Annotated[str, typer.Option(metavar="SPEC", help=SPEC)],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the predictions there, as CSV.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Predict each row of new data with a pulled model. Works offline; nothing is sent.

    With a recommender: for each user of these ratings the ten best items that are not among them.
    """
    from concord_client.inference import predict as predict_data
    from concord_client.inference import show_predictions, write_predictions

    with at_home(home) as (opened, store):
        model, full = _open(opened, store, digest)
        predictions = predict_data(model, _read(opened, data, model, labelled=False), _device(opened))
    result = {"model_digest": full, "data": data, **predictions}
    show(result if out is None else write_predictions(result, out), as_json, show_predictions)


def _open(home: "NodeHome", store: "NodeStore", digest: str) -> tuple["TrainedModel", str]:
    from concord_client.models import find_release, open_model

    release = find_release(home, store, digest)
    return open_model(home, store, release), release.model_digest


def _device(home: "NodeHome") -> str:
    from concord_client.policy import Policy

    return Policy.load(home.policy_file).resources.device


def _read(home: "NodeHome", data: str, model: "TrainedModel", labelled: bool) -> Any:
    from concord_client.data import Reading, read_data
    from concord_client.policy import Policy

    reading = Reading(roots=Policy.load(home.policy_file).data.roots)
    return read_data(data, model.plan, labelled=labelled, reading=reading)


def _registered(home: "NodeHome", store: "NodeStore", name: str, model: "TrainedModel") -> Any:
    """The rows of a registered dataset, split as in the training of this node."""
    from concord_client.policy import Policy
    from concord_client.registry import current_dataset, verify
    from concord_client.training_desk import read_dataset

    dataset = current_dataset(store, name)
    reading = verify(store, dataset, Policy.load(home.policy_file).data.roots)
    return read_dataset(model.plan, home.config.node, dataset.spec, reading)


def _summary(known: "KnownModel") -> dict[str, Any]:
    release = known.release
    return {
        "model_digest": release.model_digest,
        "plan": known.plan_name,
        "plan_digest": release.plan_digest,
        "study": release.study,
        "run": release.run,
        "organisation": release.organisation,
        "released_at": release.issued_at,
        "bytes": sum(file.size for file in release.files),
        "metrics": release.metrics,
        "pulled": known.pulled,
    }


def _show_list(known: list["KnownModel"]) -> None:
    if not known:
        write("no model was released to this node yet")
        return
    head = ("model", "plan", "study", "released by", "at", "figures", "here")
    rows = [
        (
            each.release.model_digest[:12],
            each.plan_name,
            each.release.study,
            each.release.organisation,
            day(each.release.issued_at),
            ", ".join(f"{name} {figures[name]}" for name in HEADLINES if name in (figures := each.release.metrics)),
            "yes" if each.pulled else "no",
        )
        for each in known
    ]
    lines([head, *rows])


def _show_figures(result: dict[str, Any]) -> None:
    figures = {key: value for key, value in result["metrics"].items() if key not in ("confusion", "rows")}
    lines(
        [
            ("model", result["model_digest"][:12]),
            ("rows", result["rows"]),
            *((key, "–" if value is None else f"{value:.4g}") for key, value in figures.items()),
        ]
    )
