"""One quantiser for all modes: reals of bounded norm to signed integers in a ring, and back.

Integers make three promises at once: masks cancel exactly, a sum does not depend on the order of arrival,
and a resumed run equals an uninterrupted one. Rounds half to even; by chance where noise is added to the integers.

With n nodes, w ring bits and B levels every sum fits: n·(B + 1) < 2**(w-1). At 32 bits B is at most 2**24 -
1 and the step is bound / B (6e-7 at bound 10).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.errors import UsageError

__all__ = ["clip_to_bound", "dequantise", "extent_of", "levels_of", "norm_of", "quantise"]

CHUNK = 1 << 16
"""Coordinates handled at a time: the float64 intermediates of a chunk stay in the second-level cache."""


def levels_of(ring_bits: int, nodes_max: int) -> int:
    """B: the largest magnitude that one node may send, for `nodes_max` nodes in a ring of `ring_bits`.

    Raises:
        UsageError: the ring is too narrow for so many.
    """
    top = (1 << {16: 14, 32: 24, 64: 52}[ring_bits]) - 1
    levels = min(top, ((1 << (ring_bits - 1)) - 1) // nodes_max - 1)
    if levels < 1:
        raise UsageError(
            f"a ring of {ring_bits} bits has no room for a sum of {nodes_max} nodes: set a smaller rounds.cohort, or "
            'another compression.kind than "narrow"'
        )
    assert nodes_max * (levels + 1) < 1 << (ring_bits - 1)
    return levels


def norm_of(vector: NDArray[Any]) -> float:
    """L2 norm of `(d,)` in float64 without a float64 copy of the whole.

    einsum and not `@`: a BLAS spreads so small a product over threads, which then spin against training
    processes.
    """
    total = 0.0
    for start in range(0, len(vector), CHUNK):
        part = vector[start : start + CHUNK].astype(np.float64)
        total += float(np.einsum("i,i->", part, part))
    return math.sqrt(total)


def extent_of(values: NDArray[np.signedinteger[Any]]) -> tuple[int, float]:
    """Largest magnitude and L2 norm of ring integers `(d,)`, in one pass over memory.

    The norm of 32-bit values is taken in float32 chunk by chunk: right to 1e-4, enough for a bound.
    """
    real: type[np.floating[Any]] = np.float32 if values.dtype.itemsize <= 4 else np.float64
    largest, total = 0, 0.0
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        largest = max(largest, int(part.max()), -int(part.min()))
        floats = part.astype(real)
        total += float(np.einsum("i,i->", floats, floats))
    return largest, math.sqrt(total)


def clip_to_bound(vector: NDArray[np.floating[Any]], bound: float) -> tuple[NDArray[np.floating[Any]], float]:
    """Scales `vector` down to L2 norm `bound` where it is longer; returns it and the norm that it had."""
    norm = norm_of(vector)
    if norm <= bound or not np.isfinite(norm):
        return vector, norm
    return vector * vector.dtype.type(bound / norm), norm


def quantise(
    vector: NDArray[np.floating[Any]],
    weight: float,
    bound: float,
    ring_bits: int,
    nodes_max: int,
    levels: int = 0,
    rounded: Callable[[NDArray[np.float64]], NDArray[np.float64]] = np.rint,
) -> NDArray[np.signedinteger[Any]]:
    """round(weight · vector · B / bound) as little-endian integers of `ring_bits`, `(d,)`.

    levels: B, 0 for the finest that the ring holds. Precondition: `vector` is finite and clipped to `bound`; 0 < weight
    <= 1.
    """
    levels = levels or levels_of(ring_bits, nodes_max)
    factor = weight * levels / bound
    out = np.empty(len(vector), f"<i{ring_bits // 8}")
    for start in range(0, len(vector), CHUNK):
        part = vector[start : start + CHUNK].astype(np.float64)
        part *= factor
        part = rounded(part)
        np.clip(part, -levels, levels, out=part)  # float32 clipping may leave a coordinate 1e-7 above the bound
        out[start : start + CHUNK] = part
    return out


def dequantise(
    total: NDArray[np.signedinteger[Any]],
    weight_sum: float,
    bound: float,
    ring_bits: int,
    nodes_max: int,
    levels: int = 0,
) -> NDArray[np.float64]:
    """The mean `(d,) float64` that a ring sum stands for, given the sum of the nodes' weights. levels: as above."""
    step = bound / (levels or levels_of(ring_bits, nodes_max))
    mean: NDArray[np.float64] = np.multiply(total, step / weight_sum, dtype=np.float64)
    return mean
