"""Statistics over nodes as exact integer sums: what any number of nodes add up, under masks too, never a row.

Two stages. First: rows, and per number column count and sum, per category column the count of each category. Second,
given the means: the centred sum and the centred squares. All are fixed-point integers whose scale follows from the
contract's ranges, so the result does not depend on the order of nodes.

Raw table inputs are `(n, columns) float64`, a category as its index in the contract, NaN where missing. Raw image
inputs are `(n, channels, height, width)`, uint8 or float32; a channel counts as a number column of its pixels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.blocks import Block
from concord_shared.errors import DataError
from concord_shared.plan.schema import Column, DataContract, Plan

__all__ = [
    "Statistics",
    "Sums",
    "channel_names",
    "described",
    "fit_means",
    "fit_scales",
    "number_names",
    "statistics_block",
]

Sums = NDArray[np.int64]
Raw = NDArray[Any]
RELATIVE_BITS_MAX = 52
CONSTANT = 1e-12
"""Below this share of its range, squared, a column's variance is that of rounding."""


def number_names(contract: DataContract) -> tuple[str, ...]:
    """Names of number columns, or of an image's channels."""
    return tuple(column.name for column in described(contract) if column.kind == "number")


@dataclass(frozen=True)
class Statistics:
    """The integer sums of one stage over the rows of one node, or of many.

    Stage 1 `vector`: rows; per number column count, sum; per category column its counts.
    Stage 2 `vector`: per number column count, centred sum, centred squares.
    """

    stage: int
    vector: Sums

    @classmethod
    def of(
        cls, stage: int, contract: DataContract, raw: Raw, rows_max: int, means: Mapping[str, float]
    ) -> "Statistics":
        values: list[int] = [len(raw)] if stage == 1 else []
        values_max = _values_max(contract, rows_max)
        for column, levels, counts in _columns(contract, raw):
            if column.kind == "category":
                if stage == 1:
                    values += [int(counts[levels == code].sum()) for code in range(len(column.categories))]
            elif stage == 1:
                values += [
                    int(counts.sum()),
                    _fixed_sum(levels - _low(column), counts, _bits(column, values_max, 1)),
                ]
            else:
                centred = levels - means[column.name]
                values += [int(counts.sum()), _fixed_sum(centred, counts, _bits(column, values_max, 1))]
                values += [_fixed_sum(centred**2, counts, _bits(column, values_max, 2))]
        return cls(stage, np.array(values, np.int64))

    def problem(self, contract: DataContract, rows_max: int, rows_bound: int) -> str | None:
        """Why these sums cannot be those of an honest node with at most `rows_max` rows, or None.

        rows_bound: the offer's bound on all rows together, which the fixed point follows from.
        """
        if self.stage == 1 and not 0 <= int(self.vector[0]) <= rows_max:
            return f"{int(self.vector[0])} rows, where {rows_max} are registered"
        rows = int(self.vector[0]) if self.stage == 1 else rows_max
        values_max, values_bound = _values_max(contract, rows), _values_max(contract, rows_bound)
        position = int(self.stage == 1)
        for column in described(contract):
            if column.kind == "category":
                counts = self.vector[position : position + len(column.categories)] if self.stage == 1 else np.zeros(1)
                position += len(column.categories) if self.stage == 1 else 0
                if int(counts.min()) < 0 or sum(int(count) for count in counts) > values_max:
                    return f"column {column.name} has impossible category counts"
                continue
            size = 2 if self.stage == 1 else 3
            count, *sums = (int(value) for value in self.vector[position : position + size])
            position += size
            if not 0 <= count <= values_max:
                return f"column {column.name} counts {count} values"
            for power, total in enumerate(sums, 1):
                most = (
                    math.ldexp(_width(column) ** power, _bits(column, values_bound, power)) * count * (1 + 1e-9) + count
                )
                least = -most if self.stage == 2 and power == 1 else 0
                if not least <= total <= most:
                    return f"column {column.name} has a sum that no values within its range have"
        return None


