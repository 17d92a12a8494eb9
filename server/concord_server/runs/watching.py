"""A run as it goes, for those who watch: `state` when it changes, `round` for each step, `end` with the whole report.

The event's id is the round's index; a watcher that comes back names the last one it saw, and misses nothing.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi.concurrency import run_in_threadpool
from fastapi.sse import ServerSentEvent

from concord_server.api.state import State
from concord_server.runs import service
from concord_server.runs.states import ENDED
from concord_server.runs.tables import Run

__all__ = ["follow"]

EVERY_S = 0.5
LASTS_S = 600.0
"""A watcher then comes back, and its token is checked again."""
ROUNDS_AT_ONCE = 200


@dataclass(frozen=True)
class _Seen:
    rounds: list[tuple[int, dict[str, Any]]]
    state: dict[str, Any]
    end: dict[str, Any] | None


async def follow(state: State, run: str, after: int) -> AsyncIterator[ServerSentEvent]:
    """Replays the rounds after that index, then follows until the run ends, or the coordinator does."""
    deadline = asyncio.get_running_loop().time() + LASTS_S
    told: dict[str, Any] | None = None
    while True:
        seen = await run_in_threadpool(_look, state, run, after)
        if seen.state != told:
            told = seen.state
            yield ServerSentEvent(event="state", data=told)
        for index, record in seen.rounds:
            after = index
            yield ServerSentEvent(event="round", id=str(index), data=record)
        if seen.end is not None:
            yield ServerSentEvent(event="end", data=seen.end)
            return
        if state.closing.is_set() or asyncio.get_running_loop().time() > deadline:
            return
        if not seen.rounds:
            await asyncio.sleep(EVERY_S)


def _look(state: State, run: str, after: int) -> _Seen:
    with state.database.reading() as session:
        row = session.get_one(Run, run)
        rounds = service.records_after(session, run, after, ROUNDS_AT_ONCE)
        over = row.state in ENDED and len(rounds) < ROUNDS_AT_ONCE
        report = service.view(session, row)
        return _Seen(
            rounds=[(each.index, each.record) for each in rounds],
            state=report.model_dump(include={"state", "reason", "waiting_for", "stop_requested"}),
            end=service.detail(session, row).model_dump(mode="json") if over else None,
        )
