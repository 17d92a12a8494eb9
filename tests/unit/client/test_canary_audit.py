"""An audit of DP-SGD by canaries (Steinke, Nasr and Jagielski 2023): what a run shows must not refute what it claims.

Each canary is a row whose gradient is a coordinate of its own, in the data or not by a coin. Who sees the model guesses
for the coordinates that moved most that their canaries were in, for those that moved least that they were not. An
(ε, δ) run lets at most a Binomial(guesses, e^ε / (1 + e^ε)) of guesses be right, up to δ: from the number that was
right follows, at 95 %, the least ε that the run can have had.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from concord_client.private_training import train_privately
from concord_shared import noise
from concord_shared.accounting import noise_multiplier, sampling_of
from concord_shared.noise import SecretStream
from concord_shared.plan import Plan
from helpers import IMAGES, plan_of

EPSILON, DELTA = 1.5, 1e-6


def audited_plan(batch: int, steps: int) -> Plan:
    dp = f"privacy={{mode='plain', dp={{unit='record', epsilon={EPSILON}, delta={DELTA}, clip=1.0}}}}"
    return plan_of(IMAGES, dp, f"training.batch_size={batch}", f"training.local_steps={steps}", "rounds.count=1")


def lowest_epsilon(right: int, guesses: int, canaries: int) -> float:
    """The least ε with P[right or more] ≥ 5 %, the term of δ for all canaries included (their theorem, simplified)."""

    def chance(epsilon: float) -> float:
        share = 1 / (1 + math.exp(-epsilon))
        logs = [
            math.lgamma(guesses + 1) - math.lgamma(k + 1) - math.lgamma(guesses - k + 1)
            + k * math.log(share) + (guesses - k) * math.log1p(-share)
            for k in range(right, guesses + 1)
        ]  # fmt: skip
        return sum(map(math.exp, logs)) + 2 * DELTA * canaries

    low, high = 0.0, 20.0
    if chance(low) >= 0.05:
        return 0.0
    while high - low > 1e-3:
        low, high = ((low + high) / 2, high) if chance((low + high) / 2) < 0.05 else (low, (low + high) / 2)
    return low


def audit(canaries: int, guesses: int, share: float, steps: int) -> float:
    """The lower bound of ε that one run of DP-SGD over the canaries shows."""
    chance = np.random.default_rng()
    inside = chance.random(canaries) < 0.5
    rows = torch.eye(canaries)[torch.from_numpy(inside)] * 100  # far above the clip
    plan = audited_plan(max(1, round(share * len(rows))), steps)
    model = nn.Linear(canaries, 1, bias=False)
    nn.init.zeros_(model.weight)
    train_privately(
        model, lambda outputs, targets: outputs[:, 0], rows, torch.zeros(len(rows)),
        torch.optim.SGD(model.parameters(), 1.0), sampling_of(plan, len(rows)), noise_multiplier(plan, len(rows)), 1.0,
    )  # fmt: skip
    order = np.argsort(model.weight.detach()[0].numpy())  # the gradient is positive: who is in, sinks
    right = int(inside[order[: guesses // 2]].sum() + (~inside[order[-(guesses // 2) :]]).sum())
    return lowest_epsilon(right, guesses, canaries)


@pytest.fixture(params=["no noise", "a tenth of the noise", "every step the same"])
def weakened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Controls: the audit must catch them, or it could not fail."""
    original = SecretStream.normals
    broken: dict[str, Callable[[SecretStream, int], object]] = {
        "no noise": lambda stream, count: np.zeros(count),
        "a tenth of the noise": lambda stream, count: original(stream, count) / 10,
        "every step the same": lambda stream, count: np.full(count, 3.0),
    }
    monkeypatch.setattr(noise.SecretStream, "normals", broken[request.param])
    return str(request.param)


def test_bounds_of_the_audit_are_those_of_the_binomial() -> None:
    assert lowest_epsilon(150, 300, 1000) == 0
    assert lowest_epsilon(300, 300, 1000) > EPSILON + 1
    assert lowest_epsilon(200, 300, 1000) < lowest_epsilon(230, 300, 1000)


def test_what_canaries_show_is_below_what_was_claimed() -> None:
    shown = audit(1000, 300, 1.0, 5)
    assert shown < EPSILON


def test_without_enough_noise_the_same_audit_shows_a_violation(weakened: str) -> None:
    assert audit(1000, 300, 1.0, 5) > EPSILON


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_many_audits_with_more_canaries(share: float) -> None:
    """At 95 % each, one in 20 may go above what its run really had, which is far below the claim."""
    shown = [audit(2000, 600, share, 30) for _ in range(10)]
    print(f"sampling rate {share}: lower bounds {[round(each, 2) for each in shown]}, claimed {EPSILON}")
    assert 0 < max(shown) < EPSILON


@pytest.mark.slow
def test_many_audits_see_missing_noise_each_time(weakened: str) -> None:
    assert min(audit(2000, 600, 1.0, 30) for _ in range(5)) > EPSILON
