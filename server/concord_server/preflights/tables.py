"""The tables of preflights: what was asked, and what each node answered."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger
from sqlmodel import Field

from concord_server.database import Table, UtcDateTime, utc_now

__all__ = ["PreflightReportRow", "PreflightRow"]


class PreflightRow(Table, table=True):
    """envelope: the request as its organisation signed it, and as nodes were told it."""

    __tablename__ = "preflight"
    preflight: str = Field(primary_key=True)
    study: str = Field(index=True, foreign_key="study.study")
    plan_digest: str = Field(foreign_key="plan.digest")
    organisation: str = Field(foreign_key="organisation.name")
    not_after: int = Field(sa_type=BigInteger)
    envelope: dict[str, Any] = Field(sa_type=JSON)
    created_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime, index=True)


class PreflightReportRow(Table, table=True):
    """envelope: the report as the node signed it."""

    __tablename__ = "preflight_report"
    preflight: str = Field(primary_key=True, foreign_key="preflight.preflight")
    node: str = Field(primary_key=True, foreign_key="node.name")
    envelope: dict[str, Any] = Field(sa_type=JSON)
    received_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)
