"""FedBN: averaging of all but the normalisation layers, which stay at their node (Li et al. 2021, Algorithm 1).

X. Li, M. Jiang, X. Zhang, M. Kamp, Q. Dou: FedBN: Federated Learning on Non-IID Features via Local Batch Normalization,
ICLR 2021. Scale, shift and running statistics are each node's own, so that nodes whose inputs differ in brightness,
contrast or unit share what lies behind them.
"""

from typing import TYPE_CHECKING, Any

from concord_shared.errors import UsageError
from concord_shared.plan.schema import Plan
from concord_shared.strategies.averaging import add_mean, delta_only, no_state, train_plainly
from concord_shared.strategies.base import Strategy, encode_delta

if TYPE_CHECKING:
    from torch import nn

__all__ = ["fedbn"]


def _normalisation(plan: Plan, model: "nn.Module") -> frozenset[str]:
    """Parameters and running statistics of every normalisation layer. Raises: UsageError: the model has none that
    training would change.
    """
    from torch import nn
    from torch.nn.modules.batchnorm import _NormBase

    kinds: tuple[Any, ...] = (_NormBase, nn.GroupNorm, nn.LayerNorm)
    found = frozenset(
        f"{name}.{tensor}" if name else tensor
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for tensor in module.state_dict()
    )
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found & (moving | dict(model.named_buffers()).keys()):
        raise UsageError(
            f"strategy fedbn: model {plan.model.name} has no normalisation layer that is trained and could stay at a "
            'node (with adapters none is); choose one that has, as mlp with norm = "batch", or another strategy'
        )
    return found


fedbn = Strategy("fedbn", delta_only, no_state, train_plainly, encode_delta, add_mean, personal=_normalisation)
