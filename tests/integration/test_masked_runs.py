"""`privacy.mode = "private"` in whole runs: the model of the plain run, and nothing of a single node."""

import json
from pathlib import Path
from typing import Any

import pytest

from concord_local import simulate
from concord_server.checkpoints import RunStore
from concord_shared.errors import RunFailedError, UsageError

MASKED = "privacy.mode=private"
SMALL = ["model.name=2nn", "rounds.count=3"]
SMALLER = ["model.name=logistic-regression", "rounds.count=2"]


def run(folder: Path, *overrides: str, nodes: int = 5, **options: Any) -> dict[str, Any]:
    return simulate("digits-cnn", overrides=[*SMALL, *overrides], nodes=nodes, workers=1, out=folder, **options).summary


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["strategy.name=fedavgm"],
        ["strategy.name=scaffold", "training.momentum=0.0", *SMALLER],
        ["strategy.name=fednova", *SMALLER],
        ["strategy.name=fedrep", "rounds.count=1"],
        ["rounds.cohort=4"],
        ["preprocessing.scope=federated", "preprocessing.standardise=true"],
        ["evaluation.incoming=true", "evaluation.every=0"],
    ],
    ids=["plain", "momentum", "scaffold", "fednova", "fedrep", "cohort", "statistics", "incoming"],
)
def test_masked_equals_plain(overrides: list[str], tmp_path: Path) -> None:
    plain, masked = run(tmp_path / "p", *overrides), run(tmp_path / "m", *overrides, MASKED)
    assert masked["plan_digest"] != plain["plan_digest"]
    for figure in ("model_digest", "metrics", "owners"):
        assert masked[figure] == plain[figure], figure


def test_with_the_same_survivors_too(tmp_path: Path) -> None:
    """Lost nodes are the same in both: chosen by round and name."""
    losing = {"nodes": 10, "faults": "dropout:0.15"}
    plain = run(tmp_path / "p", "rounds.quorum=2", "seed=3", **losing)
    masked = run(tmp_path / "m", "rounds.quorum=2", "seed=3", MASKED, **losing)
    assert masked["model_digest"] == plain["model_digest"]
    records = [record for record in RunStore(tmp_path / "m").records() if record["kind"] == "train"]
    assert any(record["failures"] for record in records)


def test_the_coordinator_knows_of_no_node(tmp_path: Path) -> None:
    """Of all that it stores: no node's figures, rows, norms or remarks. The owners' own are shown as theirs."""
    summary = run(tmp_path / "m", MASKED)
    assert summary["per_node"] is None
    assert summary["worst_node"] is None
    assert summary["owners"]["node-1"]["accuracy"] > 0
    for record in RunStore(tmp_path / "m").records():
        assert not record.get("per_node")
        assert not record.get("notes")
    text = (tmp_path / "m" / "metrics.jsonl").read_text("utf-8")
    assert '"norms"' not in text
    assert '"steps"' not in text


def test_a_resumed_masked_run_ends_with_the_same_model(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", MASKED)

    class Stop(Exception):
        pass

    def stop(record: Any) -> None:
        if record["kind"] == "train" and record["round"] == 2:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "part", MASKED, observer=stop)
    assert simulate(resume=tmp_path / "part").summary["model_digest"] == whole["model_digest"]


def test_one_loss_of_three_is_a_named_abort(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"stage keys: \d of 3 nodes answered, the quorum is 3; failed: node-"):
        run(tmp_path, MASKED, "rounds.aborts_max=1", nodes=3, faults="dropout:0.9")


def test_two_partners_need_an_explicit_word(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"needs 3 of them .*privacy\.minimum_cohort"):
        run(tmp_path / "a", MASKED, nodes=2)
    assert run(tmp_path / "b", MASKED, "privacy.minimum_cohort=2", nodes=2)["metrics"]["rows"] > 0


def test_the_report_and_the_card_say_what_was_masked(tmp_path: Path) -> None:
    run(tmp_path / "m", MASKED)
    page = (tmp_path / "m" / "report.html").read_text("utf-8")
    assert "the sum over the cohort only" in page
    assert "There was no differential privacy" in page
    assert "in the clear" not in page
    assert "secure aggregation FSA-1, no differential privacy" in (tmp_path / "m" / "MODEL_CARD.md").read_text("utf-8")
    assert json.loads((tmp_path / "m" / "summary.json").read_text("utf-8"))["per_node"] is None
