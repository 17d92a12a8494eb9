"""Preprocessing that is honest in a federation: fitted from statistics over nodes, never from pooled rows.

The fitted values are part of the model's artefact: training, evaluation and prediction apply the same.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.canonical import canonical_digest
from concord_shared.errors import ArtefactError
from concord_shared.image_cleaning import denoised
from concord_shared.plan.data import Column, DataContract
from concord_shared.plan.preparation import Preprocessing
from concord_shared.plan.schema import Plan
from concord_shared.statistics import channel_names, described
from concord_shared.text_features import features, inverse_frequencies
from concord_shared.text_tokens import tokens

__all__ = ["Fitted", "Raw", "feature_names", "moved", "tidy", "unfitted"]

Raw = NDArray[Any]


@dataclass(frozen=True)
class Fitted:
    """What was learned, by name of number column or channel; of categories the code that occurs most.

    means: what a missing number becomes, and is subtracted, unless `centres` has another for it. scales: what numbers
    are divided by. fences: between which they are moved. documents: of texts their number, and in how many each bin
    occurs. kept: of a column of hashed words the bins that occur often enough.
    """

    contract: DataContract
    preprocessing: Preprocessing
    means: Mapping[str, float]
    scales: Mapping[str, float]
    modes: Mapping[str, int]
    centres: Mapping[str, float] = field(default_factory=dict)
    fences: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    documents: tuple[int, ...] = ()
    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def transform(self, raw: Raw) -> NDArray[Any]:
        """Raw rows to model inputs: `(n, features)` or `(n, channels, height, width)` float32, or tokens `(n, length)`
        int64."""
        if self.preprocessing.tokens is not None:
            return tokens(raw, self.preprocessing.tokens)[0]
        if self.contract.input == "text":
            return self._text(raw)
        if self.contract.input == "ratings":
            return raw.astype(np.float32)  # numbers of users and places of items, exact below 2**24
        tidied = tidy(self.contract, self.preprocessing, raw)
        if self.contract.input in ("image", "array"):
            return self._image(tidied)
        return self._table(moved(self.contract, tidied, self.fences))

    def counts(self, raw: Raw) -> dict[str, int]:
        """What cleaning does to these rows: how many values are outside, how many moved, how many images changed."""
        tidied = tidy(self.contract, self.preprocessing, raw)
        found: dict[str, int] = {}
        if self.preprocessing.tokens is not None:
            found |= tokens(raw, self.preprocessing.tokens)[1]
        if self.preprocessing.outside == "missing":
            found["outside"] = int((np.isnan(tidied) & ~np.isnan(raw)).sum())
        if self.preprocessing.outliers is not None:
            change = moved(self.contract, tidied, self.fences) != tidied
            found["outliers"] = int((change & ~np.isnan(tidied)).sum())
        if self.preprocessing.denoise != "none":
            found["denoised"] = int((tidied != raw).reshape(len(raw), -1).any(1).sum())
        return found

    def document(self) -> dict[str, Any]:
        return {
            "schema": "concord/preprocessing/1",
            "contract": self.contract.model_dump(mode="json"),
            "preprocessing": self.preprocessing.model_dump(mode="json"),
            "means": dict(self.means),
            "scales": dict(self.scales),
            "modes": dict(self.modes),
            **({"centres": dict(self.centres)} if self.centres else {}),
            **({"fences": {name: list(pair) for name, pair in self.fences.items()}} if self.fences else {}),
            **({"documents": list(self.documents)} if self.documents else {}),
            **({"kept": {name: list(bins) for name, bins in self.kept.items()}} if self.kept else {}),
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
                {str(key): float(value) for key, value in document.get("centres", {}).items()},
                {str(key): _pair(value) for key, value in document.get("fences", {}).items()},
                tuple(int(value) for value in document.get("documents", ())),
                {str(key): tuple(int(value) for value in bins) for key, bins in document.get("kept", {}).items()},
            )
        except (KeyError, ValueError, AttributeError, TypeError) as error:
            raise ArtefactError(f"not a preprocessing document of concord: {error}") from error

    @property
    def is_complete(self) -> bool:
        """Whether each column has what transforming it needs, as finite numbers and known categories."""
        wanted, columns = self.preprocessing, described(self.contract)
        numbers = {column.name for column in columns if column.kind == "number"}
        categories = {column.name: len(column.words) for column in columns if column.kind == "category"}
        bins = {column.name: column.bins for column in columns if column.bins}
        edges = [edge for pair in self.fences.values() for edge in pair]
        values = [*self.means.values(), *self.scales.values(), *self.centres.values(), *edges]
        return (
            set(self.means) == set(self.scales) == numbers
            and set(self.modes) == set(categories)
            and set(self.centres) == (numbers if wanted.normalise else set())
            and set(self.fences) <= (numbers if wanted.outliers else set())
            and all(math.isfinite(value) for value in values)
            and all(value > 0 for value in self.scales.values())
            and all(low <= high for low, high in self.fences.values())
            and all(0 <= mode < categories[name] for name, mode in self.modes.items())
            and set(self.kept) == set(bins)
            and all(0 <= place < bins[name] for name, kept in self.kept.items() for place in kept)
            and len(self.documents) == (1 + wanted.text.bins if wanted.text else 0)
            and all(0 <= count <= self.documents[0] for count in self.documents[1:])
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
                parts.append(self._number(column.name, values)[:, None].astype(np.float32))
            else:
                codes = np.where(np.isnan(values), self.modes.get(column.name, 0), values).astype(np.int64)
                parts.append(self._category(column, codes)[:, self._dropped :])
        return np.concatenate(parts, 1)

    def _category(self, column: Column, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """One column for each category or bin, 1 where it is the row's; a bin that was left out has 0 throughout."""
        out = np.zeros((len(codes), len(column.words)), np.float32)
        out[np.arange(len(codes)), codes] = 1
        if column.name in self.kept:
            out[:, np.setdiff1d(np.arange(column.bins), self.kept[column.name])] = 0
        return out

    def _number(self, name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = self.means.get(name, 0.0)
        centre = self.centres.get(name, mean)
        values = np.where(np.isnan(values), centre if self.preprocessing.normalise == "robust" else mean, values)
        if self.preprocessing.standardise or self.preprocessing.normalise:
            values = (values - centre) / self.scales[name]
        return values

    def _text(self, raw: Raw) -> NDArray[np.float32]:
        assert self.preprocessing.text is not None
        return features(raw, self.preprocessing.text, self._weights)

    @cached_property
    def _weights(self) -> NDArray[np.float64] | None:
        """Of a text's bins; None where nothing was fitted."""
        assert self.preprocessing.text is not None
        rows, *counts = self.documents or (0,)
        return inverse_frequencies(rows, np.array(counts), self.preprocessing.text) if counts else None

    @property
    def _dropped(self) -> int:
        return _dropped(self.preprocessing)


def tidy(contract: DataContract, preprocessing: Preprocessing, raw: Raw) -> Raw:
    """Raw rows cleaned of what needs no other row to be seen: the first step of fitting and of `transform` alike."""
    if contract.input == "image" and preprocessing.denoise == "median":
        return denoised(raw)
    if preprocessing.outside != "missing":
        return raw
    ranges = [column.range or (-math.inf, math.inf) for column in contract.columns]
    lows, highs = np.array(ranges).T
    return np.where((raw < lows) | (raw > highs), math.nan, raw)


def moved(contract: DataContract, tidied: Raw, fences: Mapping[str, tuple[float, float]]) -> Raw:
    """Tidy rows of a table with outliers moved to the fences of their columns."""
    edges = [fences.get(column.name, (-math.inf, math.inf)) for column in contract.columns]
    lows, highs = np.array(edges).T
    return tidied.clip(lows, highs)


def feature_names(contract: DataContract, preprocessing: Preprocessing) -> tuple[str, ...]:
    """Names of the model's inputs for a table or text, in order."""
    if preprocessing.tokens is not None:
        return tuple(f"token_{place}" for place in range(preprocessing.tokens.length))
    if preprocessing.text is not None:
        return tuple(f"bin_{place}" for place in range(preprocessing.text.bins))
    names: list[str] = []
    for column in contract.columns:
        if column.kind == "number":
            names.append(column.name)
        else:
            names += [f"{column.name}={category}" for category in column.words[_dropped(preprocessing) :]]
    return tuple(names)


def unfitted(plan: Plan) -> Fitted:
    """For scope none: nothing to learn."""
    return Fitted(plan.data, plan.preprocessing, {}, {}, {})


def _pair(value: Any) -> tuple[float, float]:
    low, high = value
    return float(low), float(high)


def _dropped(preprocessing: Preprocessing) -> int:
    return 1 if preprocessing.encode == "one-hot-drop-first" else 0
