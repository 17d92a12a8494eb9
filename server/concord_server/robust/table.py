"""Step 10 of the walk in robust mode: every node's Update in a row of its own, in memory that the disk backs."""

import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_server.collector import RingSum
from concord_shared.blocks import Block
from concord_shared.errors import ArtefactError
from concord_shared.files import explain

__all__ = ["UpdateTable", "table_bytes"]

Integers = NDArray[np.signedinteger[Any]]
PIECE_VALUES = 1 << 20
"""Values of a piece of columns, all rows together: 8 MB as float64, whatever the number of nodes."""


def table_bytes(blocks: Sequence[Block], nodes: int) -> int:
    """What the table of these blocks takes on the disk."""
    return nodes * sum(block.size * block.dtype.itemsize for block in blocks if block.weight != "none")


class UpdateTable:
    """The Updates of one step. Real blocks by row, integer blocks (lanes, metrics) summed as `RingSum` does.

    A row's place is its node's place in the cohort, so nothing depends on the order of arrival. The file has no name:
    it goes with this process, however that ends; and its space is taken before the first row, so that a full disk is an
    error and never a crash. As with `RingSum`, a step that was in progress when the coordinator died is asked again:
    nodes send what they had computed.

    Args:
        cohort: whom the step asks, in name order.
        folder: where the file lies; it exists.

    Raises:
        ArtefactError: there is no room for the table.
    """

    def __init__(self, blocks: Sequence[Block], cohort: Sequence[str], folder: Path) -> None:
        self._places = {name: place for place, name in enumerate(sorted(cohort))}
        self._counts = RingSum(tuple(block for block in blocks if block.weight == "none"))
        self._real = tuple(block for block in blocks if block.weight != "none")
        self._map = _allocate(folder, table_bytes(blocks, len(cohort)))
        self._rows: dict[str, Integers] = {}
        offset = 0
        for block in sorted(self._real, key=lambda block: -block.ring_bits):  # aligned: the wide ones first
            values = np.frombuffer(self._map, block.dtype, len(cohort) * block.size, offset)
            self._rows[block.name] = values.reshape(len(cohort), block.size)
            offset += values.nbytes

    @property
    def nodes(self) -> set[str]:
        return self._counts.nodes

    def add(self, node: str, blocks: Mapping[str, Integers]) -> None:
        """Takes one node's validated blocks; a second time for the same node is our bug."""
        self._counts.add(node, blocks)
        for block in self._real:
            self._rows[block.name][self._places[node]] = blocks[block.name]
        self._forget()

    def sums(self) -> dict[str, Integers]:
        """The sums of the integer blocks."""
        return self._counts.sums()

    def totals(self, nodes: Sequence[str]) -> dict[str, Integers]:
        """The exact sums of the real blocks over `nodes`: what `RingSum` would have made of them."""
        found: dict[str, Integers] = {}
        for block in self._real:
            total = found[block.name] = np.empty(block.size, block.dtype)
            for where, rows in self.pieces(block.name, nodes):
                total[where] = rows.sum(axis=0)
        return found

    def pieces(self, block: str, nodes: Sequence[str]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """The rows of `nodes`, exactly, a piece of the columns at a time: where it lies, and `(n, k) float64`."""
        rows = self._rows[block]
        places = [self._places[node] for node in nodes]
        step = max(1, PIECE_VALUES // max(1, len(places)))
        for start in range(0, rows.shape[1], step):
            where = slice(start, min(start + step, rows.shape[1]))
            piece = np.empty((len(places), where.stop - where.start))
            for index, place in enumerate(places):
                piece[index] = rows[place, where]
            yield where, piece
        self._forget()

    def _forget(self) -> None:
        """The pages stay on the disk (or in its cache), not in this process."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _allocate(folder: Path, size: int) -> mmap.mmap:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, size))
            else:
                for start in range(0, max(1, size), PIECE_VALUES):
                    file.write(bytes(min(PIECE_VALUES, size - start)))
                file.flush()
            return mmap.mmap(file.fileno(), max(1, size))
    except OSError as error:
        raise ArtefactError(
            f"no room for the table of Updates in {folder} ({size / 1e6:.0f} MB): {explain(error)}"
        ) from error
