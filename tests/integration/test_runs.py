"""Runs as a whole: determinism, resuming after a kill, node state, faults, statistics."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from concord_local import simulate
from concord_local.federation import Federation
from concord_server.checkpoints import RunStore
from concord_shared.errors import ArtefactError, RunFailedError
from concord_shared.plan import load_plan
from federations import Shuffled, driver, federation, run, small_plan, transport

SLOW = pytest.mark.slow


def test_same_digest_for_one_two_and_four_workers_and_in_process(tmp_path: Path) -> None:
    plan = small_plan("model.name=seed-cnn", "rounds.count=2")
    digests = {run(plan, tmp_path / "0")[0].model_digest}
    for workers in (1, 2, 4):
        digests.add(run(plan, tmp_path / str(workers), "workers", workers=workers)[0].model_digest)
    assert len(digests) == 1


@pytest.mark.parametrize("seed", range(3))
def test_same_digest_for_any_order_of_arrival(seed: int, tmp_path: Path) -> None:
    plan = small_plan()
    ordered, _ = run(plan, tmp_path / "ordered")
    shuffled, _ = run(plan, tmp_path / "shuffled", wrap=lambda inner: Shuffled(inner, seed))
    assert shuffled.model_digest == ordered.model_digest
    assert shuffled.metrics == ordered.metrics


def test_another_seed_gives_another_model(tmp_path: Path) -> None:
    assert (
        run(small_plan(), tmp_path / "a")[0].model_digest != run(small_plan("seed=1"), tmp_path / "b")[0].model_digest
    )


class Killed(Exception):
    pass


SCAFFOLD = "strategy.name=scaffold", "training.momentum=0.0"


@pytest.mark.parametrize("overrides", [(), SCAFFOLD], ids=["fedavg", "scaffold"])
@pytest.mark.parametrize("after", range(1, 7))
def test_resume_after_any_step_ends_with_the_same_model(after: int, overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Dies right after the `after`-th step of train, evaluate, train, … was stored."""
    plan = small_plan(*overrides)
    whole, records = run(plan, tmp_path / "whole")
    nodes = federation(plan)
    inner = transport("in-process", plan, nodes, tmp_path / "part")
    seen = []

    def die(record: object) -> None:
        seen.append(record)
        if len(seen) == after:
            raise Killed

    with pytest.raises(Killed):
        driver(plan, nodes, inner, tmp_path / "part", observer=die).run()
    inner = transport("in-process", plan, nodes, tmp_path / "part")
    resumed = driver(plan, nodes, inner, tmp_path / "part").run()
    assert resumed.model_digest == whole.model_digest
    assert resumed.metrics == whole.metrics
    assert resumed.bytes_up == pytest.approx(whole.bytes_up, rel=1e-3)  # replies tell their seconds
    again = RunStore(tmp_path / "part").records()
    assert [(r["kind"], r["round"]) for r in again] == [(r["kind"], r["round"]) for r in records]


