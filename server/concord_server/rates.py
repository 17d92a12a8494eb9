"""How much each caller may ask."""

from collections import OrderedDict

__all__ = ["BUCKETS_MAX", "TokenBuckets"]

BUCKETS_MAX = 10_000


class TokenBuckets:
    """How much each caller may still ask: a minute's worth at once, refilled steadily. The oldest callers are
    forgotten, so that nobody can fill the memory.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: str, now: float) -> float:
        """0 if this request is within the rate, and counts it; otherwise the seconds until one would be."""
        left, since = self._buckets.pop(caller, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * self._per_minute / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / self._per_minute
        self._buckets[caller] = (left - 1 if left >= 1 else left, now)
        while len(self._buckets) > BUCKETS_MAX:
            self._buckets.popitem(last=False)
        return wait
