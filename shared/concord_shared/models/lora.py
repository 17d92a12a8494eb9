"""LoRA (Hu et al. 2021): the base model stays as it is, and each wanted dense layer learns a sum of few outer products.

    W x  becomes  W x + (alpha / rank) · B A x,   A (rank, inputs) ~ N(0, 1/rank), B (outputs, rank) = 0

W is frozen: the seeded start at every node alike, never sent. A, B and the classification's head travel.
"""

import math

from torch import Tensor, nn
from torch.nn import functional

from concord_shared.errors import UsageError
from concord_shared.plan.models import Lora

__all__ = ["adapted"]

HEAD = "head"


def adapted(model: nn.Module, wanted: Lora | None) -> nn.Module:
    """`model` itself, all of it frozen but its head, with adapters in its dense layers whose last name is a target; as
    it is where none are wanted.

    Raises:
        UsageError: a target names no dense layer of the model.
    """
    if wanted is None:
        return model
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.split(".")[0] == HEAD
    for target in wanted.targets:
        found = [(owner, owner.get_submodule(target)) for owner in model.modules() if target in owner._modules]
        dense = [(owner, layer) for owner, layer in found if _is_dense(layer)]
        if not dense:
            raise UsageError(
                f"model.lora.targets: the model has no dense layer {target!r}; its layers: {_names(model)}"
            )
        for owner, layer in dense:
            owner.register_module(target, _Adapted(layer, wanted.rank, wanted.alpha))
    return model


def _names(model: nn.Module) -> str:
    last = {name.split(".")[-1] for name, layer in model.named_modules() if _is_dense(layer)}
    return ", ".join(sorted(last - {HEAD}))


def _is_dense(layer: nn.Module | None) -> bool:
    """GPT-2's dense layers are named Conv1D; they keep their weight the other way round."""
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


class _Adapted(nn.Module):
    """A frozen dense layer and what it learns beside."""

    def __init__(self, base: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.factor = base, alpha / rank
        weight = base.get_parameter("weight")
        outputs, inputs = weight.shape if isinstance(base, nn.Linear) else reversed(weight.shape)
        self.down = nn.Parameter(weight.new_empty(rank, inputs))
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))
        nn.init.normal_(self.down, std=1 / math.sqrt(rank))

    def forward(self, x: Tensor) -> Tensor:
        learned = functional.linear(functional.linear(x, self.down), self.up)
        added: Tensor = self.base(x) + self.factor * learned
        return added
