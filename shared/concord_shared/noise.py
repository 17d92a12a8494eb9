"""Noise of differential privacy: step 7 of the walk, in integers before masking; and what DP-SGD draws at a node.

Everything comes from a `SecretStream`, whose key is the operating system's. There is no seed: noise that somebody could
draw again hides nothing.

A discrete Gaussian N_Z(0, σ²) gives x the weight exp(−x²/2σ²) (Canonne, Kamath and Steinke 2020).
"""

import itertools
import math
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from concord_shared.accounting import DELTA_OF_DRAWS, noise_multiplier, rounds_of
from concord_shared.blocks import Block
from concord_shared.errors import PlanError
from concord_shared.masking.thresholds import thresholds_of
from concord_shared.plan.privacy import Private
from concord_shared.plan.schema import Plan

__all__ = [
    "SecretStream",
    "check_noise",
    "coarse_levels",
    "node_deviation",
    "noised_statistics",
    "noised_sums",
    "noised_update",
    "round_by_chance",
    "sum_deviation",
    "widest",
]

CHUNK = 1 << 15
"""Words at a time: a chunk and its work fit into the second-level cache."""
ZEROS = bytes(8 * CHUNK)
TABLE_DEVIATION = 1024.0
"""Up to it a table of the distribution stays within the cache, and its roundings are few."""
BASE, FINE = 128, 512.0
"""A wider one is fine + BASE · coarse: a sum of discrete Gaussians, whose finer one has a deviation of 4 · BASE."""
DRAW_ERROR = 2.0**-48
"""Statistical distance of one draw from the discrete Gaussian, at most: see `SecretStream.integers`."""
TAILS = 12
"""Deviations within which all draws lie, and which the ring must hold."""
LEVELS_MIN = 1 << 10
DEVIATION_MIN = 4.0
"""From it on a sum of discrete Gaussians costs what a Gaussian does: see `accounting.distributed_rdp`."""

Integers = NDArray[np.signedinteger[Any]]


