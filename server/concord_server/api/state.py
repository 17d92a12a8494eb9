"""What all routes share, made once at start: directory, database, signing authority, the end of the process."""

import asyncio
from functools import cached_property
from typing import Annotated

from fastapi import Depends, Request

from concord_server.audit.service import record
from concord_server.database import Database, utc_now
from concord_server.nodes.outbox import Outbox
from concord_server.pki import Authority
from concord_server.refusals import Refusals
from concord_server.settings import Home
from concord_shared.errors import ArtefactError
from concord_shared.signing import PrivateKey, read_private_key

__all__ = ["CurrentDatabase", "CurrentHome", "CurrentState", "State"]


class State:
    """closing: set when the process is to end; whoever waits on behalf of a caller stops then.

    outbox: rings when there may be something new to tell to nodes. refusals: of nodes, and of callers who are none.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self.database = home.database()
        self.closing = asyncio.Event()
        self.outbox = Outbox(self.database, self.closing)
        self.refusals = Refusals(self._write_refusal)
        self._authority = Authority.open(home, utc_now())
        self._authority_at = _changed_at(home)

    @cached_property
    def signer(self) -> PrivateKey:
        """The coordinator's own key: signs heads of its log, receipts and capsules."""
        return read_private_key(self.home.coordinator_key)

    @property
    def authority(self) -> Authority:
        """The membership key in use; `concord server renew-membership` may change it while this process runs."""
        changed_at = _changed_at(self.home)
        if changed_at != self._authority_at:
            self._authority, self._authority_at = Authority.open(self.home, utc_now()), changed_at
        return self._authority

    def _write_refusal(self, who: str, path: str, reason: str, times: int) -> None:
        action = "node:send-refused" if who.startswith("node:") else "node:connect-refused"
        with self.database.session() as session:
            record(session, who, action, path[:300], reason=reason, times=times)


def _changed_at(home: Home) -> int:
    try:
        return home.membership_certificate.stat().st_mtime_ns
    except OSError as error:
        raise ArtefactError(f"{home.membership_certificate} is gone; put it back") from error


def state(request: Request) -> State:
    found: State = request.app.state.concord
    return found


def home(request: Request) -> Home:
    return state(request).home


def database(request: Request) -> Database:
    return state(request).database


CurrentState = Annotated[State, Depends(state)]
CurrentHome = Annotated[Home, Depends(home)]
CurrentDatabase = Annotated[Database, Depends(database)]
