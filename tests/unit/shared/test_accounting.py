"""What a plan costs: known figures, brute force, and a second accountant."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from concord_shared.accounting import (
    ORDERS,
    Sampling,
    distributed_rdp,
    epsilon_of,
    gaussian_rdp,
    noise_multiplier,
    plan_epsilon,
    round_rdp,
    sampling_of,
)
from concord_shared.errors import PlanError
from concord_shared.plan import Plan
from helpers import IMAGES, plan_of

DELTA = 1e-5


def private_plan(*overrides: str, unit: str = "record", epsilon: float = 3.0) -> Plan:
    dp = f"privacy={{mode='plain', dp={{unit='{unit}', epsilon={epsilon}, delta={DELTA}, clip=10.0}}}}"
    return plan_of(IMAGES, dp, *overrides)


# Sampling


def test_a_batch_is_a_poisson_sample_of_the_expected_size() -> None:
    plan = private_plan("training.batch_size=100", "training.local_epochs=2")
    assert sampling_of(plan, 1000) == Sampling(0.1, 20)
    assert sampling_of(plan, 1001) == Sampling(100 / 1001, 22)


def test_fewer_rows_than_a_batch_are_all_in_it_and_gain_nothing_from_sampling() -> None:
    assert sampling_of(private_plan("training.batch_size=100"), 30) == Sampling(1.0, 1)


def test_local_steps_are_counted_as_they_are() -> None:
    assert sampling_of(private_plan("training.batch_size=10", "training.local_steps=7"), 40) == Sampling(0.25, 7)


def test_a_whole_node_gains_nothing_from_the_sampling_of_its_rows() -> None:
    plan = private_plan("training.batch_size=10", "training.local_steps=7", unit="node")
    assert sampling_of(plan, 40) == Sampling(1.0, 1)


# Known figures


def test_ninety_steps_of_a_thirtieth_at_noise_one() -> None:
    """Figures of dp-accounting's own accountants at q = 1/30, σ = 1, δ = 1e-5: PLD 2.256, RDP 2.699 (all orders)."""
    total = [90 * gaussian_rdp(order, 1.0, 1 / 30) for order in ORDERS]
    assert epsilon_of(total, DELTA) == pytest.approx(2.71, abs=0.02)
    assert epsilon_of(total, DELTA) >= 2.699


@pytest.mark.parametrize(("rounds", "epsilon"), [(1, 0.7255), (10, 2.594), (50, 6.573), (100, 9.997)])
def test_noise_of_five_over_full_rounds_costs_what_the_exact_gaussian_costs(rounds: int, epsilon: float) -> None:
    plan = private_plan(f"rounds.count={rounds}", unit="node", epsilon=epsilon)
    assert noise_multiplier(plan, 1) == pytest.approx(5.0, rel=1e-2)


def test_divergences_are_those_of_a_second_accountant() -> None:
    from opacus.accountants.analysis import rdp

    for rate, multiplier in ((0.01, 0.8), (0.3, 5.0), (1.0, 3.0)):
        theirs = rdp.compute_rdp(q=rate, noise_multiplier=multiplier, steps=1, orders=list(ORDERS))
        ours = [gaussian_rdp(order, multiplier, rate) for order in ORDERS]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12)


# A plan


@pytest.mark.parametrize("rows", [20, 300, 1000, 6000])
@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_the_whole_plan_costs_at_most_its_promise_and_nearly_all_of_it(rows: int, epsilon: float) -> None:
    plan = private_plan("training.batch_size=256", "rounds.count=5", epsilon=epsilon)
    assert 0.99 * epsilon < plan_epsilon(plan, rows) <= epsilon


def test_less_privacy_needs_less_noise_and_more_rounds_more() -> None:
    plan = private_plan("training.batch_size=64", "rounds.count=5")
    assert noise_multiplier(private_plan("training.batch_size=64", "rounds.count=5", epsilon=1.0), 900) > (
        noise_multiplier(plan, 900)
    )
    assert noise_multiplier(private_plan("training.batch_size=64", "rounds.count=9"), 900) > noise_multiplier(plan, 900)


def test_what_rounds_add_up_to_is_above_what_the_plan_costs_at_once_but_not_by_much() -> None:
    plan = private_plan("training.batch_size=256", "rounds.count=20")
    rounds = [20 * each for each in round_rdp(plan, 1000)]
    assert plan_epsilon(plan, 1000) <= epsilon_of(rounds, DELTA) < 1.35 * plan_epsilon(plan, 1000)


def test_a_promise_that_no_noise_keeps_is_refused() -> None:
    with pytest.raises(PlanError, match=r"no noise keeps \d+ steps within epsilon 0\.001"):
        noise_multiplier(private_plan("rounds.count=100000", epsilon=1e-3), 1000)


def test_a_plan_without_a_promise_cannot_be_accounted_for() -> None:
    with pytest.raises(PlanError, match=r"has no \[privacy\.dp\]"):
        round_rdp(plan_of(IMAGES), 100)


@pytest.mark.parametrize(("rdp", "delta"), [(math.nan, DELTA), (-1.0, DELTA), (0.0, 0.0), (0.0, math.nan)])
def test_an_impossible_divergence_or_delta_costs_infinitely_much(rdp: float, delta: float) -> None:
    assert epsilon_of([rdp] * len(ORDERS), delta) == math.inf


# Integer noise


def discrete_gaussian(deviation: float, reach: int = 400) -> NDArray[np.float64]:
    points = np.arange(-reach, reach + 1)
    weights = np.exp(-(points**2) / (2 * deviation**2))
    return np.asarray(weights / weights.sum())


def divergence(order: int, noise: NDArray[np.float64], shift: int) -> float:
    """By brute force, of an integer mechanism with this noise and a sensitivity of `shift`."""
    p, q = np.roll(noise, shift)[shift:], noise[shift:]
    both = (p > 1e-280) & (q > 1e-280)
    terms = order * np.log(p[both]) + (1 - order) * np.log(q[both])
    return float(np.logaddexp.reduce(terms) / (order - 1))


@pytest.mark.parametrize("deviation", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_the_divergence_of_summed_integer_noise_is_never_above_what_is_charged(deviation: float, nodes: int) -> None:
    one = discrete_gaussian(deviation, 60)
    total = one
    for _ in range(nodes - 1):
        total = np.convolve(total, one, "same")
    for order in (2, 4, 8):
        exact, charged = divergence(order, total, 1), distributed_rdp(order, 1.0, deviation, nodes, 1)
        assert exact <= charged * (1 + 1e-9)
        if deviation >= 4:
            assert charged == pytest.approx(exact, rel=1e-3)


def test_from_a_deviation_of_four_on_integer_noise_costs_what_continuous_noise_does() -> None:
    for order in ORDERS:
        assert distributed_rdp(order, 70.0, 4.0, 100, 10**8) == pytest.approx(gaussian_rdp(order, 40 / 70), rel=1e-12)
