"""Raw rows, their split into training, validation and test, and the check against the plan's contract."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.errors import DataError
from concord_shared.plan.schema import DataContract
from concord_shared.seeds import derive_seed

__all__ = ["NodeDataset", "RawData", "Split", "assign_splits", "check_contract"]

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


def check_contract(contract: DataContract, data: RawData, source: str, missing_allowed: bool) -> None:
    """Compares rows with the plan's contract; names and counts only, never a value.

    Raises:
        DataError: with one line for each difference.
    """
    problems = list(_input_problems(contract, data.inputs, missing_allowed))
    problems += list(_target_problems(contract, data.targets))
    if not len(data):
        problems = ["no rows"]
    if problems:
        raise DataError(f"{source}: does not fit the plan's data contract:\n  " + "\n  ".join(problems))


def _input_problems(contract: DataContract, inputs: NDArray[Any], missing_allowed: bool) -> Any:
    if contract.input == "image":
        if inputs.shape[1:] != contract.shape:
            got = list(inputs.shape[1:])
            yield f"images: expected shape {list(contract.shape)} (channels, height, width), got {got}"
        if inputs.dtype != np.dtype(contract.dtype):
            yield f"images: expected dtype {contract.dtype}, got {inputs.dtype}"
        elif inputs.dtype == np.float32 and (bad := int((~np.isfinite(inputs)).sum())):
            yield f"images: {bad} pixels are NaN or Inf"
        return
    if inputs.shape[1:] != (len(contract.columns),):
        yield f"expected {len(contract.columns)} columns, got rows of shape {list(inputs.shape[1:])}"
        return
    for index, column in enumerate(contract.columns):
        values = inputs[:, index]
        absent = int(np.isnan(values).sum())
        if absent and not missing_allowed:
            yield (
                f"column {column.name}: {absent} of {len(values)} values are missing; "
                'set preprocessing.missing = "impute" or remove those rows'
            )
        if column.range is not None:
            outside = int(((values < column.range[0]) | (values > column.range[1])).sum())
            if outside:
                yield f"column {column.name}: {outside} values are outside the range {list(column.range)}"
        if column.kind == "category":
            known = np.isin(values, np.arange(len(column.categories))) | np.isnan(values)
            if outside := int((~known).sum()):
                yield f"column {column.name}: {outside} values are outside its {len(column.categories)} categories"
        if np.isinf(values).any():
            yield f"column {column.name}: {int(np.isinf(values).sum())} values are infinite"


def _target_problems(contract: DataContract, targets: NDArray[Any]) -> Any:
    if contract.task == "classification":
        outside = int(((targets < 0) | (targets >= len(contract.classes))).sum())
        if outside:
            yield (
                f"target {contract.target}: {outside} rows have a class outside the contract's "
                f"{len(contract.classes)} classes"
            )
    elif contract.target_range is not None:
        low, high = contract.target_range
        outside = int((~((targets >= low) & (targets <= high))).sum())
        if outside:
            yield f"target {contract.target}: {outside} values are missing or outside {[low, high]}"
