"""SCAFFOLD: control variates take the drift out of local steps (Karimireddy et al. 2020, Algorithm 1, option II).

S. P. Karimireddy, S. Kale, M. Mohri, S. Reddi, S. Stich, A. T. Suresh: SCAFFOLD: Stochastic Controlled Averaging for
Federated Learning, ICML 2020. Each gradient gets + c − cᵢ; after K steps of rate η from x to y

    cᵢ⁺ = cᵢ − c + (x − y) / (K η)        stays at the node
    x ← x + ηg · mean(y − x)              c ← c + (|S| / N) · mean(cᵢ⁺ − cᵢ)

The paper's means are over nodes; here both are weighted as every Update is, so that the sum that is minimised is the
one that FedAvg minimises, and |S| / N is the weight of those who answered among that of all. So c stays the mean of all
nodes' cᵢ, whoever is asked or stays away; what the bound cuts from a change is cut from the node's own cᵢ⁺ too.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.blocks import Block
from concord_shared.plan.schema import Plan
from concord_shared.plan.strategies import Scaffold
from concord_shared.quantiser import clip_to_bound
from concord_shared.strategies.base import LocalResult, LocalWork, State, Strategy, delta_block
from concord_shared.tensors import Float32Vector, Layout

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["scaffold"]


def _blocks(plan: Plan, layout: Layout) -> tuple[Block, ...]:
    section, delta = plan.strategy, delta_block(plan, layout)
    assert isinstance(section, Scaffold)
    return delta, Block("control", layout.size, delta.weight, section.control_bound, plan.rounds.ring_bits)


def _init(plan: Plan, layout: Layout) -> State:
    return {"control": np.zeros(layout.size)}


def _local(work: LocalWork) -> LocalResult:
    import torch

    section = work.plan.strategy
    assert isinstance(section, Scaffold)
    own = work.node_state.get("control", np.zeros(work.layout.size))
    drift = (work.broadcast["control"] - own).astype(np.float32)
    corrections = [torch.from_numpy(view) for view in work.layout.split(drift).values()]

    def adjust(parameters: list["Tensor"], start: list["Tensor"]) -> None:
        for parameter, correction in zip(parameters, corrections, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(correction.to(parameter.device))

    theta, steps = work.train(adjust)
    slope = (work.theta - theta).astype(np.float64) / (max(1, steps) * work.learning_rate)
    change = slope - work.broadcast["control"]
    return LocalResult(
        theta, steps, {"control": own + clip_to_bound(change, section.control_bound)[0]}, {"change": change}
    )


def _encode(work: LocalWork, result: LocalResult) -> dict[str, NDArray[Any]]:
    return {"delta": result.theta - work.theta, "control": result.extra["change"]}


def _apply(
    plan: Plan, layout: Layout, theta: Float32Vector, state: State, means: Mapping[str, NDArray[Any]], share: float
) -> tuple[Float32Vector, State]:
    section = plan.strategy
    assert isinstance(section, Scaffold)
    moved = (theta + section.server_learning_rate * means["delta"]).astype(np.float32)
    return moved, {"control": state["control"] + share * means["control"]}


scaffold = Strategy("scaffold", _blocks, _init, _local, _encode, _apply, ("control",))
