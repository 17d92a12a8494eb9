"""Several devices of one node, here two or three processes on its processor, come to what one comes to."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from concord_client.ranks import RankLostError
from concord_client.trainer import Workbench
from concord_shared.models import new_vector
from concord_shared.plan import Plan
from concord_shared.strategies.base import Adjust
from helpers import IMAGES, LANGUAGE, plan_of

CPU = torch.device("cpu")
FREE = {"deterministic": False, "batch_size": 6, "local_epochs": 2}


def image_plan(**training: Any) -> Plan:
    return plan_of(IMAGES).with_changes(model={"name": "mlp", "hidden": [9]}, training=FREE | training)


def language_plan() -> Plan:
    return plan_of(LANGUAGE).with_changes(training=FREE | {"optimiser": "sgd", "momentum": 0.9, "learning_rate": 0.1})


def rows_of(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Of 20: the last batch has two, and a third device nothing of it to do."""
    chance = np.random.default_rng(0)
    if plan.data.input == "text":
        tokens = chance.integers(2, 11, (20, 9))
        tokens[::3, 5:] = 0  # shares with other numbers of known tokens
        return tokens, np.zeros(20)
    return chance.normal(size=(20, 1, 8, 8)).astype(np.float32), chance.integers(0, len(plan.data.classes), 20)


def trained(plan: Plan, devices: tuple[str, ...], adjust: Adjust | None = None) -> np.ndarray:
    bench = Workbench(plan, CPU, devices=devices)
    assert (bench._ranks is not None) == (len(devices) > 1)
    try:
        bench.load(new_vector(plan)[1])
        bench.train(bench.rows(*rows_of(plan)), plan.training.learning_rate, 7, adjust)
        return bench.read()
    finally:
        bench.close()


def pull(parameters: Any, start: Any) -> None:
    for parameter, begun in zip(parameters, start, strict=True):
        parameter.grad.add_(0.5 * (parameter - begun) + 0.01)


@pytest.mark.parametrize(
    ("plan", "devices", "adjust"),
    [
        (image_plan(momentum=0.9, gradient_clip=0.1), 2, None),
        (image_plan(), 3, pull),
        (image_plan(micro_batch=2), 2, None),
        (language_plan(), 2, None),
    ],
    ids=["clipped", "adjusted-three", "in-parts", "language"],
)
def test_two_processes_come_to_what_one_comes_to(plan: Plan, devices: int, adjust: Adjust | None) -> None:
    one = trained(plan, (), adjust)
    several = trained(plan, ("cpu",) * devices, adjust)
    assert np.abs(several - one).max() < 1e-5
    assert np.abs(one - new_vector(plan)[1]).max() > 1e-3


def test_two_plans_at_once_do_not_meet() -> None:
    plans = image_plan(), language_plan()
    benches = [Workbench(plan, CPU, devices=("cpu", "cpu")) for plan in plans]
    try:
        for plan, bench in zip(plans, benches, strict=True):
            bench.load(new_vector(plan)[1])
            bench.train(bench.rows(*rows_of(plan)), plan.training.learning_rate, 7)
        for plan, bench in zip(plans, benches, strict=True):
            assert np.abs(bench.read() - trained(plan, ())).max() < 1e-5
    finally:
        for bench in benches:
            bench.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workbench]:
    monkeypatch.setattr("concord_client.ranks.TIMEOUT_S", 5.0)
    made = Workbench(image_plan(local_epochs=10_000), CPU, devices=("cpu", "cpu"))
    yield made
    made.close()


def test_a_killed_process_is_a_named_error_and_soon(bench: Workbench) -> None:
    assert bench._ranks is not None
    [pid] = bench._ranks.process_ids
    batches = 0

    def before_batch() -> None:
        nonlocal batches
        batches += 1
        if batches == 20:
            os.kill(pid, signal.SIGKILL)

    bench.load(new_vector(bench.plan)[1])
    begun = time.monotonic()
    with pytest.raises(RankLostError, match=r"cpu \(exit code -9\)"):
        bench.train(bench.rows(*rows_of(bench.plan)), 0.1, 0, before_batch=before_batch)
    assert time.monotonic() - begun < 60
    assert 20 <= batches <= 22


def test_a_process_that_hangs_is_a_named_error(bench: Workbench) -> None:
    assert bench._ranks is not None
    [pid] = bench._ranks.process_ids
    os.kill(pid, signal.SIGSTOP)
    begun = time.monotonic()
    bench.load(new_vector(bench.plan)[1])
    rows = bench.rows(*rows_of(bench.plan))
    with pytest.raises(RankLostError, match="did not answer within 5 s"):
        bench.train(rows, 0.1, 0)
    assert time.monotonic() - begun < 60


def test_memory_that_is_out_here_or_there_makes_smaller_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = image_plan()
    one, bench = trained(plan, ()), Workbench(plan, CPU, devices=("cpu", "cpu"))
    inner, failures = bench.task.loss, []

    def short(outputs: Any, targets: Any, reduction: str = "mean") -> Any:
        if len(targets) > 2:
            failures.append(len(targets))
            raise torch.OutOfMemoryError("out of memory")
        return inner(outputs, targets, reduction)

    monkeypatch.setattr(bench.task, "loss", short)
    try:
        bench.load(new_vector(plan)[1])
        bench.train(bench.rows(*rows_of(plan)), plan.training.learning_rate, 7)
        assert failures == [3, 3]  # its share of a batch of 6, whole and in parts of at most 3
        assert bench.micro_batch == 2
        assert np.abs(bench.read() - one).max() < 1e-5
    finally:
        bench.close()


def test_a_device_that_is_not_there_is_named_at_once() -> None:
    begun = time.monotonic()
    with pytest.raises(RankLostError, match="cuda:7"):
        Workbench(image_plan(), CPU, devices=("cpu", "cuda:7"))
    assert time.monotonic() - begun < 30


def test_what_fails_in_another_process_is_said_here(bench: Workbench) -> None:
    assert bench._ranks is not None
    wide = np.zeros((6, 1, 9, 9), np.float32)
    bench.load(new_vector(bench.plan)[1])
    bench._ranks.hand_out(bench.trained(), torch.from_numpy(wide), torch.zeros(6, dtype=torch.int64), 6, 6.0, 1.0)
    with pytest.raises(RuntimeError, match=r"RuntimeError: .*shapes cannot be multiplied"):
        bench._ranks.add_gradients(bench.trained())


def test_others_end_with_their_first(bench: Workbench) -> None:
    assert bench._ranks is not None
    [pid] = bench._ranks.process_ids
    bench.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_deterministic_plan_trains_on_one_device_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        bench = Workbench(plan_of(IMAGES), CPU, devices=("cpu", "cpu"))
    assert bench._ranks is None
    assert "deterministic is on" in caplog.text
