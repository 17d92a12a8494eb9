"""Ditto: a shared model, and at each node a whole model of its own, pulled to it (Li et al. 2021, Algorithm 1).

T. Li, S. Hu, A. Beirami, V. Smith: Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021.
The shared model is trained as in FedAvg. The node's own v begins at it and takes as many steps again, each with the
gradient + λ (v − θ), where θ is the model that was sent. v is what the node evaluates and predicts with; it never
leaves.
"""

from typing import TYPE_CHECKING

from concord_shared.errors import UsageError
from concord_shared.plan.schema import Plan
from concord_shared.plan.strategies import Ditto
from concord_shared.strategies.averaging import add_mean, delta_only, no_state
from concord_shared.strategies.base import LocalResult, LocalWork, State, Strategy, encode_delta
from concord_shared.tensors import Float32Vector

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["OWN", "ditto"]

OWN = "own"
"""Under this name a NodeState keeps the whole model of the node's own."""


def _local(work: LocalWork) -> LocalResult:
    import torch

    section = work.plan.strategy
    assert isinstance(section, Ditto)
    pull, sent = section.pull, [torch.from_numpy(view.copy()) for view in work.layout.split(work.theta).values()]

    def adjust(parameters: list["Tensor"], start: list["Tensor"]) -> None:
        for parameter, anchor in zip(parameters, sent, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(parameter - anchor.to(parameter.device), alpha=pull)

    own, _ = work.train(adjust, start=_own(work.theta, work.node_state))
    theta, steps = work.train(None)
    return LocalResult(theta, steps, {OWN: own})


def _own(theta: Float32Vector, node_state: State) -> Float32Vector:
    return node_state.get(OWN, theta)


def _nothing_else(plan: Plan, model: "nn.Module") -> frozenset[str]:
    if getattr(model, "personal_parameters", ()):
        raise UsageError(
            f"strategy ditto: model {plan.model.name} keeps parameters at the node already, which two models would "
            "train at once; choose fedavg"
        )
    return frozenset()


ditto = Strategy("ditto", delta_only, no_state, _local, encode_delta, add_mean, personal=_nothing_else, own=_own)
