"""The audit log's tables: they only grow, which triggers of the database see to."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON
from sqlmodel import Field

from concord_server.database import Table, UtcDateTime

__all__ = ["AuditEvent", "AuditSubtree", "NodeHead"]


class AuditEvent(Table, table=True):
    """actor: `person:NAME`, `node:NAME`, `address:IP` or `coordinator`. action: `subject:verb`. Never changed.

    id: its sequence in the log, from 1 without gaps. hash: over all of it and the hash of the one before
    (`concord_shared.evidence.log`), hexadecimal.
    """

    __tablename__ = "audit_event"

    id: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    at: datetime = Field(sa_type=UtcDateTime)
    actor: str = Field(index=True)
    action: str = Field(index=True)
    subject: str = Field(index=True)
    detail: dict[str, Any] = Field(default={}, sa_type=JSON)
    hash: str


class AuditSubtree(Table, table=True):
    """Full subtrees of the log's Merkle tree above its leaves, which are the hashes of events. Never changed."""

    __tablename__ = "audit_subtree"

    level: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    index: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    hash: str


class NodeHead(Table, table=True):
    """What the coordinator remembers of a node's own log: its last signed head that follows from all before.

    alarm: why a later one does not, "" where all is well; offered: that one.
    """

    __tablename__ = "node_head"

    node: str = Field(primary_key=True, foreign_key="node.name")
    identity_key: str
    head: dict[str, Any] = Field(sa_type=JSON)
    received_at: datetime = Field(sa_type=UtcDateTime)
    alarm: str = ""
    offered: dict[str, Any] | None = Field(default=None, sa_type=JSON)
