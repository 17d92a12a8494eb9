"""Prepared rows, and batches of them on the device that trains."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Batch", "Rows"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Rows:
    """Inputs `(n, …)`; targets `(n,)` int64 or float32, of a language model `(n, length - 1)`.

    device: where batches go, one by one, of rows that it has no room for; None where all are on it.
    """

    inputs: Tensor
    targets: Tensor
    device: torch.device | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, size: int) -> Iterator[Batch]:
        """So many rows each, in order; the last may have fewer. Views, of rows that are all on the device."""
        for inputs, targets in zip(torch.split(self.inputs, size), torch.split(self.targets, size), strict=True):
            yield self._moved(inputs), self._moved(targets)

    def batches_in(self, order: Tensor, size: int) -> Iterator[Batch]:
        """As `batches`, of the rows in another order `(n,) int64`."""
        order = order.to(self.inputs.device)
        if self.device is None:
            yield from Rows(self.inputs.index_select(0, order), self.targets.index_select(0, order)).batches(size)
            return
        for part in torch.split(order, size):
            yield self._moved(self.inputs.index_select(0, part)), self._moved(self.targets.index_select(0, part))

    def _moved(self, part: Tensor) -> Tensor:
        if self.device is None:
            return part
        if self.device.type == "cuda":
            part = part.pin_memory()  # then the copy needs nobody to wait for it
        return part.to(self.device, non_blocking=True)
