"""Torch's optimisers as they are, but for what prepares them for torch.compile, which concord does not use: importing
that costs each process more than a second of its first round.
"""

import inspect
from typing import TypeVar, cast

import torch

__all__ = ["SGD", "Adam", "AdamW"]

Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


def _undecorated(kind: type[Kind]) -> type[Kind]:
    """The same arithmetic, its gradients off; only `differentiable` optimisers, of which we have none, want them on."""
    own = {
        "add_param_group": inspect.unwrap(kind.add_param_group),
        "step": torch.no_grad()(inspect.unwrap(kind.step)),
    }
    return cast(type[Kind], type(kind.__name__, (kind,), own))


SGD = _undecorated(torch.optim.SGD)
Adam = _undecorated(torch.optim.Adam)
AdamW = _undecorated(torch.optim.AdamW)
