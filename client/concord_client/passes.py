"""One batch's gradient on what memory there is: in parts, with activations worked out again, in half precision."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from concord_client.devices import is_out_of_memory
from concord_shared.errors import UsageError

__all__ = ["Parts", "blocks_of", "new_scaler", "recompute_activations", "take_step"]

log = logging.getLogger(__name__)

SCALE = 1024.0
"""Of float16's losses at first: optimisers begin anew in each round, and a scale that is too large costs steps."""


def new_scaler(dtype: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler:
    """Scales losses where gradients would vanish in float16; does nothing with any other dtype."""
    return torch.amp.GradScaler(device.type, init_scale=SCALE, enabled=dtype == torch.float16)


def take_step(scaler: torch.amp.GradScaler, optimiser: torch.optim.Optimizer) -> bool:
    """False where gradients are beyond float16: the step is left out, and the next ones are scaled less."""
    if not scaler.is_enabled():
        optimiser.step()
        return True
    before = scaler.get_scale()
    scaler.step(optimiser)
    scaler.update()
    return bool(scaler.get_scale() >= before)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers whose class says `is_block`. Raises: UsageError: the model has none."""
    blocks = [module for module in model.modules() if getattr(module, "is_block", False)]
    if not blocks:
        raise UsageError(
            "training.recompute_activations: this model has no blocks whose activations could be worked out again; "
            "ResNets, EfficientNets and transformers have. Leave it out"
        )
    return blocks


def recompute_activations(model: nn.Module) -> None:
    """Of each block only the input is kept, and the rest worked out again on the way back (Chen et al. 2016): memory
    for one more forward pass. Raises: UsageError: as `blocks_of`.
    """
    for block in blocks_of(model):
        block.forward = functools.partial(_recomputed, block, block.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **more: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs, **more)
    return checkpoint(forward, *inputs, use_reentrant=False, **more)


class Parts:
    """How many rows are on the device at once. A batch of more is taken in parts whose gradients add up to its own.

    may_shrink: where memory is out, halve the parts, say so, and go on; else the error says what to do.
    """

    def __init__(self, size: int, may_shrink: bool) -> None:
        self.size = size
        self._may_shrink = may_shrink

    def add_gradient(self, rows: int, one: Callable[[int], None], forget: Callable[[], None]) -> None:
        """one: adds the gradient of a batch of `rows`, in parts of so many. forget: sets gradients back to none.

        Raises:
            UsageError: memory is out, and the parts may not be smaller.
        """
        while True:
            forget()
            size = min(self.size or rows, rows)
            try:
                one(size)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(size, error)
            else:
                return

    def _shrink(self, size: int, error: Exception) -> None:
        if size == 1:
            raise UsageError(
                "no memory left to train on a single row: use a smaller model, or give the node more"
            ) from error
        if not self._may_shrink:
            raise UsageError(
                f"no memory left for {size} rows at once. Set training.micro_batch below {size}: batches are then "
                "taken in parts, with the same gradient but for rounding. With training.deterministic = false a node "
                "does so by itself"
            ) from error
        self.size = (size + 1) // 2
        log.warning("no memory left; rows at once are halved", extra={"rows": size, "now": self.size})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
