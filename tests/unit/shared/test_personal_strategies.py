"""SCAFFOLD, FedNova, Ditto: each step by hand, on a model of two numbers; and what does not go together."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from concord_shared.blocks import decode_means, encode_update
from concord_shared.errors import PlanError, UsageError
from concord_shared.plan import Plan
from concord_shared.strategies import LocalResult, LocalWork, strategy_for
from concord_shared.strategies.fednova import work_of
from concord_shared.tensors import Layout
from helpers import REGRESSION, named, plan_of

LAYOUT = Layout.of({"a": (1,), "b": (1,)})
THETA = np.array([1.0, -1.0], np.float32)


def plan_with(strategy: str, *overrides: str) -> Plan:
    return plan_of(REGRESSION, f"strategy={{{strategy}}}", "rounds.weight_cap=3", *overrides)


def work_with(plan: Plan, train: Callable[..., Any], state: Any = None, broadcast: Any = None) -> LocalWork:
    return LocalWork(plan, LAYOUT, THETA, broadcast or {}, state or {}, 0.1, train, lambda: (None, None))  # type: ignore[arg-type]


def stepping(steps: int, slope: np.ndarray, seen: list[Any]) -> Callable[..., Any]:
    """Plain SGD of rate 0.1 on a constant slope, with the strategy's change to it."""

    def train(adjust: Any, start: np.ndarray | None = None, part: str = "all", epochs: int = 0) -> Any:
        begin = THETA if start is None else start
        now = [torch.tensor([float(value)], requires_grad=True) for value in begin]
        before = [value.detach().clone() for value in now]
        seen.append(begin.copy())
        for _ in range(steps):
            for value, grad in zip(now, slope, strict=True):
                value.grad = torch.tensor([float(grad)])
            with torch.no_grad():
                if adjust:
                    adjust(now, before)
                for value in now:
                    assert value.grad is not None
                    value -= 0.1 * value.grad
        return np.array([value.item() for value in now], np.float32), steps

    return train


def round_of(
    plan: Plan, theta: np.ndarray, state: Any, nodes: list[tuple[LocalWork, int]]
) -> tuple[Any, Any, list[Any]]:
    """One round through the blocks' own bounds and weights; rows of each node are given."""
    strategy, sums, kept = strategy_for(plan), dict[str, Any](), []
    blocks = strategy.blocks(plan, LAYOUT)
    for work, rows in nodes:
        result = strategy.local(work)
        kept.append(dict(result.node_state))
        for name, values in encode_update(blocks, strategy.encode(work, result), rows, 3, len(nodes)).blocks.items():
            sums[name] = sums.get(name, 0) + values.astype(np.int64)
    means = decode_means(blocks, sums, len(nodes), plan.rounds.weight_cap)
    return *strategy.apply(plan, LAYOUT, theta, state, means, 1.0), kept


class TestScaffold:
    def test_two_rounds_by_hand(self) -> None:
        """Slopes [2, 0] and [0, 4], two steps of 0.1 each, equal rows.

        Round 1, all controls 0: the nodes end 0.2 · slope away; their controls become their slopes, c the mean [1, 2].
        Round 2: each step follows slope − cᵢ + c = c at both nodes: both move by −0.2 · [1, 2], and no drift is left.
        """
        plan = plan_with("name='scaffold'")
        slopes = np.array([2.0, 0.0]), np.array([0.0, 4.0])
        state = strategy_for(plan).init(plan, LAYOUT)
        nodes = [(work_with(plan, stepping(2, slope, []), broadcast=state), 3) for slope in slopes]
        theta, state, kept = round_of(plan, THETA, state, nodes)
        assert theta == pytest.approx([0.8, -1.4], abs=1e-5)
        assert [each["control"] for each in kept] == [pytest.approx([2, 0], abs=1e-5), pytest.approx([0, 4], abs=1e-5)]
        assert state["control"] == pytest.approx([1.0, 2.0], abs=1e-5)
        nodes = [
            (work_with(plan, stepping(2, slope, []), own, state), 3) for slope, own in zip(slopes, kept, strict=True)
        ]
        strategy = strategy_for(plan)
        for work, _ in nodes:
            moved = strategy.encode(work, strategy.local(work))
            assert moved["delta"] == pytest.approx([-0.2, -0.4], abs=1e-5)
            assert moved["control"] == pytest.approx([0.0, 0.0], abs=1e-4)

    def test_answers_of_half_the_weight_move_the_control_half_as_far(self) -> None:
        plan = plan_with("name='scaffold', server_learning_rate=0.5")
        means = {"delta": np.array([1.0, 0.0]), "control": np.array([4.0, 2.0])}
        theta, state = strategy_for(plan).apply(plan, LAYOUT, THETA, {"control": np.array([1.0, 1.0])}, means, 0.5)
        assert theta == pytest.approx([1.5, -1.0])
        assert state["control"] == pytest.approx([3.0, 2.0])


