"""A worker's hold on runs. A lease runs out unless it is renewed; then another worker goes on from the last step.

`owner` is a name that no other worker has, nor this one after a restart. `lease_next` gives it a run, `renew_lease`
keeps it, `save_step` and `finish` refuse one whose lease is another's by now.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import case
from sqlalchemy import func as sql
from sqlmodel import Session, and_, col, or_, select

from concord_server.audit.service import record as audit
from concord_server.database import utc_now
from concord_server.models.tables import ModelVersion
from concord_server.plans.service import plan_of
from concord_server.plans.tables import PlanRow
from concord_server.runs.approvals import begun_with
from concord_server.runs.course import end, locked, manifest_of
from concord_server.runs.receipts import taken_digest
from concord_server.runs.states import Outcome, Waiting, move
from concord_server.runs.tables import Round, Run
from concord_server.studies.envelopes import document_of
from concord_shared.documents import Approval, RunManifest
from concord_shared.errors import ConflictError, NotFoundError
from concord_shared.plan.schema import Plan

__all__ = [
    "RunControl",
    "RunView",
    "finish",
    "lease_next",
    "load_run",
    "records_after",
    "release_lease",
    "renew_lease",
    "save_step",
]


@dataclass(frozen=True)
class RunControl:
    """What a worker must know of its run. reason: why it is to stop."""

    stop_requested: bool
    still_mine: bool
    reason: str = ""


@dataclass(frozen=True)
class RunView:
    """All that a driver needs. approvals: those that the run began with, in node order; the same when it is resumed.

    start_model: the version to start from, with its file; None for the plan's seeded model.
    """

    id: str
    manifest: RunManifest
    plan: Plan
    document: dict[str, Any]
    checkpoint: dict[str, Any] | None
    approvals: tuple[Approval, ...]
    records: tuple[dict[str, Any], ...]
    start_model: ModelVersion | None
    stop_requested: bool
    reason: str


def lease_next(session: Session, owner: str, now: datetime, lease_s: float, busy: Collection[str] = ()) -> Run | None:
    """Gives `owner` a run to work on: one that is queued, or whose worker is gone (its lease ran out).

    By priority, then the longest unserved. Each lease that saved no step takes one off a run's priority, so that a run
    which ends its workers, or is given back again and again, cannot keep the others from their turn.

    busy: what this owner works on already; never given twice, however late its renewal.
    """
    rank = case((col(Run.priority) > col(Run.fruitless), col(Run.priority) - col(Run.fruitless)), else_=0)
    expired = or_(col(Run.lease_until).is_(None), col(Run.lease_until) <= now)
    query = (
        select(Run)
        .where(or_(Run.state == "queued", and_(Run.state == "running", expired)), col(Run.id).not_in(busy))
        .order_by(rank.desc(), col(Run.served_at), col(Run.sequence))
        .limit(1)
    )
    run = session.exec(query.with_for_update(skip_locked=True)).first()
    if run is None:
        return None
    if run.state == "queued":
        run.state, run.started_at = move("queued", "running"), now
    audit(session, "coordinator", "run:lease", run.id, owner=owner, before=run.lease_owner)
    run.lease_owner, run.lease_until = owner, now + timedelta(seconds=lease_s)
    run.served_at, run.fruitless = now, run.fruitless + 1
    session.add(run)
    return run


def renew_lease(
    session: Session,
    run_id: str,
    owner: str,
    now: datetime,
    lease_s: float,
    awaited: Sequence[Waiting] = (),
) -> RunControl:
    """Keeps a lease; says whether it is still there to be kept, and whether the run is to stop.

    awaited: for whom the run waits at the moment, for those who watch it.
    """
    run = locked(session, run_id)
    if not _is_held(run, owner):
        return RunControl(run.stop_requested, still_mine=False, reason=run.reason)
    run.lease_until = now + timedelta(seconds=lease_s)
    run.awaited = [each.document() for each in awaited]
    session.add(run)
    return RunControl(run.stop_requested, still_mine=True, reason=run.reason)


def release_lease(session: Session, run_id: str, owner: str, now: datetime, awaited: Sequence[Waiting] = ()) -> None:
    """Gives a run back that did not end: another worker, or this one, goes on with it. No longer held: no change.

    awaited: what it waits for, for those who watch it; since when, as it was said before.
    """
    run = locked(session, run_id)
    if _is_held(run, owner):
        since = {(each["node"], each["what"]): each["since"] for each in run.awaited}
        run.awaited = [each.document() | {"since": since.get((each.node, each.what), each.since)} for each in awaited]
        run.lease_owner, run.lease_until, run.served_at = None, None, now
        session.add(run)


def save_step(
    session: Session,
    run_id: str,
    owner: str,
    record: dict[str, Any],
    checkpoint: dict[str, Any] | None,
    model: ModelVersion | None = None,
    taken: Mapping[str, str] | None = None,
) -> Round:
    """One step of a run: its record, where the run stands now, and the model that it made, if it made one.

    taken: by node, the digest of what it signed for this step.

    checkpoint: None for the last words of a run that fails, which stands where it stood.

    Raises:
        ConflictError: the lease is no longer the owner's; nothing was stored.
    """
    run = _held(session, run_id, owner)
    last = session.exec(select(sql.max(Round.index)).where(Round.run == run_id)).one()
    step = Round(
        run=run_id, index=0 if last is None else last + 1, kind=record["kind"], number=record["round"], record=record
    )
    session.add(step)
    if model is not None:
        _put_model(session, run, model)
    if checkpoint is not None:
        run.checkpoint, run.fruitless = checkpoint, 0
        session.add(run)
    told = {"kind": step.kind, "round": step.number, "model": model.digest if model else None}
    if taken:
        told["taken"] = taken_digest(taken)
    audit(session, "coordinator", "run:step", run_id, **told, aborted=record.get("aborted"))
    for node, evidence in record.get("quarantined", {}).items():
        audit(session, "coordinator", "node:quarantine", run_id, node=node, round=step.number, **evidence)
    for node, reason in record.get("failures", {}).items():
        if not reason.startswith("declined:"):  # a decline is a node's right, anything else is no honest reply
            audit(session, f"node:{node}", "reply:send-refused", run_id, reason=reason)
    return step


def load_run(session: Session, run_id: str) -> RunView:
    """Raises: NotFoundError."""
    run = session.get(Run, run_id)
    if run is None:
        raise NotFoundError(f"no run {run_id!r}")
    row = session.get_one(PlanRow, run.plan_digest)
    return RunView(
        id=run.id,
        manifest=manifest_of(run),
        plan=plan_of(row),
        document=row.document,
        checkpoint=run.checkpoint,
        approvals=tuple(document_of(row.envelope, Approval) for row in begun_with(session, run)),
        records=tuple(each.record for each in records_after(session, run_id)),
        start_model=_start_model(session, run),
        stop_requested=run.stop_requested,
        reason=run.reason,
    )


def finish(
    session: Session,
    run_id: str,
    owner: str,
    state: Outcome,
    reason: str,
    summary: dict[str, Any],
    model: ModelVersion | None = None,
) -> Run:
    """Ends a run, and tells its nodes. model: its last, whose files lie in models/<digest>/<run>/ already.

    Raises:
        ConflictError: the lease is no longer the owner's; nothing was stored.
    """
    run = _held(session, run_id, owner)
    if model is not None:
        model.final = True
        _put_model(session, run, model)
    run.summary = summary
    end(session, run, state, reason, utc_now())
    return run


def records_after(session: Session, run: str, index: int = -1, limit: int | None = None) -> list[Round]:
    """The rounds of a run after `index`, in order."""
    query = select(Round).where(Round.run == run, Round.index > index).order_by(col(Round.index))
    return list(session.exec(query if limit is None else query.limit(limit)))


def _put_model(session: Session, run: Run, model: ModelVersion) -> None:
    """Stores what a run made; the same digest again (a round that changed nothing, the final files) replaces it."""
    model.run, model.plan_digest = run.id, run.plan_digest
    of_this = (ModelVersion.digest == model.digest, ModelVersion.run == run.id)
    before = session.exec(select(ModelVersion).where(*of_this)).first()
    if before is not None:
        model.id, model.created_at = before.id, before.created_at
    session.merge(model)


def _is_held(run: Run, owner: str) -> bool:
    return run.state == "running" and run.lease_owner == owner


def _held(session: Session, run_id: str, owner: str) -> Run:
    run = locked(session, run_id)
    if not _is_held(run, owner):
        raise ConflictError(f"the run {run_id} is no longer leased to {owner}: it is {run.state}; nothing was stored")
    return run


def _start_model(session: Session, run: Run) -> ModelVersion | None:
    if run.start_model is None:
        return None
    query = (
        select(ModelVersion)
        .join(Run)
        .where(ModelVersion.digest == run.start_model, Run.study == run.study, ModelVersion.path != "")
    )
    return session.exec(query.order_by(col(ModelVersion.id))).first()
