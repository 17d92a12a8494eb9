"""Peak memory of a simulation: the proportional set size, summed over its processes."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

__all__ = ["PeakMemory", "pss_mb"]

INTERVAL_S = 0.5


def pss_mb(process_ids: Iterable[int]) -> float | None:
    """Summed PSS in MB: shared pages count once. None where the system does not tell (not Linux)."""
    total = 0
    for process_id in process_ids:
        try:
            lines = Path(f"/proc/{process_id}/smaps_rollup").read_text("ascii").splitlines()
        except (OSError, ValueError):
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return round(total / 1024, 1) if total else None


class PeakMemory:
    """Samples while the `with` block runs. `peak_mb` is the highest sum seen, or None."""

    def __init__(self) -> None:
        self.peak_mb: float | None = None
        self._process_ids = [os.getpid()]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def watch(self, process_ids: Iterable[int]) -> None:
        self._process_ids += process_ids

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            now = pss_mb(self._process_ids)
            if now is not None:
                self.peak_mb = max(now, self.peak_mb or 0.0)
            if self._done.wait(INTERVAL_S):
                return
