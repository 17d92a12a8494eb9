"""Peak memory of a simulation: the proportional set size, summed over its processes."""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

__all__ = ["PeakMemory", "cpu_seconds", "peak_rss_mb", "pss_mb"]

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


def peak_rss_mb(process_id: int) -> float | None:
    """The most memory that a process ever held, in MB. None where the system does not tell."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text("ascii").splitlines()
    except (OSError, ValueError):
        return None
    return next((round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith("VmHWM:")), None)


def cpu_seconds(process_id: int) -> float:
    """Processor time of a process so far; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{process_id}/stat").read_text("ascii").rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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

    def sample(self) -> None:
        now = pss_mb(self._process_ids)
        if now is not None:
            self.peak_mb = max(now, self.peak_mb or 0.0)

    def _sample(self) -> None:
        while True:
            self.sample()
            if self._done.wait(INTERVAL_S):
                return
