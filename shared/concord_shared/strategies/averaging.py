"""FedAvg, FedAvgM and FedProx: the weighted mean of the nodes' differences, and two ways to steady it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.plan.schema import Plan
from concord_shared.plan.strategies import FedAvgM, FedProx
from concord_shared.strategies.base import LocalResult, LocalWork, State, Strategy, delta_block, encode_delta
from concord_shared.tensors import Float32Vector, Layout

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_mean", "delta_only", "fedavg", "fedavgm", "fedprox", "no_state", "train_plainly"]

Means = Mapping[str, NDArray[Any]]


def train_plainly(work: LocalWork) -> LocalResult:
    theta, steps = work.train(None)
    return LocalResult(theta, steps)


def no_state(plan: Plan, layout: Layout) -> State:
    return {}


def add_mean(
    plan: Plan, layout: Layout, theta: Float32Vector, state: State, means: Means, share: float
) -> tuple[Float32Vector, State]:
    """θ ← θ + Δ̄ (McMahan et al. 2017, Algorithm 1)."""
    return np.add(theta, means["delta"], dtype=np.float64, casting="same_kind", out=np.empty_like(theta)), state


def _zero_velocity(plan: Plan, layout: Layout) -> State:
    return {"velocity": np.zeros(layout.size)}


def _add_with_momentum(
    plan: Plan, layout: Layout, theta: Float32Vector, state: State, means: Means, share: float
) -> tuple[Float32Vector, State]:
    """v ← βv + Δ̄; θ ← θ + ηv (Hsu et al. 2019, section 4.3)."""
    section = plan.strategy
    assert isinstance(section, FedAvgM)
    velocity = section.server_momentum * state["velocity"] + means["delta"]
    return (theta + section.server_learning_rate * velocity).astype(np.float32), {"velocity": velocity}


def _train_near_start(work: LocalWork) -> LocalResult:
    """Adds μ(w − θ) to each gradient (Li et al. 2020, equation 2)."""
    import torch

    section = work.plan.strategy
    assert isinstance(section, FedProx)
    mu = section.mu

    def adjust(parameters: list["Tensor"], start: list["Tensor"]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_add_(gradients, torch._foreach_sub(parameters, start), alpha=mu)  # type: ignore[arg-type]

    theta, steps = work.train(adjust)
    return LocalResult(theta, steps)


def delta_only(plan: Plan, layout: Layout) -> Any:
    return (delta_block(plan, layout),)


fedavg = Strategy("fedavg", delta_only, no_state, train_plainly, encode_delta, add_mean)
fedavgm = Strategy("fedavgm", delta_only, _zero_velocity, train_plainly, encode_delta, _add_with_momentum)
fedprox = Strategy("fedprox", delta_only, no_state, _train_near_start, encode_delta, add_mean)