class SecretStream:
    """Chance that nobody can foresee or repeat: AES-256 in counter mode, keyed by the operating system.

    One for each piece of work: a process that forks after it was made would go on with the same numbers.
    """

    def __init__(self) -> None:
        self._encryptor = Cipher(AES256(os.urandom(32)), CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """`(count,)`, uniform; count is at most CHUNK."""
        return np.frombuffer(self._encryptor.update(memoryview(ZEROS)[: 8 * count]), "<u8")

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """`(count,)` in the open interval (0, 1), 2⁵² values at the same distance."""
        out = np.empty(count)
        for start in range(0, count, CHUNK):
            part = out[start : start + CHUNK]
            part[:] = self.words(len(part)) >> np.uint64(12)
        out += 0.5
        out *= 2.0**-52
        return out

    def normals(self, count: int) -> NDArray[np.float64]:
        """`(count,)` of N(0, 1) by Box and Muller's transform: floating-point numbers, so not every real number."""
        out = np.empty(count + count % 2)
        half = CHUNK // 2
        for start in range(0, len(out), CHUNK):
            pairs = min(half, (len(out) - start) // 2)
            radius = np.sqrt(-2 * np.log(self.uniforms(pairs)))
            angle = 2 * np.pi * self.uniforms(pairs)
            out[start : start + pairs] = radius * np.cos(angle)
            out[start + pairs : start + 2 * pairs] = radius * np.sin(angle)
        return out[:count]

    def integers(self, deviation: float, count: int) -> NDArray[np.int64]:
        """`(count,)` of the discrete Gaussian with that deviation.

        Right to DRAW_ERROR: a table of at most 2¹⁵ weights is rounded to 2⁻⁶⁴ each, a wide one is made of at most four
        draws, and a sum with a finer part of 4 · BASE is off by less than 2⁻³⁰⁰.
        """
        if deviation > TABLE_DEVIATION:
            coarse = math.sqrt((deviation**2 - FINE**2) / BASE**2)
            return self.integers(FINE, count) + BASE * self.integers(coarse, count)
        table = _table(deviation)
        out = np.empty(count, np.int64)
        for start in range(0, count, CHUNK):
            part = out[start : start + CHUNK]
            part[:] = np.searchsorted(table, self.words(len(part)), "right")
        out -= len(table) // 2
        return out


def round_by_chance(reals: NDArray[np.float64], stream: SecretStream) -> NDArray[np.float64]:
    """Each of `(d,)` up or down to a whole number, so that its mean stays; none moves by 1 or more."""
    return np.floor(reals + stream.uniforms(len(reals)))


def coarse_levels(size: int) -> int:
    """B of an Update `(size,)` that noise is added to: a power of two with B ≥ 20·√d.

    Rounding by chance makes a vector of length B at most √d longer, so 5 % at most. More levels would only widen the
    noise.
    """
    return max(LEVELS_MIN, 1 << math.ceil(math.log2(20 * math.sqrt(size))))


def node_deviation(plan: Plan, size: int, nodes: int) -> float:
    """Of the integer noise that one node adds to each coordinate of its Update `(size,)`; 0 where it adds none.

    Of `nodes` in the cohort, by the signed manifest, m − c honest ones are in every sum, whoever is lost and whoever
    leaves out its noise: together they add what the promise needs, and more survivors only add to it.
    """
    if plan.noise != "distributed":
        return 0.0
    assert isinstance(plan.privacy, Private)
    needed = thresholds_of(plan.privacy, nodes)
    return sum_deviation(plan, size) / math.sqrt(needed.survivors - needed.collusion)


def sum_deviation(plan: Plan, size: int) -> float:
    """Of the noise that hides a node in a sum: the multiplier times how far, in levels, one Update can move it."""
    return noise_multiplier(plan, 1) * (coarse_levels(size) + math.sqrt(size))


def check_noise(plan: Plan, size: int, nodes: int) -> None:
    """Raises: PlanError: Updates `(size,)` of so many nodes and their noise do not fit into the plan's ring, or its
    delta is finer than draws can be."""
    if plan.noise not in ("distributed", "central"):
        return
    assert plan.privacy.dp is not None
    draws = nodes if plan.noise == "distributed" else 1
    each = node_deviation(plan, size, nodes) or sum_deviation(plan, size)
    if nodes * (coarse_levels(size) + 1) + widest(each * math.sqrt(draws)) >= 1 << (plan.rounds.ring_bits - 1):
        raise PlanError(
            f"the noise that privacy.dp asks of {nodes} nodes does not fit into {plan.rounds.ring_bits} bits; set "
            "rounds.ring_bits = 64, or promise less"
        )
    if plan.rounds.count * draws * size * DRAW_ERROR > DELTA_OF_DRAWS * plan.privacy.dp.delta:
        raise PlanError(
            f"privacy.dp.delta = {plan.privacy.dp.delta:g} is too small for {plan.rounds.count} rounds of noise on "
            f"{size} parameters: each draw is exact to {DRAW_ERROR:.1g}"
        )


def noised_update(
    plan: Plan, blocks: Iterable[Block], values: Mapping[str, Integers], nodes: int, stream: SecretStream
) -> dict[str, Integers]:
    """A node's encoded blocks as they leave: with its share of the noise, where the plan asks nodes for it.

    Raises: PlanError: as `check_noise`.
    """
    if plan.noise != "distributed":
        return dict(values)
    return dict(values) | {
        block.name: _noised(plan, values[block.name], nodes, node_deviation(plan, block.size, nodes), stream)
        for block in blocks
        if block.levels
    }


def noised_sums(plan: Plan, blocks: Iterable[Block], sums: Mapping[str, Integers], nodes: int) -> dict[str, Integers]:
    """The sums that the coordinator goes on with: with noise, where the plan asks it for that. Drawn anew each time."""
    if plan.noise != "central":
        return dict(sums)
    stream = SecretStream()
    return dict(sums) | {
        block.name: _noised(plan, sums[block.name], nodes, sum_deviation(plan, block.size), stream)
        for block in blocks
        if block.levels
    }


def noised_statistics(plan: Plan, deviations: NDArray[np.float64], sums: Integers, stream: SecretStream) -> Integers:
    """One node's sums of a stage `(d,)` as they leave, with discrete Gaussian noise of those deviations.

    Raises: PlanError: delta is finer than draws can be.
    """
    assert plan.privacy.dp is not None
    if rounds_of(plan) * len(sums) * DRAW_ERROR > DELTA_OF_DRAWS * plan.privacy.dp.delta:
        raise PlanError(
            f"privacy.dp.delta is too small for noise on {len(sums)} sums: a draw is exact to {DRAW_ERROR:.1g}"
        )
    noised = sums.astype(np.int64)
    edges = [0, *(np.flatnonzero(np.diff(deviations)) + 1).tolist(), len(sums)]
    for start, end in itertools.pairwise(edges):
        noised[start:end] += stream.integers(float(deviations[start]), end - start)
    return noised


def widest(deviation: float) -> int:
    """The largest magnitude of one draw that anyone has to reckon with."""
    return math.ceil(TAILS * deviation)


def _noised(plan: Plan, values: Integers, nodes: int, deviation: float, stream: SecretStream) -> Integers:
    check_noise(plan, len(values), nodes)
    assert deviation >= DEVIATION_MIN
    noise = stream.integers(deviation, len(values))
    noise += values
    return noise.astype(values.dtype)


@lru_cache(maxsize=8)
def _table(deviation: float) -> NDArray[np.uint64]:
    """Upper ends of the words that stand for −r … r−1; above the last is r.

    The weights are right to 2⁻⁵² of themselves and rounded to 2⁻⁶⁴; what is left over is the middle's.
    """
    assert 0.5 <= deviation <= TABLE_DEVIATION
    reach = widest(deviation)
    points = np.arange(-reach, reach + 1, dtype=np.float64)
    weights = np.exp(-(points**2) / (2 * deviation**2))
    shares = [int(share) for share in np.rint(weights / math.fsum(weights) * 2.0**64)]
    shares[reach] += (1 << 64) - sum(shares)
    ends, total = [], 0
    for share in shares[:-1]:
        total += share
        ends.append(min(total, (1 << 64) - 1))
    return np.array(ends, np.uint64)