def statistics_block(stage: int, contract: DataContract) -> Block:
    size = int(stage == 1)
    for column in described(contract):
        size += (len(column.categories) if column.kind == "category" else 2) if stage == 1 else 0
        size += 3 if stage == 2 and column.kind == "number" else 0
    return Block("statistics", size, "none", ring_bits=64, rows_first=stage == 1)


def fit_means(plan: Plan, first: Sums, rows_max: int) -> tuple[dict[str, float], dict[str, int]]:
    """Means of number columns and most frequent categories, from the first stage's sums."""
    means: dict[str, float] = {}
    modes: dict[str, int] = {}
    values_max = _values_max(plan.data, rows_max)
    position = 1
    for column in described(plan.data):
        if column.kind == "category":
            counts = first[position : position + len(column.categories)]
            modes[column.name] = int(counts.argmax())
            position += len(column.categories)
        else:
            count, total = (int(value) for value in first[position : position + 2])
            if count == 0:
                raise DataError(f"column {column.name}: no node has a single value; remove it from the plan's contract")
            means[column.name] = _low(column) + math.ldexp(total / count, -_bits(column, values_max, 1))
            position += 2
    return means, modes


def fit_scales(plan: Plan, second: Sums, rows_max: int) -> dict[str, float]:
    """Standard deviations of number columns, from the second stage's sums. A constant column gets 1."""
    scales: dict[str, float] = {}
    values_max = _values_max(plan.data, rows_max)
    position = 0
    for column in described(plan.data):
        if column.kind == "number":
            count, centred, squares = (int(value) for value in second[position : position + 3])
            if count == 0:
                raise DataError(f"column {column.name}: no node of the second stage has a value; try again")
            drift = math.ldexp(centred / count, -_bits(column, values_max, 1))
            variance = math.ldexp(squares / count, -_bits(column, values_max, 2)) - drift**2
            constant = variance <= CONSTANT * _width(column) ** 2
            scales[column.name] = 1.0 if constant else math.sqrt(variance)
            position += 3
    return scales


def described(contract: DataContract) -> tuple[Column, ...]:
    """A table's columns; an image's channels as number columns."""
    if contract.input == "table":
        return contract.columns
    return tuple(Column(name=name, range=(0.0, 255.0)) for name in channel_names(contract))


def _columns(contract: DataContract, raw: Raw) -> Any:
    """Per column: the column, values that occur (float64), and how often each does."""
    for index, column in enumerate(described(contract)):
        if contract.input == "image":
            yield column, np.arange(256.0), np.bincount(raw[:, index].reshape(-1), minlength=256)
        else:
            values = raw[:, index][~np.isnan(raw[:, index])]
            yield column, values, np.ones(len(values), np.int64)


def channel_names(contract: DataContract) -> list[str]:
    return [f"channel_{index}" for index in range(contract.shape[0])]


def _low(column: Column) -> float:
    return column.range[0] if column.range else 0.0


def _bits(column: Column, values_max: int, power: int) -> int:
    """Fractional bits such that `values_max` values of width**power sum below 2**62."""
    scale = math.ceil(math.log2(_width(column)) * power)
    return min(RELATIVE_BITS_MAX, 62 - math.ceil(math.log2(values_max))) - scale


def _width(column: Column) -> float:
    assert column.range is not None, "a plan whose preprocessing is fitted has ranges"
    return column.range[1] - column.range[0]


def _values_max(contract: DataContract, rows_max: int) -> int:
    """How many values of one column `rows_max` rows can hold: an image's channel has one a pixel."""
    return rows_max * (contract.shape[1] * contract.shape[2] if contract.input == "image" else 1)


def _fixed_sum(values: NDArray[np.float64], counts: NDArray[np.int64], bits: int) -> int:
    return int((np.rint(np.ldexp(values, bits)).astype(np.int64) * counts).sum())
