"""Statistics over nodes as a programme of stages: what any number of nodes add up, under masks too, never a row.

    known ─► measure (at each node, over its batches) ─► int64 vector ─► sum over nodes ─► absorb ─► known ─► …

`known` is what the stages so far found, as a document; it goes out with the next stage's offers, so all nodes know it.
All sums are fixed-point integers whose scale follows from the contract's ranges: the result does not depend on the
order of nodes.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.blocks import Block
from concord_shared.errors import DataError
from concord_shared.plan.data import Column, DataContract
from concord_shared.plan.schema import Plan
from concord_shared.statistics.columns import (
    RELATIVE_BITS_MAX,
    RELATIVE_BITS_NOISY,
    Batch,
    FixedPoint,
    described,
    numbers,
    span,
    target_column,
    width,
)
from concord_shared.statistics.parts import (
    DRIFT_BITS,
    FINE_BITS,
    Part,
    Sums,
    Tallies,
    bounds,
    parts_of,
    reaches,
    tally,
    totals,
)
from concord_shared.statistics.suppression import suppressed
from concord_shared.statistics.wanted import RANK_BINS, Wanted, wanted_of

__all__ = ["KNOWN_SCHEMA", "Programme"]

KNOWN_SCHEMA = "concord/statistics/1"
DEVIATION_MIN = 4.0
CONSTANT = 1e-12
"""Below this share of its range, squared, a column's variance is that of rounding."""
Known = Mapping[str, Any]


