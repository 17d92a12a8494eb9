"""`privacy.mode = "robust"` in whole runs: attackers change little, are seen and left out, and block nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_local import simulate
from concord_server.checkpoints import RunStore
from concord_shared.errors import PlanError
from concord_shared.guarantee import guarantee_of
from concord_shared.plan import load_plan
from federations import Shuffled, federation, run, small_plan, transport
from federations import driver as driver_of

ROBUST = "privacy={mode='robust', attackers=2, quarantine_after=2}"
SMALL = ["model.name=2nn", "rounds.count=4", "training.local_epochs=2", "training.learning_rate=0.03", ROBUST]
NODES = 7


def drill(folder: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    chosen = {"nodes": NODES, "partition": "iid", "workers": 1} | options
    return simulate("digits-cnn", overrides=[*SMALL, *overrides], out=folder, **chosen).summary


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return drill(tmp_path_factory.mktemp("clean") / "run")


def test_nobody_stands_out_where_nobody_attacks(clean: dict[str, Any]) -> None:
    assert [row["flagged"] for row in clean["robust"]["nodes"].values()] == [0] * NODES
    assert "attack" not in clean


@pytest.mark.parametrize("attack", ["label-flip", "sign-flip", "scale:-10", "free-rider"])
def test_two_attackers_are_seen_left_out_and_cost_little(attack: str, clean: dict[str, Any], tmp_path: Path) -> None:
    """The quick version of tests/learning/test_robust.py: within five points, on 255 test rows."""
    summary = drill(tmp_path / "run", attack=attack)
    seen = summary["attack"]["seen"]
    assert seen["precision"] == 1.0
    assert seen["quarantined"] == summary["attack"]["nodes"]
    assert summary["metrics"]["accuracy"] > clean["metrics"]["accuracy"] - 0.05
    records = [record for record in RunStore(tmp_path / "run").records() if record["kind"] == "train"]
    assert set(records[-1]["survivors"]) == set(clean["robust"]["nodes"]) - set(summary["attack"]["nodes"])
    assert records[-1]["left_out"] == summary["attack"]["nodes"]
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Who stood out" in page
    assert "谁与众不同" in page


def test_the_control_without_a_rule_the_attack_works(clean: dict[str, Any], tmp_path: Path) -> None:
    summary = drill(tmp_path / "run", "privacy.mode=plain", attack="scale:-10", attackers=2)
    assert summary["metrics"]["accuracy"] < clean["metrics"]["accuracy"] - 0.3


def test_nan_is_refused_in_each_round_and_reaches_no_model(clean: dict[str, Any], tmp_path: Path) -> None:
    summary = drill(tmp_path / "run", attack="nan")
    assert summary["attack"]["seen"]["refused"] == 2 * 4
    assert summary["metrics"]["accuracy"] > clean["metrics"]["accuracy"] - 0.05


@pytest.mark.parametrize("rule", ["nnm-trimmed-mean", "trimmed-mean", "median", "clipped-mean"])
def test_not_a_bit_depends_on_the_order_of_arrival(rule: str, tmp_path: Path) -> None:
    plan = small_plan(f"privacy={{mode='robust', rule='{rule}', attackers=1}}")
    ordered, _ = run(plan, tmp_path / "ordered")
    shuffled, _ = run(plan, tmp_path / "shuffled", wrap=lambda inner: Shuffled(inner, 1))
    assert shuffled.model_digest == ordered.model_digest


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_killed_run_goes_on_with_the_same_model_and_the_same_quarantine(after: int, tmp_path: Path) -> None:
    whole = drill(tmp_path / "whole", "evaluation.every=2", attack="scale:-10")
    left: list[int] = []

    class Killed(Exception):
        pass

    def die(record: Any) -> None:
        if record["kind"] in ("train", "evaluate"):
            left.append(1)
            if len(left) == after:
                raise Killed

    with pytest.raises(Killed):
        drill(tmp_path / "part", "evaluation.every=2", attack="scale:-10", observer=die)
    resumed = simulate(resume=tmp_path / "part").summary
    for figure in ("model_digest", "metrics", "robust"):
        assert resumed[figure] == whole[figure], figure
    assert resumed["attack"]["seen"]["quarantined"] == whole["attack"]["nodes"]


def test_quarantine_never_takes_a_round_below_its_quorum(tmp_path: Path) -> None:
    """Where all must answer, those who stand out are still asked, and the run says so."""
    summary = drill(tmp_path / "run", "rounds.quorum='all'", attack="scale:-10")
    records = [record for record in RunStore(tmp_path / "run").records() if record["kind"] == "train"]
    assert all(len(record["survivors"]) == NODES for record in records)
    assert not any("quarantined" in record for record in records)
    assert "2 too few for its quorum; they are still asked" in records[1]["quarantine_withheld"]
    assert summary["robust"]["quarantine_withheld"] == records[-1]["quarantine_withheld"]
    assert summary["attack"]["seen"]["quarantined"] == []


def test_a_lift_has_the_node_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lifted: dict[str, str] = {}
    monkeypatch.setattr(RunStore, "lifted", lambda store: lifted)

    def lift(record: Any) -> None:
        if record["kind"] == "train" and record["round"] == 3:
            lifted.update(dict.fromkeys(record["left_out"][:1], "ada"))

    summary = drill(tmp_path / "run", "rounds.count=6", attack="scale:-10", observer=lift)
    records = [record for record in RunStore(tmp_path / "run").records() if record["kind"] == "train"]
    [back] = lifted
    assert back in summary["attack"]["nodes"]
    assert back not in records[2]["survivors"]
    assert all(back in record["survivors"] for record in records[3:]), "flagged again, and still asked"
    assert all(len(record["left_out"]) == 1 for record in records[4:])


def test_every_node_counts_the_same_whatever_it_says_of_its_rows(tmp_path: Path) -> None:
    """A weight is what the sum of a plain run goes by; no robust rule looks at it."""
    plan = small_plan("privacy={mode='robust', rule='median', attackers=1}", "rounds.count=1", "rounds.weight_cap=1")
    other = plan.with_changes(rounds=plan.document()["rounds"] | {"weight_cap": 10_000})
    digests = set()
    for index, each in enumerate((plan, other)):
        nodes = federation(each, partition="quantity:0.5")
        inner = transport("in-process", each, nodes, tmp_path / str(index))
        digests.add(driver_of(each, nodes, inner, tmp_path / str(index)).run().model_digest)
    assert len(digests) == 1


def test_noise_for_whole_nodes_is_added_to_the_exact_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator's noise stands between sum and model, as in plain mode; the figures are those of Updates."""
    dp = "dp={unit='node', epsilon=5.0, delta=1e-5, clip=10.0}"
    robust = f"privacy={{mode='robust', rule='clipped-mean', attackers=2, quarantine_after=0, {dp}}}"
    noisy = drill(tmp_path / "noisy", robust)
    assert noisy["deterministic"] is False
    noised: list[Any] = []

    def nothing(plan: Any, blocks: Any, sums: Any, nodes: int) -> Any:
        noised.append(sums["delta"].copy())
        return dict(sums) | {"delta": np.zeros_like(sums["delta"])}

    monkeypatch.setattr("concord_server.driver.noised_sums", nothing)
    still = drill(tmp_path / "still", robust)
    assert all(np.count_nonzero(each) for each in noised)
    assert len(noised) == 4
    assert still["metrics"]["accuracy"] < 0.5, "the model is made of what noise left of the sum, and of nothing else"
    assert all(row["flagged"] == 0 for row in still["robust"]["nodes"].values())


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "nnm-trimmed-mean"])
def test_noise_for_whole_nodes_needs_a_sum(rule: str) -> None:
    dp = f"privacy={{mode='robust', rule='{rule}', dp={{unit='node', epsilon=5.0, delta=1e-5, clip=10.0}}}}"
    with pytest.raises(PlanError, match=rf"hides a node in a sum, and rule {rule} makes none"):
        load_plan("digits-cnn", [dp])


def test_noise_for_whole_nodes_goes_with_no_quarantine() -> None:
    """One node's Update would decide which others are in the sum: then it moves the sum by more than itself."""
    fields = "mode='robust', rule='clipped-mean', attackers=2, dp={unit='node', epsilon=5.0, delta=1e-5, clip=10.0}"
    with pytest.raises(PlanError, match=r"privacy\.quarantine_after = 0"):
        load_plan("digits-cnn", [f"privacy={{{fields}}}"])
    plan = load_plan("digits-cnn", [f"privacy={{{fields}, quarantine_after=0}}"]).plan
    found = guarantee_of(plan)
    assert found is not None
    assert "how far each node's Update stands from the others" in found.sentences()[-1]
