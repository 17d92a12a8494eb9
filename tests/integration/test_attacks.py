"""Reproductions of what once broke a run: hostile remarks, two processes, other data, dead workers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message

from concord_local import simulate
from concord_local.transports import WorkerTransport
from concord_server.checkpoints import RunStore
from concord_shared.errors import ArtefactError, RunFailedError
from concord_shared.messages import decline
from concord_shared.transport import Transport
from federations import Relay, federation, run, small_plan, transport

NOTES = {
    "nested": "[" * 2000 + "]" * 2000,
    "open brackets": "[" * 4096,
    "lone surrogate": '{"a":"\\ud800"}',
    "not finite": '{"seconds": NaN, "norms": {"delta": Infinity}, "rows": 1e400}',
    "long integer": '{"steps": ' + "9" * 4000 + "}",
    "line separator": '{"precision": "a\u2028b"}',
    "unknown": '{"backdoor": "x", "norms": {"other": 1}}',
    "a list": "[1, 2]",
}


class Noting(Relay):
    """Replaces the remarks of node-3."""

    def __init__(self, inner: Transport, text: str) -> None:
        super().__init__(inner)
        self._text = text

    def receive(self, timeout_s: float) -> list[Message]:
        replies = self.inner.receive(timeout_s)
        for reply in replies:
            if reply.metadata.src_node_id == 4 and not reply.has_error():
                reply.content["notes"] = ConfigRecord({"json": self._text})
        return replies


@pytest.mark.parametrize("case", NOTES)
def test_remarks_of_a_node_harm_nothing(case: str, tmp_path: Path) -> None:
    plan = small_plan("rounds.count=1")
    honest, _ = run(plan, tmp_path / "honest")
    result, records = run(plan, tmp_path / "noted", wrap=lambda inner: Noting(inner, NOTES[case]))
    assert result.model_digest == honest.model_digest
    assert not set(records[0]["notes"]["node-3"]) - {"rows", "steps", "seconds", "norms", "precision"}
    assert "backdoor" not in (tmp_path / "noted" / "metrics.jsonl").read_text("utf-8")


def test_a_reason_with_a_line_separator_does_not_stop_resuming(tmp_path: Path) -> None:
    class Declining(Relay):
        def receive(self, timeout_s: float) -> list[Message]:
            replies = self.inner.receive(timeout_s)
            for index, reply in enumerate(replies):
                if reply.metadata.src_node_id == 4:
                    error = decline(reply, "a\u2028b")
                    error.metadata.__dict__["_src_node_id"] = 4
                    error.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
                    replies[index] = error
            return replies

    plan = small_plan()
    first, records = run(plan, tmp_path, wrap=Declining)
    assert "\u2028" in records[0]["failures"]["node-3"]
    assert run(plan, tmp_path)[0].model_digest == first.model_digest


class Broken(Relay):
    """Loses every answer to steps of one kind while `broken` is set."""

    broken = True

    def __init__(self, inner: Transport, kind: str) -> None:
        super().__init__(inner)
        self._kind = kind

    def receive(self, timeout_s: float) -> list[Message]:
        replies = self.inner.receive(timeout_s)
        return [r for r in replies if not (self.broken and r.metadata.message_type == self._kind)]


@pytest.mark.parametrize("kind", ["query.statistics", "evaluate"])
def test_resuming_repeats_the_step_that_ended_a_run(kind: str, tmp_path: Path) -> None:
    plan = small_plan(
        "rounds.deadline_s=0.5", "evaluation.every=0", "preprocessing.scope=federated", "preprocessing.standardise=true"
    )
    whole, _ = run(plan, tmp_path / "whole")
    with pytest.raises(RunFailedError, match="0 of 5 nodes answered"):
        run(plan, tmp_path / "part", wrap=lambda inner: Broken(inner, kind))
    resumed, _ = run(plan, tmp_path / "part")
    assert resumed.model_digest == whole.model_digest
    assert resumed.metrics == whole.metrics


def test_a_run_with_one_round_that_was_lost_has_failed(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match="train round 1"):
        run(small_plan("rounds.count=1", "rounds.deadline_s=0.5"), tmp_path, wrap=lambda inner: Broken(inner, "train"))


def test_an_answer_of_another_run_of_the_same_plan_is_not_counted(tmp_path: Path) -> None:
    kept: list[Message] = []

    class Keeping(Relay):
        def receive(self, timeout_s: float) -> list[Message]:
            replies = self.inner.receive(timeout_s)
            kept.extend(r for r in replies if r.metadata.src_node_id == 4 and r.metadata.message_type == "train")
            return replies

    class Replaying(Relay):
        def receive(self, timeout_s: float) -> list[Message]:
            replies = self.inner.receive(timeout_s)
            return [
                kept[0] if r.metadata.src_node_id == 4 and r.metadata.message_type == "train" else r for r in replies
            ]

    plan = small_plan("rounds.count=1", "rounds.grace_s=0.2")
    run(plan, tmp_path / "old", wrap=Keeping)
    _, records = run(plan, tmp_path / "new", wrap=Replaying)
    assert "node-3" not in records[0]["survivors"]
    assert records[0]["late"] == ["node-3"]


def _start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "concord_local", *arguments]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _await(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    until = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert condition()


def test_two_processes_cannot_work_on_one_run(tmp_path: Path) -> None:
    first = _start("simulate", "--set", "rounds.count=200", "--nodes", "4", "--out", "run", cwd=tmp_path)
    try:
        _await((tmp_path / "run" / "checkpoint" / "state.json").exists)
        second = _start("simulate", "--resume", "run", cwd=tmp_path)
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "another process works on this run" in errors
    finally:
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=60)


@pytest.mark.parametrize("delay_s", [0.2, 0.6, 1.2])
def test_an_early_interrupt_is_no_success(delay_s: float, tmp_path: Path) -> None:
    process = _start("simulate", "--set", "rounds.count=300", "--out", "run", cwd=tmp_path)
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0


def test_resuming_refuses_other_rows(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 8), np.uint8)
    labels = np.arange(200) % 10
    np.savez(tmp_path / "d.npz", x=images, y=labels)

    class Stop(Exception):
        pass

    def stop(record: object) -> None:
        if isinstance(record, dict) and record["kind"] == "evaluate":
            raise Stop

    def start() -> None:
        simulate(
            "digits-cnn", data=f"npz:{tmp_path / 'd.npz'}", nodes=3, workers=1, out=tmp_path / "run", observer=stop,
            overrides=["model.name=2nn", "rounds.count=3"], partition="iid",
        )  # fmt: skip

    with pytest.raises(Stop):
        start()
    np.savez(tmp_path / "d.npz", x=images[:150], y=labels[:150])
    with pytest.raises(ArtefactError, match="not those that the run began with"):
        simulate(resume=tmp_path / "run")
    np.savez(tmp_path / "d.npz", x=images, y=labels)
    assert simulate(resume=tmp_path / "run").summary["rounds"] == 3


def test_resuming_a_finished_run_gives_what_it_came_to(tmp_path: Path) -> None:
    first = simulate("digits-cnn", nodes=3, workers=1, out=tmp_path, overrides=["model.name=2nn", "rounds.count=1"])
    before = (tmp_path / "summary.json").read_bytes()
    assert simulate(resume=tmp_path).summary["model_digest"] == first.summary["model_digest"]
    assert (tmp_path / "summary.json").read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [["--data", "csv:nope.csv"], ["--nodes", "5000"], ["--set", "rounds.cohort=50"], ["--partition", "even"],
     ["--device", "tpu"], ["--seeds", "2", "--nodes", "5000"]],
)  # fmt: skip
def test_wrong_use_writes_nothing(arguments: list[str], tmp_path: Path, here: Any) -> None:
    done = here("simulate", *arguments, "--out", "run")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_resume_takes_no_other_option(tmp_path: Path) -> None:
    process = _start("simulate", "--resume", "run", "--workers", "3", cwd=tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "leave the other options out" in errors


def test_nodes_without_test_rows_can_be_compared(tmp_path: Path) -> None:
    """Ten rows over ten nodes: one each, none to test on."""
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8), np.uint8)
    np.savez(tmp_path / "d.npz", x=images, y=np.arange(10), site=np.arange(10))
    summary = simulate(
        "digits-cnn", data=f"npz:{tmp_path / 'd.npz'}", partition="natural:site", workers=1, compare=True,
        overrides=["model.name=2nn", "rounds.count=1"], out=tmp_path / "run",
    ).summary  # fmt: skip
    assert summary["comparison"]["all"]["alone_mean"] is None
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_worker_killed_in_mid_run_changes_nothing(tmp_path: Path) -> None:
    plan = small_plan("model.name=seed-cnn", "rounds.count=2", "rounds.cohort=5")
    whole, _ = run(plan, tmp_path / "whole")
    inner = transport("workers", plan, federation(plan), tmp_path / "killed")
    assert isinstance(inner, WorkerTransport)

    class Killing(Relay):
        killed = False

        def receive(self, timeout_s: float) -> list[Message]:
            replies = self.inner.receive(timeout_s)
            if replies and not self.killed:
                Killing.killed = True
                os.kill(inner.process_ids[0], signal.SIGKILL)
            return replies

    from federations import driver

    try:
        result = driver(plan, federation(plan), Killing(inner), tmp_path / "killed").run()
    finally:
        inner.close()
    assert Killing.killed
    assert result.model_digest == whole.model_digest
    assert all(not json.loads(json.dumps(r))["failures"] for r in RunStore(tmp_path / "killed").records())
