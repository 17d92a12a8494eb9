"""Raw rows, and their split into training, validation and test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.seeds import derive_seed

__all__ = ["NodeDataset", "RawData", "Split", "assign_splits", "joined"]

TEST_FRACTION = 0.2


class Split(IntEnum):
    TRAIN = 0
    VALIDATION = 1
    TEST = 2


@dataclass(frozen=True)
class RawData:
    """Rows as they were read.

    inputs: table `(n, columns) float64` (a category as its index, NaN where missing), or image `(n, c, h,
    w)`.
    targets: class index `(n,) int64`, or value `(n,) float64`.
    split: `(n,) uint8` of `Split` where the source has one, else None.
    groups: columns `(n,)` by which rows may be dealt to nodes.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    split: NDArray[np.uint8] | None = None
    groups: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class NodeDataset:
    """The rows of one node: arrays (its own, or shared with others in a simulation) and indices into them."""

    name: str
    inputs: NDArray[Any]
    targets: NDArray[Any]
    rows: Mapping[Split, NDArray[np.int64]]

    def size(self, split: Split) -> int:
        return len(self.rows[split])

    def take(self, split: Split) -> tuple[NDArray[Any], NDArray[Any]]:
        """A copy of the split's inputs and targets."""
        return self.inputs[self.rows[split]], self.targets[self.rows[split]]


def assign_splits(
    data: RawData, rows: NDArray[np.int64], node: str, seed: int, validation_fraction: float
) -> dict[Split, NDArray[np.int64]]:
    """Training, validation and test rows of one node.

    The source's own split where it has one, else a seeded 80/20; validation is a fraction of the training
    rows.
    """
    chance = np.random.default_rng(derive_seed(seed, "split", node=node))
    if data.split is None:
        shuffled = chance.permutation(rows)
        test_size = round(TEST_FRACTION * len(rows)) if len(rows) > 1 else 0
        train, validation, test = shuffled[test_size:], shuffled[:0], shuffled[:test_size]
    else:
        train, validation, test = (rows[data.split[rows] == split] for split in Split)
    if validation_fraction and not len(validation):
        shuffled = chance.permutation(train)
        size = round(validation_fraction * len(train)) if len(train) > 1 else 0
        train, validation = shuffled[size:], shuffled[:size]
    return {Split.TRAIN: np.sort(train), Split.VALIDATION: np.sort(validation), Split.TEST: np.sort(test)}


def joined(parts: Sequence[RawData]) -> RawData:
    """Batches of one source as a whole; no rows where there are none."""
    if len(parts) < 2:
        return parts[0] if parts else RawData(np.empty((0, 0)), np.empty(0, np.int64))
    splits = [part.split for part in parts if part.split is not None]
    inputs = np.empty((sum(map(len, parts)), *parts[0].inputs.shape[1:]), parts[0].inputs.dtype)
    return RawData(
        np.concatenate([part.inputs for part in parts], out=inputs),
        np.concatenate([part.targets for part in parts]),
        np.concatenate(splits) if splits else None,
        {name: np.concatenate([part.groups[name] for part in parts]) for name in parts[0].groups},
    )
