"""Robust rules as pure functions of `(n, k) float64`: n Updates in rows, k of their coordinates. f: attackers, 2f < n.

A mean can be put anywhere by a single attacker (Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine
Tolerant Gradient Descent", lemma 1); each of these bounds what f of n can do. All commute with scaling, so they work on
ring integers as they are. Every row counts the same.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["clip_factors", "median", "neighbours", "trimmed_mean"]

Reals = NDArray[np.float64]


def median(rows: Reals) -> Reals:
    """Coordinate by coordinate (Yin et al. 2018, "Byzantine-Robust Distributed Learning", definition 1): `(k,)`."""
    middle: Reals = np.median(rows, axis=0)
    return middle


def trimmed_mean(rows: Reals, f: int) -> Reals:
    """Of each coordinate without its f largest and f smallest values (Yin et al. 2018, definition 2, β = f/n)."""
    assert 0 <= 2 * f < len(rows)
    kept: Reals = np.sort(rows, axis=0)[f : len(rows) - f]
    mean: Reals = kept.mean(axis=0)
    return mean


def neighbours(squares: NDArray[Any], f: int) -> Reals:
    """`(n, n)` of 0 and 1: row i marks the n - f Updates nearest to Update i, itself among them.

    Times the rows, over n - f, that is nearest-neighbour mixing (Allouah et al. 2023, "Fixing by Mixing", algorithm 2),
    to be followed by a rule such as the trimmed mean. Of equally near ones the first in row order.

    Args:
        squares: the Gram matrix `(n, n)` of the Updates.
    """
    norms = np.diagonal(squares)
    distances = norms[:, None] + norms[None, :] - 2 * squares
    np.fill_diagonal(distances, -1.0)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, : len(squares) - f]
    marks = np.zeros(squares.shape)
    np.put_along_axis(marks, nearest, 1.0, axis=1)
    return marks


def clip_factors(norms: Reals) -> Reals:
    """What scales each Update down to the median of their norms, where it is longer: `(n,)`, at most 1.

    Norm bounding (Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 5), with a bound that the
    majority sets and no attacker can raise above an honest norm. The mean of what it leaves is a robust rule.
    """
    bound = float(np.median(norms))
    factors: Reals = np.minimum(1.0, np.divide(bound, norms, out=np.ones_like(norms), where=norms > 0))
    return factors
