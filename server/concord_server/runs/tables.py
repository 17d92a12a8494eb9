"""The tables of runs: nodes' approvals, the runs themselves, and the rounds that they took."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger
from sqlmodel import Field

from concord_server.database import Table, UtcDateTime, utc_now

__all__ = ["ApprovalRow", "ReceiptRow", "Round", "Run"]


class ApprovalRow(Table, table=True):
    """Every word of a node on a plan, dataset and study; that of the highest sequence holds."""

    __tablename__ = "approval"
    node: str = Field(primary_key=True, foreign_key="node.name")
    dataset: str = Field(primary_key=True)
    study: str = Field(primary_key=True, foreign_key="study.study", index=True)
    plan_digest: str = Field(primary_key=True, foreign_key="plan.digest")
    sequence: int = Field(primary_key=True, sa_type=BigInteger)
    decision: str
    dataset_version: str
    rows: int = Field(sa_type=BigInteger)
    evaluation_rows: int = Field(sa_type=BigInteger)
    not_after: int = Field(sa_type=BigInteger)
    envelope: dict[str, Any] = Field(sa_type=JSON)
    created_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)


class Run(Table, table=True):
    """state: see `states`. reason: why it ended, or why it is asked to stop.

    waiting_for: lines {node, what, since}; while it runs, whom it lost. awaited: the same, as its worker says: who has
    not answered for long. summary: figures of a run that ended.
    sequence: counts runs in the order of their start. admitted: the approvals that it began with, {node, dataset,
    sequence}: fixed when it is queued, so that a resumed run goes on with the same nodes.
    fruitless: leases in a row that saved no step; each takes one off the priority when workers choose.
    served_at: when it was queued, or last leased: the longest unserved goes first.
    """

    __tablename__ = "run"
    id: str = Field(primary_key=True)
    study: str = Field(index=True, foreign_key="study.study")
    plan_digest: str = Field(index=True, foreign_key="plan.digest")
    organisation: str = Field(index=True, foreign_key="organisation.name")
    sequence: int = Field(unique=True)
    manifest: dict[str, Any] = Field(sa_type=JSON)
    admitted: list[dict[str, Any]] = Field(default_factory=list, sa_type=JSON)
    start_model: str | None = None
    not_before: int = Field(sa_type=BigInteger)
    not_after: int = Field(sa_type=BigInteger)
    state: str = Field(default="waiting", index=True)
    reason: str = ""
    waiting_for: list[dict[str, Any]] = Field(default_factory=list, sa_type=JSON)
    awaited: list[dict[str, Any]] = Field(default_factory=list, sa_type=JSON)
    priority: int = 0
    created_by: str
    created_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)
    started_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    ended_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    served_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)
    lease_owner: str | None = None
    lease_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    fruitless: int = 0
    stop_requested: bool = False
    checkpoint: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    summary: dict[str, Any] | None = Field(default=None, sa_type=JSON)


class Round(Table, table=True):
    """One record of a run, as metrics.jsonl holds them; index counts from 0 without gaps."""

    __tablename__ = "round"
    run: str = Field(primary_key=True, foreign_key="run.id")
    index: int = Field(primary_key=True)
    kind: str
    number: int
    record: dict[str, Any] = Field(sa_type=JSON)
    created_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)


class ReceiptRow(Table, table=True):
    """An Update that was taken: the coordinator's signed receipt, and what the node signed (canonical JSON) with its
    signature, hexadecimal. number: counts all receipts.
    """

    __tablename__ = "receipt"
    number: int = Field(primary_key=True, sa_column_kwargs={"autoincrement": False})
    run: str = Field(index=True, foreign_key="run.id")
    node: str = Field(index=True, foreign_key="node.name")
    kind: str
    round: int
    statement: str
    signature: str
    envelope: dict[str, Any] = Field(sa_type=JSON)
