"""What a plan with [privacy.dp] costs: the noise that it needs, and the privacy that it spends.

    a plan, fixed before it begins    privacy loss distributions (PLD), tight: noise_multiplier, plan_epsilon
    rounds that add up in a ledger    Rényi divergences (RDP) at fixed orders: round_rdp, epsilon_of

A node works all of it out from its own number of rows, never from figures that came with a message. Neighbours differ
by one record added or removed (unit record), or by one node's Update replaced by zeros (unit node); the numbers of rows
and nodes are public. Every rounding errs towards privacy. Pure; dp-accounting is imported where it is used.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from concord_shared.errors import PlanError
from concord_shared.plan.privacy import DifferentialPrivacy
from concord_shared.plan.schema import Plan
from concord_shared.statistics import Programme

__all__ = [
    "DELTA_OF_DRAWS",
    "ORDERS",
    "Sampling",
    "distributed_rdp",
    "epsilon_of",
    "gaussian_rdp",
    "noise_multiplier",
    "plan_epsilon",
    "round_rdp",
    "rounds_of",
    "sampling_of",
]

ORDERS = (*range(2, 33), 36, 40, 48, 56, 64, 80, 96, 128, 192, 256, 512, 1024)
"""The orders of every Rényi divergence here. Fixed for ever: ledgers add up at them."""
TOLERANCE = 1e-3
"""Noise is at most this share above the least that keeps the promise."""
MULTIPLIER_MIN, MULTIPLIER_MAX = 0.25, 1e6
TIGHT_STEPS_MAX = 100_000
"""Beyond, RDP answers, which needs no time: a plan that was written for it must not keep a node busy for hours."""
DELTA_OF_DRAWS = 0.1
"""The share of delta that is kept for integer noise being drawn from tables of finite precision."""


@dataclass(frozen=True)
class Sampling:
    """rate: q, the chance of each record to be in a step. steps: of one round, each with its own noise."""

    rate: float
    steps: int


def sampling_of(plan: Plan, rows: int) -> Sampling:
    """Of one training round at a node with `rows` training rows."""
    if _promise(plan).unit == "node" or plan.kind == "statistics":
        return Sampling(1.0, 1)
    assert rows >= 1, "a node without training rows trains in no round"
    training = plan.training
    batch = training.batch_of(rows)
    return Sampling(batch / rows, training.local_steps or training.local_epochs * math.ceil(rows / batch))


def rounds_of(plan: Plan) -> int:
    """How often a plan asks for something with noise in it: each time is one charge."""
    return Programme.of(plan).stages if plan.kind == "statistics" else plan.rounds.count


def noise_multiplier(plan: Plan, rows: int) -> float:
    """Standard deviation of the noise over the clip, with which all rounds of the plan cost at most its epsilon.

    Args:
        rows: training rows of the node; without meaning where the unit is a node.

    Raises:
        PlanError: no noise is enough.
    """
    dp, sampling = _promise(plan), sampling_of(plan, rows)
    return _calibrated(sampling.rate, sampling.steps * rounds_of(plan), dp.epsilon, _delta(plan, dp))


def plan_epsilon(plan: Plan, rows: int) -> float:
    """Of the whole plan at its delta, by PLD: at most the epsilon that it promises."""
    dp, sampling = _promise(plan), sampling_of(plan, rows)
    steps = sampling.steps * rounds_of(plan)
    return _epsilon(sampling.rate, steps, noise_multiplier(plan, rows), _delta(plan, dp), dp.epsilon)


def round_rdp(plan: Plan, rows: int) -> tuple[float, ...]:
    """The Rényi divergence of one training round, at each of ORDERS. Rounds add up order by order."""
    sampling, multiplier = sampling_of(plan, rows), noise_multiplier(plan, rows)
    return tuple(sampling.steps * gaussian_rdp(order, multiplier, sampling.rate) for order in ORDERS)


def epsilon_of(rdp: Sequence[float], delta: float) -> float:
    """The smallest epsilon that divergences at ORDERS prove (Canonne, Kamath and Steinke 2020, proposition 12)."""
    assert len(rdp) == len(ORDERS)
    if not (0 < delta < 1 and all(each >= 0 for each in rdp)):  # NaN too
        return math.inf
    proven: list[float] = [
        divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        for order, divergence in zip(ORDERS, rdp, strict=True)
    ]
    return max(0.0, min(proven))


def gaussian_rdp(order: int, multiplier: float, rate: float = 1.0) -> float:
    """Of the Gaussian mechanism on a Poisson sample: Mironov, Talwar and Zhang 2019, section 3.3 (whole orders)."""
    if rate == 1.0:
        return order / (2 * multiplier * multiplier)
    terms = [
        math.log(math.comb(order, k))
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + k * (k - 1) / (2 * multiplier**2)
        for k in range(order + 1)
    ]
    most = max(terms)
    return max(0.0, most + math.log(math.fsum(math.exp(term - most) for term in terms))) / (order - 1)


def distributed_rdp(order: int, sensitivity: float, deviation: float, nodes: int, size: int) -> float:
    """Of a sum in which `nodes` add discrete Gaussian noise each (Kairouz, Liu and Steinke 2021, theorem 1).

    Args:
        sensitivity: L2, of integer vectors `(size,)`.
        deviation: of the noise of one node and coordinate, at least 0.5.

    A sum of discrete Gaussians is not one: τ bounds the difference. From a deviation of 4 on, τ is below 1e-60 and this
    is the Gaussian mechanism's divergence to the last bit.
    """
    assert deviation >= 0.5
    tau = 10 * sum(math.exp(-2 * math.pi**2 * deviation**2 * k / (k + 1)) for k in range(1, nodes))
    ratio = sensitivity / (math.sqrt(nodes) * deviation)
    return order / 2 * min(ratio**2 + tau * size / 2, (ratio + tau * math.sqrt(size)) ** 2)


def _promise(plan: Plan) -> DifferentialPrivacy:
    if plan.privacy.dp is None:
        raise PlanError(f"plan {plan.name} has no [privacy.dp]: it promises nothing that could be accounted for")
    return plan.privacy.dp


def _delta(plan: Plan, dp: DifferentialPrivacy) -> float:
    return dp.delta if plan.noise == "dp-sgd" else dp.delta * (1 - DELTA_OF_DRAWS)


@lru_cache(maxsize=4096)
def _calibrated(rate: float, steps: int, epsilon: float, delta: float) -> float:
    """RDP gives a bracket in milliseconds; PLD, which is tighter, then finds the least noise within it."""

    def tight(multiplier: float) -> float:
        return _epsilon(rate, steps, multiplier, delta, epsilon)

    def rough(multiplier: float) -> float:
        return _rough_epsilon(rate, steps, multiplier, delta) if rate < 1 else tight(multiplier)

    high = MULTIPLIER_MIN
    while rough(high) > epsilon:
        high *= 1.5
        if high > MULTIPLIER_MAX:
            raise PlanError(f"privacy.dp: no noise keeps {steps} steps within epsilon {epsilon:g} at delta {delta:g}")
    while tight(high) > epsilon:  # discretised upwards, PLD may lie a little above
        high *= 1.05
    low = high
    while tight(low) <= epsilon and high > MULTIPLIER_MIN:
        high, low = low, low / 1.2
    while high > low * (1 + TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if tight(middle) <= epsilon else (middle, high)
    return high


@lru_cache(maxsize=4096)
def _epsilon(rate: float, steps: int, multiplier: float, delta: float, about: float) -> float:
    """Of `steps` Gaussian mechanisms on Poisson samples. about: the epsilon near which it matters."""
    import dp_accounting

    if rate == 1.0:  # together they are one Gaussian mechanism: exact (Balle and Wang 2018)
        return float(dp_accounting.get_epsilon_gaussian(multiplier / math.sqrt(steps), delta))
    if steps > TIGHT_STEPS_MAX:
        return _rough_epsilon(rate, steps, multiplier, delta)
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=min(1e-3, about / 1000))
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier))
    return float(accountant.compose(event, steps).get_epsilon(delta))


def _rough_epsilon(rate: float, steps: int, multiplier: float, delta: float) -> float:
    return epsilon_of([steps * gaussian_rdp(order, multiplier, rate) for order in ORDERS], delta)
