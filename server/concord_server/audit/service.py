"""Writing to the audit log, and reading it."""

import re
from typing import Any

from sqlmodel import Session

from concord_server.audit.tables import AuditEvent
from concord_server.database import utc_now

__all__ = ["record"]

ACTION = re.compile(r"[a-z]+(-[a-z]+)*:[a-z]+(-[a-z]+)*")


def record(session: Session, actor: str, action: str, subject: str, **detail: Any) -> None:
    """Appends an event to this transaction: it is stored exactly if what it tells of is.

    actor: `person:NAME`, `node:NAME`, `address:IP` or `coordinator`; action: `subject:verb`, such as `node:revoke`;
    a refused attempt ends in `-refused`. detail: JSON; never a secret, never data.
    """
    assert ACTION.fullmatch(action), f"an action is subject:verb, not {action!r}"
    session.add(AuditEvent(at=utc_now(), actor=actor, action=action, subject=subject, detail=detail))
