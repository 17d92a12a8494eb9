"""Preprocessing as statistics over nodes: what is asked for in which order, and what is made of it.

    documents    of texts: in how many each bin of characters occurs
    quantiles    of numbers, for fences against outliers and for the norms that follow from quantiles
    distances    the median distance from the median, where the fences are made of it
    numbers      means, deviations and most frequent categories, of rows cleaned and moved between the fences

Each phase has a programme of its own, of one or more stages. `known` is what the phases so far found, by name: a node
works out medians and fences from it just as the coordinator does.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.blocks import Block
from concord_shared.errors import DataError
from concord_shared.plan.data import Column, DataContract
from concord_shared.plan.preparation import Outliers, TextFeatures
from concord_shared.plan.schema import Plan
from concord_shared.preprocessing import Fitted, Raw, moved, tidy, unfitted
from concord_shared.statistics import Batch, Programme, Wanted, described, width
from concord_shared.text_features import document_counts

__all__ = ["AnyProgramme", "Fitting", "fit", "fit_locally", "programme_of"]

Known = Mapping[str, Any]
Sums = NDArray[np.int64]
LEVELS = (0.01, 0.25, 0.5, 0.75, 0.99)
RESOLUTION = 1e-9
"""Of quantiles, as a share of the column's range: three stages."""
NORMAL = 1.4826
"""The standard deviation of a normal distribution, in median distances from its median."""


@dataclass(frozen=True)
class Documents:
    """Of texts: rows, and in how many each bin occurs. One stage; the same questions as a `Programme` answers."""

    wanted: TextFeatures
    stages: int = 1

    def block(self, stage: int) -> Block:
        return Block("statistics", 1 + self.wanted.bins, "none", ring_bits=64, rows_first=True)

    def measure(self, stage: int, batches: Iterable[Batch], known: Known, rows_max: int) -> Sums:
        parts = [np.append(len(texts), document_counts(texts, self.wanted)) for texts, _ in batches]
        total: Sums = np.sum(parts, 0, dtype=np.int64)
        return total

    def read(self, stage: int, text: str) -> Known:
        return {}

    def problem(
        self, stage: int, vector: Sums, rows: int, rows_max: int, slack: NDArray[np.float64] | None = None
    ) -> str | None:
        told = int(vector[0])
        if not 0 <= told <= rows:
            return f"{told} rows, where {rows} are registered"
        if not 0 <= int(vector.min()) <= int(vector.max()) <= told:
            return "a bin of characters that occurs in more texts than there are"
        return None

    def absorb(self, stage: int, vector: Sums, known: Known, rows_max: int) -> dict[str, Any]:
        return {"counts": vector.tolist()}


@dataclass(frozen=True)
class Fitting:
    """The stages of a plan's preprocessing, as one programme."""

    plan: Plan

    @cached_property
    def phases(self) -> dict[str, Programme | Documents]:
        wanted, contract = self.plan.preprocessing, self.plan.data
        if wanted.text is not None:
            return {"documents": Documents(wanted.text)}
        phases: dict[str, Programme | Documents] = {}
        if wanted.fits_quantiles:
            extremes = wanted.normalise == "min-max"
            phases["quantiles"] = Programme(
                contract, Wanted(quantiles=LEVELS, extremes=extremes, resolution=RESOLUTION)
            )
        if wanted.outliers is not None and wanted.outliers.rule == "mad":
            phases["distances"] = Programme(_from_0(contract), Wanted(quantiles=(0.5,), resolution=RESOLUTION))
        return phases | {"numbers": Programme(contract, Wanted(spread=True))}

    @property
    def stages(self) -> int:
        return sum(programme.stages for programme in self.phases.values())

    def block(self, stage: int) -> Block:
        phase, own = self._at(stage)
        return self.phases[phase].block(own)

    def measure(self, stage: int, batches: Iterable[Batch], known: Known, rows_max: int) -> Sums:
        """`(size,) int64`: one node's sums of a stage over its raw rows."""
        phase, own = self._at(stage)
        prepared = ((self._prepared(phase, raw, known), targets) for raw, targets in batches)
        return self.phases[phase].measure(own, prepared, known.get(phase, {}), rows_max)

    def read(self, stage: int, text: str) -> Known:
        """What an offer says that earlier stages found, if it is all that `stage` needs.

        Raises:
            ValueError: it is not.
        """
        if stage == 1:
            return {}
        phase, own = self._at(stage)
        try:
            told = json.loads(text)
            known = {name: self._read_quantiles(name, told[name]) for name in self._before(phase)}
            return known | {phase: self.phases[phase].read(own, json.dumps(told[phase]) if own > 1 else "")}
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"no results of the stage before that can be read: {error}") from error

    def problem(
        self, stage: int, vector: Sums, rows: int, rows_max: int, slack: NDArray[np.float64] | None = None
    ) -> str | None:
        """Why these sums cannot be those of honest nodes with at most `rows` rows together, or None."""
        phase, own = self._at(stage)
        return self.phases[phase].problem(own, vector, rows, rows_max, slack)

    def absorb(self, stage: int, vector: Sums, known: Known, rows_max: int) -> dict[str, Any]:
        """What is known after a stage, from the sums over nodes."""
        phase, own = self._at(stage)
        found = self.phases[phase].absorb(own, vector, known.get(phase, {}), rows_max)
        return {**known, phase: found}

    def _at(self, stage: int) -> tuple[str, int]:
        """The phase of a stage, and which of its own stages it is."""
        for phase, programme in self.phases.items():
            if stage <= programme.stages:
                return phase, stage
            stage -= programme.stages
        raise AssertionError("a stage that the fitting does not have")

    def _before(self, phase: str) -> list[str]:
        names = list(self.phases)
        return names[: names.index(phase)]

    def _prepared(self, phase: str, raw: Raw, known: Known) -> Raw:
        """The rows that a phase sees."""
        tidied = tidy(self.plan.data, self.plan.preprocessing, raw)
        if phase == "distances":
            medians = [_quantile(known, column, 0.5) or 0.0 for column in self.plan.data.columns]
            distances: Raw = np.abs(tidied - np.array(medians))
            return distances
        if phase == "numbers" and self.plan.preprocessing.outliers is not None:
            return moved(self.plan.data, tidied, fences(self.plan, known))
        return tidied

    def _read_quantiles(self, phase: str, about: Any) -> dict[str, Any]:
        """Of a phase that is over, what the following ones need: the quantiles of each number column."""
        read: dict[str, Any] = {}
        for column in self.phases[phase].contract.columns:  # type: ignore[union-attr]
            if column.kind == "number":
                assert column.range is not None
                told = {str(name): value for name, value in about["columns"][column.name]["quantiles"].items()}
                for value in told.values():
                    if value is not None and not column.range[0] <= float(value) <= column.range[1]:
                        raise ValueError(f"a quantile of {column.name} outside of its range")
                read[column.name] = {"quantiles": told}
        return {"columns": read}