@pytest.mark.parametrize(
    ("delay_s", "strategy"),
    [
        pytest.param(0.0, "fedavg", marks=SLOW),
        (0.3, "fedavg"),
        pytest.param(0.9, "fedavg", marks=SLOW),
        pytest.param(0.2, "fedrep", marks=SLOW),
        pytest.param(0.7, "ditto", marks=SLOW),
    ],
)
def test_kill_9_then_resume_ends_with_the_same_model(delay_s: float, strategy: str, tmp_path: Path) -> None:
    """A real process, killed at a moment that nobody chose; parts that stay at their nodes are as they were too."""
    overrides = ["rounds.count=12", f"strategy={{name='{strategy}'}}"]
    options = [word for each in overrides for word in ("--set", each)]
    options += ["--nodes", "5", "--workers", "2", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "concord_local", "simulate", "digits-cnn", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    state = tmp_path / "run" / "checkpoint" / "state.json"
    until = time.monotonic() + 60
    while not state.exists() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(delay_s)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "summary.json").exists(), "the run was over before it was killed"
    resumed = simulate(resume=tmp_path / "run")
    whole = simulate("digits-cnn", overrides=overrides, nodes=5, workers=1, out=tmp_path / "whole")
    assert resumed.summary["model_digest"] == whole.summary["model_digest"]
    assert resumed.metrics == whole.metrics
    assert resumed.summary["per_node"] == whole.summary["per_node"]


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    plan = small_plan()
    run(plan, tmp_path)
    [tensors] = (tmp_path / "checkpoint").glob("*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(ArtefactError, match="not the one that the checkpoint names"):
        run(plan, tmp_path)


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    run(small_plan(), tmp_path)
    with pytest.raises(ArtefactError, match="belongs to plan"):
        run(small_plan("training.learning_rate=0.01"), tmp_path)


def test_scaffold_needs_nothing_of_the_engine(tmp_path: Path) -> None:
    """Node state, a broadcast state and a second block, through both transports, and it learns."""
    plan = small_plan("rounds.count=15", *SCAFFOLD)
    first, _ = run(plan, tmp_path / "a")
    second, _ = run(plan, tmp_path / "b", "workers")
    assert first.model_digest == second.model_digest
    assert float(first.metrics["accuracy"]) > 0.8  # type: ignore[arg-type]
    assert np.abs(first.state["control"]).max() > 0
    assert len(list((tmp_path / "a" / "nodes").glob("*.safetensors"))) >= 5


def test_scaffold_moves_no_further_from_its_correction_than_fedavg_without_state(tmp_path: Path) -> None:
    """In its first round all controls are zero: SCAFFOLD's model is FedAvg's, bit for bit."""
    plain, corrected = (small_plan("rounds.count=1", *overrides) for overrides in (SCAFFOLD[1:], SCAFFOLD))
    assert run(corrected, tmp_path / "a")[0].model_digest == run(plain, tmp_path / "b")[0].model_digest


def test_dropouts_leave_the_mean_of_the_survivors(tmp_path: Path) -> None:
    summary = simulate(
        "digits-cnn", overrides=["rounds.count=4", "model.name=2nn"], nodes=5, workers=1,
        faults="dropout:0.3", out=tmp_path,
    ).summary  # fmt: skip
    records = [record for record in RunStore(tmp_path).records() if record["kind"] == "train"]
    assert any(record["failures"] for record in records)
    assert all(len(r["survivors"]) + len(r["failures"]) == 5 for r in records if "survivors" in r)
    assert summary["metrics"]["rows"] > 0


def test_a_run_without_its_quorum_fails_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"quorum is 5.*dropped out"):
        simulate(
            "digits-cnn",
            overrides=["rounds.quorum=5", "rounds.aborts_max=2", "model.name=2nn"],
            nodes=5,
            workers=1,
            faults="dropout:0.9",
            out=tmp_path,
        )


def test_slow_nodes_are_left_behind_after_grace(tmp_path: Path) -> None:
    simulate(
        "digits-cnn",
        overrides=["rounds.count=1", "rounds.grace_s=0.5", "model.name=2nn", "rounds.quorum=1"],
        nodes=5,
        workers=1,
        faults="slow:20",
        out=tmp_path,
    )
    record = RunStore(tmp_path).records()[0]
    assert record["silent"]
    assert record["seconds"] < 20


def test_federated_statistics_equal_the_pooled_ones_over_transports(tmp_path: Path) -> None:
    overrides = ["preprocessing.scope=federated", "preprocessing.standardise=true", "rounds.count=1", "model.name=2nn"]
    summary = simulate("digits-cnn", overrides=overrides, nodes=5, workers=2, out=tmp_path, partition="iid").summary
    plan = load_plan("digits-cnn", overrides).plan
    nodes = Federation.of(_digits(), plan, "iid", 5)
    rows = np.concatenate([nodes.rows[name][0] for name in nodes.names])  # type: ignore[index]
    pixels = nodes.inputs[rows].astype(np.float64)
    from concord_local.rundir import RunDirectory

    fitted = RunDirectory.open(tmp_path).read_json("preprocessing.json")
    assert fitted["means"]["channel_0"] == pytest.approx(pixels.mean(), rel=1e-9)
    assert fitted["scales"]["channel_0"] == pytest.approx(pixels.std(), rel=1e-9)
    assert summary["metrics"]["rows"] == sum(len(nodes.rows[name][2]) for name in nodes.names)  # type: ignore[index]


def _digits() -> object:
    from federations import digits

    return digits()
