"""A batch's gradient in parts, with activations worked out again, in half precision: the same training, less memory."""

import logging
from typing import Any

import numpy as np
import pytest
import torch

from concord_client.passes import Parts
from concord_client.trainer import Workbench
from concord_shared.errors import PlanError, UsageError
from concord_shared.models import new_vector
from concord_shared.plan import Plan
from helpers import IMAGES, LANGUAGE, REGRESSION, TABLE, plan_of

CPU = torch.device("cpu")
RESNET = (
    "data.shape=[1, 16, 16]",
    "model={name='resnet-18', width=0.125}",
)
GPT = ("model={name='gpt-mini', layers=2, width=16, heads=2}",)


def trained(text: str, rng: np.random.Generator, *overrides: str, rows: int = 24) -> tuple[np.ndarray, Workbench]:
    plan = plan_of(text, "training.batch_size=12", "training.local_epochs=2", "training.learning_rate=0.1", *overrides)
    bench = Workbench(plan, CPU)
    if plan.data.task == "language-model":
        inputs: Any = rng.integers(2, 9, (rows, 9))
        inputs[::3, 4:] = 0  # texts of other lengths: their known tokens count, not their rows
        targets = np.zeros(rows)
    else:
        inputs = rng.normal(size=(rows, *plan.data.shape)).astype(np.float32)
        targets = rng.integers(0, 3, rows)
    bench.load(new_vector(plan)[1])
    bench.train(bench.rows(inputs, targets), 0.1, seed=5)
    return bench.read(), bench


LESS = ("training.micro_batch=5",), ("training.micro_batch=1",), ("training.recompute_activations=true",)


@pytest.mark.parametrize(
    ("text", "model", "asked"),
    [
        *((IMAGES, (), asked) for asked in LESS[:2]),
        *((IMAGES, RESNET, asked) for asked in LESS),
        *((LANGUAGE, GPT, asked) for asked in LESS),
    ],
)
def test_less_memory_trains_the_same_model(text: str, model: tuple[str, ...], asked: tuple[str, ...]) -> None:
    whole, parts = (trained(text, np.random.default_rng(1), *model, *more)[0] for more in ((), asked))
    start = new_vector(plan_of(text, *model))[1]
    assert np.abs(whole - start).max() > 1e-2, "it trained"
    np.testing.assert_allclose(parts, whole, atol=2e-5)
    if "recompute" in asked[0]:
        assert np.array_equal(parts, whole), "the same operations, bit for bit"


def test_activations_are_worked_out_again() -> None:
    """Each block runs forward twice a step, and once in evaluation."""
    _, bench = trained(LANGUAGE, np.random.default_rng(1), *GPT, "training.recompute_activations=true")
    calls: list[int] = []
    for module in bench.model.modules():
        if type(module).__name__ == "_Block":
            module.widen.register_forward_hook(lambda *_: calls.append(1))
    rows = bench.rows(np.random.default_rng(1).integers(2, 9, (12, 9)), np.zeros(12))
    bench.train(rows, 0.1, seed=5, epochs=1)
    assert len(calls) == 2 * 2
    calls.clear()
    bench.evaluate(rows)
    assert len(calls) == 2


def hold_only(bench: Workbench, most: int) -> None:
    """As a device that holds so many rows at once."""
    inner = bench.model.forward

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        if bench.model.training and len(inputs) > most:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        made: torch.Tensor = inner(inputs)
        return made

    bench.model.forward = forward


def test_a_smaller_part_is_taken_where_memory_is_out_and_said(
    rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(IMAGES, "training.batch_size=12", "training.deterministic=false")
    inputs, targets = rng.normal(size=(24, 1, 8, 8)).astype(np.float32), rng.integers(0, 3, 24)
    results = []
    for most in (100, 3):
        bench = Workbench(plan, CPU)
        bench.load(new_vector(plan)[1])
        hold_only(bench, most)
        with caplog.at_level(logging.WARNING):
            bench.train(bench.rows(inputs, targets), 0.1, seed=5)
        results.append((bench.read(), bench.micro_batch))
    assert [found for _, found in results] == [0, 3]
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-6)
    assert [record.message for record in caplog.records].count("no memory left; rows at once are halved") == 2
    torch.use_deterministic_algorithms(True)


