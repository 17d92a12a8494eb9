"""The wheel of deploy/examples/wheel: built, installed, and its two models trained by their plans as they stand."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from concord_local import simulate
from concord_local.demo import demo
from concord_shared.models.plugins import installed_plugins
from concord_shared.plan import load_plan
from concord_shared.plan.models import PluginModel

EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "wheel"
PLANS = [EXAMPLE / "canvas-detector.toml", EXAMPLE / "sentence-translator.toml"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the wheel is installed into, on the path of this process and of those that it starts."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = shutil.copytree(EXAMPLE, folder / "sources")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "site")]
    subprocess.run([*command, str(sources)], check=True)  # this repository's own example
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder / "site"))
        patch.setenv("PYTHONPATH", str(folder / "site"))
        yield folder / "site"


def make(module: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", module, *words], check=True, env=os.environ)


def course_of(observed: list[Any], figure: str) -> list[float]:
    return [record["metrics"][figure] for record in observed if record["kind"] == "evaluate"]


def test_the_plans_name_the_wheel_as_it_is_built(installed: Path) -> None:
    [found] = [each for each in installed_plugins() if each.package == "concord-examples"]
    for file in PLANS:
        model = load_plan(str(file)).plan.model
        assert isinstance(model, PluginModel)
        assert model.sha256 == found.sha256
        assert model.model in found.models


def test_the_detector_finds_digits(installed: Path, tmp_path: Path) -> None:
    make("concord_examples.detector", str(tmp_path / "canvases.npz"))
    observed: list[Any] = []
    data = f"npz:{tmp_path / 'canvases.npz'}"
    result = simulate(str(PLANS[0]), data=data, out=tmp_path / "run", observer=observed.append)
    assert result.summary["metrics"]["map-50"] >= 0.9
    assert len(course_of(observed, "map-50")) == 3


def test_the_translator_learns(installed: Path, tmp_path: Path, dataset_path: Callable[[str], Path]) -> None:
    languages = str(dataset_path("sib200_zh")), "eng_Latn", "zho_Hans"
    make("concord_examples.translator", *languages, str(tmp_path / "pairs.npz"))
    observed: list[Any] = []
    simulate(str(PLANS[1]), data=f"npz:{tmp_path / 'pairs.npz'}", out=tmp_path / "run", observer=observed.append)
    losses = course_of(observed, "loss")
    assert losses[-1] < losses[0] - 0.3, losses


@pytest.mark.parametrize("plan", PLANS, ids=["detector", "translator"])
def test_it_trains_in_a_deployed_federation_too(
    installed: Path, tmp_path: Path, dataset_path: Callable[[str], Path], plan: Path
) -> None:
    """Under masks, where each partner's policy and the coordinator's settings name the wheel by its hash."""
    data = tmp_path / "rows.npz"
    if plan == PLANS[0]:
        make("concord_examples.detector", str(data))
    else:
        make("concord_examples.translator", str(dataset_path("sib200_zh")), "eng_Latn", "zho_Hans", str(data))
    short = ["rounds.count=2", "evaluation.every=0"]
    deployed = demo(str(plan), data=f"npz:{data}", nodes=3, overrides=[*short, "privacy.mode=private"])
    simulated = simulate(str(plan), data=f"npz:{data}", nodes=3, overrides=short, out=tmp_path / "run")
    assert deployed["model_digest"] == simulated.summary["model_digest"]
