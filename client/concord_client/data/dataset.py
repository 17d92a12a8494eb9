"""Raw rows, and their split into training, validation and test."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.plan.schema import Plan
from concord_shared.preprocessing import unfitted
from concord_shared.seeds import derive_seed
from concord_shared.statistics import Batch
from concord_shared.text_features import tidy_text

__all__ = ["NodeDataset", "RawData", "Split", "assign_splits", "joined", "split_for"]

TEST_FRACTION = 0.2
BATCH_ROWS = 1 << 16


class Split(IntEnum):
    TRAIN = 0
    VALIDATION = 1
    TEST = 2


@dataclass(frozen=True)
class RawData:
    """Rows as they were read.

    inputs: table `(n, columns) float64` (a category as its index, NaN where missing), image `(n, c, h, w)`, or text
    `(n,) str`.
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
    """The rows of one node: arrays (its own, or shared with others in a simulation) and indices into them.

    stream: reads its training rows batch by batch, where they are only looked at once and in order: then there are no
    arrays.
    """

    name: str
    inputs: NDArray[Any]
    targets: NDArray[Any]
    rows: Mapping[Split, NDArray[np.int64]]
    stream: Callable[[], Iterator[Batch]] | None = None

    def batches(self) -> Iterator[Batch]:
        """The training rows, so many at a time as memory does not feel."""
        if self.stream is not None:
            yield from self.stream()
            return
        rows = self.rows[Split.TRAIN]
        for start in range(0, len(rows), BATCH_ROWS):
            part = rows[start : start + BATCH_ROWS]
            yield self.inputs[part], self.targets[part]

    def size(self, split: Split) -> int:
        return len(self.rows[split])

    def take(self, split: Split) -> tuple[NDArray[Any], NDArray[Any]]:
        """A copy of the split's inputs and targets."""
        return self.inputs[self.rows[split]], self.targets[self.rows[split]]


def assign_splits(
    data: RawData,
    rows: NDArray[np.int64],
    node: str,
    seed: int,
    validation_fraction: float,
    drop_duplicates: bool = False,
) -> dict[Split, NDArray[np.int64]]:
    """Training, validation and test rows of one node.

    The source's own split where it has one, else a seeded 80/20; validation is a fraction of the training
    rows. Duplicates are dropped from the training rows alone: what is evaluated stays as it is.
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
    train = np.sort(train)
    if drop_duplicates:
        train = train[~repeated(data, train)]
    return {Split.TRAIN: train, Split.VALIDATION: np.sort(validation), Split.TEST: np.sort(test)}


def repeated(data: RawData, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of `rows` are equal to an earlier one of them, in every input and in the target."""
    seen: set[bytes] = set()
    found = np.zeros(len(rows), bool)
    for place, row in enumerate(rows):
        values = data.inputs[row]
        content = tidy_text(str(values)).encode() if data.inputs.dtype.kind in "OU" else values.tobytes()
        digest = hashlib.blake2b(data.targets[row].tobytes() + content, digest_size=16).digest()
        found[place] = digest in seen
        seen.add(digest)
    return found


def cleaning_counts(plan: Plan, data: RawData) -> dict[str, int]:
    """What the plan would clean of these rows that can be seen without others' rows."""
    found = unfitted(plan).counts(data.inputs)
    found.pop("outliers", None)  # their fences follow from all nodes
    if plan.preprocessing.duplicates == "drop":
        found["duplicates"] = int(repeated(data, np.arange(len(data))).sum())
    return found


def split_for(plan: Plan, data: RawData, rows: NDArray[np.int64], node: str) -> dict[Split, NDArray[np.int64]]:
    """As `assign_splits`, as a plan wants it: statistics over all rows have nothing to test on."""
    if plan.statistics is not None and plan.statistics.rows == "all":
        return {Split.TRAIN: np.sort(rows), Split.VALIDATION: rows[:0], Split.TEST: rows[:0]}
    drop = plan.preprocessing.duplicates == "drop"
    return assign_splits(data, rows, node, plan.seed, plan.evaluation.validation_fraction, drop)


def joined(parts: Sequence[RawData]) -> RawData:
    """Batches of one source as a whole; no rows where there are none."""
    if len(parts) < 2:
        return parts[0] if parts else RawData(np.empty((0, 0)), np.empty(0, np.int64))
    splits = [part.split for part in parts if part.split is not None]
    dtype = np.result_type(*{part.inputs.dtype for part in parts})  # texts of one batch may be longer than of another
    inputs = np.empty((sum(map(len, parts)), *parts[0].inputs.shape[1:]), dtype)
    return RawData(
        np.concatenate([part.inputs for part in parts], out=inputs),
        np.concatenate([part.targets for part in parts]),
        np.concatenate(splits) if splits else None,
        {name: np.concatenate([part.groups[name] for part in parts]) for name in parts[0].groups},
    )
