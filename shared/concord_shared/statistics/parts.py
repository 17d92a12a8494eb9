"""The vector of a stage, in parts: which there are, what a node adds up for them, and what an honest one cannot exceed.

    stage 1   rows
              level      number: values, values outside of the range, sum above its low end
                         category: values of each, values of none of them
              histogram  values by coarse bin
    stage 2   spread     values, centred sum, centred squares (about the mean that stage 1 gave)
              site       number: sᵢ²/nᵢ of this node's centred sum sᵢ over its nᵢ values, so that their sum tells the
                         variance between nodes
              drift      values times the distance of this node's shares from those of all; values
              products   of each pair of number columns, over rows that have both: rows, centred products, centred
                         sums of each, squares of each
    stage 2…  fine       values; for each rank that is looked for: those below the open bin, and by part of that bin

Everything but site and drift is a sum over rows, so batches add up; those two follow from such sums of one node. Sums
of single columns are rounded row by row, so they are the same bit for bit however rows are spread over nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.plan.data import Column
from concord_shared.statistics.columns import (
    Batch,
    FixedPoint,
    Values,
    count_of,
    numbers,
    span,
    values_of,
    width,
    within,
)
from concord_shared.statistics.wanted import RANK_BINS, Wanted

__all__ = ["DRIFT_BITS", "Part", "Tallies", "bounds", "parts_of", "reaches", "tally", "totals"]

Sums = NDArray[np.int64]
Known = Mapping[str, Any]
Tallies = dict[tuple[str, int], Sums]
"""By part and place of its column: sums over the rows of one node so far."""
FINE_BITS = RANK_BINS.bit_length() - 1
DRIFT_BITS = 20
ROUNDED_BATCHES = 1 << 10
"""Products are rounded once a batch: where one record moves the borders of batches, each may round otherwise."""


@dataclass(frozen=True)
class Part:
    """column: its place; -1 for all of them."""

    what: str
    column: int
    size: int


def parts_of(columns: tuple[Column, ...], wanted: Wanted, stage: int) -> tuple[Part, ...]:
    """The parts of a stage's vector, in order."""
    parts = [Part("rows", -1, 1)] if stage == 1 else []
    for index, column in enumerate(columns):
        number = column.kind == "number"
        if stage == 1:
            parts.append(Part("level", index, 3 if number else len(column.words) + 1))
            if number and wanted.coarse:
                parts.append(Part("histogram", index, wanted.coarse))
        if stage == 2:
            if number and (wanted.spread or wanted.sites):
                parts.append(Part("spread", index, 3))
            if number and wanted.sites:
                parts.append(Part("site", index, 1))
            if wanted.sites:
                parts.append(Part("drift", index, 2))
        if number and 2 <= stage <= wanted.depth:
            parts.append(Part("fine", index, 1 + len(wanted.rank_names()) * (1 + RANK_BINS)))
    pairs = len(list(numbers(columns)))
    if stage == 2 and wanted.correlation and pairs > 1:
        parts.append(Part("products", -1, 6 * (pairs * (pairs - 1) // 2)))
    return tuple(parts)


def tally(
    point: FixedPoint, columns: tuple[Column, ...], wanted: Wanted, stage: int, batch: Batch, known: Known
) -> Tallies:
    """What one batch adds: of every column, and of pairs of them."""
    found: Tallies = {("rows", -1): np.array([len(batch[0])], np.int64)} if stage == 1 else {}
    for index, column in enumerate(columns):
        values = values_of(point.contract, batch, index)
        about = known.get("columns", {}).get(column.name, {})
        of = _of_number if column.kind == "number" else _of_category
        found |= {(what, index): sums for what, sums in of(point, column, wanted, stage, values, about).items()}
    if stage == 2 and wanted.correlation and len(list(numbers(columns))) > 1:
        found["products", -1] = _products(point, columns, batch, known)
    return found


def totals(point: FixedPoint, columns: tuple[Column, ...], part: Part, found: Tallies, known: Known) -> Sums:
    """A part of the vector, from what all batches of this node added up to."""
    if part.what not in ("site", "drift"):
        return found[part.what, part.column]
    column = columns[part.column]
    if part.what == "site":
        count, centred, _ = (int(value) for value in found["spread", part.column])
        own = point.real(centred, column) ** 2 / count if count else 0.0
        return np.array([point.fixed(own, column, column)], np.int64)
    cells = found["cells", part.column].astype(np.float64)
    share = np.array(known["columns"][column.name]["shares"])
    distance = np.abs(cells - cells.sum() * share).sum() / 2
    return np.array([round(np.ldexp(distance, DRIFT_BITS)), int(cells.sum())], np.int64)


def reaches(point: FixedPoint, columns: tuple[Column, ...], part: Part) -> list[tuple[int, float]]:
    """How far one record can move a part, in groups of lanes: (lanes, L2 of what it adds to these together).

    Within a group each of a record's values is in one lane alone, or there is one lane.
    """
    values = float(point.values_max // point.rows_max)
    if part.what == "rows":
        return [(1, 1.0)]
    if part.what == "products":
        chosen = [column for _, column in numbers(columns)]
        pairs = [(chosen[a], chosen[b]) for a, b in zip(*np.triu_indices(len(chosen), 1), strict=True)]
        each = [[1.0] * len(pairs), [point.unit(a, b) for a, b in pairs]]
        each += [[point.unit(pair[side]) for pair in pairs] for side in (0, 1)]
        each += [[point.unit(pair[side], pair[side]) for pair in pairs] for side in (0, 1)]
        return [(1, reach + ROUNDED_BATCHES * (kind > 0)) for kind, lanes in enumerate(each) for reach in lanes]
    column = columns[part.column]
    if part.what == "spread":
        return [(1, values), (1, values * point.unit(column)), (1, values * point.unit(column, column))]
    if part.what == "level" and column.kind == "number":
        return [(2, values), (1, values * point.unit(column))]
    if part.what == "fine":
        return [(1, values), *[(1 + RANK_BINS, values)] * ((part.size - 1) // (1 + RANK_BINS))]
    assert part.what in ("level", "histogram"), "what one record adds to it has no bound"
    return [(part.size, values)]


def bounds(
    point: FixedPoint, columns: tuple[Column, ...], part: Part, sums: Sums, values_max: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the sums of honest nodes with at most so many values a column lie between, (size,) each."""
    least, most = np.zeros(part.size), np.full(part.size, float(values_max))
    if part.what in ("rows", "fine") or (columns[part.column].kind == "category" and part.what == "level"):
        return least, most
    if part.what == "products":
        return _bounds_of_products(point, columns, values_max, part.size)
    column = columns[part.column]
    count = min(max(0, int(sums[0])), values_max)
    if part.what == "level":
        most[2] = point.most(count, column)
    elif part.what == "spread":
        most[1:] = point.most(count, column), point.most(count, column, column)
        least[1] = -most[1]
    elif part.what == "site":
        most[0] = point.most(values_max, column, column)
    elif part.what == "drift":
        most[0] = float(values_max << DRIFT_BITS)
    return least, most


def _of_number(
    point: FixedPoint, column: Column, wanted: Wanted, stage: int, values: Values, about: Known
) -> dict[str, Sums]:
    inside, outside = within(values, column)
    found: dict[str, Sums] = {}
    if stage == 1:
        above = inside.levels - span(column)[0]
        found["level"] = np.array([count_of(inside), outside, point.total(above, inside.counts, column)], np.int64)
        if wanted.coarse:
            found["histogram"] = _binned(_places(inside, column, wanted.coarse), inside.counts, wanted.coarse)
    if stage == 2 and (wanted.spread or wanted.sites):
        centred = inside.levels - about["mean"]
        both = [point.total(centred, inside.counts, column), point.total(centred**2, inside.counts, column, column)]
        found["spread"] = np.array([count_of(inside), *both], np.int64)
        if wanted.sites:
            shown = wanted.shown_bins
            found["cells"] = _binned(_places(inside, column, shown), inside.counts, shown)
    if 2 <= stage <= wanted.depth:
        found["fine"] = _fine(_places(inside, column, _bins(wanted, stage)), inside, about["open"])
    return found


def _of_category(
    point: FixedPoint, column: Column, wanted: Wanted, stage: int, values: Values, about: Known
) -> dict[str, Sums]:
    if stage > 1 and not (stage == 2 and wanted.sites):
        return {}
    size = len(column.words)
    codes = values.levels[~np.isnan(values.levels)]
    known = codes[(codes >= 0) & (codes < size)].astype(np.int64)
    cells = np.bincount(known, minlength=size)
    if stage == 2:
        return {"cells": cells}
    return {"level": np.append(cells, len(codes) - len(known))}


def _bins(wanted: Wanted, stage: int) -> int:
    return wanted.coarse << (FINE_BITS * (stage - 1))


def _places(values: Values, column: Column, bins: int) -> NDArray[np.int64]:
    """Which of `bins` equal parts of the range each value is in; the last one holds its upper end."""
    place = (values.levels - span(column)[0]) * (1 / width(column))
    place *= bins
    whole = place.astype(np.int64)
    return np.minimum(whole, bins - 1, out=whole)


def _binned(places: NDArray[np.int64], counts: NDArray[np.int64] | None, bins: int) -> Sums:
    if counts is None:
        return np.bincount(places, minlength=bins)
    found = np.zeros(bins, np.int64)
    np.add.at(found, places, counts)
    return found


def _fine(places: NDArray[np.int64], values: Values, opened: list[int]) -> Sums:
    """How many values; for each rank how many are below its open bin (of the stage before), then by part of it."""
    parent, counts = places >> FINE_BITS, values.counts
    parts = [np.array([count_of(values)], np.int64)]
    for place in opened:
        inside, below = parent == place, parent < place
        less = int(np.count_nonzero(below) if counts is None else counts[below].sum())
        parts.append(np.array([less], np.int64))
        parts.append(_binned(places[inside] & (RANK_BINS - 1), None if counts is None else counts[inside], RANK_BINS))
    return np.concatenate(parts)


def _products(point: FixedPoint, columns: tuple[Column, ...], batch: Batch, known: Known) -> Sums:
    """`(6 * pairs,)`: rows, products, sums of the first and of the second, squares of the first and of the second."""
    chosen = list(numbers(columns))
    rows = len(batch[0])
    centred, there = np.zeros((len(chosen), rows)), np.zeros((len(chosen), rows))
    for place, (index, column) in enumerate(chosen):
        levels = values_of(point.contract, batch, index).levels
        inside = (levels >= span(column)[0]) & (levels <= span(column)[1])
        there[place] = inside
        np.subtract(levels, known["columns"][column.name]["mean"], out=centred[place], where=inside)
    first, second = np.triu_indices(len(chosen), 1)
    sums = centred @ there.T
    squares = (centred**2) @ there.T
    shifts = np.array([[point.bits(a, b) for _, b in chosen] for _, a in chosen])
    single = np.array([point.bits(a) for _, a in chosen])
    twice = np.array([point.bits(a, a) for _, a in chosen])
    parts = [
        (there @ there.T)[first, second],
        np.ldexp((centred @ centred.T)[first, second], shifts[first, second]),
        np.ldexp(sums[first, second], single[first]),
        np.ldexp(sums[second, first], single[second]),
        np.ldexp(squares[first, second], twice[first]),
        np.ldexp(squares[second, first], twice[second]),
    ]
    return np.concatenate([np.rint(part).astype(np.int64) for part in parts])


def _bounds_of_products(
    point: FixedPoint, columns: tuple[Column, ...], values_max: int, size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    chosen = [column for _, column in numbers(columns)]
    pairs = [(chosen[a], chosen[b]) for a, b in zip(*np.triu_indices(len(chosen), 1), strict=True)]
    most = np.array(
        [float(values_max)] * len(pairs)
        + [point.most(values_max, a, b) for a, b in pairs]
        + [point.most(values_max, a) for a, _ in pairs]
        + [point.most(values_max, b) for _, b in pairs]
        + [point.most(values_max, a, a) for a, _ in pairs]
        + [point.most(values_max, b, b) for _, b in pairs]
    )
    signed = np.arange(size) // len(pairs)
    return np.where((signed >= 1) & (signed <= 3), -most, 0.0), most
