"""Runs: started and stopped by people, let go on by what nodes say. What workers do with them is in `leases`; it is
offered here too.
"""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field
from sqlalchemy import func as sql
from sqlmodel import Session, select

from concord_server.api.bodies import Signed
from concord_server.api.security import Caller, NodeCaller
from concord_server.audit.service import record as audit
from concord_server.database import lock, utc_now
from concord_server.plans.tables import PlanRow
from concord_server.runs import approvals
from concord_server.runs.course import alive, assess, locked, manifest_of, stop_now
from concord_server.runs.leases import (
    RunControl,
    RunView,
    finish,
    lease_next,
    load_run,
    records_after,
    release_lease,
    renew_lease,
    save_step,
)
from concord_server.runs.manifests import check_manifest
from concord_server.runs.quarantine import LIFT, lift, lifted, robust_overview
from concord_server.runs.states import ENDED
from concord_server.runs.tables import Round, Run
from concord_server.settings import Settings
from concord_server.studies import service as studies
from concord_server.studies.envelopes import envelope_of, keep, open_signed
from concord_server.studies.reach import in_reach
from concord_shared.documents import RunManifest
from concord_shared.errors import ConflictError, NotFoundError
from concord_shared.signing import Envelope

__all__ = [
    "PRIORITY_MAX",
    "NewRun",
    "RunControl",
    "RunDetail",
    "RunReport",
    "RunView",
    "detail",
    "find",
    "finish",
    "lease_next",
    "lift",
    "lifted",
    "load_run",
    "manifest_of",
    "promote_waiting",
    "records_after",
    "release_lease",
    "renew_lease",
    "save_step",
    "start",
    "stop",
    "stop_unserved",
    "take_approval",
    "view",
]

PRIORITY_MAX = 9


class NewRun(BaseModel, extra="forbid"):
    """manifest: a RunManifest, signed by its organisation. priority: higher goes first."""

    manifest: Signed
    priority: int = Field(0, ge=0, le=PRIORITY_MAX)


class WaitingFor(BaseModel):
    """node: "" for what is not a node's. since: seconds of Unix time."""

    node: str
    what: str
    since: int


class RunReport(BaseModel):
    """state: waiting | queued | running | succeeded | failed | stopped. steps: how many are done."""

    id: str
    study: str
    plan_digest: str
    organisation: str
    state: str
    reason: str
    waiting_for: list[WaitingFor]
    stop_requested: bool
    priority: int
    nodes: list[str]
    steps: int
    created_by: str
    created_at: str
    started_at: str | None
    ended_at: str | None


class RunDetail(RunReport):
    """summary: figures of a run that ended. robust: in that mode, who stood out and who is left out, so far. document:
    the manifest, as its organisation signed it.
    """

    start_model: str | None
    summary: dict[str, Any] | None
    robust: dict[str, Any] | None
    document: Signed


class Statistics(BaseModel):
    """found: of all nodes' rows together, what the last stage gave. plan: the document of the plan that asked."""

    run: str
    found: dict[str, Any]
    plan: dict[str, Any]


def statistics_of(session: Session, run: Run) -> Statistics:
    """Raises: NotFoundError: the run's plan asks for none. ConflictError: it has not succeeded."""
    plan: dict[str, Any] = session.get_one(PlanRow, run.plan_digest).document
    if plan["kind"] != "statistics":
        raise NotFoundError(f"the run {run.id} trains a model; statistics are of plans of kind statistics")
    if not run.summary or "statistics" not in run.summary:
        raise ConflictError(f"the run {run.id} is {run.state}; it has statistics once it succeeded")
    return Statistics(run=run.id, found=run.summary["statistics"], plan=plan)


