"""Nodes that a robust run left out, and a person's word that they are to be asked again.

Such a word is a line of the run's records, beside those of its steps: who watches the run sees it, and the worker that
drives it reads it before its next step.
"""

from typing import Any

from sqlalchemy import func as sql
from sqlmodel import Session, select

from concord_server.api.security import Caller
from concord_server.audit.service import record as audit
from concord_server.robust.anomalies import overview
from concord_server.runs.course import locked
from concord_server.runs.leases import records_after
from concord_server.runs.states import ENDED
from concord_server.runs.tables import Round, Run
from concord_shared.errors import ConflictError

__all__ = ["LIFT", "lift", "lifted", "robust_overview"]

LIFT = "lift"
"""The kind of its records."""


def robust_overview(session: Session, run: str) -> dict[str, Any] | None:
    """Of a run in robust mode: each node's figures so far, and who is left out. None in other modes."""
    return overview(each.record for each in records_after(session, run))


def lifted(session: Session, run: str) -> dict[str, str]:
    """By node, who took it out of quarantine."""
    found: dict[str, str] = {}
    for each in session.exec(select(Round).where(Round.run == run, Round.kind == LIFT).order_by(Round.index)):  # type: ignore[arg-type]
        found |= each.record["lifted"]
    return found


def lift(session: Session, caller: Caller, run: Run, node: str, reason: str) -> None:
    """From the run's next step on the node is asked again, and is not left out a second time. Again changes nothing.

    Raises:
        ConflictError: the run has ended, or the node is not in quarantine.
    """
    caller.check(run.organisation, "researcher", "org-admin")
    run = locked(session, run.id)
    if run.state in ENDED:
        raise ConflictError(f"the run {run.id} is {run.state} already")
    if node in lifted(session, run.id):
        return
    known = (robust_overview(session, run.id) or {"nodes": {}})["nodes"].get(node)
    if known is None or known["quarantined"] is None:
        raise ConflictError(f"{node} is not in quarantine in the run {run.id}; see: concord run show {run.id}")
    last = session.exec(select(sql.max(Round.index)).where(Round.run == run.id)).one()
    number = known["quarantined"]["round"]
    record = {"kind": LIFT, "round": number, "lifted": {node: caller.person}, "reason": reason}
    session.add(Round(run=run.id, index=last + 1, kind=LIFT, number=number, record=record))
    audit(session, caller.actor, "quarantine:lift", run.id, node=node, reason=reason)