class TestFedNova:
    @pytest.mark.parametrize(
        ("momentum", "steps", "work"),
        # with momentum ½ the steps of a constant gradient move 1, 1.5, 1.75: 4.25 in three
        [(0.0, 3, 3.0), (0.5, 1, 1.0), (0.5, 3, 4.25), (0.5, 2, 2.5)],
    )
    def test_work_of_steps(self, momentum: float, steps: int, work: float) -> None:
        plan = plan_with("name='fednova'", f"training.momentum={momentum}")
        assert work_of(plan.training, steps) == pytest.approx(work)

    def test_a_round_by_hand(self) -> None:
        """Slopes [1, 0] and [0, 1]; 2 and 6 steps of 0.1; 1 and 3 rows, so p = ¼, ¾.

        Δ = [−0.2, 0] and [0, −0.6], a step −0.1 each; τ_eff = ¼ · 2 + ¾ · 6 = 5: θ − 5 · 0.1 · [¼, ¾].
        FedAvg would move by [−0.05, −0.45]: nine to one, for rows of three to one.
        """
        plan = plan_with("name='fednova'")
        nodes = [
            (work_with(plan, stepping(2, np.array([1.0, 0.0]), [])), 1),
            (work_with(plan, stepping(6, np.array([0.0, 1.0]), [])), 3),
        ]
        theta, _, _ = round_of(plan, THETA, {}, nodes)
        assert theta - THETA == pytest.approx([-0.125, -0.375], abs=1e-5)

    def test_with_equal_steps_it_is_fedavg(self) -> None:
        ends = []
        for name in ("fednova", "fedavg"):
            plan = plan_with(f"name='{name}'", "training.momentum=0.9")
            nodes = [(work_with(plan, stepping(4, np.array([1.0, rows]), [])), rows) for rows in (1, 3)]
            ends.append(round_of(plan, THETA, {}, nodes)[0])
        assert ends[0] == pytest.approx(ends[1], abs=1e-5)

    def test_no_word_of_a_nodes_steps_makes_the_model_move_further_than_an_update_may(self) -> None:
        plan = plan_with("name='fednova'", "rounds.update_bound=2.0")
        means = {"delta": np.array([0.3, 0.4]), "tau": np.array([2.0**24])}
        theta, _ = strategy_for(plan).apply(plan, LAYOUT, THETA, {}, means, 1.0)
        assert theta - THETA == pytest.approx([1.2, 1.6])

    @pytest.mark.parametrize("momentum", [0.0, 0.99])
    def test_nobody_took_more_steps_than_the_plan_has(self, momentum: float) -> None:
        many = ("training.local_steps=200000", f"training.momentum={momentum}")
        plan = plan_with("name='fednova'", *many)
        most = work_of(plan.training, 200_000)
        bound = named(strategy_for(plan).blocks(plan, LAYOUT), "tau")
        assert (bound.bound, bound.over) == (most, "refuse")
        work = work_with(plan, stepping(1, np.zeros(2), []))
        for steps, refused in ((200_000, False), (200_001, True)):
            vectors = strategy_for(plan).encode(work, LocalResult(THETA, steps))
            with pytest.raises(UsageError, match="tau") if refused else nullcontext():
                encode_update((bound,), {"tau": vectors["tau"]}, 3, 3, 2)


