"""Prepared rows on a device, and batches of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rows"]


@dataclass(frozen=True)
class Rows:
    """Inputs `(n, …)`; targets `(n,)` int64 or float32, of a language model `(n, length - 1)`."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of so many rows each, in order; the last may have fewer."""
        return zip(torch.split(self.inputs, size), torch.split(self.targets, size), strict=True)
