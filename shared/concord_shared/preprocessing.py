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
from concord_shared.errors import ArtefactError
from concord_shared.plan.schema import DataContract, Plan, Preprocessing
from concord_shared.statistics import Statistics, Sums, channel_names, described, fit_means, fit_scales

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


def fit(plan: Plan, first: Sums, second: Sums, rows_max: int) -> Fitted:
    """The fitted preprocessing, from the sums of both stages of statistics."""
    means, modes = fit_means(plan, first, rows_max)
    return Fitted(plan.data, plan.preprocessing, means, fit_scales(plan, second, rows_max), modes)


def fit_locally(plan: Plan, raw: Raw) -> Fitted:
    """Scope per-node, and the baselines of `--compare`: the same sums over these rows alone."""
    if plan.preprocessing.scope == "none" or not (plan.preprocessing.standardise or plan.data.input == "table"):
        return unfitted(plan)
    rows_max = max(1, len(raw))
    first = Statistics.of(1, plan.data, raw, rows_max, {}).vector
    means, _ = fit_means(plan, first, rows_max)
    return fit(plan, first, Statistics.of(2, plan.data, raw, rows_max, means).vector, rows_max)


def _dropped(preprocessing: Preprocessing) -> int:
    return 1 if preprocessing.encode == "one-hot-drop-first" else 0
