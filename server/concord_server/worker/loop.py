"""The worker's process: looks every second for runs to begin or to take over, and keeps those that it has."""

import logging
import secrets
import threading
import time

from concord_server.database import utc_now
from concord_server.preflights.service import forget
from concord_server.runs import service
from concord_server.runs.retention import tidy
from concord_server.runs.tables import Run
from concord_server.settings import Home
from concord_server.tls import FreshContext
from concord_server.worker.leases import Lease
from concord_server.worker.task import Link, carry_out
from concord_shared.errors import ConcordError
from concord_shared.signing import read_private_key

__all__ = ["Worker", "superlink_link"]

log = logging.getLogger(__name__)

LOOK_S = 0.5
COOL_S = 15.0
"""How long a run that was given back in trouble is left alone."""
DRAIN_S = 10.0


def superlink_link(home: Home) -> Link:
    """The coordinator's own SuperLink, on this machine.

    Raises:
        ArtefactError: the coordinator's key cannot be read.
    """
    context = FreshContext(home.root_certificate, home.worker_certificate, home.worker_key)
    settings = home.settings
    return Link(f"{settings.own_host}:{settings.superlink_port}", context, read_private_key(home.coordinator_key))


class Worker:
    """owner: a name that no other worker has; a restarted one is another."""

    def __init__(self, home: Home, link: Link) -> None:
        self._home, self._link = home, link
        self._database = home.database()
        self.owner = f"worker-{secrets.token_hex(6)}"
        self._running: dict[str, tuple[Lease, threading.Thread]] = {}
        self._cooling: dict[str, float] = {}
        self._stop = threading.Event()
        self._renewed_at_s = 0.0

    def stop(self) -> None:
        """Asks to drain; safe in a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Until `stop`; then every run is given back, where it stands."""
        threading.Thread(target=_warm_up, name="warm-up", daemon=True).start()
        threading.Thread(target=self._keep_tidy, name="tidy", daemon=True).start()
        while not self._stop.wait(LOOK_S):
            try:
                self.look()
            except ConcordError as error:  # the database is away: the leases go on as long as they last
                log.warning("the table of runs cannot be reached", extra={"reason": str(error)})
        for lease, _ in self._running.values():
            lease.drain()
        until = time.monotonic() + DRAIN_S
        for _, thread in self._running.values():
            thread.join(max(0.0, until - time.monotonic()))

    def _keep_tidy(self) -> None:
        """In a thread of its own: files of gigabytes may take longer to remove than a lease lasts."""
        settings = self._home.settings
        limits = settings.retention_days, settings.checkpoint_quota_mb << 20
        while True:
            try:
                with self._database.reading() as session:
                    due = tidy(session, self._home.path, utc_now(), *limits, dry_run=True)
                if due:
                    with self._database.session() as session:
                        gone = tidy(session, self._home.path, utc_now(), *limits)
                    freed = sum(each.size for each in gone)
                    log.info("old files of runs were removed", extra={"files": len(gone), "bytes": freed})
                with self._database.session() as session:
                    forget(session, utc_now(), settings.retention_days)
            except Exception:  # the outermost loop of a thread: the next time may do better
                log.exception("old files of runs cannot be removed")
            if self._stop.wait(settings.tidy_s):
                return

    def look(self) -> None:
        """One turn: renew what is held, learn of stops, let waiting runs go on, take what is free."""
        self._put_down()
        self._keep()
        with self._database.session() as session:
            service.promote_waiting(session, utc_now())
        while self._has_room() and self._take():
            pass

    def _has_room(self) -> bool:
        """A run that waits for its nodes costs memory and no time: it keeps the next one from its turn only where
        `runs_held` are here already.
        """
        settings = self._home.settings
        at_work = sum(not lease.awaited() for lease, _ in self._running.values())
        return at_work < settings.runs_parallel and len(self._running) < settings.runs_held

    def _put_down(self) -> None:
        """Forgets what has ended."""
        now = time.monotonic()
        self._cooling = {run: until for run, until in self._cooling.items() if until > now}
        for run, (lease, thread) in list(self._running.items()):
            if not thread.is_alive():
                del self._running[run]
                if lease.troubled:
                    self._cooling[run] = now + COOL_S

    def _keep(self) -> None:
        lease_s = self._home.settings.lease_s
        due = time.monotonic() - self._renewed_at_s > lease_s / 3
        for run, (lease, _) in self._running.items():
            if due:
                with self._database.session() as session:
                    control = service.renew_lease(session, run, self.owner, utc_now(), lease_s, lease.awaited())
                mine, stop, reason = control.still_mine, control.stop_requested, control.reason
            else:
                with self._database.reading() as session:
                    row = session.get_one(Run, run)
                    mine, stop, reason = row.lease_owner == self.owner, row.stop_requested, row.reason
            if not mine:
                if run in self._running and self._running[run][1].is_alive():
                    lease.lose()
            elif stop:
                lease.stop(reason)
        if due:
            self._renewed_at_s = time.monotonic()

    def _take(self) -> bool:
        with self._database.session() as session:
            leased = service.lease_next(
                session, self.owner, utc_now(), self._home.settings.lease_s, busy=[*self._running, *self._cooling]
            )
            run = None if leased is None else leased.id
        if run is None:
            return False
        lease = Lease(run)
        thread = threading.Thread(
            target=carry_out, args=(self._home, self._link, lease, self.owner), name=f"run-{run}", daemon=True
        )
        self._running[run] = (lease, thread)
        thread.start()
        return True


def _warm_up() -> None:
    """torch takes seconds to import: before the first run needs it, not while its nodes wait."""
    from concord_shared.models import new_vector  # noqa: F401
