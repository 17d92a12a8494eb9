"""`[compression]` in whole runs: fewer bytes, the same model wherever and however it is computed."""

import json
from pathlib import Path
from typing import Any

import pytest

from concord_local import simulate
from concord_server.checkpoints import RunStore

SMALL = ["model.name=2nn", "rounds.count=4", "training.batch_size=32", "evaluation.every=0", "rounds.update_bound=3.0"]


def run(folder: Path, *overrides: str, workers: int = 1, **options: Any) -> dict[str, Any]:
    return simulate(
        "digits-cnn", overrides=[*SMALL, *overrides], nodes=4, workers=workers, out=folder, **options
    ).summary


def bytes_up(folder: Path) -> int:
    return max(each["bytes_up"] for each in RunStore(folder).records() if each["kind"] == "train")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    folder = tmp_path_factory.mktemp("plain")
    return run(folder), bytes_up(folder)


@pytest.mark.parametrize(("kind", "times"), [("fp16", 1.95), ("int8", 3.8), ("narrow", 1.95), ("rand-k", 9.0)])
def test_a_round_moves_fewer_bytes_and_still_learns(
    kind: str, times: float, plain: tuple[dict[str, Any], int], tmp_path: Path
) -> None:
    summary = run(tmp_path, f"compression.kind={kind}")
    assert plain[1] / bytes_up(tmp_path) >= times
    off = 0.35 if kind == "rand-k" else 0.03
    assert summary["metrics"]["accuracy"] > plain[0]["metrics"]["accuracy"] - off
    assert summary["deterministic"]


@pytest.mark.parametrize("kind", ["int8", "rand-k"])
def test_workers_do_not_change_the_model(kind: str, tmp_path: Path) -> None:
    first, second = (
        run(tmp_path / str(workers), f"compression.kind={kind}", workers=workers)["model_digest"] for workers in (1, 2)
    )
    assert first == second


@pytest.mark.parametrize("kind", ["rand-k", "narrow"])
def test_under_masks_the_same_model(kind: str, tmp_path: Path) -> None:
    wanted = f"compression.kind={kind}"
    assert (
        run(tmp_path / "plain", wanted)["model_digest"]
        == run(tmp_path / "masked", wanted, "privacy.mode=private")["model_digest"]
    )


@pytest.mark.parametrize("kind", ["int8", "fp16", "rand-k", "narrow"])
def test_rules_against_attackers_see_what_was_decoded(kind: str, tmp_path: Path) -> None:
    robust = ("privacy.mode=robust", "privacy.attackers=1", "rounds.quorum=3")
    summary = run(tmp_path, f"compression.kind={kind}", *robust, attack="scale:-10", attackers=1)
    record = next(each for each in RunStore(tmp_path).records() if each["kind"] == "train")
    assert "anomalies" in record
    assert summary["metrics"]["accuracy"] > (0.2 if kind == "rand-k" else 0.5)


def test_what_is_left_over_survives_a_stop(tmp_path: Path) -> None:
    """A run that was stopped ends with the model of one that was not: the rest of a round is part of a node's state."""
    whole = run(tmp_path / "whole", "compression.kind=rand-k")["model_digest"]

    def stop(record: Any) -> None:
        if record.get("kind") == "train" and record.get("round") == 2:
            raise KeyboardInterrupt

    with pytest.raises(BaseException, match="Go on with"):
        run(tmp_path / "stopped", "compression.kind=rand-k", observer=stop)
    again = simulate(resume=tmp_path / "stopped").summary
    assert again["model_digest"] == whole
    assert json.loads((tmp_path / "stopped" / "summary.json").read_text("utf-8"))["model_digest"] == whole
