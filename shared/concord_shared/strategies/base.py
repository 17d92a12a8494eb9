"""What a strategy is: four pure functions and the blocks that it declares.

    init    coordinator   the state before the first round
    local   node          work on the node's data, from the model that was sent
    encode  node          the blocks' vectors
    apply   coordinator   decoded means, and the share of all nodes' weight that is in them → the next model and state

State is passed and never held, so a checkpoint of (model, state) is all that a resumed run needs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from concord_shared.blocks import Block
from concord_shared.noise import coarse_levels
from concord_shared.plan.schema import Plan
from concord_shared.tensors import Float32Vector, Layout

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Adjust", "LocalResult", "LocalWork", "Part", "State", "Strategy", "Train", "delta_block", "encode_delta"]

State = Mapping[str, NDArray[Any]]
Adjust = Callable[[list["Tensor"], list["Tensor"]], None]
"""Changes the gradients in place before a step, given the shared parameters, in the order of their layout, now and at
the start."""
Part = Literal["all", "shared", "personal"]


class Train(Protocol):
    """The plan's local training; returns the local model `(d,)` and the steps taken.

    adjust: changes the gradients. start: where the shared part begins, else at the model that was sent; the personal
    part goes on from where it is. part: what moves; the rest stays as it is. epochs: in place of the plan's local work.
    """

    def __call__(
        self,
        adjust: Adjust | None,
        start: Float32Vector | None = None,
        part: Part = "all",
        epochs: int = 0,
    ) -> tuple[Float32Vector, int]: ...


@dataclass(frozen=True)
class LocalResult:
    """theta: the local model `(d,) float32`; steps: optimiser steps taken; node_state: what stays at the node, but for
    the personal parameters, which the node itself keeps there."""

    theta: Float32Vector
    steps: int = 0
    node_state: State = field(default_factory=dict)
    extra: State = field(default_factory=dict)


@dataclass(frozen=True)
class LocalWork:
    """What a node gives to `local` and `encode`.

    theta: the model that was sent `(d,) float32`. broadcast: the parts of the coordinator's state that came
    with it.
    train: runs the plan's local training from theta.
    rows: the node's prepared training inputs `(n, …) float32` and targets `(n,)`.
    """

    plan: Plan
    layout: Layout
    theta: Float32Vector
    broadcast: State
    node_state: State
    learning_rate: float
    train: Train
    rows: Callable[[], tuple[NDArray[np.float32], NDArray[Any]]]


def _nothing(plan: Plan, model: "nn.Module") -> frozenset[str]:
    return frozenset()


def _the_model_that_was_sent(theta: Float32Vector, node_state: State) -> Float32Vector:
    return theta


@dataclass(frozen=True)
class Strategy:
    """`broadcast` names the parts of the state that nodes need to train, `(d,)` each, sent as float32. personal: names
    of the model's parameters and buffers that this strategy leaves at their node. own: what a node evaluates and
    predicts with, from the model that was sent and its NodeState.
    """

    name: str
    blocks: Callable[[Plan, Layout], tuple[Block, ...]]
    init: Callable[[Plan, Layout], State]
    local: Callable[[LocalWork], LocalResult]
    encode: Callable[[LocalWork, LocalResult], dict[str, NDArray[Any]]]
    apply: Callable[
        [Plan, Layout, Float32Vector, State, Mapping[str, NDArray[Any]], float], tuple[Float32Vector, State]
    ]
    broadcast: tuple[str, ...] = ()
    personal: Callable[[Plan, "nn.Module"], frozenset[str]] = _nothing
    own: Callable[[Float32Vector, State], Float32Vector] = _the_model_that_was_sent


def delta_block(plan: Plan, layout: Layout) -> Block:
    """Δ = θ_local − θ_global, clipped to the plan's bound; weighted by examples, or uniformly where noise hides nodes
    or records, and in robust mode: then each counts the same, whatever is in it, and the number of rows that a node
    says of itself is no lever.
    """
    counts = plan.noise == "none" and plan.privacy.mode != "robust"
    weight: Literal["examples", "uniform"] = "examples" if counts else "uniform"
    levels = coarse_levels(layout.size) if plan.noise in ("distributed", "central") else 0
    return Block("delta", layout.size, weight, plan.rounds.update_bound, plan.rounds.ring_bits, levels=levels)


def encode_delta(work: LocalWork, result: LocalResult) -> dict[str, NDArray[Any]]:
    return {"delta": result.theta - work.theta}
