import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concord_shared.blocks import decode_means, encode_update
from concord_shared.errors import RunFailedError, UsageError
from concord_shared.plan import Plan
from concord_shared.strategies import LocalResult, LocalWork, strategy_for
from concord_shared.tensors import Layout
from helpers import REGRESSION, named, plan_of

LAYOUT = Layout.of({"w": (2,)})
LINEAR = Layout.of({"1.bias": (1,), "1.weight": (1, 3)})
THETA = np.array([1.0, -1.0], np.float32)


def plan_with(strategy: str, *overrides: str) -> Plan:
    return plan_of(REGRESSION, "rounds.count=1", f"strategy={{{strategy}}}", *overrides)


def work_of(plan: Plan, layout: Layout, theta: np.ndarray, **given: Any) -> LocalWork:
    nothing: dict[str, Any] = {"train": lambda adjust: (theta, 0), "rows": lambda: (None, None)}
    return LocalWork(plan, layout, theta, {}, {}, 0.1, **{**nothing, **given})


def apply_round(plan: Plan, state: Any, delta: Sequence[float], theta: np.ndarray = THETA) -> tuple[np.ndarray, Any]:
    return strategy_for(plan).apply(plan, LAYOUT, theta, state, {"delta": np.array(delta)}, 1.0)


class TestAveraging:
    def test_fedavg_adds_the_mean_weighted_by_rows(self) -> None:
        """Nodes with 1 and 3 rows end at [2, -1] and [1, 1]: θ + (1·[1, 0] + 3·[0, 2]) / 4."""
        plan = plan_with("name='fedavg'", "rounds.weight_cap=3")
        strategy = strategy_for(plan)
        blocks, sums = strategy.blocks(plan, LAYOUT), {}
        for end, rows in ((np.array([2, -1], np.float32), 1), (np.array([1, 1], np.float32), 3)):
            work = work_of(plan, LAYOUT, THETA, train=lambda adjust, end=end: (end, 5))
            result = strategy.local(work)
            assert result.steps == 5
            for name, values in encode_update(blocks, strategy.encode(work, result), rows, 3, 2).blocks.items():
                sums[name] = sums.get(name, 0) + values.astype(np.int64)
        theta, state = strategy.apply(
            plan, LAYOUT, THETA, {}, decode_means(blocks, sums, 2, plan.rounds.weight_cap), 1.0
        )
        assert theta == pytest.approx([1.25, 0.5], abs=1e-5)
        assert theta.dtype == np.float32
        assert state == {}

    def test_delta_is_local_minus_global(self) -> None:
        plan = plan_with("name='fedavg'")
        encoded = strategy_for(plan).encode(work_of(plan, LAYOUT, THETA), LocalResult(np.array([4, 4], np.float32)))
        assert encoded["delta"].tolist() == [3.0, 5.0]

    def test_delta_block_follows_the_plan(self) -> None:
        plan = plan_with("name='fedavg'", "rounds.ring_bits=64", "rounds.update_bound=2.5")
        block = named(strategy_for(plan).blocks(plan, LAYOUT), "delta")
        assert (block.size, block.weight, block.bound, block.ring_bits, block.over) == (2, "examples", 2.5, 64, "scale")

    def test_fedavgm_two_rounds_by_hand(self) -> None:
        plan = plan_with("name='fedavgm', server_learning_rate=0.5, server_momentum=0.9")
        theta, state = apply_round(plan, strategy_for(plan).init(plan, LAYOUT), [1.0, -2.0])
        assert theta == pytest.approx([1.5, -2.0])  # v = [1, -2]
        theta, state = apply_round(plan, state, [1.0, 0.0], theta)
        assert state["velocity"] == pytest.approx([1.9, -1.8])
        assert theta == pytest.approx([2.45, -2.9])

    def test_fedavgm_without_momentum_is_fedavg(self) -> None:
        momentum = plan_with("name='fedavgm', server_learning_rate=1.0, server_momentum=0.0")
        theta, _ = apply_round(momentum, strategy_for(momentum).init(momentum, LAYOUT), [0.3, 0.4])
        assert np.array_equal(theta, apply_round(plan_with("name='fedavg'"), {}, [0.3, 0.4])[0])

    def test_fedprox_adjusts_gradients_by_mu_times_the_way_from_the_start(self) -> None:
        plan = plan_with("name='fedprox', mu=0.5")
        now, start = torch.tensor([3.0, 1.0], requires_grad=True), torch.tensor([1.0, 2.0])
        now.grad = torch.tensor([10.0, 20.0])

        def train(adjust: Any) -> tuple[np.ndarray, int]:
            with torch.no_grad():
                adjust([now], [start])
            return THETA, 1

        result = strategy_for(plan).local(work_of(plan, LAYOUT, THETA, train=train))
        assert now.grad.tolist() == [11.0, 19.5]
        assert now.tolist() == [3.0, 1.0]
        assert result.steps == 1

    def test_fedavg_leaves_gradients_alone(self) -> None:
        seen: list[Any] = []

        def train(adjust: Any) -> tuple[np.ndarray, int]:
            seen.append(adjust)
            return THETA, 1

        plan = plan_with("name='fedavg'")
        strategy_for(plan).local(work_of(plan, LAYOUT, THETA, train=train))
        assert seen == [None]


