"""What the routes have in common: creations that were carried out, by their Idempotency-Key."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON
from sqlmodel import Field

from concord_server.database import Table, UtcDateTime

__all__ = ["IdempotentRequest"]


class IdempotentRequest(Table, table=True):
    """response: None where it held a secret, which is kept nowhere."""

    __tablename__ = "idempotent_request"

    person: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    request: str
    response: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    created_at: datetime = Field(sa_type=UtcDateTime, index=True)
