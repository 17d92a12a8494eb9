"""Preprocessing that is honest in a federation: fitted from statistics over nodes, never from pooled rows.

The fitted values are part of the model's artefact: training, evaluation and prediction apply the same.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.canonical import canonical_digest
from concord_shared.errors import ArtefactError, DataError
from concord_shared.plan.schema import DataContract, Plan, Preprocessing
from concord_shared.statistics import Programme, channel_names, described

__all__ = ["Fitted", "feature_names", "fit", "fit_locally", "unfitted"]

Raw = NDArray[Any]


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
        columns = described(self.contract)
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
            for channel, name in enumerate(channel_names(self.contract)):
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


def fit(plan: Plan, known: Mapping[str, Any]) -> Fitted:
    """The fitted preprocessing, from what all stages of statistics found.

    Raises:
        DataError: a column has no values.
    """
    means, scales, modes = dict[str, float](), dict[str, float](), dict[str, int]()
    for column in described(plan.data):
        about = known["columns"][column.name]
        if column.kind == "category":
            modes[column.name] = about["mode"] or 0
            continue
        if about["mean"] is None:
            raise DataError(f"column {column.name}: no node has a single value; remove it from the plan's contract")
        if about["scale"] is None:
            raise DataError(f"column {column.name}: no node of the second stage has a value; try again")
        means[column.name], scales[column.name] = about["mean"], about["scale"]
    return Fitted(plan.data, plan.preprocessing, means, scales, modes)


def fit_locally(plan: Plan, raw: Raw) -> Fitted:
    """Scope per-node, and the baselines of `--compare`: the same sums over these rows alone."""
    if plan.preprocessing.scope == "none" or not (plan.preprocessing.standardise or plan.data.input == "table"):
        return unfitted(plan)
    programme, rows_max = Programme.of(plan), max(1, len(raw))
    known: Mapping[str, Any] = {}
    for stage in range(1, programme.stages + 1):
        vector = programme.measure(stage, [(raw, None)], programme.read(stage, json.dumps(known)), rows_max)
        known = programme.absorb(stage, vector, known, rows_max)
    return fit(plan, known)


def _dropped(preprocessing: Preprocessing) -> int:
    return 1 if preprocessing.encode == "one-hot-drop-first" else 0
