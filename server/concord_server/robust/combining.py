"""A robust rule over a table of Updates, a piece of the columns at a time; and how each Update lies to the result.

At 32 ring bits a row's norm is at most 2**24 levels, so every product of two rows and every sum of rows is an integer
below 2**53: float64 holds it exactly, and neither the order of additions nor the threads of a BLAS can change a bit. At
64 bits numpy's own loops add in one order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_server.robust import rules
from concord_server.robust.table import UpdateTable
from concord_shared.blocks import Block
from concord_shared.plan.privacy import Robust
from concord_shared.quantiser import levels_of

__all__ = ["Combined", "combine"]

Reals = NDArray[np.float64]


@dataclass(frozen=True)
class Combined:
    """mean: what the rule makes of a block, `(d,)` in the Update's own unit. The figures of each row, `(n,)`:

    norm, distance: L2, of the Update and of its difference from `mean`; cosine: between the two.
    trimmed: the share of coordinates in which it is among the f largest or f smallest.
    """

    mean: Reals
    norm: Reals
    distance: Reals
    cosine: Reals
    trimmed: Reals


def combine(table: UpdateTable, block: Block, nodes: Sequence[str], privacy: Robust, nodes_max: int) -> Combined:
    """The rule of `privacy` over the rows of `nodes`, in name order; more than twice its attackers.

    nodes_max: the size of the cohort, by which the ring's levels go.
    """
    f, count = privacy.attackers, len(nodes)
    assert count > 2 * f, "the round machine settles nothing below its quorum"
    exact = block.ring_bits <= 32
    gram = _gram(table, block, nodes, full=privacy.rule == "nnm-trimmed-mean", exact=exact)
    norms = np.sqrt(np.diagonal(gram))
    mixing, factors = np.empty(0), np.empty(0)
    if privacy.rule == "nnm-trimmed-mean":
        mixing = rules.neighbours(gram, f)
    elif privacy.rule == "clipped-mean":
        factors = rules.clip_factors(norms)
    mean, square = np.empty(block.size), 0.0
    apart, along, cut = np.zeros(count), np.zeros(count), np.zeros(count)
    for where, rows in table.pieces(block.name, nodes):
        match privacy.rule:
            case "nnm-trimmed-mean":
                part = rules.trimmed_mean(_times(mixing, rows, exact), f) / (count - f)
            case "trimmed-mean":
                part = rules.trimmed_mean(rows, f)
            case "median":
                part = rules.median(rows)
            case "clipped-mean":
                part = (rows * factors[:, None]).mean(axis=0)
        mean[where] = part
        square += float(np.einsum("k,k->", part, part))
        along += np.einsum("nk,k->n", rows, part)
        ordered = np.sort(rows, axis=0)
        cut += np.count_nonzero((rows < ordered[f]) | (rows > ordered[count - f - 1]), axis=1)
        rows -= part
        apart += np.einsum("nk,nk->n", rows, rows)
    unit = block.bound / (block.levels or levels_of(block.ring_bits, nodes_max))
    lengths = norms * np.sqrt(square)
    return Combined(
        mean=mean * unit,
        norm=norms * unit,
        distance=np.sqrt(apart) * unit,
        cosine=np.divide(along, lengths, out=np.zeros(count), where=lengths > 0),
        trimmed=cut / block.size,
    )


def _gram(table: UpdateTable, block: Block, nodes: Sequence[str], full: bool, exact: bool) -> Reals:
    """`(n, n)`: the products of all rows with each other, or, unless `full`, with themselves alone."""
    gram = np.zeros((len(nodes), len(nodes)))
    for _, rows in table.pieces(block.name, nodes):
        gram += _times(rows, rows.T, exact) if full else np.diag(np.einsum("nk,nk->n", rows, rows))
    return gram


def _times(left: Reals, right: Reals, exact: bool) -> NDArray[Any]:
    return left @ right if exact else np.einsum("ij,jk->ik", left, right)
