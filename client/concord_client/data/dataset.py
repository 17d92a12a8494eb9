"""Raw rows, their split into training, validation and test, and the check against the plan's contract."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.errors import DataError
from concord_shared.plan.schema import DataContract, Plan
from concord_shared.preprocessing import unfitted
from concord_shared.seeds import derive_seed
from concord_shared.text_features import tidy_text

__all__ = ["NodeDataset", "RawData", "Split", "assign_splits", "check_contract"]

TEST_FRACTION = 0.2


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


def check_contract(
    contract: DataContract, data: RawData, source: str, missing_allowed: bool, outside_allowed: bool = False
) -> None:
    """Compares rows with the plan's contract; names and counts only, never a value.

    Raises:
        DataError: with one line for each difference.
    """
    problems = list(_input_problems(contract, data.inputs, missing_allowed, outside_allowed))
    problems += list(_target_problems(contract, data.targets))
    if not len(data):
        problems = ["no rows"]
    if problems:
        raise DataError(f"{source}: does not fit the plan's data contract:\n  " + "\n  ".join(problems))


def _input_problems(contract: DataContract, inputs: NDArray[Any], missing_allowed: bool, outside_allowed: bool) -> Any:
    if contract.input == "text":
        yield from _text_problems(contract, inputs)
        return
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
        if column.range is not None and not outside_allowed:
            outside = int(((values < column.range[0]) | (values > column.range[1])).sum())
            if outside:
                yield f"column {column.name}: {outside} values are outside the range {list(column.range)}"
        if column.kind == "category":
            known = np.isin(values, np.arange(len(column.categories))) | np.isnan(values)
            if outside := int((~known).sum()):
                yield f"column {column.name}: {outside} values are outside its {len(column.categories)} categories"
        if np.isinf(values).any() and not (outside_allowed and column.range):
            yield f"column {column.name}: {int(np.isinf(values).sum())} values are infinite"


def _text_problems(contract: DataContract, texts: NDArray[Any]) -> Any:
    if texts.ndim != 1 or texts.dtype.kind != "U":
        yield f"expected one text in each row, got {texts.dtype} of shape {list(texts.shape)}"
        return
    lengths = np.char.str_len(texts)
    if empty := int((lengths == 0).sum()):
        yield f"column {contract.text}: {empty} of {len(texts)} texts are missing or empty; remove those rows"
    if long := int((lengths > contract.length_max).sum()):
        yield f"column {contract.text}: {long} texts have more than {contract.length_max} characters; shorten them"


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
