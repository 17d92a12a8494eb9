"""Tables of nodes: who was invited, who belongs, every version of the roster, and what nodes are yet to be told."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON
from sqlmodel import Field

from concord_server.database import Table, UtcDateTime

__all__ = ["Invitation", "Node", "NodeUpdate", "RosterVersion"]


class Invitation(Table, table=True):
    """token_digest: SHA-256 of the one-time token, which is kept nowhere."""

    id: str = Field(primary_key=True)
    organisation: str = Field(foreign_key="organisation.name")
    node: str = Field(index=True)
    token_digest: str = Field(unique=True)
    created_by: str
    created_at: datetime = Field(sa_type=UtcDateTime)
    expires_at: datetime = Field(sa_type=UtcDateTime)
    used_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class Node(Table, table=True):
    """state: enrolled → active ⇄ suspended → revoked. Keys are as in documents (`public_text`).

    tls_key: the fingerprint of the key that its certificate is for; tls_key_next: of a renewed one that it has not
    used yet, so that an answer that was lost locks nobody out. certificate_serial: of the latest, hexadecimal.
    delivered: the number of the last update that it has received.
    """

    name: str = Field(primary_key=True)
    organisation: str = Field(foreign_key="organisation.name", index=True)
    state: str = Field(index=True)
    identity_key: str = Field(unique=True)
    flower_key: str = Field(unique=True)
    tls_key: str = Field(unique=True)
    tls_key_next: str | None = Field(default=None, unique=True)
    certificate_serial: str
    certificate_not_after: datetime = Field(sa_type=UtcDateTime)
    enrolled_at: datetime = Field(sa_type=UtcDateTime)
    last_seen_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    delivered: int = 0


class RosterVersion(Table, table=True):
    """envelope: the signed roster as it was sent."""

    __tablename__ = "roster_version"

    version: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    envelope: dict[str, Any] = Field(sa_type=JSON)
    issued_at: datetime = Field(sa_type=UtcDateTime)


class NodeUpdate(Table, table=True):
    """What a node is to be told, in order; read by `GET /api/node/updates`. Of a roster, `subject` is the version and
    `body` is empty: one copy of it serves all nodes.
    """

    __tablename__ = "node_update"
    __table_args__ = ({"sqlite_autoincrement": True},)

    sequence: int | None = Field(default=None, primary_key=True)
    node: str = Field(foreign_key="node.name", index=True)
    kind: str
    subject: str
    body: dict[str, Any] = Field(sa_type=JSON)
    created_at: datetime = Field(sa_type=UtcDateTime)
