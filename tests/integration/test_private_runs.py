"""`[privacy.dp]` in whole runs: noise, as much of it as was promised, and words on what it covers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_local import simulate
from concord_server.checkpoints import RunStore
from concord_shared.errors import PlanError, RunFailedError
from concord_shared.models import new_vector
from concord_shared.noise import check_noise, coarse_levels, node_deviation, sum_deviation
from concord_shared.plan import load_plan
from concord_shared.tensors import read_safetensors

SMALL = ["model.name=logistic-regression", "rounds.count=2", "training.batch_size=32", "evaluation.every=0"]
BOUND = 10.0
NODES = 5


def dp(unit: str, epsilon: float = 3.0, clip: float = BOUND, mode: str = "plain") -> str:
    return f"privacy={{mode='{mode}', dp={{unit='{unit}', epsilon={epsilon}, delta=1e-5, clip={clip}}}}}"


def run(folder: Path, *overrides: str, nodes: int = NODES, **options: Any) -> dict[str, Any]:
    return simulate("digits-cnn", overrides=[*SMALL, *overrides], nodes=nodes, workers=1, out=folder, **options).summary


def model_of(folder: Path) -> Any:
    tensors, _ = read_safetensors(folder / "model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def test_records_are_hidden_under_masks_too_and_the_model_still_learns(tmp_path: Path) -> None:
    learns = ["rounds.count=6", "training.batch_size=64", "training.learning_rate=0.5"]
    summary = run(tmp_path, dp("record", 8.0, 1.0, "private"), *learns)
    assert summary["metrics"]["accuracy"] > 0.6
    assert summary["guarantee"]["unit"] == "record"
    assert not summary["deterministic"]


@pytest.mark.parametrize(("unit", "mode"), [("record", "plain"), ("node", "plain"), ("node", "private")])
def test_the_same_plan_never_gives_the_same_model_twice(unit: str, mode: str, tmp_path: Path) -> None:
    first, second = (run(tmp_path / each, dp(unit, mode=mode)) for each in "ab")
    assert first["plan_digest"] == second["plan_digest"]
    assert first["model_digest"] != second["model_digest"]


def noise_in(folder: Path, mode: str, **options: Any) -> tuple[Any, int]:
    """What noise did to the model of one round without training, in levels of a sum; and how many survived.

    The learning rate leaves the Updates far below one level, so the sum holds noise and rounding only.
    """
    still = ["rounds.count=1", "training.learning_rate=1e-12", "rounds.quorum=2"]
    run(folder, dp("node", mode=mode), *still, **options)
    plan = load_plan("digits-cnn", [*SMALL, *still, dp("node", mode=mode)]).plan
    layout, start = new_vector(plan)
    [record] = [each for each in RunStore(folder).records() if each["kind"] == "train"]
    tensors, _ = read_safetensors(folder / "model.safetensors")
    moved = layout.join({name: tensors[name] for name, _ in layout.entries}) - start
    survivors = len(record["survivors"])
    return moved.astype(np.float64) * coarse_levels(layout.size) / BOUND * survivors, survivors


def test_noise_of_nodes_under_masks_adds_up_to_what_was_promised(tmp_path: Path) -> None:
    """The opened sum is the plain one, but for noise of exactly the promised deviation: masks cancel."""
    plan = load_plan("digits-cnn", [*SMALL, "rounds.count=1", dp("node", mode="private")]).plan
    noise, survivors = noise_in(tmp_path / "run", "private")
    assert survivors == NODES
    each = node_deviation(plan, len(noise), NODES)
    assert noise.std() == pytest.approx(each * math.sqrt(NODES), rel=0.12)  # 650 draws: 4 deviations of a deviation
    assert each * math.sqrt(NODES) > sum_deviation(plan, len(noise))
    assert abs(noise.mean()) < 5 * noise.std() / math.sqrt(len(noise))


def test_with_the_fewest_survivors_there_is_still_enough_noise_without_the_colluders(tmp_path: Path) -> None:
    """Of 10 nodes 7 must survive and 3 may collude: the noise of 4 honest ones is what hides a node."""
    plan = load_plan("digits-cnn", [*SMALL, "rounds.count=1", dp("node", mode="private")]).plan
    noise, survivors = noise_in(tmp_path / "run", "private", nodes=10, faults="dropout:0.12")
    assert 7 <= survivors < 10, "choose another rate of losses"
    each = node_deviation(plan, len(noise), 10)
    assert each * math.sqrt(4) == pytest.approx(sum_deviation(plan, len(noise)))
    assert noise.std() == pytest.approx(each * math.sqrt(survivors), rel=0.12)


def test_the_coordinators_noise_is_what_was_promised_whoever_survives(tmp_path: Path) -> None:
    plan = load_plan("digits-cnn", [*SMALL, "rounds.count=1", dp("node")]).plan
    noise, _ = noise_in(tmp_path / "run", "plain")
    assert noise.std() == pytest.approx(sum_deviation(plan, len(noise)), rel=0.12)


def test_of_hidden_nodes_not_even_the_scaling_of_an_update_is_told(tmp_path: Path) -> None:
    """Each Update is far longer than the bound, which one bit of each node would tell."""
    run(tmp_path, dp("node", clip=1e-3, mode="private"), "rounds.update_bound=1e-3", "rounds.count=1")
    [record] = [each for each in RunStore(tmp_path).records() if each["kind"] == "train"]
    assert record["scaled_down"] == 0


def test_noise_that_the_ring_cannot_hold_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    tiny = [dp("node", 1e-3, mode="private"), "rounds.count=10000"]
    with pytest.raises(PlanError, match=r"does not fit into 32 bits; set rounds\.ring_bits = 64"):
        run(tmp_path, *tiny)
    assert not RunStore(tmp_path).records()
    check_noise(load_plan("digits-cnn", [*SMALL, *tiny, "rounds.ring_bits=64"]).plan, 650, NODES)


def test_a_delta_that_draws_cannot_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"privacy\.dp\.delta = 1e-12 is too small"):
        run(tmp_path, dp("node").replace("1e-5", "1e-12"))


def test_a_model_whose_rows_cannot_be_told_apart_is_refused_by_name(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from torch import nn\n"
        "def model():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8, track_running_stats=False),\n"
        "                         nn.Linear(8, 10))\n",
        "utf-8",
    )
    with pytest.raises(RunFailedError, match=r"cannot train a model with BatchNorm1d.*Use GroupNorm"):
        simulate(
            "digits-cnn", overrides=[dp("record"), "rounds.count=1", "rounds.aborts_max=1"], nodes=3, workers=1,
            out=tmp_path / "run", model=f"{own}:model",
        )  # fmt: skip


def test_report_card_and_summary_say_what_is_promised_and_what_is_not(tmp_path: Path) -> None:
    run(tmp_path, dp("record"))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "ε = 3, but for a chance of δ = 1e-05" in page
    assert "差分隐私：某节点增减一条记录" in page
    assert "figures of evaluation: they are exact sums" in page
    assert "评估指标：它们是测试行的精确总和" in page
    assert "no differential privacy" not in page
    card = (tmp_path / "MODEL_CARD.md").read_text("utf-8")
    assert "Not covered: figures of evaluation" in card
    assert "no differential privacy" not in card
    assert "deterministic: false" in card
    told = json.loads((tmp_path / "summary.json").read_text("utf-8"))["guarantee"]
    assert (told["unit"], told["epsilon"], told["delta"]) == ("record", 3.0, 1e-5)
    assert any("floating-point" in words for words in told["not_covered"])
