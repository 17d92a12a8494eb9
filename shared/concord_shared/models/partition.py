"""Which parameters of a plan's model are shared, which stay at their node, and which nobody trains.

    shared    travels: θ `(d,)` and its layout, everywhere outside of a node, are of these alone
    personal  each node's own, in its NodeState: what the model declares in `personal_parameters` (names of parameters
              or of modules), and what the plan's strategy keeps back. Begins at the seeded start at every node
    frozen    `requires_grad` is False: equal at all nodes by construction, never trained and never sent

Running statistics (float buffers) are nobody's to average: they are personal where the strategy says so (FedBN), and
refused elsewhere. Tables that a model does not save (`persistent=False`) are constants and belong to no part.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from concord_shared.errors import UsageError
from concord_shared.plan.schema import Plan
from concord_shared.strategies.registry import strategy_for
from concord_shared.tensors import Layout

if TYPE_CHECKING:
    from torch import nn

__all__ = ["COUNTERS", "Partition", "has_own_parts", "partition_of"]

COUNTERS = "num_batches_tracked"
"""BatchNorm's count of batches, of which nothing is computed: no part of a model."""


@dataclass(frozen=True)
class Partition:
    """shared, personal: layouts of float32 tensors; personal may hold running statistics. frozen: names."""

    shared: Layout
    personal: Layout
    frozen: tuple[str, ...] = ()


def partition_of(plan: Plan, model: "nn.Module") -> Partition:
    """The partition of the plan's model, by what the model and the plan's strategy say.

    Raises:
        UsageError: a shared or personal tensor is not float32; the model keeps running statistics that no node would
            keep; a name that is declared personal does not exist; nothing is left to share; or the plan's privacy
            does not cover such a partition.
    """
    parameters = dict(model.named_parameters())
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved and not name.endswith(COUNTERS)}
    kept = _named(model, getattr(model, "personal_parameters", ()), (*parameters, *buffers))
    kept |= strategy_for(plan).personal(plan, model)
    frozen = tuple(sorted(name for name, parameter in parameters.items() if not parameter.requires_grad))
    if outside := [name for name in buffers if name not in kept]:
        raise UsageError(
            f"the model keeps the buffers {', '.join(outside[:3])}, which cannot be averaged; use GroupNorm instead of "
            'BatchNorm, or strategy.name = "fedbn", with which each node keeps its own'
        )
    tensors = {name: tensor for name, tensor in (parameters | buffers).items() if name not in frozen}
    wrong = [name for name, tensor in tensors.items() if str(tensor.dtype) != "torch.float32"]
    if wrong:
        raise UsageError(f"expected float32 parameters, got others in {', '.join(wrong[:3])}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shared = Layout.of({name: shape for name, shape in shapes.items() if name not in kept})
    personal = Layout.of({name: shape for name, shape in shapes.items() if name in kept})
    if not shared.size and (personal.size or frozen):
        raise UsageError(
            f"strategy {plan.strategy.name} leaves nothing of model {plan.model.name} to share; choose a model with "
            "more layers, or another strategy"
        )
    if frozen and plan.noise == "dp-sgd":
        raise UsageError(
            'privacy.dp.unit = "record" cannot train a model with frozen parameters: it bounds the gradient of each '
            "row over all of them"
        )
    if personal.size and plan.noise in ("distributed", "central"):
        raise UsageError(
            'privacy.dp.unit = "node" covers what is shared, and figures of the personal parameters that this model '
            "keeps at a node would leave without noise; choose another model or strategy, or leave privacy.dp out"
        )
    return Partition(shared, personal, frozen)


def has_own_parts(plan: Plan, partition: Partition) -> bool:
    """Whether a node evaluates and predicts with a model of its own, of which a part stays there, or with Ditto all."""
    return bool(partition.personal.size) or plan.strategy.name == "ditto"


def _named(model: "nn.Module", wanted: Iterable[str], names: Iterable[str]) -> frozenset[str]:
    """The tensors of these names, or of modules of these names."""
    found, there = set[str](), tuple(names)
    for each in wanted:
        mine = [name for name in there if name == each or name.startswith(f"{each}.")]
        if not mine:
            raise UsageError(f"the model declares {each!r} personal, and has no parameter or module of that name")
        found.update(mine)
    return frozenset(found)
