"""The table of organisations."""

from datetime import datetime

from sqlmodel import Field

from concord_server.database import Table, UtcDateTime

__all__ = ["Organisation"]


class Organisation(Table, table=True):
    """key: its Ed25519 public key (`public_text`), once its people registered it."""

    name: str = Field(primary_key=True)
    title: str
    key: str | None = None
    created_at: datetime = Field(sa_type=UtcDateTime)