SECOND = {
    # Reddi et al. 2021, Algorithm 2, from v = τ² = 0.01 with Δ² = [4, 0] and β₂ = 0.9, then with Δ² = [0, 1]
    "fedadagrad": ([4.01, 0.01], [4.01, 1.01]),
    "fedadam": ([0.409, 0.009], [0.3681, 0.1081]),
    "fedyogi": ([0.41, 0.01], [0.41, 0.11]),
}


@pytest.mark.parametrize("name", SECOND)
def test_adaptive_strategies_two_rounds_by_hand(name: str) -> None:
    plan = plan_with(f"name='{name}', server_learning_rate=0.5, beta1=0.8, beta2=0.9, tau=0.1")
    strategy, theta = strategy_for(plan), THETA
    state = strategy.init(plan, LAYOUT)
    assert state["second"] == pytest.approx([0.01, 0.01])
    first = np.zeros(2)
    for delta, second in zip(([2.0, 0.0], [0.0, -1.0]), SECOND[name], strict=True):
        expected_first = 0.8 * first + 0.2 * np.array(delta)
        expected = [t + 0.5 * m / (math.sqrt(v) + 0.1) for t, m, v in zip(theta, expected_first, second, strict=True)]
        theta, state = apply_round(plan, state, delta, theta)
        first = state["first"]
        assert first == pytest.approx(expected_first)
        assert state["second"] == pytest.approx(second)
        assert theta == pytest.approx(expected, rel=1e-6)


def test_fedyogi_lets_a_large_second_moment_shrink() -> None:
    plan = plan_with("name='fedyogi', beta2=0.9")
    _, state = apply_round(plan, {"first": np.zeros(2), "second": np.array([1.0, 1.0])}, [0.5, 2.0])
    assert state["second"] == pytest.approx([1 - 0.1 * 0.25, 1 + 0.1 * 4])


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi", "fedadagrad"])
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=2))
def test_apply_is_pure(name: str, delta: list[float]) -> None:
    plan = plan_with(f"name='{name}'")
    strategy = strategy_for(plan)
    theta, state = THETA.copy(), strategy.init(plan, LAYOUT)
    before = {key: value.copy() for key, value in state.items()}
    one = apply_round(plan, state, delta, theta)
    other = apply_round(plan, state, delta, theta)
    assert np.array_equal(theta, THETA)
    assert all(np.array_equal(state[key], value) for key, value in before.items())
    assert np.array_equal(one[0], other[0])


