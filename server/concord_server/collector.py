"""Step 10 of the walk: sums replies as they arrive, O(d) memory whatever the number of nodes.

The sum is one of integers modulo 2**w, so it depends neither on the order of arrival nor on which worker
computed what.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.blocks import Block

__all__ = ["RingSum"]

Integers = NDArray[np.signedinteger[Any]]


class RingSum:
    """The running sum of the blocks of one step. Knows no strategy."""

    def __init__(self, blocks: tuple[Block, ...]) -> None:
        self._sums: dict[str, NDArray[np.unsignedinteger[Any]]] = {
            block.name: np.zeros(block.size, f"<u{block.ring_bits // 8}") for block in blocks
        }
        self.nodes: set[str] = set()

    def add(self, node: str, blocks: Mapping[str, Integers]) -> None:
        """Adds one node's validated blocks; a second time for the same node is our bug."""
        assert node not in self.nodes
        for name, total in self._sums.items():
            np.add(total, blocks[name].view(total.dtype), out=total)
        self.nodes.add(node)

    def sums(self) -> dict[str, Integers]:
        """The sums as signed integers; views, not copies."""
        return {name: total.view(f"<i{total.dtype.itemsize}") for name, total in self._sums.items()}
