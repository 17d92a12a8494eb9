"""The tables of plans, and of the studies that they are submitted to."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON
from sqlmodel import Field

from concord_server.database import Table, UtcDateTime, utc_now

__all__ = ["PlanRow", "StudyPlan"]


class PlanRow(Table, table=True):
    """A plan by its content; who may see it follows from the studies that it is in."""

    __tablename__ = "plan"
    digest: str = Field(primary_key=True)
    name: str
    document: dict[str, Any] = Field(sa_type=JSON)
    created_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)


class StudyPlan(Table, table=True):
    """requested_by: the organisation that submitted the plan to the study."""

    __tablename__ = "study_plan"
    study: str = Field(primary_key=True, foreign_key="study.study")
    plan_digest: str = Field(primary_key=True, index=True, foreign_key="plan.digest")
    requested_by: str = Field(foreign_key="organisation.name")
    created_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)
