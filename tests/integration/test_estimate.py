"""`concord estimate`: bytes are those that a run sends; what cannot be estimated is refused."""

import json
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from typer.testing import CliRunner

from concord_local import simulate, simulation
from concord_local.cli import app
from concord_local.estimate import _answer, estimate
from concord_server.driver import Driver
from concord_shared.errors import PlanError, RunFailedError, UsageError
from concord_shared.messages import bytes_of
from concord_shared.transport import Transport

SMALL = ["model.name=logistic-regression", "rounds.count=3"]


@pytest.fixture(autouse=True)
def _short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and refusals do not depend on how long the probe takes."""
    monkeypatch.setattr("concord_local.estimate.PROBE_S", 0.1)


class Counting:
    """Another transport; counts the bytes of all messages."""

    def __init__(self, inner: Transport) -> None:
        self._inner, self.count = inner, 0

    def send(self, messages: Iterable[Message]) -> None:
        listed = list(messages)
        self.count += sum(map(bytes_of, listed))
        self._inner.send(listed)

    def receive(self, timeout_s: float) -> list[Message]:
        replies = self._inner.receive(timeout_s)
        self.count += sum(map(bytes_of, replies))
        return replies

    def withdraw(self) -> None:
        self._inner.withdraw()

    def close(self) -> None:
        self._inner.close()


def bytes_of_run(monkeypatch: pytest.MonkeyPatch, plan: str, **options: Any) -> tuple[int, dict[str, Any]]:
    """What the coordinator and the nodes of a simulation sent to each other, and the run's summary."""
    made: list[Counting] = []

    def counting(*arguments: Any, **more: Any) -> Driver:
        made.append(Counting(arguments[5]))
        return Driver(*arguments[:5], made[0], *arguments[6:], **more)

    with monkeypatch.context() as patched:
        patched.setattr(simulation, "Driver", counting)
        summary = simulate(plan, **options).summary
    return made[0].count, summary


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["evaluation.every=2"],
        ["evaluation.incoming=true"],
        ["rounds.cohort=3"],
        ["privacy.mode=private"],
        ["strategy.name=fedprox", "model={name='mlp', hidden=[200]}"],
    ],
    ids=" ".join,
)
def test_bytes_are_those_that_a_run_sends(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"nodes": 5, "partition": "iid", "overrides": [*SMALL, *overrides], "workers": 1}
    found = estimate("digits-cnn", **options)
    sent, _ = bytes_of_run(monkeypatch, "digits-cnn", out=tmp_path, **options)
    assert found["bytes"]["total"] == pytest.approx(sent, rel=0.05)
    assert bool(found["bytes"]["node_round_masks"]) == ("privacy.mode=private" in overrides)


def test_more_rounds_and_nodes_cost_more_and_each_of_them_is_named() -> None:
    few = estimate("digits-cnn", nodes=3, partition="iid", overrides=SMALL, workers=1)
    many = estimate("digits-cnn", nodes=3, partition="iid", overrides=["model.name=mlp", "rounds.count=30"], workers=1)
    assert many["bytes"]["total"] > 9 * few["bytes"]["total"]
    assert (few["nodes"], few["rounds"], few["parameters"]) == (3, 3, 650)
    assert few["memory_mb"]["node"] > 50
    assert [sentence.partition(":")[0] for sentence in few["advice"]] == ["time", "bytes", "memory"]
    assert "evaluation.every" in few["advice"][1]


def test_the_command_prints_a_table_or_json() -> None:
    command = ["estimate", "digits-cnn", "--nodes", "2", "--partition", "iid", "--workers", "1"]
    done = CliRunner().invoke(app, [*command, "--set", "rounds.count=2", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["seconds"]["total"] > 0
    done = CliRunner().invoke(app, [*command, "--set", "rounds.count=2"])
    assert done.exit_code == 0, done.output
    assert "bytes of all nodes" in done.stdout


def test_what_trains_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="concord estimate is for plans that train"):
        estimate("heart-statistics")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nodes": 0}, "--nodes 0: expected at least 1"),
        ({"workers": 0}, "--workers 0"),
        ({"device": "abacus"}, "abacus"),
        ({"overrides": ["model={name='resnet-18', stem='imagenet'}"]}, "needs images of at least 17×17"),
    ],
)
def test_what_cannot_run_cannot_be_estimated(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        estimate("digits-cnn", **options)


def test_a_probe_that_ends_without_an_answer_says_what_to_do() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    process.join()
    with pytest.raises(RunFailedError, match=r"code 0; .*smaller training.batch_size"):
        _answer(process, ours)
    ours.close()