def test_a_deterministic_plan_says_what_to_do_instead(rng: np.random.Generator) -> None:
    plan = plan_of(IMAGES, "training.batch_size=12")
    bench = Workbench(plan, CPU)
    bench.load(new_vector(plan)[1])
    hold_only(bench, 3)
    rows = bench.rows(rng.normal(size=(24, 1, 8, 8)).astype(np.float32), rng.integers(0, 3, 24))
    with pytest.raises(UsageError, match=r"no memory left for 12 rows at once\. Set training.micro_batch below 12"):
        bench.train(rows, 0.1, seed=5)


def test_a_row_that_does_not_fit_is_the_end() -> None:
    def one(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UsageError, match="a single row"):
        Parts(0, may_shrink=True).add_gradient(8, one, lambda: None)


def test_other_errors_are_not_taken_for_memory() -> None:
    def one(size: int) -> None:
        raise ValueError("shapes differ")

    with pytest.raises(ValueError, match="shapes differ"):
        Parts(0, may_shrink=True).add_gradient(8, one, lambda: None)


def test_half_precision_scales_losses_and_trains(rng: np.random.Generator) -> None:
    """In float16 gradients below 6e-8 are 0: these are, without a scale."""
    small = (*GPT, "training.optimiser=adam", "training.learning_rate=0.01")
    full, _ = trained(LANGUAGE, np.random.default_rng(1), *small)
    half, bench = trained(LANGUAGE, np.random.default_rng(1), *small, "training.precision=fp16")
    assert bench.precision == "fp16"
    start = new_vector(plan_of(LANGUAGE, *small))[1]
    assert np.isfinite(half).all()
    moved, error = np.linalg.norm(full - start), np.linalg.norm(half - full)
    assert 0 < error < 0.2 * moved


def test_in_half_precision_a_step_beyond_it_is_left_out_and_not_counted() -> None:
    plan = plan_of(REGRESSION, "training={precision='fp16', batch_size=8, local_steps=4, learning_rate=1e-5}")
    bench, inputs = Workbench(plan, CPU), np.full((8, 3), 8, np.float32)
    bench.load(start := new_vector(plan)[1])
    rows = bench.rows(inputs, np.full(8, 100.0))
    assert bench.train(rows, 1e-5, seed=1) == 0  # slopes of 1600; the fourth is still scaled by 128
    assert np.array_equal(bench.read(), start)


@pytest.mark.parametrize(
    "asked",
    [
        ("training.micro_batch=4",),
        ("training.recompute_activations=true",),
        ("training.batch_size=1",),
        ("training.local_steps=5", "training.batch_share=0.1"),
    ],
)
def test_batch_norm_wants_whole_batches(asked: tuple[str, ...]) -> None:
    def normed(plan: Plan) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 3))

    with pytest.raises(PlanError, match="compares the rows of a batch"):
        plan_of(IMAGES, "model={name='mlp', hidden=[4], norm='batch'}", "strategy.name=fedbn", *asked)
    with pytest.raises(UsageError, match="BatchNorm compares the rows of a batch"):
        Workbench(plan_of(IMAGES, "strategy.name=fedbn", *asked), CPU, normed)


def test_a_model_without_blocks_says_so() -> None:
    with pytest.raises(UsageError, match="no blocks"):
        Workbench(plan_of(IMAGES, "training.recompute_activations=true"), CPU)


def test_gradients_of_single_records_are_made_one_by_one() -> None:
    noisy = "privacy={mode='plain', dp={unit='record', epsilon=8.0, delta=1e-5, clip=1.0}}"
    with pytest.raises(PlanError, match="record by record"):
        plan_of(IMAGES, noisy, "training.micro_batch=4")
    assert plan_of(TABLE, "training.micro_batch=4").training.micro_batch == 4