class TestLeastSquares:
    PLAN = plan_with("name='least-squares'", "rounds.weight_cap=4000")

    def solve(self, inputs: np.ndarray, targets: np.ndarray, cuts: Sequence[int], plan: Plan = PLAN) -> Any:
        """One round over the nodes that `cuts` make of the rows, through the exact sum."""
        strategy, theta = strategy_for(plan), np.zeros(4, np.float32)
        blocks, sums = strategy.blocks(plan, LINEAR), {}
        parts = np.split(np.arange(len(targets)), cuts)
        for rows in parts:
            given = {"rows": lambda rows=rows: (inputs[rows].astype(np.float32), targets[rows])}
            work = work_of(plan, LINEAR, theta, **given)
            vectors = strategy.encode(work, strategy.local(work))
            for name, values in encode_update(blocks, vectors, len(rows), 4000, len(parts)).blocks.items():
                sums[name] = sums.get(name, 0) + values.astype(np.int64)
        means = decode_means(blocks, sums, len(parts), plan.rounds.weight_cap)
        return strategy.apply(plan, LINEAR, theta, strategy.init(plan, LINEAR), means, 1.0)

    def rows(self, rng: np.random.Generator, count: int = 500) -> tuple[np.ndarray, np.ndarray]:
        inputs = rng.normal(size=(count, 3)).astype(np.float32) * [1, 2, 0.5] + [0, 3, -1]
        return inputs, 4 + inputs @ [1.5, -2.0, 0.25] + rng.normal(size=count)

    @pytest.mark.parametrize("cuts", [[], [250], [7, 30, 490]])
    def test_equals_numpy_and_the_textbooks_standard_errors(self, cuts: list[int], rng: np.random.Generator) -> None:
        inputs, targets = self.rows(rng)
        theta, state = self.solve(inputs, targets, cuts)
        matrix = np.column_stack([np.ones(500), inputs.astype(np.float32).astype(np.float64)])
        solution, residual, _, _ = np.linalg.lstsq(matrix, targets)
        assert np.concatenate([theta[:1], theta[1:]]) == pytest.approx(solution, rel=1e-6, abs=1e-6)
        variance = residual[0] / (500 - 4)
        errors = np.sqrt(variance * np.diag(np.linalg.inv(matrix.T @ matrix)))
        assert state["standard_errors"] == pytest.approx(errors, rel=1e-5)

    def test_singular_moments_are_refused(self, rng: np.random.Generator) -> None:
        inputs, targets = self.rows(rng)
        inputs[:, 2] = inputs[:, 1]
        with pytest.raises(RunFailedError, match="singular: two columns carry the same"):
            self.solve(inputs, targets, [200])

    def test_a_constant_column_is_refused(self, rng: np.random.Generator) -> None:
        inputs, targets = self.rows(rng)
        inputs[:, 2] = 1
        with pytest.raises(RunFailedError, match="one is constant over all nodes"):
            self.solve(inputs, targets, [200])

    @pytest.mark.filterwarnings("ignore:invalid value encountered in sqrt")
    @pytest.mark.parametrize("dependence", ["sum of two columns", "every category beside an intercept"])
    def test_dependent_columns_are_refused_however_the_rows_are_dealt(self, dependence: str) -> None:
        for seed in range(8):
            inputs, targets = self.rows(np.random.default_rng(seed))
            if dependence == "sum of two columns":
                inputs[:, 2] = inputs[:, 0] + inputs[:, 1]
            else:
                inputs = np.eye(3)[np.arange(500) * (seed + 2) % 7 % 3]
            for cuts in ([], [70], [200], [123, 300]):
                with pytest.raises(RunFailedError, match="singular"):
                    self.solve(inputs, targets, cuts)

    def test_moments_above_their_bound_are_refused_at_the_node(self, rng: np.random.Generator) -> None:
        plan = plan_with("name='least-squares', moment_bound=3.0")
        with pytest.raises(UsageError, match="block moments has the norm"):
            self.solve(*self.rows(rng), [250], plan)

    def test_sends_moments_and_a_number_of_rows_only(self) -> None:
        moments, rows = strategy_for(self.PLAN).blocks(self.PLAN, LINEAR)
        assert (moments.name, moments.size, moments.over) == ("moments", 15, "refuse")  # 5·6 / 2
        assert (rows.name, rows.size, rows.weight, rows.rows_first) == ("rows", 1, "none", True)
