"""FedNova: a node that takes more steps than others does not pull the model to itself (Wang et al. 2020).

J. Wang, Q. Liu, H. Liang, G. Joshi, H. V. Poor: Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization, NeurIPS 2020, equation 6. Of node i with τᵢ steps, Δᵢ is divided by aᵢ, which is τᵢ for plain SGD, and
(τᵢ − ρ(1 − ρ^τᵢ)/(1 − ρ)) / (1 − ρ) with momentum ρ (section 4.2); then θ ← θ + τ_eff · Σ pᵢ Δᵢ / aᵢ, with
τ_eff = Σ pᵢ aᵢ. Block `delta` is Δᵢ · a_min / aᵢ, with a_min of the fewest steps that a plan allows (one an epoch), so
that its bound cuts no node more than it would in FedAvg; block `tau` is aᵢ. θ moves by no more than that bound, as in
FedAvg: else a node could make the others' Updates as long as it likes, by what it says of its steps.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.blocks import Block
from concord_shared.plan.schema import Plan
from concord_shared.plan.training import Training
from concord_shared.quantiser import clip_to_bound
from concord_shared.strategies.averaging import no_state, train_plainly
from concord_shared.strategies.base import LocalResult, LocalWork, State, Strategy, delta_block
from concord_shared.tensors import Float32Vector, Layout

__all__ = ["fednova", "work_of"]

WORK_MAX = float(1 << 24)
"""Of `tau` where a plan counts epochs: steps, times 1 / (1 − ρ), that a node can have taken in one round."""


def work_of(training: Training, steps: int) -> float:
    """‖aᵢ‖₁: what `steps` steps of the plan's SGD move, in steps without momentum."""
    rho = training.momentum
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)


def _least(plan: Plan) -> float:
    training = plan.training
    fewest = 1 if training.local_seconds else training.local_steps or training.local_epochs
    return work_of(training, fewest)


def _blocks(plan: Plan, layout: Layout) -> tuple[Block, ...]:
    delta, steps = delta_block(plan, layout), plan.training.local_steps
    most = work_of(plan.training, steps) if steps else WORK_MAX
    return delta, Block("tau", 1, delta.weight, most, 64, over="refuse")


def _encode(work: LocalWork, result: LocalResult) -> dict[str, NDArray[Any]]:
    done = work_of(work.plan.training, max(1, result.steps))
    scale = _least(work.plan) / done
    return {"delta": (result.theta - work.theta) * np.float32(scale), "tau": np.array([done])}


def _apply(
    plan: Plan, layout: Layout, theta: Float32Vector, state: State, means: Mapping[str, NDArray[Any]], share: float
) -> tuple[Float32Vector, State]:
    factor = float(means["tau"][0]) / _least(plan)
    moved, _ = clip_to_bound(factor * means["delta"], plan.rounds.update_bound)
    return (theta + moved).astype(np.float32), state


fednova = Strategy("fednova", _blocks, no_state, train_plainly, _encode, _apply)
