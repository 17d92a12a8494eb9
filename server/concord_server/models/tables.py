"""The tables of trained models and of their releases."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, UniqueConstraint
from sqlmodel import Field

from concord_server.database import Table, UtcDateTime, utc_now

__all__ = ["ModelVersion", "ReleaseRow"]


class ModelVersion(Table, table=True):
    """The model after a round of a run. Two runs of one plan may well end with the same digest, so both name it.

    path: of the tensors, below the coordinator's directory; empty once tidied away. sha256, size: of that file.
    final: the run's last, whose files lie in models/<digest>/<run>/.
    """

    __tablename__ = "model_version"
    __table_args__ = (UniqueConstraint("digest", "run"),)
    id: int | None = Field(default=None, primary_key=True)
    digest: str
    run: str = Field(index=True, foreign_key="run.id")
    plan_digest: str = Field(foreign_key="plan.digest")
    round: int
    path: str
    sha256: str
    size: int = Field(sa_type=BigInteger)
    final: bool = False
    metrics: dict[str, Any] = Field(default_factory=dict, sa_type=JSON)
    created_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)


class ReleaseRow(Table, table=True):
    """A model cleared for use. envelope: the Release, signed by the organisation that owns the run."""

    __tablename__ = "release"
    model_digest: str = Field(primary_key=True)
    run: str = Field(primary_key=True, foreign_key="run.id")
    study: str = Field(index=True, foreign_key="study.study")
    organisation: str = Field(foreign_key="organisation.name")
    envelope: dict[str, Any] = Field(sa_type=JSON)
    created_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)