AnyProgramme = Programme | Fitting


def programme_of(plan: Plan) -> AnyProgramme:
    """What nodes sum: before the first training round, or all that a plan of statistics asks for."""
    return Fitting(plan) if plan.kind == "train" else Programme.of(plan)


def fences(plan: Plan, known: Known) -> dict[str, tuple[float, float]]:
    """Between which values each number column stays; none of a column that has no spread."""
    outliers = plan.preprocessing.outliers
    found = {}
    for column in plan.data.columns:
        if column.kind == "number" and outliers is not None and _quantile(known, column, 0.5) is not None:
            low, high = _fence(outliers, column, known)
            if low < high:
                found[column.name] = (low, high)
    return found


def _fence(outliers: Outliers, column: Column, known: Known) -> tuple[float, float]:
    first, lower, median, upper, last = (_quantile(known, column, level) or 0.0 for level in LEVELS)
    if outliers.rule == "mad":
        lower = upper = median
        spread = NORMAL * (known["distances"]["columns"][column.name]["quantiles"]["0.5"] or 0.0)
    else:
        spread = upper - lower
    if spread <= 2 * RESOLUTION * width(column):  # no more than the resolution can tell from 0
        return first, last
    return lower - outliers.factor * spread, upper + outliers.factor * spread


def fit(plan: Plan, known: Known) -> Fitted:
    """The fitted preprocessing, from what all stages found.

    Raises:
        DataError: a column has no values.
    """
    wanted = plan.preprocessing
    if wanted.text is not None:
        return Fitted(plan.data, wanted, {}, {}, {}, documents=tuple(known["documents"]["counts"]))
    means, scales, centres = dict[str, float](), dict[str, float](), dict[str, float]()
    modes, kept = dict[str, int](), dict[str, tuple[int, ...]]()
    for column in described(plan.data):
        about = known["numbers"]["columns"][column.name]
        if column.kind == "category":
            modes[column.name] = about["mode"] or 0
            if column.bins:
                counts = np.array(about["counts"])
                kept[column.name] = tuple(np.flatnonzero(counts >= column.minimum_count).tolist())
            continue
        if about["mean"] is None:
            raise DataError(f"column {column.name}: no node has a single value; remove it from the plan's contract")
        if about["scale"] is None:
            raise DataError(f"column {column.name}: no node of the last stage has a value; try again")
        means[column.name], scales[column.name] = about["mean"], about["scale"]
        if wanted.normalise:
            centres[column.name], scales[column.name] = _norm(plan, column, known, about["scale"])
    return Fitted(plan.data, wanted, means, scales, modes, centres, fences(plan, known), kept=kept)


def _norm(plan: Plan, column: Column, known: Known, deviation: float) -> tuple[float, float]:
    """What is subtracted from a column and what it is divided by, as follows from its quantiles."""
    about = known["quantiles"]["columns"][column.name]
    if plan.preprocessing.normalise == "min-max":
        pair = np.clip([about["minimum"], about["maximum"]], *fences(plan, known).get(column.name, (None, None)))
        low, high = (float(edge) for edge in pair)
        return low, high - low if high > low else 1.0
    lower, median, upper = (about["quantiles"][str(level)] for level in LEVELS[1:4])
    spread = upper - lower
    return median, spread if spread > 2 * RESOLUTION * width(column) else deviation


def fit_locally(plan: Plan, raw: Raw) -> Fitted:
    """Scope per-node, and the baselines of `--compare`: the same sums over these rows alone."""
    if plan.preprocessing.scope == "none" or not plan.fits_something:
        return unfitted(plan)
    fitting, rows_max = Fitting(plan), max(1, len(raw))
    known: Known = {}
    for stage in range(1, fitting.stages + 1):
        vector = fitting.measure(stage, [(raw, None)], fitting.read(stage, json.dumps(known)), rows_max)
        known = fitting.absorb(stage, vector, known, rows_max)
    return fit(plan, known)


def _from_0(contract: DataContract) -> DataContract:
    """The contract of distances between values: each number's range begins at 0 and is as wide."""
    columns = [
        column if column.range is None else column.model_copy(update={"range": (0.0, width(column))})
        for column in contract.columns
    ]
    return contract.model_copy(update={"columns": tuple(columns)})


def _quantile(known: Known, column: Column, level: float) -> float | None:
    if column.kind != "number":
        return None
    value = known["quantiles"]["columns"][column.name]["quantiles"][str(level)]
    return None if value is None else float(value)
