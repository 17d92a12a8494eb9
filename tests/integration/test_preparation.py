"""Rows are prepared by one code: in training, evaluation and prediction, in simulation and at a node, masked or not."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner
from unit.client.rounds_kit import Site, make_site
from unit.client.test_models import channel, release

from concord_client.cli import app as node_app
from concord_client.data import Split, read_data
from concord_client.models import pull_model
from concord_local import simulate
from concord_local.cli import app
from concord_local.federation import Federation
from concord_local.rundir import RunDirectory
from concord_shared.errors import ConcordError
from concord_shared.fitting import fit_locally
from concord_shared.plan import Plan, load_plan
from concord_shared.preprocessing import Fitted
from concord_shared.tensors import read_safetensors, write_safetensors

PREPARED = """
name = "prepared"
[data]
task = "classification"
input = "table"
target = "ill"
classes = ["no", "yes"]
[[data.columns]]
name = "age"
range = [0, 120]
[[data.columns]]
name = "city"
kind = "category"
categories = ["bonn", "köln"]
[[data.columns]]
name = "dose"
range = [0, 1e6]
[preprocessing]
scope = "federated"
normalise = "robust"
missing = "impute"
outside = "missing"
duplicates = "drop"
[preprocessing.outliers]
rule = "mad"
factor = 4.0
[model]
name = "logistic-regression"
[training]
learning_rate = 0.5
[rounds]
count = 3
[privacy]
mode = "private"
"""
WORDS = """
name = "words"
[data]
task = "classification"
input = "text"
text = "text"
length_max = 100
classes = ["heart", "sky"]
[preprocessing]
scope = "federated"
duplicates = "drop"
[preprocessing.text]
bins = 1024
ngrams = 2
minimum_count = 2
[model]
name = "mlp"
hidden = [8]
[training]
optimiser = "adam"
learning_rate = 0.05
[rounds]
count = 4
"""


def write_patients(file: Path, rng: np.random.Generator, rows: int = 400) -> Path:
    """With missing values, a dose in another unit now and then, ages that nobody has, and every row of ward 1 twice."""
    lines = []
    for _ in range(rows):
        ill = rng.random() < 0.5
        age = "" if rng.random() < 0.1 else f"{rng.normal(70 if ill else 40, 8):.1f}"
        age = "4000" if rng.random() < 0.05 else age
        dose = rng.normal(5, 1) * (1000 if rng.random() < 0.1 else 1)
        lines.append(f"{age},{rng.choice(['bonn', 'köln'])},{dose:.3f},{'yes' if ill else 'no'},{rng.integers(1, 5)}")
    lines += [line for line in lines if line.endswith(",1")]
    file.write_text("\n".join(["age,city,dose,ill,ward", *lines]), "utf-8")
    return file


def write_texts(file: Path, rng: np.random.Generator, rows: int = 240) -> Path:
    letters = {"heart": "心脏病血压胸痛医院", "sky": "天气云雨雪风阳光"}
    lines = []
    for place in range(rows):
        label = ("heart", "sky")[place % 2]
        lines.append(f"{''.join(rng.choice(list(letters[label]), 8))},{label},{rng.integers(1, 5)}")
    file.write_text("\n".join(["text,label,ward", *lines]), "utf-8")
    return file


@pytest.fixture(params=["table", "text"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    rng = np.random.default_rng(0)
    plan, write = (PREPARED, write_patients) if request.param == "table" else (WORDS, write_texts)
    (tmp_path / "plan.toml").write_text(plan, "utf-8")
    return str(tmp_path / "plan.toml"), write(tmp_path / "rows.csv", rng)


def run(study: tuple[str, Path], out: Path, *overrides: str) -> dict[str, Any]:
    plan, file = study
    return simulate(plan, data=f"csv:{file}", partition="natural:ward", workers=1, out=out, overrides=overrides).summary


def told(command: Any, *words: str) -> Any:
    result = CliRunner().invoke(command, [*words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def pulled(directory: Path, plan: Plan, digest: str, to: Path) -> Site:
    """A node that holds the run's released model."""
    site = make_site(to)
    site.store.put("plan", plan.digest, plan.document())
    shelf = to / "shelf"
    shelf.mkdir()
    for name in ("model.safetensors", "MODEL_CARD.md"):
        shutil.copyfile(directory / name, shelf / name)
    pull_model(
        site.home, site.store, release(site, shelf, model_digest=digest, plan_digest=plan.digest), channel(shelf)
    )
    return site


