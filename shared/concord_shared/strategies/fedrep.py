"""FedRep: nodes share a representation, and each keeps a head of its own (Collins et al. 2021, Algorithm 1).

L. Collins, H. Hassani, A. Mokhtari, S. Shakkottai: Exploiting Shared Representations for Personalized Federated
Learning, ICML 2021. In each round a node trains its head with the body as it was sent, then the body with this head.
"""

from typing import TYPE_CHECKING

from concord_shared.plan.schema import Plan
from concord_shared.plan.strategies import FedRep
from concord_shared.strategies.averaging import add_mean, delta_only, no_state
from concord_shared.strategies.base import LocalResult, LocalWork, Strategy, encode_delta

if TYPE_CHECKING:
    from torch import nn

__all__ = ["fedrep"]


def _head(plan: Plan, model: "nn.Module") -> frozenset[str]:
    """The parameters of the last layers that have some."""
    section = plan.strategy
    assert isinstance(section, FedRep)
    layers = [
        [f"{name}.{parameter}" if name else parameter for parameter, _ in module.named_parameters(recurse=False)]
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    return frozenset(name for layer in layers[-section.head_layers :] for name in layer)


def _head_then_body(work: LocalWork) -> LocalResult:
    section = work.plan.strategy
    assert isinstance(section, FedRep)
    _, head_steps = work.train(None, part="personal", epochs=section.head_epochs)
    theta, steps = work.train(None, part="shared")
    return LocalResult(theta, head_steps + steps)


fedrep = Strategy("fedrep", delta_only, no_state, _head_then_body, encode_delta, add_mean, personal=_head)
