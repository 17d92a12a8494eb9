"""Text as numbers: characters and their n-grams, hashed into bins. No dictionary, no segmenter, any script.

Term frequency times inverse document frequency, each row of length 1; the frequencies over nodes are exact sums
(`document_counts`), so that nobody's vocabulary is told: bins say which n-grams *may* occur, never which do.
"""

import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.plan.preparation import TextFeatures

__all__ = ["document_counts", "features", "inverse_frequencies", "tidy_text"]

Texts = NDArray[Any]
PRIME, MIX = np.uint64(0x100000001B3), np.uint64(0x9E3779B97F4A7C15)
"""Fowler, Noll and Vo's 64-bit prime; the golden ratio as Knuth multiplies with it."""


def tidy_text(text: str) -> str:
    """One form for letters that look the same (NFKC), and one space between words."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def document_counts(texts: Texts, wanted: TextFeatures) -> NDArray[np.int64]:
    """In how many texts `(n,) str` each bin occurs: `(bins,)`."""
    counts = np.zeros(wanted.bins, np.int64)
    for bins in _bins(texts, wanted):
        counts[np.unique(bins)] += 1
    return counts


def inverse_frequencies(rows: int, counts: NDArray[np.int64], wanted: TextFeatures) -> NDArray[np.float64]:
    """Of each bin ln((1 + n) / (1 + df)) + 1, as scikit-learn smooths it; 0 where it occurs in too few texts."""
    weights = np.log((1 + rows) / (1 + counts.astype(np.float64))) + 1
    return np.where(counts >= wanted.minimum_count, weights, 0.0)


def features(texts: Texts, wanted: TextFeatures, weights: NDArray[np.float64] | None) -> NDArray[np.float32]:
    """`(n, bins) float32`, each row of length 1, or 0 where no bin of it counts. weights: of bins; None for all 1."""
    out = np.zeros((len(texts), wanted.bins), np.float32)
    for row, bins in zip(out, _bins(texts, wanted), strict=True):
        found, counts = np.unique(bins, return_counts=True)
        values = counts if weights is None else counts * weights[found]
        row[found] = values / (np.linalg.norm(values) or 1.0)
    return out


def _bins(texts: Texts, wanted: TextFeatures) -> Iterator[NDArray[np.int64]]:
    """Of each text the bins of all its n-grams, as often as they occur."""
    for text in texts:
        codes = np.frombuffer(tidy_text(str(text)).encode("utf-32-le", "replace"), "<u4").astype(np.uint64)
        parts = [_hashes(codes, size) for size in range(1, min(wanted.ngrams, len(codes)) + 1)]
        found = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
        yield (found & np.uint64(wanted.bins - 1)).astype(np.int64)


def _hashes(codes: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """A 64-bit hash of each n-gram of `size` code points, FNV-1a with its upper bits mixed into the lower."""
    count = len(codes) - size + 1
    value = np.full(count, size, np.uint64)
    for offset in range(size):
        value = (value ^ codes[offset : offset + count]) * PRIME
    value = value * MIX
    return value ^ (value >> np.uint64(32))
