"""Refusals for the audit log: a caller that is refused again and again fills a line a minute, not the database."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from concord_shared.errors import ConcordError

__all__ = ["Refusals", "actor_of"]

log = logging.getLogger(__name__)
EVERY_S = 60.0
TICK_S = 5.0
Write = Callable[[str, str, str, int], None]


@dataclass
class _Caller:
    """since: when something of this caller was last written. times: refusals since then; path, reason: of the last."""

    since: float
    times: int = 0
    path: str = ""
    reason: str = ""


class Refusals:
    """Writes the first refusal of a caller at once, and then how many there were, each minute that has any.

    write: given who, path, reason and how often; what it raises is logged, and counted in with the next.
    """

    def __init__(self, write: Write, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._every_s, self._clock = write, every_s, clock
        self._callers: dict[str, _Caller] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def start(self) -> None:
        """Writes counts from now on, until `stop`; may be started again after it."""
        self._stop.clear()
        threading.Thread(target=self._flush_for_ever, name="refusals", daemon=True).start()

    def stop(self) -> None:
        """Writes what is left."""
        self._stop.set()
        self.flush(all_of_it=True)

    def note(self, who: str, path: str, reason: str) -> None:
        """One refusal; from any thread."""
        with self._lock:
            first = who not in self._callers
            caller = self._callers.setdefault(who, _Caller(self._clock()))
            caller.times, caller.path, caller.reason = caller.times + 1, path, reason
        if first:
            self._write_down(who, caller)

    def flush(self, all_of_it: bool = False) -> None:
        """Writes what is a minute old, and forgets callers that have been quiet since."""
        with self._lock:
            now = self._clock()
            due = {who: each for who, each in self._callers.items() if all_of_it or now - each.since >= self._every_s}
            for who in [who for who, each in due.items() if not each.times]:
                del self._callers[who], due[who]
        for who, caller in due.items():
            self._write_down(who, caller)

    def _write_down(self, who: str, caller: _Caller) -> None:
        with self._lock:
            times, path, reason = caller.times, caller.path, caller.reason
            caller.times, caller.since = 0, self._clock()
        if not times:
            return
        try:
            self._write(who, path, reason, times)
        except ConcordError as error:
            log.error("a refusal was not recorded", extra={"who": who, "times": times, "reason": str(error)})
            with self._lock:
                caller.times += times

    def _flush_for_ever(self) -> None:
        while not self._stop.wait(TICK_S):
            self.flush()


def actor_of(who: str, worker: str) -> str:
    """A caller of the SuperLink as the audit log writes actors. worker: the spiffe name of the coordinator's worker."""
    if who == worker:
        return "coordinator"
    return f"node:{who.rpartition('/')[2]}" if who.startswith("spiffe://") else f"address:{who}"
