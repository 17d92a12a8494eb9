"""The audit log's table."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON
from sqlmodel import Field

from concord_server.database import Table, UtcDateTime

__all__ = ["AuditEvent"]


class AuditEvent(Table, table=True):
    """actor: `person:NAME`, `node:NAME`, `address:IP` or `coordinator`. action: `subject:verb`. Never changed."""

    __tablename__ = "audit_event"
    __table_args__ = ({"sqlite_autoincrement": True},)

    id: int | None = Field(default=None, primary_key=True)
    at: datetime = Field(sa_type=UtcDateTime)
    actor: str = Field(index=True)
    action: str = Field(index=True)
    subject: str = Field(index=True)
    detail: dict[str, Any] = Field(default={}, sa_type=JSON)
