"""`/api/v1/audit`."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel
from sqlmodel import col, select

from concord_server.api.paging import Listing, Page, paged
from concord_server.api.security import Caller, allow
from concord_server.api.state import CurrentDatabase
from concord_server.audit.tables import AuditEvent
from concord_shared.errors import NotAllowedError

__all__ = ["router"]

router = APIRouter(prefix="/api/v1/audit", tags=["audit"])
Filter = Annotated[str | None, Query(max_length=300)]


class EventView(BaseModel):
    """actor: `person:NAME`, `node:NAME`, `address:IP` or `coordinator`; action: `subject:verb`."""

    id: int
    at: str
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]


@router.get("")
def list_events(
    caller: Annotated[Caller, Depends(allow("federation-admin", "auditor"))],
    database: CurrentDatabase,
    page: Page,
    actor: Filter = None,
    action: Filter = None,
    subject: Filter = None,
) -> Listing[EventView]:
    """What happened, newest first. For those who audit the whole federation."""
    if not caller.may("", "auditor"):
        raise NotAllowedError("the audit log tells of all organisations: it needs the role auditor of the federation")
    query = select(AuditEvent)
    for column, wanted in ((AuditEvent.actor, actor), (AuditEvent.action, action), (AuditEvent.subject, subject)):
        if wanted is not None:
            query = query.where(col(column) == wanted)
    with database.reading() as session:
        return paged(session, query, col(AuditEvent.id), page, _view, newest_first=True)


def _view(row: AuditEvent) -> EventView:
    assert row.id is not None, "a stored event has its number"
    return EventView(
        id=row.id,
        at=row.at.isoformat(),
        actor=row.actor,
        action=row.action,
        subject=row.subject,
        detail=row.detail,
    )
