"""Waiting for something new to tell to nodes: one cheap query for all who wait, and neither a session nor a thread
for any of them. Other processes write to the same database, so it is asked and not told.
"""

import asyncio
import contextlib

from sqlalchemy import func
from sqlmodel import select

from concord_server.database import Database
from concord_server.nodes.tables import NodeUpdate, RosterVersion
from concord_shared.errors import ApiError

__all__ = ["Mark", "Outbox"]

EVERY_S = 0.2
Mark = tuple[int | None, int | None]
"""The highest numbers of updates and of rosters; every change of a node's state makes a new roster."""


class Outbox:
    def __init__(self, database: Database, closing: asyncio.Event) -> None:
        self._database = database
        self._closing = closing
        self._waiting: set[asyncio.Future[None]] = set()
        self._poller: asyncio.Task[None] | None = None
        self.mark: Mark | None = None

    async def wait(self, seen: Mark | None, timeout_s: float) -> None:
        """Until the mark is another than `seen`, the process ends, or the time is over."""
        if self.mark != seen or self._closing.is_set():
            return
        bell = asyncio.get_running_loop().create_future()
        self._waiting.add(bell)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(bell, timeout_s)
        finally:
            self._waiting.discard(bell)

    async def _poll(self) -> None:
        """As long as someone waits. A database that fails rings too: who asks again learns of it."""
        while self._waiting:
            try:
                mark = await asyncio.to_thread(self._read)
            except ApiError:
                mark = None
            if mark is None or mark != self.mark or self._closing.is_set():
                self.mark = mark
                self._ring()
            await asyncio.sleep(EVERY_S)

    def _ring(self) -> None:
        for bell in self._waiting:
            if not bell.done():
                bell.set_result(None)

    def _read(self) -> Mark:
        with self._database.reading() as session:
            updates = session.exec(select(func.max(NodeUpdate.sequence))).one()
            rosters = session.exec(select(func.max(RosterVersion.version))).one()
        return updates, rosters