def start(session: Session, caller: Caller, envelope: Envelope, settings: Settings, priority: int = 0) -> Run:
    """Stores a run, after the checks of `check_manifest` and of its signature. The same manifest again is the same
    run.
    """
    manifest = RunManifest.from_canonical(envelope.bytes)
    studies.find(session, caller, manifest.study)
    caller.check(manifest.organisation, "researcher", "org-admin")
    open_signed(session, envelope, RunManifest, manifest.organisation)
    lock(session, "runs")
    before = session.get(Run, manifest.run)
    if before is not None:
        if envelope_of(before.manifest).bytes == envelope.bytes:
            return before
        raise ConflictError(f"the run id {manifest.run} is taken; choose another one")
    now = utc_now()
    check_manifest(session, manifest, now, settings)
    run = Run(
        id=manifest.run,
        study=manifest.study,
        plan_digest=manifest.plan_digest,
        organisation=manifest.organisation,
        sequence=1 + (session.exec(select(sql.max(Run.sequence))).one() or 0),
        manifest=keep(envelope),
        start_model=manifest.start_model,
        not_before=manifest.not_before,
        not_after=manifest.not_after,
        priority=priority,
        created_by=caller.person,
        created_at=now,
        served_at=now,
    )
    session.add(run)
    session.flush()
    audit(session, caller.actor, "run:start", run.id, study=run.study, plan=run.plan_digest, digest=manifest.digest)
    assess(session, run, now)
    return run


def find(session: Session, caller: Caller, run: str) -> Run:
    """Raises: NotFoundError: there is none, or none that the caller may know of."""
    row = session.exec(select(Run).where(Run.id == run, in_reach(caller, Run.study, agreed=True))).first()
    if row is None:
        raise NotFoundError(f"no run {run[:80]!r}; list them with: concord run list")
    return row


def view(session: Session, run: Run) -> RunReport:
    steps = session.exec(select(sql.count()).where(Round.run == run.id, Round.kind != LIFT)).one()
    return RunReport(
        id=run.id,
        study=run.study,
        plan_digest=run.plan_digest,
        organisation=run.organisation,
        state=run.state,
        reason=run.reason,
        waiting_for=[WaitingFor(**each) for each in (*run.waiting_for, *run.awaited)],
        stop_requested=run.stop_requested,
        priority=run.priority,
        nodes=[each.node for each in manifest_of(run).participants],
        steps=steps,
        created_by=run.created_by,
        created_at=run.created_at.isoformat(),
        started_at=None if run.started_at is None else run.started_at.isoformat(),
        ended_at=None if run.ended_at is None else run.ended_at.isoformat(),
    )


def detail(session: Session, run: Run) -> RunDetail:
    return RunDetail(
        **view(session, run).model_dump(),
        start_model=run.start_model,
        summary=run.summary,
        robust=robust_overview(session, run.id) if _is_robust(session, run) else None,
        document=envelope_of(run.manifest),
    )


def _is_robust(session: Session, run: Run) -> bool:
    document: dict[str, Any] = session.get_one(PlanRow, run.plan_digest).document
    return bool(document["privacy"]["mode"] == "robust")


def stop(session: Session, caller: Caller, run: str) -> Run:
    """Asks a run to stop: at once if nobody works on it yet, else within a round trip. Asking again changes nothing."""
    row = find(session, caller, run)
    caller.check(row.organisation, "researcher", "org-admin")
    row = locked(session, run)
    if row.state in ENDED:
        raise ConflictError(f"the run {run} is {row.state} already")
    if not row.stop_requested:
        stop_now(session, row, f"stopped by {caller.person}", utc_now())
        audit(session, caller.actor, "run:stop", run, state=row.state)
    return row


def stop_unserved(session: Session, study: str, reason: str, now: datetime) -> None:
    """Stops the study's runs that use a dataset which no agreement opens to it any more."""
    lock(session, "runs")  # waits for a start that has passed its checks and is not stored yet
    agreed = studies.agreed_datasets(session, study, int(now.timestamp()))
    for run in alive(session, Run.study == study):
        used = {f"{each.node}/{each.dataset}" for each in manifest_of(run).participants}
        if not run.stop_requested and used - agreed.keys():
            stop_now(session, run, reason, now)
            audit(session, "coordinator", "run:stop", run.id, reason=reason)


def take_approval(session: Session, node: NodeCaller, envelope: Envelope) -> None:
    """Stores a node's word, and lets the runs that wait for it go on."""
    given = approvals.take_approval(session, node, envelope)
    if given is not None:
        now = utc_now()
        for run in alive(session, Run.study == given.study, Run.plan_digest == given.plan_digest):
            assess(session, run, now)


def promote_waiting(session: Session, now: datetime) -> list[str]:
    """Looks at every run that has not ended: who of its nodes has decided, what becomes of it. Returns the ids of those
    that changed their state.
    """
    changed = []
    for run in alive(session):
        before = run.state
        assess(session, run, now)
        if run.state != before:
            changed.append(run.id)
    return changed
