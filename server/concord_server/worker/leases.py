"""A lease: as long as it is renewed, a run is this worker's own. Whoever drives the run asks here whether to go on."""

import threading
from collections.abc import Callable

from concord_server.runs.states import Waiting
from concord_shared.errors import ConcordError, RunStoppedError

__all__ = ["Drained", "Lease", "LeaseLost"]


class LeaseLost(ConcordError):  # noqa: N818 (an event, not a fault)
    """Another worker has the run: whatever this one still holds of it is void."""


class Drained(ConcordError):  # noqa: N818
    """This process ends; the run goes on with the next worker."""


class Lease:
    """Written by the worker's loop, read by the thread that drives the run.

    awaited: asked for whom the run waits at the moment.
    troubled: the run was given back because something on this machine failed; not to be taken again at once.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self.troubled = False
        self.awaited: Callable[[], list[Waiting]] = list
        self._lock = threading.Lock()
        self._end: ConcordError | None = None

    def stop(self, reason: str) -> None:
        self._set(RunStoppedError(reason))

    def lose(self) -> None:
        self._set(LeaseLost("another worker has taken the run"))

    def drain(self) -> None:
        self._set(Drained("the coordinator is going down"))

    def check(self) -> None:
        """Raises: what ended it. Called at least every second while the run waits for nodes."""
        if self._end is not None:
            raise self._end

    def _set(self, end: ConcordError) -> None:
        """The first word counts; but a lost lease outweighs every other: nothing may be written any more."""
        with self._lock:
            if self._end is None or isinstance(end, LeaseLost):
                self._end = end