def test_what_training_fitted_evaluation_and_prediction_apply(study: tuple[str, Path], tmp_path: Path) -> None:
    summary = run(study, tmp_path / "run")
    plan, spec = load_plan(study[0]).plan, f"csv:{study[1]}"
    assert summary["metrics"]["accuracy"] > 0.85
    if plan.data.input == "table":
        assert summary["cleaning"]["1"]["duplicates"] > 20
        assert min(counts["outside"] for counts in summary["cleaning"].values()) > 0
        assert min(counts["outliers"] for counts in summary["cleaning"].values()) > 0
    predicted = told(app, "predict", str(tmp_path / "run"), "--data", spec)
    lines = study[1].read_text("utf-8").splitlines()[1:]
    hits = np.mean([word == line.split(",")[-2] for word, line in zip(predicted["prediction"], lines, strict=True)])
    evaluated = told(app, "evaluate", str(tmp_path / "run"), "--data", spec)
    assert evaluated["metrics"]["accuracy"] == pytest.approx(float(hits))
    site = pulled(tmp_path / "run", plan, summary["model_digest"], tmp_path / "site")
    home, digest = ["--home", str(site.home.path)], summary["model_digest"]
    at_the_node = told(node_app, "models", "predict", digest, "--data", spec, *home)
    assert at_the_node["prediction"] == predicted["prediction"]
    assert at_the_node["probability"] == predicted["probability"]
    assert told(node_app, "models", "evaluate", digest, "--data", spec, *home)["metrics"] == evaluated["metrics"]
    site.store.close()


def test_a_model_is_refused_without_a_part_of_its_preprocessing(study: tuple[str, Path], tmp_path: Path) -> None:
    summary = run(study, tmp_path / "run")
    plan = load_plan(study[0]).plan
    file = tmp_path / "run" / "model.safetensors"
    tensors, metadata = read_safetensors(file)
    part = "documents" if plan.data.input == "text" else "centres"
    document = {key: value for key, value in json.loads(metadata["preprocessing"]).items() if key != part}
    write_safetensors(file, tensors, metadata | {"preprocessing": json.dumps(document)})
    with pytest.raises(ConcordError, match="what prepares its inputs does not describe"):
        pulled(tmp_path / "run", plan, summary["model_digest"], tmp_path / "site")


def test_what_is_fitted_is_what_the_pooled_rows_give(study: tuple[str, Path], tmp_path: Path) -> None:
    run(study, tmp_path / "run")
    plan = load_plan(study[0]).plan
    rows = Federation.of(read_data(f"csv:{study[1]}", plan), plan, "natural:ward", None).all_rows()
    pooled = fit_locally(plan, rows.take(Split.TRAIN)[0])
    fitted = Fitted.from_document(RunDirectory.open(tmp_path / "run").read_json("preprocessing.json"))
    assert fitted.documents == pooled.documents
    for name in fitted.means:
        assert fitted.means[name] == pytest.approx(pooled.means[name], rel=1e-9)
        assert fitted.centres[name] == pytest.approx(pooled.centres[name], rel=1e-9)
        assert fitted.scales[name] == pytest.approx(pooled.scales[name], rel=1e-9)
    for name, fence in fitted.fences.items():
        assert fence == pytest.approx(pooled.fences[name], rel=1e-9)
    assert fitted.fences.keys() == pooled.fences.keys()


def test_masks_change_neither_what_is_fitted_nor_the_model(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(WORDS, "utf-8")
    study = str(tmp_path / "plan.toml"), write_texts(tmp_path / "rows.csv", np.random.default_rng(0))
    plain = run(study, tmp_path / "plain")
    private = run(study, tmp_path / "private", "privacy.mode=private")
    assert private["model_digest"] == plain["model_digest"]
    fitted = [RunDirectory.open(tmp_path / name).read_json("preprocessing.json") for name in ("plain", "private")]
    assert fitted[0] == fitted[1]
    assert private["per_node"] in (None, {})
