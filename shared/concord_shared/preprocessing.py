"""Preprocessing that is honest in a federation: fitted from exact integer sums over nodes, never from pooled
rows.

Two statistics rounds. First: rows, and per number column count and sum, per category column the count of each
category. Second, given the means: the centred sum and the centred squares. All are fixed-point integers
whose scale follows from the contract's ranges, so the result does not depend on the order of nodes and can
be summed under masks. The fitted values are part of the model's artefact: inference applies the same.

Raw table inputs are `(n, columns) float64`, a category as its index in the contract, NaN where missing. Raw
image inputs are `(n, channels, height, width)`, uint8 or float32.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.blocks import Block
from concord_shared.canonical import canonical_digest
from concord_shared.errors import ArtefactError, DataError
from concord_shared.plan.schema import Column, DataContract, Plan, Preprocessing

__all__ = [
    "Fitted",
    "Statistics",
    "feature_names",
    "fit",
    "fit_locally",
    "fit_means",
    "number_names",
    "statistics_block",
    "unfitted",
]

Sums = NDArray[np.int64]
Raw = NDArray[Any]
RELATIVE_BITS_MAX = 52
CONSTANT = 1e-12
"""Below this share of its range, squared, a column's variance is that of rounding."""


@dataclass(frozen=True)
class Fitted:
    """What was learned: `means` and `scales` of number columns or channels, `modes` of category columns."""

    contract: DataContract
    preprocessing: Preprocessing
    means: Mapping[str, float]
    scales: Mapping[str, float]
    modes: Mapping[str, int]

    def transform(self, raw: Raw) -> NDArray[np.float32]:
        """Raw rows to model inputs: `(n, features)` or `(n, channels, height, width)` float32."""
        return self._image(raw) if self.contract.input == "image" else self._table(raw)

    def document(self) -> dict[str, Any]:
        return {
            "schema": "concord/preprocessing/1",
            "contract": self.contract.model_dump(mode="json"),
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "means": dict(self.means),
            "scales": dict(self.scales),
            "modes": dict(self.modes),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> "Fitted":
        try:
            return cls(
                DataContract.model_validate_json(json.dumps(document["contract"])),
                Preprocessing.model_validate_json(json.dumps(document["preprocessing"])),
                {str(key): float(value) for key, value in document["means"].items()},
                {str(key): float(value) for key, value in document["scales"].items()},
                {str(key): int(value) for key, value in document["modes"].items()},
            )
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise ArtefactError(f"not a preprocessing document of concord: {error}") from error

    @property
    def is_complete(self) -> bool:
        """Whether each column has what transforming it needs, as finite numbers and known categories."""
        columns = _described(self.contract)
        numbers = [column.name for column in columns if column.kind == "number"]
        categories = {column.name: len(column.categories) for column in columns if column.kind == "category"}
        values = [*self.means.values(), *self.scales.values()]
        return (
            set(self.means) == set(self.scales) == set(numbers)
            and set(self.modes) == set(categories)
            and all(math.isfinite(value) for value in values)
            and all(value > 0 for value in self.scales.values())
            and all(0 <= mode < categories[name] for name, mode in self.modes.items())
        )

    @property
    def digest(self) -> str:
        return canonical_digest(self.document())

    def _image(self, raw: Raw) -> NDArray[np.float32]:
        images = raw.astype(np.float32)
        if raw.dtype == np.uint8 and self.preprocessing.scale == "unit":
            images *= np.float32(1 / 255)
        if self.preprocessing.standardise:
            unit = 255 if self.preprocessing.scale == "unit" else 1
            for channel, name in enumerate(_channels(self.contract)):
                images[:, channel] -= np.float32(self.means[name] / unit)
                images[:, channel] /= np.float32(self.scales[name] / unit)
        return images

    def _table(self, raw: Raw) -> NDArray[np.float32]:
        parts = []
        for index, column in enumerate(self.contract.columns):
            values = raw[:, index]
            if column.kind == "number":
                values = np.where(np.isnan(values), self.means.get(column.name, 0.0), values)
                if self.preprocessing.standardise:
                    values = (values - self.means[column.name]) / self.scales[column.name]
                parts.append(values[:, None])
            else:
                codes = np.where(np.isnan(values), self.modes.get(column.name, 0), values).astype(np.int64)
                parts.append(np.eye(len(column.categories))[codes][:, self._dropped :])
        return np.concatenate(parts, 1).astype(np.float32)

    @property
    def _dropped(self) -> int:
        return _dropped(self.preprocessing)


def number_names(contract: DataContract) -> tuple[str, ...]:
    """Names of number columns, or of an image's channels."""
    return tuple(column.name for column in _described(contract) if column.kind == "number")


def feature_names(contract: DataContract, preprocessing: Preprocessing) -> tuple[str, ...]:
    """Names of the model's inputs for a table, in order."""
    names: list[str] = []
    for column in contract.columns:
        if column.kind == "number":
            names.append(column.name)
        else:
            names += [f"{column.name}={category}" for category in column.categories[_dropped(preprocessing) :]]
    return tuple(names)


def unfitted(plan: Plan) -> Fitted:
    """For scope none: nothing to learn."""
    return Fitted(plan.data, plan.preprocessing, {}, {}, {})


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
        for column in _described(contract):
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
    for column in _described(contract):
        size += (len(column.categories) if column.kind == "category" else 2) if stage == 1 else 0
        size += 3 if stage == 2 and column.kind == "number" else 0
    return Block("statistics", size, "none", ring_bits=64, rows_first=stage == 1)


def fit_means(plan: Plan, first: Sums, rows_max: int) -> tuple[dict[str, float], dict[str, int]]:
    """Means of number columns and most frequent categories, from the first stage's sums."""
    means: dict[str, float] = {}
    modes: dict[str, int] = {}
    values_max = _values_max(plan.data, rows_max)
    position = 1
    for column in _described(plan.data):
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


def fit(plan: Plan, first: Sums, second: Sums, rows_max: int) -> Fitted:
    """The fitted preprocessing. A constant column gets scale 1."""
    means, modes = fit_means(plan, first, rows_max)
    scales: dict[str, float] = {}
    values_max = _values_max(plan.data, rows_max)
    position = 0
    for column in _described(plan.data):
        if column.kind == "number":
            count, centred, squares = (int(value) for value in second[position : position + 3])
            if count == 0:
                raise DataError(f"column {column.name}: no node of the second stage has a value; try again")
            drift = math.ldexp(centred / count, -_bits(column, values_max, 1))
            variance = math.ldexp(squares / count, -_bits(column, values_max, 2)) - drift**2
            constant = variance <= CONSTANT * _width(column) ** 2
            scales[column.name] = 1.0 if constant else math.sqrt(variance)
            position += 3
    return Fitted(plan.data, plan.preprocessing, means, scales, modes)


def fit_locally(plan: Plan, raw: Raw) -> Fitted:
    """Scope per-node, and the baselines of `--compare`: the same sums over these rows alone."""
    if plan.preprocessing.scope == "none" or not (plan.preprocessing.standardise or plan.data.input == "table"):
        return unfitted(plan)
    rows_max = max(1, len(raw))
    first = Statistics.of(1, plan.data, raw, rows_max, {}).vector
    means, _ = fit_means(plan, first, rows_max)
    return fit(plan, first, Statistics.of(2, plan.data, raw, rows_max, means).vector, rows_max)


def _described(contract: DataContract) -> tuple[Column, ...]:
    """A table's columns; an image's channels as number columns."""
    if contract.input == "table":
        return contract.columns
    return tuple(Column(name=name, range=(0.0, 255.0)) for name in _channels(contract))


def _columns(contract: DataContract, raw: Raw) -> Any:
    """Per column: the column, values that occur (float64), and how often each does."""
    for index, column in enumerate(_described(contract)):
        if contract.input == "image":
            yield column, np.arange(256.0), np.bincount(raw[:, index].reshape(-1), minlength=256)
        else:
            values = raw[:, index][~np.isnan(raw[:, index])]
            yield column, values, np.ones(len(values), np.int64)


def _channels(contract: DataContract) -> list[str]:
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


def _dropped(preprocessing: Preprocessing) -> int:
    return 1 if preprocessing.encode == "one-hot-drop-first" else 0
