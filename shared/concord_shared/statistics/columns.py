"""What statistics see of raw rows: columns one by one, and numbers as fixed point.

Raw table inputs are `(n, columns) float64`, a category as its index in the contract, NaN where missing. Raw image
inputs are `(n, channels, height, width)`, uint8; a channel counts as a number column of its pixels.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.plan.data import Column, DataContract

__all__ = [
    "Batch",
    "FixedPoint",
    "Values",
    "channel_names",
    "columns_by_name",
    "described",
    "target_column",
    "values_of",
    "width",
]

Raw = NDArray[Any]
Batch = tuple[Raw, NDArray[Any] | None]
"""Inputs, and their targets where those are wanted."""
RELATIVE_BITS_MAX = 52
RELATIVE_BITS_NOISY = 20
"""Where noise is added anyway: finer units would only be more of them."""


@dataclass(frozen=True)
class Values:
    """Of one column in one batch: what occurs `(k,) float64`, NaN where missing, and how often each does `(k,) int64`;
    None: once."""

    levels: NDArray[np.float64]
    counts: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class FixedPoint:
    """The scale of sums over at most `rows_max` rows of all nodes together.

    relative_bits: the finest, in parts of a column's range.
    """

    contract: DataContract
    rows_max: int
    relative_bits: int = RELATIVE_BITS_MAX

    @property
    def values_max(self) -> int:
        """How many values of one column the rows can hold: an image's channel has one a pixel."""
        shape = self.contract.shape
        return self.rows_max * (shape[1] * shape[2] if self.contract.input == "image" else 1)

    def bits(self, *columns: Column) -> int:
        """Fractional bits such that `values_max` products of one value of each of `columns` sum below 2**62."""
        scale = math.ceil(sum(math.log2(width(column)) for column in columns))
        return min(self.relative_bits, 62 - math.ceil(math.log2(self.values_max))) - scale

    def total(self, values: NDArray[np.float64], counts: NDArray[np.int64] | None, *columns: Column) -> int:
        """The sum of `values`, each rounded to fixed point: the same for any order and any split of the rows."""
        whole = np.rint(np.ldexp(values, self.bits(*columns))).astype(np.int64)
        return int(whole.sum() if counts is None else (whole * counts).sum())

    def fixed(self, value: float, *columns: Column) -> int:
        """A sum of reals that a node works out as one number."""
        return round(math.ldexp(value, self.bits(*columns)))

    def real(self, total: float, *columns: Column) -> float:
        return math.ldexp(total, -self.bits(*columns))

    def unit(self, *columns: Column) -> float:
        """How far one value, or the product of one value of each column, can move a sum."""
        product = math.prod(width(column) for column in columns)
        return math.ldexp(product, self.bits(*columns)) + 1

    def most(self, count: float, *columns: Column) -> float:
        """No honest sum of `count` products of values within their ranges is larger."""
        product = math.prod(width(column) for column in columns)
        return math.ldexp(product, self.bits(*columns)) * count * (1 + 1e-9) + count


def described(contract: DataContract) -> tuple[Column, ...]:
    """A table's columns; an image's channels as number columns; a text has none."""
    if contract.input != "image":
        return contract.columns
    return tuple(Column(name=name, range=(0.0, 255.0)) for name in channel_names(contract))


def target_column(contract: DataContract) -> Column:
    """What is predicted, as one more column."""
    if contract.task == "classification":
        return Column(name=contract.target, kind="category", categories=contract.classes)
    return Column(name=contract.target, range=contract.target_range)


def columns_by_name(document: Mapping[str, Any]) -> dict[str, Column]:
    """What statistics can tell of, the target too, of a contract as a plan's document holds it."""
    contract = DataContract.model_validate_json(json.dumps(document))
    return {column.name: column for column in (*described(contract), target_column(contract))}


def channel_names(contract: DataContract) -> list[str]:
    return [f"channel_{index}" for index in range(contract.shape[0])]


def values_of(contract: DataContract, batch: Batch, index: int) -> Values:
    """Column `index` of those that are described; the target is the one after the last."""
    inputs, targets = batch
    if index == len(described(contract)):
        assert targets is not None
        return Values(np.asarray(targets, np.float64))
    if contract.input == "image":
        counts = np.bincount(inputs[:, index].reshape(-1), minlength=256)
        return Values(np.arange(256.0), counts)
    return Values(np.ascontiguousarray(inputs[:, index], np.float64))


def within(values: Values, column: Column) -> tuple[Values, int]:
    """The values inside of a number column's range, and how many are outside. Missing ones are neither."""
    low, high = span(column)
    levels, counts = values.levels, values.counts
    inside = (levels >= low) & (levels <= high)
    if counts is not None:
        return Values(levels[inside], counts[inside]), int(counts[(levels < low) | (levels > high)].sum())
    kept = int(np.count_nonzero(inside))
    if kept == len(levels):
        return values, 0
    outside = len(levels) - kept - int(np.count_nonzero(np.isnan(levels)))
    return Values(levels[inside]), outside


def count_of(values: Values) -> int:
    return len(values.levels) if values.counts is None else int(values.counts.sum())


def span(column: Column) -> tuple[float, float]:
    assert column.range is not None, "a plan that sums numbers has their ranges"
    return column.range


def width(column: Column) -> float:
    low, high = span(column)
    return high - low


def numbers(columns: tuple[Column, ...]) -> Iterator[tuple[int, Column]]:
    """Number columns with their places."""
    return ((index, column) for index, column in enumerate(columns) if column.kind == "number")
