import math
from itertools import chain, count
from typing import Any

import numpy as np
import pytest
import torch

from concord_client.trainer import Workbench, round_learning_rate
from concord_shared.errors import TrainingDivergedError
from concord_shared.models import new_vector
from concord_shared.plan import Plan
from concord_shared.strategies import LocalWork, strategy_for
from helpers import IMAGES, REGRESSION, TABLE, one_column_plan, plan_of

CPU = torch.device("cpu")
X, Y = np.array([[1.0], [2.0]], np.float32), np.array([2.0, 4.0])


def bench_of(plan: Plan) -> Workbench:
    return Workbench(plan, CPU)


def trained(plan: Plan, theta: Any, inputs: np.ndarray = X, targets: np.ndarray = Y, seed: int = 1) -> np.ndarray:
    """One round of local training from `theta` at the plan's learning rate."""
    bench = bench_of(plan)
    bench.load(np.asarray(theta, np.float32))
    bench.train(bench.rows(inputs, targets), plan.training.learning_rate, seed)
    return bench.read()


def table_rows(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    inputs = rng.normal(size=(count, 4)).astype(np.float32)
    return inputs, (inputs[:, 0] > 0).astype(np.int64)


def test_read_only_targets_are_copied_and_others_are_not() -> None:
    """torch warns of memory that it may not write."""
    targets = np.array([1, 0], np.int64)
    bench = bench_of(plan_of(TABLE))
    inputs = np.zeros((2, 4), np.float32)
    assert np.shares_memory(bench.rows(inputs, targets).targets.numpy(), targets)
    targets.flags.writeable = False
    bench.rows(inputs, targets).targets[0] = 0
    assert targets.tolist() == [1, 0]


class TestSteps:
    """Linear regression y = b + w·x on (1, 2), (2, 4); a vector is [b, w]. At 0: ∂b = -6, ∂w = -10."""

    def test_one_sgd_step_by_hand(self) -> None:
        theta = trained(one_column_plan("training.learning_rate=0.01"), [0, 0])
        assert theta == pytest.approx([0.06, 0.10])

    def test_momentum_and_nesterov_by_hand(self) -> None:
        plan = one_column_plan("training={learning_rate=0.01, momentum=0.5, local_steps=2}")
        # at [0.06, 0.1]: residuals -1.84, -3.74; ∂b = -5.58, ∂w = -9.32; v = 0.5·[-6, -10] + ∂
        assert trained(plan, [0, 0]) == pytest.approx([0.06 + 0.0858, 0.1 + 0.1432], rel=1e-5)
        nesterov = one_column_plan("training={learning_rate=0.01, momentum=0.5, nesterov=true}")
        assert trained(nesterov, [0, 0]) == pytest.approx([0.09, 0.15], rel=1e-5)

    def test_weight_decay_by_hand(self) -> None:
        plan = one_column_plan("training={learning_rate=0.01, weight_decay=0.5}")
        # at [2, 0]: residuals 0, -2; ∂b = -2, ∂w = -4; decay adds 0.5·[2, 0]
        assert trained(plan, [2, 0]) == pytest.approx([2.01, 0.04], rel=1e-5)

    def test_gradient_clip_by_hand(self) -> None:
        plan = one_column_plan("training={learning_rate=1.0, gradient_clip=0.5}")
        theta = trained(plan, [0, 0])
        assert theta == pytest.approx(0.5 * np.array([6, 10]) / math.hypot(6, 10), rel=1e-5)

    @pytest.mark.parametrize(("optimiser", "expected"), [("adam", 0.01), ("adamw", 0.01 + 1 * (1 - 0.01 * 0.1))])
    def test_adam_steps_by_the_learning_rate_and_adamw_decays_apart(self, optimiser: str, expected: float) -> None:
        start = 0.0 if optimiser == "adam" else 1.0
        decay = 0.0 if optimiser == "adam" else 0.1
        plan = one_column_plan(f"training={{optimiser='{optimiser}', learning_rate=0.01, weight_decay={decay}}}")
        assert trained(plan, [0, start])[1] == pytest.approx(expected, rel=1e-5)

    def test_fedprox_two_steps_by_hand(self) -> None:
        plan = one_column_plan("strategy={name='fedprox', mu=2.0}", "training={learning_rate=0.01, local_steps=2}")
        bench, start = bench_of(plan), np.zeros(2, np.float32)
        bench.load(start)

        def train(adjust: Any) -> tuple[np.ndarray, int]:
            return bench.read(), bench.train(bench.rows(X, Y), 0.01, 1, adjust)

        work = LocalWork(plan, bench.layout, start, {}, {}, 0.01, train, lambda: (X, Y))
        assert strategy_for(plan).local(work).steps == 2
        # the second gradient is [-5.58, -9.32] + 2·([0.06, 0.1] - 0)
        assert bench.read() == pytest.approx([0.06 + 0.0546, 0.1 + 0.0912], rel=1e-5)

    def test_what_a_step_does_not_use_has_a_gradient_of_0_where_a_strategy_adds_to_it(self) -> None:
        def spare(plan: Plan) -> torch.nn.Module:
            model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
            model.forward = lambda inputs: model[0](inputs)  # type: ignore[method-assign]
            return model

        def pull(parameters: list[torch.Tensor], start: list[torch.Tensor]) -> None:
            for parameter in parameters:
                parameter.grad += 1.0  # type: ignore[operator]

        bench = Workbench(one_column_plan("training.learning_rate=0.01"), CPU, spare)
        bench.load(np.zeros(4, np.float32))
        bench.train(bench.rows(X, Y), 0.01, 1, pull)
        assert bench.read() == pytest.approx([0.05, 0.09, -0.01, -0.01])

    def test_each_round_starts_with_a_fresh_optimiser(self) -> None:
        plan = one_column_plan("training={learning_rate=0.01, momentum=0.9}")
        bench = bench_of(plan)
        for _ in range(2):
            bench.load(np.zeros(2, np.float32))
            bench.train(bench.rows(X, Y), 0.01, 1)
            assert bench.read() == pytest.approx([0.06, 0.10])


class TestBatches:
    def batches(self, plan: Plan, rows: int, seed: int = 1) -> list[list[int]]:
        bench = bench_of(plan)
        numbers = np.arange(rows, dtype=np.float32)
        prepared = bench.rows(numbers[:, None], numbers)
        batches = []
        for inputs, targets in bench.batches(prepared, seed):
            assert torch.equal(inputs[:, 0], targets)
            batches.append([int(t) for t in targets])
        return batches

    def test_an_epoch_shows_every_row_once(self) -> None:
        batches = self.batches(one_column_plan("training={batch_size=4, local_epochs=2}"), 10)
        assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
        first, second = [*chain(*batches[:3])], [*chain(*batches[3:])]
        assert sorted(first) == sorted(second) == list(range(10))
        assert first != second

    @pytest.mark.parametrize("steps", [1, 3, 7])
    def test_local_steps_are_counted_over_epochs(self, steps: int) -> None:
        plan = one_column_plan(f"training={{batch_size=4, local_steps={steps}}}")
        assert len(self.batches(plan, 10)) == steps
        bench = bench_of(plan)
        assert bench.train(bench.rows(X, Y), 0.01, 1) == steps

    def test_order_follows_the_seed(self) -> None:
        plan = one_column_plan()
        assert self.batches(plan, 30, 5) == self.batches(plan, 30, 5) != self.batches(plan, 30, 6)


def test_training_is_the_same_bit_for_bit(rng: np.random.Generator) -> None:
    plan = plan_of(TABLE, "training={batch_size=7, local_epochs=3, learning_rate=0.5}")
    inputs, targets = table_rows(100, rng)
    _, start = new_vector(plan)
    one = trained(plan, start, inputs, targets)
    torch.manual_seed(99)
    assert trained(plan, start, inputs, targets).tobytes() == one.tobytes()
    assert not np.array_equal(trained(plan, start, inputs, targets, seed=2), one)


@pytest.mark.parametrize("size", [7, 40])
def test_rows_that_the_device_has_no_room_for_train_the_same(
    size: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In main memory, batch by batch; here the device is the processor, so only the way of the rows differs."""
    plan = plan_of(TABLE, f"training.batch_size={size}", "training.local_epochs=2")
    inputs, targets = table_rows(40, rng)
    found = []
    for room in (math.inf, 100.0):
        monkeypatch.setattr("concord_client.trainer.room_for_rows", lambda device, room=room: room)
        bench = bench_of(plan)
        rows = bench.rows(inputs, targets)
        assert rows.device == (None if room == math.inf else CPU)
        bench.load(new_vector(plan)[1])
        steps = bench.train(rows, 0.1, 3)
        predicted, figures = bench.predict(rows), bench.evaluate(rows).figures()
        found.append((steps, bench.read().tobytes(), predicted.tobytes(), figures))
    assert found[0] == found[1]


def test_training_learns(rng: np.random.Generator) -> None:
    plan = plan_of(TABLE, "training={learning_rate=1.0, local_epochs=20}")
    inputs, targets = table_rows(300, rng)
    bench = bench_of(plan)
    bench.load(trained(plan, new_vector(plan)[1], inputs, targets))
    assert bench.evaluate(bench.rows(inputs, targets)).figures()["accuracy"] > 0.95  # type: ignore[operator]


class TestModelInMemory:
    @pytest.mark.parametrize("model", ["seed-cnn", "2nn"])
    def test_load_and_read_are_inverse(self, model: str, rng: np.random.Generator) -> None:
        bench = bench_of(plan_of(IMAGES, f"model.name={model}"))
        theta = rng.normal(size=bench.layout.size).astype(np.float32)
        theta.flags.writeable = False
        bench.load(theta)
        assert bench.read().tobytes() == theta.tobytes()

    def test_training_does_not_change_the_vector_that_was_loaded(self) -> None:
        bench, theta = bench_of(one_column_plan()), np.zeros(2, np.float32)
        bench.load(theta)
        bench.train(bench.rows(X, Y), 0.01, 1)
        assert theta.tolist() == [0, 0]
        assert bench.read().tolist() != [0, 0]

    def test_warming_up_changes_nothing(self, rng: np.random.Generator) -> None:
        bench = bench_of(plan_of(IMAGES))
        theta = rng.normal(size=bench.layout.size).astype(np.float32)
        bench.load(theta)
        bench.warm_up(bench.rows(np.ones((2, 1, 8, 8), np.float32), np.zeros(2, np.int64)))
        assert bench.read().tobytes() == theta.tobytes()
        assert all(parameter.grad is None for parameter in bench.model.parameters())

    def test_warming_up_on_one_row_that_batch_norm_cannot_compare(self) -> None:
        bench = bench_of(plan_of(IMAGES, "model={name='mlp', hidden=[4], norm='batch'}", "strategy.name=fedbn"))
        bench.warm_up(bench.rows(np.ones((1, 1, 8, 8), np.float32), np.zeros(1, np.int64)))

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_a_model_that_is_not_finite_is_divergence(self, bad: float) -> None:
        bench = bench_of(one_column_plan())
        bench.load(np.array([0, bad], np.float32))
        with pytest.raises(TrainingDivergedError, match="NaN or Inf"):
            bench.read()

    def test_too_high_a_learning_rate_is_divergence(self) -> None:
        with pytest.raises(TrainingDivergedError, match=r"Lower training\.learning_rate"):
            trained(one_column_plan("training={learning_rate=1e30, local_steps=5}"), [0, 0])


class TestEvaluation:
    def test_regression_by_hand(self) -> None:
        bench = bench_of(one_column_plan())
        bench.load(np.array([1.0, 1.0], np.float32))  # predicts 2 and 3
        figures = bench.evaluate(bench.rows(X, Y)).figures()
        assert figures["rows"] == 2
        assert figures["rmse"] == pytest.approx(math.sqrt(0.5), abs=1e-6)
        assert figures["mae"] == pytest.approx(0.5, abs=1e-6)

    def test_classification_agrees_with_predictions_over_several_batches(self, rng: np.random.Generator) -> None:
        plan = plan_of(TABLE)
        inputs, targets = table_rows(2500, rng)
        bench = bench_of(plan)
        bench.load(rng.normal(size=bench.layout.size).astype(np.float32))
        rows = bench.rows(inputs, targets)
        probabilities, figures = bench.predict(rows), bench.evaluate(rows).figures()
        assert probabilities.shape == (2500, 2)
        assert probabilities.sum(1) == pytest.approx(np.ones(2500), abs=1e-6)
        assert figures["rows"] == 2500
        assert figures["accuracy"] == pytest.approx((probabilities.argmax(1) == targets).mean())
        loss = -np.log(probabilities[np.arange(2500), targets]).mean()
        assert figures["loss"] == pytest.approx(loss, rel=1e-4)

    def test_of_no_rows_is_empty(self) -> None:
        for plan, width in ((plan_of(TABLE), 4), (plan_of(REGRESSION), 3)):
            bench = bench_of(plan)
            rows = bench.rows(np.zeros((0, width), np.float32), np.zeros(0))
            assert bench.evaluate(rows).figures() == {"rows": 0}

    def test_changes_no_parameter(self) -> None:
        bench = bench_of(one_column_plan())
        bench.load(np.array([1.0, 1.0], np.float32))
        bench.evaluate(bench.rows(X, Y))
        assert bench.read().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("schedule='constant'", [0.4] * 6),
        ("schedule='step', schedule_step=2, schedule_factor=0.5", [0.4, 0.4, 0.2, 0.2, 0.1, 0.1]),
        ("schedule='cosine'", [0.4, 0.2 * (1 + 3**0.5 / 2), 0.3, 0.2, 0.1, 0.2 * (1 - 3**0.5 / 2)]),
    ],
)
def test_learning_rate_of_each_round(schedule: str, expected: list[float]) -> None:
    training = plan_of(IMAGES, f"training={{learning_rate=0.4, {schedule}}}").training
    assert [round_learning_rate(training, number, 6) for number in range(1, 7)] == pytest.approx(expected)


def test_work_ends_in_time_with_one_step_at_least(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second later: begun at 0, a step before each look at 1, 2, 3."""
    plan = plan_of(
        IMAGES,
        "training.batch_size=1",
        "training.local_seconds=3.0",
        "training.deterministic=false",
        "strategy.name=fednova",
    )
    bench = Workbench(plan, torch.device("cpu"))
    rows = bench.rows(rng.normal(size=(50, 1, 8, 8)).astype(np.float32), rng.integers(0, 3, 50))
    for seconds_a_look, steps in ((1.0, 3), (100.0, 1), (0.001, 50)):
        clock = count()
        monkeypatch.setattr("concord_client.trainer.time.monotonic", lambda: next(clock) * seconds_a_look)  # noqa: B023
        assert bench.train(rows, 0.1, seed=1) == steps
