"""Writing to the audit log, and reading it: entries, its signed head, proofs.

A transaction's events are appended as its last act, under one lock, so that they are chained in the order in which
transactions are stored, and no transaction waits for another while it holds that lock.
"""

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlmodel import Session, col, func, select

from concord_server.audit.tables import AuditEvent, AuditSubtree
from concord_server.database import at_the_end, lock, utc_now
from concord_shared.errors import NotFoundError
from concord_shared.evidence.heads import TreeHead, coordinator_log
from concord_shared.evidence.log import GENESIS, Entry, chained, plain_detail
from concord_shared.evidence.merkle import Read, consistency_proof, inclusion_proof, root_of
from concord_shared.signing import Envelope, PrivateKey, seal

__all__ = [
    "entries",
    "entry_of",
    "grown_since",
    "head",
    "proof_of",
    "record",
    "signed_head",
    "size",
    "subtrees",
]

ACTION = re.compile(r"[a-z]+(-[a-z]+)*:[a-z]+(-[a-z]+)*")
LOG = "audit"


def record(session: Session, actor: str, action: str, subject: str, **detail: Any) -> None:
    """Appends an event to this transaction: it is stored exactly if what it tells of is.

    actor: `person:NAME`, `node:NAME`, `address:IP` or `coordinator`; action: `subject:verb`, such as `node:revoke`;
    a refused attempt ends in `-refused`. detail: JSON; never a secret, never data.
    """
    assert ACTION.fullmatch(action), f"an action is subject:verb, not {action!r}"
    session.info.setdefault(LOG, []).append((utc_now(), actor, action, subject, detail))
    at_the_end(session, LOG, _append)


def _append(session: Session) -> None:
    """The events of this transaction, chained to those before."""
    session.flush()
    lock(session, LOG)
    last = session.exec(select(AuditEvent.id, AuditEvent.hash).order_by(col(AuditEvent.id).desc()).limit(1)).first()
    sequence, before = (last[0], bytes.fromhex(last[1])) if last else (0, GENESIS)
    fresh: dict[tuple[int, int], bytes] = {}
    stored = subtrees(session)

    def read(level: int, index: int) -> bytes:
        return fresh.get((level, index)) or stored(level, index)

    for at, *told in session.info.pop(LOG):
        sequence += 1
        actor, action, subject, detail = plain_detail(told)
        row = AuditEvent(id=sequence, at=at, actor=actor, action=action, subject=subject, detail=detail, hash="")
        before, above = chained(entry_of(row), before, read)
        row.hash = before.hex()
        session.add(row)
        fresh[0, sequence - 1] = before
        for level, index, found in above:
            fresh[level, index] = found
            session.add(AuditSubtree(level=level, index=index, hash=found.hex()))
    session.flush()


def entry_of(row: AuditEvent) -> Entry:
    """The entry that a row is: whoever changes the row changes the entry."""
    return Entry(
        sequence=row.id,
        at=moment(row.at),
        actor=row.actor,
        action=row.action,
        subject=row.subject,
        detail=row.detail,
    )


def moment(at: datetime) -> str:
    return at.isoformat(timespec="microseconds")


def subtrees(session: Session) -> Read:
    """Reads full subtrees of the log as it is stored."""

    def read(level: int, index: int) -> bytes:
        if level == 0:
            found = session.exec(select(AuditEvent.hash).where(AuditEvent.id == index + 1)).first()
        else:
            of_this = (AuditSubtree.level == level, AuditSubtree.index == index)
            found = session.exec(select(AuditSubtree.hash).where(*of_this)).first()
        if found is None:
            raise NotFoundError("a part of the audit log is missing in the database: concord audit verify says which")
        return bytes.fromhex(found)

    return read


def size(session: Session) -> int:
    return session.exec(select(func.max(AuditEvent.id))).one() or 0


def head(session: Session, federation: str) -> TreeHead:
    """As the log is now."""
    count = size(session)
    root = root_of(count, subtrees(session)).hex()
    return TreeHead(log=coordinator_log(federation), size=count, root=root, issued_at=int(utc_now().timestamp()))


def signed_head(session: Session, federation: str, key: PrivateKey) -> tuple[TreeHead, Envelope]:
    assert isinstance(key, Ed25519PrivateKey)
    found = head(session, federation)
    return found, seal(found, key)


def grown_since(session: Session, since: int, now: int) -> tuple[str, ...]:
    """The proof that the log of `now` entries begins with the `since` first ones; empty where it cannot."""
    if not 0 < since < now:
        return ()
    return tuple(part.hex() for part in consistency_proof(since, now, subtrees(session)))


def proof_of(session: Session, sequence: int, count: int) -> tuple[str, ...]:
    """The proof that entry `sequence` is among the first `count`. Raises: NotFoundError."""
    if not 1 <= sequence <= count:
        raise NotFoundError(f"there is no entry {sequence} among the first {count} of the audit log")
    return tuple(part.hex() for part in inclusion_proof(sequence - 1, count, subtrees(session)))


def entries(session: Session, first: int, limit: int) -> Iterator[AuditEvent]:
    query = select(AuditEvent).where(AuditEvent.id >= first).order_by(col(AuditEvent.id)).limit(limit)
    yield from session.exec(query)
