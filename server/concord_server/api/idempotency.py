"""Creations that a caller may safely send again: `Idempotency-Key: ANY-UNIQUE-TEXT`.

The answer is stored in the transaction that creates, so a creation and the memory of it are one thing.

    @router.post("/things", status_code=201)
    def create(body: NewThing, caller: …, once: Once) -> Thing:
        return once(Thing, lambda session: service.create(session, caller, body))
"""

import datetime
import hashlib
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request
from pydantic import BaseModel
from sqlalchemy import delete
from sqlmodel import Session, col

from concord_server.api.security import SignedIn
from concord_server.api.state import CurrentDatabase
from concord_server.api.tables import IdempotentRequest
from concord_server.database import Database, lock, utc_now
from concord_shared.errors import ConflictError

__all__ = ["Once"]

KEPT = datetime.timedelta(hours=24)
View = TypeVar("View", bound=BaseModel)


class _Once:
    def __init__(self, database: Database, person: str, key: str | None, request: str) -> None:
        self._database = database
        self._person = person
        self._key = key
        self._request = request

    def __call__(self, view: type[View], work: Callable[[Session], View], *, secret: bool = False) -> View:
        """Does `work` in one transaction, or answers as it did when the same request was carried out before.

        secret: the answer is not stored; the same request again is a conflict.
        """
        with self._database.session() as session:
            if self._key is None:
                return work(session)
            lock(session, f"once:{self._person}:{self._key}")
            before = session.get(IdempotentRequest, (self._person, self._key))
            if before is not None:
                return self._again(view, before)
            result = work(session)
            response = None if secret else result.model_dump(mode="json")
            now = utc_now()
            session.execute(delete(IdempotentRequest).where(col(IdempotentRequest.created_at) < now - KEPT))
            session.add(
                IdempotentRequest(
                    person=self._person, key=self._key, request=self._request, response=response, created_at=now
                )
            )
            return result

    def _again(self, view: type[View], before: IdempotentRequest) -> View:
        if before.request != self._request:
            raise ConflictError("this Idempotency-Key was used for another request; use a new one for each creation")
        if before.response is None:
            raise ConflictError(
                "this was carried out already, and its secret was shown then; revoke it and make another"
            )
        return view.model_validate(before.response)


async def _once(
    request: Request,
    database: CurrentDatabase,
    caller: SignedIn,
    idempotency_key: Annotated[str | None, Header(min_length=8, max_length=200, pattern=r"^[\x21-\x7e]+$")] = None,
) -> _Once:
    content = f"{request.method} {request.url.path}\n".encode() + await request.body()
    return _Once(database, caller.person, idempotency_key, hashlib.sha256(content).hexdigest())


Once = Annotated[_Once, Depends(_once)]
