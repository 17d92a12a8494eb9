"""Tables of people, what they may do, and the tokens they do it with."""

from datetime import datetime

from sqlalchemy import JSON
from sqlmodel import Field

from concord_server.database import Table, UtcDateTime

__all__ = ["ApiToken", "Person", "RoleGrant"]


class Person(Table, table=True):
    id: str = Field(primary_key=True)
    name: str = Field(unique=True)
    organisation: str | None = Field(default=None, foreign_key="organisation.name")
    created_at: datetime = Field(sa_type=UtcDateTime)


class RoleGrant(Table, table=True):
    """A role within an organisation; organisation "" means in the whole federation."""

    __tablename__ = "role_grant"

    person: str = Field(primary_key=True, foreign_key="person.id")
    role: str = Field(primary_key=True)
    organisation: str = Field(default="", primary_key=True)


class ApiToken(Table, table=True):
    """digest: SHA-256 of the token, which is kept nowhere. scopes: `read`, `write`, or with a noun, `runs:write`."""

    __tablename__ = "api_token"

    id: str = Field(primary_key=True)
    person: str = Field(foreign_key="person.id", index=True)
    digest: str = Field(unique=True)
    title: str = ""
    scopes: list[str] = Field(default=[], sa_type=JSON)
    created_at: datetime = Field(sa_type=UtcDateTime)
    expires_at: datetime = Field(sa_type=UtcDateTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    last_used_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