@dataclass(frozen=True)
class Programme:
    """The stages of some statistics over a contract's columns. noisy: nodes add noise to their sums."""

    contract: DataContract
    wanted: Wanted
    noisy: bool = False

    @classmethod
    def of(cls, plan: Plan) -> "Programme":
        return cls(plan.data, wanted_of(plan), plan.noise == "tallies")

    @property
    def stages(self) -> int:
        return self.wanted.stages

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        target = (target_column(self.contract),) if self.wanted.target else ()
        return (*described(self.contract), *target)

    def parts(self, stage: int) -> tuple[Part, ...]:
        return parts_of(self.columns, self.wanted, stage)

    def block(self, stage: int) -> Block:
        size = sum(part.size for part in self.parts(stage))
        return Block("statistics", size, "none", ring_bits=64, rows_first=stage == 1)

    # At a node

    def measure(self, stage: int, batches: Iterable[Batch], known: Known, rows_max: int) -> Sums:
        """`(size,) int64`: one node's sums of a stage. rows_max: the offer's bound on all nodes' rows together."""
        point, found = self._point(rows_max), self._nothing(stage)
        for batch in batches:
            for name, sums in tally(point, self.columns, self.wanted, stage, batch, known).items():
                found[name] = found[name] + sums if name in found else sums
        return np.concatenate([totals(point, self.columns, part, found, known) for part in self.parts(stage)])

    def without_small_cells(self, stage: int, vector: Sums) -> Sums:
        """A node's own vector for a coordinator that sees it in the clear: small counts of categories, and what would
        give them away, count as values of none of them.
        """
        told, at = vector.copy(), 0
        for part in self.parts(stage):
            if part.what == "level" and self.columns[part.column].kind == "category":
                cells = told[at : at + part.size - 1]
                small = [cell is None for cell in suppressed(cells.tolist(), self.wanted.minimum_count)]
                told[at + part.size - 1] += cells[small].sum()
                cells[small] = 0
            at += part.size
        return told

    def read(self, stage: int, text: str) -> Known:
        """What an offer says that earlier stages found, if it is all that `stage` needs.

        Raises:
            ValueError: it is not.
        """
        if stage == 1:
            return {}
        try:
            known = json.loads(text)
            if known["schema"] != KNOWN_SCHEMA:
                raise ValueError("another schema")
            columns = {column.name: self._read_column(column, known["columns"][column.name]) for column in self.columns}
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(f"no results of the stage before that can be read: {error}") from error
        return {"columns": columns}

    def deviations(self, stage: int, rows_max: int, multiplier: float) -> NDArray[np.float64]:
        """`(size,)`: of the noise in each sum with which the stage is a Gaussian mechanism of that noise multiplier.

        A record moves each group of lanes by at most its reach Δ, so with deviations multiplier · √groups · Δ it moves
        the whole, in deviations, by at most 1 / multiplier.
        """
        point = self._point(rows_max)
        groups = [group for part in self.parts(stage) for group in reaches(point, self.columns, part)]
        spread = multiplier * math.sqrt(len(groups))
        return np.concatenate([np.full(lanes, max(DEVIATION_MIN, spread * reach)) for lanes, reach in groups])

    # At the coordinator

    def problem(
        self, stage: int, vector: Sums, rows: int, rows_max: int, slack: NDArray[np.float64] | None = None
    ) -> str | None:
        """Why these sums cannot be those of honest nodes with at most `rows` rows together, or None.

        slack: `(size,)`, how far the noise in them may reach.
        """
        point, at = self._point(rows_max), 0
        values_max = self._point(max(1, rows)).values_max if rows else 0
        for part in self.parts(stage):
            sums = vector[at : at + part.size]
            loose = np.zeros(part.size) if slack is None else slack[at : at + part.size]
            at += part.size
            if part.what == "rows" and slack is None:
                if not 0 <= int(sums[0]) <= rows:
                    return f"{int(sums[0])} rows, where {rows} are registered"
                values_max = self._point(max(1, int(sums[0]))).values_max if sums[0] else 0
                continue
            count = sums if slack is None else np.full_like(sums, values_max)  # a noisy count bounds nothing
            least, most = bounds(point, self.columns, part, count, values_max)
            least, most = least - loose, most + loose
            reals = sums.astype(np.float64)
            name = "pairs of columns" if part.column < 0 else f"column {self.columns[part.column].name}"
            more = slack is None and _adds_up_to_more(part, reals, values_max, self.columns)
            if (reals < least).any() or (reals > most).any() or more:
                return f"{name}: {WHAT[part.what]} that no values within its range have"
        return None

    def absorb(self, stage: int, vector: Sums, known: Known, rows_max: int) -> dict[str, Any]:
        """What is known after a stage, from the sums over nodes.

        Raises:
            DataError: there are fewer rows than may be told of, or nothing where training needs something.
        """
        point, parts = self._point(rows_max), self._split(stage, vector)
        if self.noisy:
            parts = {name: _counted(name[0], self.columns[name[1]], sums) for name, sums in parts.items()}
        if stage == 1:
            known = self._first(int(parts["rows", -1][0]))
        columns = {name: dict(about) for name, about in known["columns"].items()}
        found = dict(known) | {"stage": stage, "columns": columns}
        for index, column in enumerate(self.columns):
            about = columns[column.name]
            own = {what: sums for (what, place), sums in parts.items() if place == index}
            if "level" in own:
                about |= self._level(point, column, own, int(found["rows"]))
            if "spread" in own:
                about |= self._spread(point, column, own["spread"])
            if "site" in own:
                about |= _sites(point, column, own)
            if "drift" in own:
                distance, count = (int(value) for value in own["drift"])
                about["drift"] = math.ldexp(distance, -DRIFT_BITS) / count if count else None
            if "fine" in own:
                about |= self._refined(stage, column, about["open"], own["fine"])
        if ("products", -1) in parts:
            found["correlation"] = self._correlation(point, parts["products", -1])
        return found

    def _first(self, rows: int) -> dict[str, Any]:
        if rows < self.wanted.minimum_count:
            raise DataError(f"fewer than {self.wanted.minimum_count} rows take part, and no fewer are told of")
        return {
            "schema": KNOWN_SCHEMA,
            "rows": rows,
            "columns": {column.name: {"kind": column.kind} for column in self.columns},
        }

    def _level(self, point: FixedPoint, column: Column, own: Mapping[str, Sums], rows: int) -> dict[str, Any]:
        minimum = 1 if self.noisy else self.wanted.minimum_count  # noise hides a small count better than a gap does
        about: dict[str, Any] = {}
        values = point.values_max // point.rows_max * rows
        if column.kind == "category":
            counts, unknown = own["level"][:-1].tolist(), int(own["level"][-1])
            missing = max(0, values - sum(counts) - unknown)
            cells = [*counts, missing, unknown]
            *told, missing_told, unknown_told = suppressed(cells, minimum, of_hashed=column.bins > 0)
            about = {"counts": told, "missing": missing_told, "unknown": unknown_told}
            about |= {"count": _sum_of(told), "mode": int(np.argmax(counts)) if any(counts) else None}
            return about | ({"shares": _shares(told, minimum)} if self.wanted.sites else {})
        count, outside, total = (int(value) for value in own["level"])
        missing = max(0, values - count - outside)
        shown, coarse = self.wanted.shown_bins, own.get("histogram", np.array([count], np.int64))
        cells = coarse.reshape(shown, -1).sum(1).tolist() if shown else [count]
        *told, missing_told, outside_told = suppressed([*cells, missing, outside], minimum)
        enough = count >= max(1, minimum)
        low, high = span(column)
        mean = min(high, max(low, low + point.real(total / count, column))) if enough else None
        about = {"count": _sum_of(told), "missing": missing_told, "outside": outside_told, "mean": mean}
        if self.wanted.bins:
            about["histogram"] = told
        if self.wanted.sites:
            about["shares"] = _shares(told, minimum)
        if self.wanted.ranks:
            about |= self._told(column, 1, _ranked(self.wanted, coarse, count), count)
        return about

    def _spread(self, point: FixedPoint, column: Column, sums: Sums) -> dict[str, Any]:
        count, centred, squares = (int(value) for value in sums)
        if count < max(1, self.wanted.minimum_count):
            return {"scale": None, "variance": None}
        drift = point.real(centred / count, column)
        variance = max(0.0, point.real(squares / count, column, column) - drift**2)
        constant = variance <= CONSTANT * width(column) ** 2
        return {"variance": variance, "scale": 1.0 if constant else math.sqrt(variance)}

    def _refined(self, stage: int, column: Column, opened: list[int], sums: Sums) -> dict[str, Any]:
        """The ranks within the parts of their open bins. Where one is no longer in its bin, as nodes were lost, the
        bin's middle stands for it."""
        count, found = int(sums[0]), []
        lanes = sums[1:].reshape(-1, 1 + RANK_BINS)
        for place, (below, *cells), name in zip(opened, lanes, self.wanted.rank_names(), strict=True):
            rank = self.wanted.rank_of(name, count) - int(below)
            reached = np.cumsum(cells)
            inside = int(np.searchsorted(reached, rank)) if 0 < rank <= int(reached[-1]) else RANK_BINS // 2
            found.append((place << FINE_BITS) + inside)
        return self._told(column, stage, found, count)

    def _told(self, column: Column, stage: int, places: list[int], count: int) -> dict[str, Any]:
        """Quantiles as the middles of their bins; the extremes as the outer edges of theirs."""
        low, bins = span(column)[0], self.wanted.coarse << (FINE_BITS * (stage - 1))
        quantiles: dict[str, float | None] = {}
        extremes: dict[str, float | None] = {}
        for name, place in zip(self.wanted.rank_names(), places, strict=True):
            known = self.wanted.rank_of(name, count) > 0
            if name in ("minimum", "maximum"):
                edge = place + int(name == "maximum")
                extremes[name] = low + width(column) * edge / bins if known else None
            else:
                quantiles[name] = low + width(column) * (place + 0.5) / bins if known else None
        told = {"quantiles": quantiles, **extremes, "resolution": width(column) / bins}
        return told | {"open": places if stage < self.wanted.depth else None}

    def _correlation(self, point: FixedPoint, sums: Sums) -> dict[str, Any]:
        chosen = [column for _, column in numbers(self.columns)]
        names = [column.name for column in chosen]
        table: list[list[float | None]] = [[1.0 if a == b else None for b in names] for a in names]
        first, second = np.triu_indices(len(chosen), 1)
        for a, b, values in zip(first, second, sums.reshape(6, -1).T, strict=True):
            rows, product, *rest = (int(value) for value in values)
            if rows < max(2, self.wanted.minimum_count):
                continue
            both = chosen[a], chosen[b]
            s_a, s_b = (point.real(each / rows, column) for each, column in zip(rest[:2], both, strict=True))
            q_a, q_b = (point.real(each / rows, column, column) for each, column in zip(rest[2:], both, strict=True))
            v_a, v_b = q_a - s_a**2, q_b - s_b**2
            if v_a > CONSTANT * width(both[0]) ** 2 and v_b > CONSTANT * width(both[1]) ** 2:
                value = (point.real(product / rows, *both) - s_a * s_b) / math.sqrt(v_a * v_b)
                table[a][b] = table[b][a] = max(-1.0, min(1.0, value))
        return {"columns": names, "values": table}

    # Both

    def _point(self, rows_max: int) -> FixedPoint:
        return FixedPoint(self.contract, rows_max, RELATIVE_BITS_NOISY if self.noisy else RELATIVE_BITS_MAX)

    def _nothing(self, stage: int) -> Tallies:
        """Sums over no rows."""
        size = {(part.what, part.column): part.size for part in self.parts(stage)}
        found = {name: np.zeros(size, np.int64) for name, size in size.items()}
        if stage == 2 and self.wanted.sites:
            for index, column in enumerate(self.columns):
                cells = len(column.words) if column.kind == "category" else self.wanted.shown_bins
                found["cells", index] = np.zeros(cells, np.int64)
                if column.kind == "number":
                    found["spread", index] = np.zeros(3, np.int64)
        return found

    def _split(self, stage: int, vector: Sums) -> Tallies:
        parts, found, at = self.parts(stage), {}, 0
        for part in parts:
            found[part.what, part.column] = vector[at : at + part.size]
            at += part.size
        assert at == len(vector)
        return found

    def _read_column(self, column: Column, about: Any) -> dict[str, Any]:
        read: dict[str, Any] = {}
        if column.kind == "number":
            low, high = span(column)
            mean = low if about["mean"] is None else float(about["mean"])
            if not low <= mean <= high:
                raise ValueError(f"a mean of {column.name} outside of its range")
            read["mean"] = mean
        if self.wanted.sites:
            size = len(column.words) if column.kind == "category" else self.wanted.shown_bins
            shares = [float(each) for each in about["shares"]]
            if len(shares) != size or not all(0 <= each <= 1 for each in shares):
                raise ValueError(f"shares of {column.name} that are none")
            read["shares"] = shares
        if (opened := about.get("open")) is not None:
            sound = len(opened) == len(self.wanted.rank_names()) and all(type(each) is int for each in opened)
            if not sound or not all(0 <= each < 1 << 62 for each in opened):
                raise ValueError(f"open bins of {column.name} that are none")
            read["open"] = opened
        elif column.kind == "number" and self.wanted.depth > 1:
            raise ValueError(f"no open bins of {column.name}")
        return read