class TestDitto:
    def test_a_round_by_hand(self) -> None:
        """v = [2, 0], λ = ½, slope 0, one step of 0.1: v − 0.05 (v − θ) = [1.95, −0.05]; the shared model stays."""
        plan, seen = plan_with("name='ditto', pull=0.5"), list[np.ndarray]()
        work = work_with(plan, stepping(1, np.zeros(2), seen), {"own": np.array([2.0, 0.0], np.float32)})
        result = strategy_for(plan).local(work)
        assert result.node_state["own"] == pytest.approx([1.95, -0.05])
        assert np.array_equal(result.theta, THETA)
        assert [each.tolist() for each in seen] == [[2.0, 0.0], [1.0, -1.0]]
        assert [block.name for block in strategy_for(plan).blocks(plan, LAYOUT)] == ["delta"], "v never leaves"

    def test_its_own_model_begins_at_the_shared_one_and_is_what_the_node_evaluates(self) -> None:
        strategy = strategy_for(plan_with("name='ditto'"))
        assert np.array_equal(strategy.own(THETA, {}), THETA)
        assert np.array_equal(strategy.own(THETA, {"own": -THETA}), -THETA)


NODE_PRIVACY = "privacy={mode='private', dp={unit='node', epsilon=5.0, delta=1e-5, clip=10.0}}"
RECORD_PRIVACY = "privacy={mode='plain', dp={unit='record', epsilon=5.0, delta=1e-5, clip=1.0}}"
PLAIN_ROWS = "preprocessing={scope='none'}"


