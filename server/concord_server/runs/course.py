"""What becomes of a run, in the database: the verdicts of `states` carried out, and nodes told of them."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlmodel import Session, col, select

from concord_server.audit.service import record as audit
from concord_server.nodes.service import notify
from concord_server.nodes.tables import Node
from concord_server.plans.service import plan_of
from concord_server.plans.tables import PlanRow
from concord_server.runs import approvals
from concord_server.runs.manifests import minimum_cohort
from concord_server.runs.states import ENDED, Outcome, RunWord, Situation, Verdict, Waiting, decide, move, nodes_needed
from concord_server.runs.tables import Run
from concord_server.studies.envelopes import document_of
from concord_shared.documents import RunManifest
from concord_shared.errors import ConflictError, NotFoundError

__all__ = ["alive", "assess", "end", "locked", "manifest_of", "stop_now"]

REASON_MAX = 2000


def manifest_of(run: Run) -> RunManifest:
    return document_of(run.manifest, RunManifest)


def alive(session: Session, *conditions: Any) -> list[Run]:
    query = select(Run).where(col(Run.state).not_in(ENDED), *conditions).order_by(col(Run.sequence))
    return list(session.exec(query.with_for_update()))


def locked(session: Session, run_id: str) -> Run:
    run = session.get(Run, run_id, with_for_update=True, populate_existing=True)
    if run is None:
        raise NotFoundError(f"no run {run_id!r}")
    return run


def assess(session: Session, run: Run, now: datetime) -> None:
    """Lets a run go where what is known leads it."""
    manifest = manifest_of(run)
    verdict = decide(_situation(session, run, manifest, now))
    if verdict.state in ENDED:
        end(session, run, _outcome(verdict), verdict.reason, now)
        return
    if verdict.reason and not run.stop_requested:
        stop_now(session, run, verdict.reason, now)
    waiting_for = [each.document() for each in verdict.waiting_for]
    if verdict.state == "queued" and run.state == "waiting":
        _queue(session, run, manifest, now)
    if waiting_for != run.waiting_for:
        run.waiting_for = waiting_for
        session.add(run)


def _situation(session: Session, run: Run, manifest: RunManifest, now: datetime) -> Situation:
    plan = plan_of(session.get_one(PlanRow, run.plan_digest))
    seconds = int(now.timestamp())
    count = len(manifest.participants)
    try:
        needed = nodes_needed(plan, count, minimum_cohort(session, manifest, seconds))
    except ConflictError:  # an agreement with harder terms came since: all of them would not be enough
        needed = count + 1
    return Situation(
        state=_word(run),
        words=approvals.words(session, manifest, now),
        needed=needed,
        now=seconds,
        not_before=run.not_before,
        not_after=run.not_after,
        waiting_for=tuple(Waiting(**each) for each in run.waiting_for),
    )


def _queue(session: Session, run: Run, manifest: RunManifest, now: datetime) -> None:
    approved = frozenset(word.node for word in approvals.words(session, manifest, now) if word.says == "approved")
    rows = approvals.admitted(session, manifest, approved)
    run.admitted = [{"node": row.node, "dataset": row.dataset, "sequence": row.sequence} for row in rows]
    run.state, run.served_at = move("waiting", "queued"), now
    session.add(run)
    for node in _told(session, manifest):
        notify(session, node, "manifest", run.id, run.manifest)
    audit(session, "coordinator", "run:queue", run.id, nodes=sorted(approved))


def stop_now(session: Session, run: Run, reason: str, now: datetime) -> None:
    """A run that nobody works on ends at once; a worker is told, and ends its own."""
    if run.state == "running":
        run.stop_requested, run.reason = True, reason[:REASON_MAX]
        session.add(run)
    else:
        end(session, run, "stopped", reason, now)


def end(session: Session, run: Run, state: Outcome, reason: str, now: datetime) -> None:
    known_to_nodes = run.state != "waiting"
    run.state, run.reason, run.ended_at = move(_word(run), state), reason[:REASON_MAX], now
    run.lease_owner, run.lease_until, run.waiting_for, run.awaited = None, None, [], []
    session.add(run)
    if known_to_nodes:
        for node in _told(session, manifest_of(run)):
            notify(session, node, "run", run.id, {"run": run.id, "state": run.state, "reason": run.reason})
    audit(session, "coordinator", "run:end", run.id, state=run.state, reason=run.reason)


def _told(session: Session, manifest: RunManifest) -> Iterable[str]:
    """Nodes of the run, but for those that left the federation."""
    names = [each.node for each in manifest.participants]
    query = select(Node.name).where(col(Node.name).in_(names), Node.state != "revoked")
    return list(session.exec(query.order_by(col(Node.name))))


def _word(run: Run) -> RunWord:
    return run.state  # type: ignore[return-value]  # only `move` writes it


def _outcome(verdict: Verdict) -> Outcome:
    assert verdict.state in ENDED
    return verdict.state  # type: ignore[return-value]
