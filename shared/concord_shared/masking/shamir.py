"""Shamir's secret sharing (1979) of 32 bytes over the prime field of 2**256 + 297.

A share is f(x) of a random polynomial f of degree t - 1 whose f(0) is the secret: t shares tell the secret, fewer
nothing. Python's integers are not constant in time; a host that others can time is not in our claim.
"""

import secrets
from collections.abc import Iterable, Mapping

__all__ = ["SHARE_BYTES", "combine", "split"]

PRIME = (1 << 256) + 297
SHARE_BYTES = 33
"""Length of f(x), big endian: the prime is a little above 2**256."""


def split(secret: bytes, points: Iterable[int], threshold: int) -> dict[int, bytes]:
    """A share for each point; `threshold` of them tell the secret.

    Args:
        secret: 32 bytes.
        points: distinct, 1 or more.
    """
    assert len(secret) == 32
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {point: _evaluate(coefficients, point).to_bytes(SHARE_BYTES, "big") for point in _distinct(points)}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of these shares, by point. Too few or wrong shares give another value, which a commitment shows.

    Raises:
        ValueError: a point or a share that none can be, or a value that no secret of 32 bytes has.
    """
    points = _distinct(shares)
    values = {point: int.from_bytes(share, "big") for point, share in shares.items()}
    if any(len(shares[point]) != SHARE_BYTES or values[point] >= PRIME for point in points):
        raise ValueError("not a share")
    total = 0
    for point in points:
        above, below = 1, 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        total += values[point] * above * pow(below, -1, PRIME)
    total %= PRIME
    if total >> 256:
        raise ValueError("the shares do not belong together")
    return total.to_bytes(32, "big")


def _evaluate(coefficients: list[int], point: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


def _distinct(points: Iterable[int]) -> list[int]:
    found = list(points)
    if len(set(found)) != len(found) or min(found, default=0) < 1:
        raise ValueError("points of shares are distinct and at least 1")
    return found