def _counted(what: str, column: Column, sums: Sums) -> Sums:
    """Noisy sums with no count below zero."""
    told = sums.copy()
    if what in ("rows", "histogram", "fine") or (what == "level" and column.kind == "category"):
        return np.maximum(told, 0)
    if what in ("level", "spread"):
        told[0] = max(0, told[0])
        if what == "level":
            told[1] = max(0, told[1])
    elif what == "products":
        rows = told[: len(told) // 6]
        np.maximum(rows, 0, out=rows)
    return told


WHAT = {
    "rows": "a count",
    "level": "counts or a sum",
    "histogram": "a histogram",
    "spread": "a sum",
    "site": "a variance between nodes",
    "drift": "a distance",
    "fine": "a histogram",
    "products": "a sum of products",
}


def _adds_up_to_more(part: Part, sums: NDArray[np.float64], values_max: int, columns: tuple[Column, ...]) -> bool:
    """Whether the cells of one table count more values than there can be."""
    if part.what == "histogram" or (part.what == "level" and columns[part.column].kind == "category"):
        return bool(sums.sum() > values_max)
    if part.what == "level":
        return bool(sums[:2].sum() > values_max)
    return part.what == "fine" and bool((sums[1:].reshape(-1, 1 + RANK_BINS).sum(1) > sums[0]).any())


def _ranked(wanted: Wanted, cells: Sums, count: int) -> list[int]:
    """In which bin each wanted rank is."""
    reached = np.cumsum(cells)
    ranks = [wanted.rank_of(name, count) for name in wanted.rank_names()]
    return [min(int(np.searchsorted(reached, max(1, rank))), len(cells) - 1) for rank in ranks]


def _sites(point: FixedPoint, column: Column, own: Mapping[str, Sums]) -> dict[str, Any]:
    """Of the variance about the common mean, the share between nodes (eta squared)."""
    count, centred, squares = (int(value) for value in own["spread"])
    if not count:
        return {"between": None}
    shift = point.real(centred, column) ** 2 / count
    within_and_between = point.real(squares, column, column) - shift
    between = point.real(int(own["site"][0]), column, column) - shift
    if within_and_between <= CONSTANT * width(column) ** 2 * count:
        return {"between": 0.0}
    return {"between": max(0.0, min(1.0, between / within_and_between))}


def _sum_of(cells: list[int | None]) -> int | None:
    return None if None in cells else sum(cell for cell in cells if cell is not None)


def _shares(told: list[int | None], minimum: int) -> list[float]:
    """Of each cell, from what is told alone: one that is not counts as half of the least that would be."""
    cells = [minimum / 2 if cell is None else float(cell) for cell in told]
    return [cell / max(1.0, sum(cells)) for cell in cells]