@pytest.mark.parametrize(
    ("strategy", "overrides", "reason"),
    [
        ("fednova", ["training.optimiser=adam"], "weighs the steps of SGD"),
        ("fednova", [PLAIN_ROWS, NODE_PRIVACY], "how many steps a node took"),
        ("fednova", [PLAIN_ROWS, RECORD_PRIVACY], "how many steps a node took"),
        ("fednova", [PLAIN_ROWS, "privacy.mode=robust"], "no node's word"),
        ("scaffold", ["training.momentum=0.9"], "plain SGD"),
        ("scaffold", [PLAIN_ROWS, NODE_PRIVACY], "a second vector"),
        ("scaffold", [PLAIN_ROWS, "privacy.mode=robust"], "one node can bend"),
        ("ditto", [PLAIN_ROWS, RECORD_PRIVACY], "without a place in the budget"),
        ("fedrep", [PLAIN_ROWS, RECORD_PRIVACY], "without a place in the budget"),
        ("fedbn", [PLAIN_ROWS, NODE_PRIVACY], "without a place in the budget"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(strategy: str, overrides: list[str], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        plan_of(REGRESSION, f"strategy.name={strategy}", *overrides)


@pytest.mark.parametrize("strategy", ["fednova", "scaffold", "fedbn", "ditto", "fedrep"])
def test_masks_go_with_all_of_them(strategy: str) -> None:
    plan = plan_of(REGRESSION, f"strategy.name={strategy}", "privacy.mode=private")
    blocks = strategy_for(plan).blocks(plan, LAYOUT)
    assert named(blocks, "delta").weight == "examples"
    assert all(block.weight != "none" for block in blocks)


def fixed_point(plan: Plan, nodes: list[tuple[float, float, int, int]], rounds: int = 300) -> float:
    """Where the first number ends when node i minimises h/2 · (x − t)², for nodes (h, t, steps, rows)."""
    strategy = strategy_for(plan)
    blocks, state, theta = strategy.blocks(plan, LAYOUT), strategy.init(plan, LAYOUT), THETA
    kept: list[Any] = [{} for _ in nodes]
    rate = plan.training.learning_rate
    for _ in range(rounds):
        sums: dict[str, Any] = {}
        for place, (curvature, target, steps, rows) in enumerate(nodes):

            def train(adjust: Any, h: float = curvature, t: float = target, count: int = steps) -> Any:
                now = [torch.tensor([float(value)], requires_grad=True) for value in theta]  # noqa: B023 - called at once
                begin = [value.detach().clone() for value in now]
                for _ in range(count):
                    with torch.no_grad():
                        for value in now:
                            value.grad = h * (value - t)
                        if adjust:
                            adjust(now, begin)
                        for value in now:
                            value -= rate * value.grad
                return np.array([value.item() for value in now], np.float32), count

            work = LocalWork(plan, LAYOUT, theta, state, kept[place], rate, train, lambda: (None, None))  # type: ignore[arg-type]
            result = strategy.local(work)
            kept[place] = result.node_state
            for name, values in encode_update(
                blocks, strategy.encode(work, result), rows, 3, len(nodes)
            ).blocks.items():
                sums[name] = sums.get(name, 0) + values.astype(np.int64)
        theta, state = strategy.apply(plan, LAYOUT, theta, state, decode_means(blocks, sums, len(nodes), 3), 1.0)
    return float(theta[0])


def test_fednova_ends_at_the_optimum_where_nodes_take_unequal_steps_and_fedavg_does_not() -> None:
    """Optima 0 and 1 of 1 and 3 rows: ¾. Of 2 and 6 steps of 0.01 FedAvg makes 0.0585 · ¾ to 0.0199 · ¼: 0.898."""
    nodes = [(1.0, 0.0, 2, 1), (1.0, 1.0, 6, 3)]
    ends = {
        name: fixed_point(plan_with(f"name='{name}'", "training.learning_rate=0.01"), nodes)
        for name in ("fedavg", "fednova")
    }
    assert ends["fedavg"] == pytest.approx(0.898, abs=0.005)
    assert ends["fednova"] == pytest.approx(0.75, abs=0.01)


def test_scaffold_ends_at_the_optimum_where_nodes_differ_and_fedavg_does_not() -> None:
    """Curvatures 1 and 4, optima 0 and 1, 10 steps of 0.05: least at 0.8. FedAvg: 0.893 / (0.401 + 0.893)."""
    nodes = [(1.0, 0.0, 10, 3), (4.0, 1.0, 10, 3)]
    ends = {
        name: fixed_point(plan_with(f"name='{name}'", "training.learning_rate=0.05"), nodes)
        for name in ("fedavg", "scaffold")
    }
    assert ends["fedavg"] == pytest.approx(0.69, abs=0.005)
    assert ends["scaffold"] == pytest.approx(0.8, abs=0.005)


def test_a_slow_node_counts_by_the_steps_that_it_got_to() -> None:
    """Of one slope at both nodes, one with a single step where the other has 9: θ moves by τ_eff = 5 steps of it."""
    timed = ("training.local_steps=9", "training.local_seconds=5.0", "training.deterministic=false")
    plan = plan_with("name='fednova'", "training.optimiser='sgd'", *timed)
    slope = np.array([1.0, 2.0])
    nodes = [(work_with(plan, stepping(steps, slope, [])), 3) for steps in (1, 9)]
    theta, _, _ = round_of(plan, THETA, {}, nodes)
    np.testing.assert_allclose(theta, THETA - 0.1 * 5 * slope, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("strategy.name=fedavg",), "choose strategy fednova, which counts by steps"),
        (("strategy.name=fednova", "training.deterministic=true"), "set deterministic = false"),
        (("strategy.name=fednova", "rounds.deadline_s=5.0"), "no time to answer"),
    ],
)
def test_a_clock_goes_with_what_counts_steps(overrides: tuple[str, ...], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        plan_of(REGRESSION, "training.local_seconds=5.0", "training.deterministic=false", *overrides)
