"""Preflights: asked by a member of a study, passed on to the nodes that are named, answered by them, kept for a while.

The coordinator adds one check of its own, whether a node is there; the others are the nodes' own words.
"""

import datetime
from typing import Literal

from pydantic import BaseModel
from sqlalchemy import delete, func
from sqlmodel import Session, col, select

from concord_server.api.bodies import Signed
from concord_server.api.security import Caller, NodeCaller
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.nodes.service import notify
from concord_server.nodes.tables import Node
from concord_server.plans.tables import StudyPlan
from concord_server.preflights.tables import PreflightReportRow, PreflightRow
from concord_server.studies import service as studies
from concord_server.studies.envelopes import check_issued, document_of, envelope_of, keep, open_signed
from concord_server.studies.reach import in_reach, organisations_of
from concord_server.studies.tables import StudyMember
from concord_shared.errors import ApiError, ConflictError, NotAllowedError, NotFoundError, TooManyError
from concord_shared.preflight import LASTS_MAX_S, NODE_CHECKS, Figures, PreflightReport, PreflightRequest, Status
from concord_shared.signing import Envelope, open_envelope, read_public_text

__all__ = ["PreflightDetail", "PreflightView", "detail", "find", "forget", "request", "take_report", "view"]

PER_DAY_MAX = 200
"""Of one study; each node has a smaller number of its own."""
DAY = datetime.timedelta(days=1)
ONLINE = datetime.timedelta(seconds=90)
LATE_S = 300
"""A report that was long on its way is taken this long after the end of its request."""


class CheckView(BaseModel):
    """next: what the steward of that node does, unless the status is ok."""

    name: str
    status: Status
    says: str
    next: str


class NodeView(BaseModel):
    """answered_at: None where no answer came yet; then all but the first check are unknown. report: as it was signed.

    figures: None where nothing was measured. go: all checks are ok.
    """

    node: str
    organisation: str
    dataset: str
    go: bool
    answered_at: str | None
    checks: list[CheckView]
    differences: list[str]
    more: int
    figures: Figures | None
    report: Signed | None


class PreflightView(BaseModel):
    preflight: str
    study: str
    plan_digest: str
    organisation: str
    not_after: int
    created_at: str


class PreflightDetail(PreflightView):
    """answered: all nodes did, or the time is over. go: all nodes answered, and all their checks are ok; of an owner
    who is no member of the study: of its own nodes, the only ones that it is told of.
    """

    answered: bool
    go: bool
    nodes: list[NodeView]
    document: Signed


def request(session: Session, caller: Caller, study: str, envelope: Envelope) -> PreflightRow:
    """Stores a request and tells the nodes, after these checks: a member of the study signed it, just now; the plan is
    one of the study's; each dataset serves the study, one of each node. The same request again changes nothing.
    """
    given = PreflightRequest.from_canonical(envelope.bytes)
    if given.study != study:
        raise ApiError(f"the request is about the study {given.study}, not about {study}")
    studies.find(session, caller, study)
    caller.check(given.organisation, "researcher", "org-admin")
    open_signed(session, envelope, PreflightRequest, given.organisation)
    studies.check_member(session, study, given.organisation)
    before = session.get(PreflightRow, given.preflight)
    if before is not None:
        if envelope_of(before.envelope).bytes == envelope.bytes:
            return before
        raise ConflictError(f"the id {given.preflight} is taken; choose another one")
    now = utc_now()
    _check_times(given, int(now.timestamp()))
    if session.get(StudyPlan, (study, given.plan_digest)) is None:
        raise ConflictError(
            f"the study {study} has no plan {given.plan_digest[:16]}…; submit it first: concord plan submit"
        )
    nodes = _nodes_of(session, given, int(now.timestamp()))
    _check_number(session, study, now)
    row = PreflightRow(
        preflight=given.preflight,
        study=study,
        plan_digest=given.plan_digest,
        organisation=given.organisation,
        not_after=given.not_after,
        envelope=keep(envelope),
    )
    session.add(row)
    session.flush()
    for node in nodes:
        notify(session, node, "preflight", given.preflight, row.envelope)
    detail = {"study": study, "plan": given.plan_digest, "nodes": len(nodes), "digest": given.digest}
    record(session, caller.actor, "preflight:request", given.preflight, **detail)
    return row


def take_report(session: Session, node: NodeCaller, envelope: Envelope) -> None:
    """Stores a node's answer, after these checks: the node signed it, it answers the very request that named it, in
    time, and it is the first. The same one again changes nothing.
    """
    given = open_envelope(envelope, PreflightReport, [read_public_text(node.identity_key)])
    if (given.node, given.organisation) != (node.name, node.organisation):
        raise NotAllowedError(f"a node answers for itself alone: expected {node.organisation}/{node.name}")
    row = session.get(PreflightRow, given.preflight, with_for_update=True)
    if row is None:
        raise NotFoundError("there is no such preflight (any more)")
    asked = document_of(row.envelope, PreflightRequest)
    if given.request_digest != asked.digest or given.dataset != asked.dataset_of(node.name):
        raise ConflictError(f"the report is about another question than preflight {given.preflight}")
    now = int(utc_now().timestamp())
    check_issued(given.issued_at, now)
    before = session.get(PreflightReportRow, (given.preflight, node.name))
    if before is not None:
        if envelope_of(before.envelope).bytes == envelope.bytes:
            return
        raise ConflictError(f"{node.name} has answered preflight {given.preflight} already")
    if now > asked.not_after + LATE_S:
        raise ConflictError(f"preflight {given.preflight} is over; nobody waits for an answer any more")
    session.add(PreflightReportRow(preflight=given.preflight, node=node.name, envelope=keep(envelope)))
    session.flush()
    told = {check.name: check.status for check in given.checks}
    record(session, node.actor, "preflight:report", given.preflight, digest=given.digest, checks=told)


def find(session: Session, caller: Caller, study: str, preflight: str) -> PreflightRow:
    """Raises: NotFoundError: there is none in that study, or none that the caller may know of."""
    query = select(PreflightRow).where(
        PreflightRow.preflight == preflight,
        PreflightRow.study == study,
        in_reach(caller, PreflightRow.study, agreed=True),
    )
    row = session.exec(query).first()
    if row is None:
        raise NotFoundError(
            f"no preflight {preflight[:80]!r} of the study {study[:80]!r}; ask anew: concord study preflight"
        )
    return row


def view(row: PreflightRow) -> PreflightView:
    return PreflightView(
        preflight=row.preflight,
        study=row.study,
        plan_digest=row.plan_digest,
        organisation=row.organisation,
        not_after=row.not_after,
        created_at=row.created_at.isoformat(),
    )


def detail(session: Session, caller: Caller, row: PreflightRow) -> PreflightDetail:
    asked, now = document_of(row.envelope, PreflightRequest), utc_now()
    names = [name.partition("/")[0] for name in asked.datasets]
    known = {node.name: node for node in session.exec(select(Node).where(col(Node.name).in_(names)))}
    found = session.exec(select(PreflightReportRow).where(PreflightReportRow.preflight == row.preflight))
    reports = {each.node: each for each in found}
    allowed = _told(session, caller, row.study)
    nodes = [
        _node(known[name], asked, reports.get(name), now)
        for name in sorted(set(names) & known.keys())
        if allowed is None or known[name].organisation in allowed
    ]
    return PreflightDetail(
        **view(row).model_dump(),
        answered=all(each.answered_at for each in nodes) or now.timestamp() > row.not_after,
        go=bool(nodes) and all(each.go for each in nodes),
        nodes=nodes,
        document=envelope_of(row.envelope),
    )


def forget(session: Session, now: datetime.datetime, retention_days: int) -> int:
    """Removes what is older; returns how many. The audit log keeps who asked, and who answered what."""
    old = select(PreflightRow.preflight).where(PreflightRow.created_at < now - retention_days * DAY)
    gone = list(session.exec(old))
    if gone:
        session.execute(delete(PreflightReportRow).where(col(PreflightReportRow.preflight).in_(gone)))
        session.execute(delete(PreflightRow).where(col(PreflightRow.preflight).in_(gone)))
        record(session, "coordinator", "preflight:tidy", "preflights", preflights=len(gone))
    return len(gone)


def _check_times(given: PreflightRequest, now: int) -> None:
    check_issued(given.issued_at, now)
    if not now < given.not_after <= given.issued_at + LASTS_MAX_S:
        raise ApiError(
            f"not_after: expected a time that is yet to come, at most {LASTS_MAX_S} s after issued_at; check the clock "
            "of the machine that signed the request"
        )


def _check_number(session: Session, study: str, now: datetime.datetime) -> None:
    recent = select(func.count()).where(PreflightRow.study == study, PreflightRow.created_at > now - DAY)
    if session.exec(recent).one() >= PER_DAY_MAX:
        raise TooManyError(f"the study {study} has had {PER_DAY_MAX} preflights within a day; wait")


def _nodes_of(session: Session, given: PreflightRequest, now: int) -> list[str]:
    """Raises: ApiError: a node twice. ConflictError: a dataset that does not serve the study."""
    nodes = [name.partition("/")[0] for name in given.datasets]
    if len(set(nodes)) != len(nodes):
        raise ApiError("a node takes part in a run with one dataset; name each node once")
    agreed = studies.agreed_datasets(session, given.study, now)
    for name in given.datasets:
        if name not in agreed:
            raise ConflictError(f"no agreement opens {name} to the study {given.study}; see: concord agreement list")
    return [name for name in nodes if _agreed_state(agreed, name) != "revoked"]


def _agreed_state(agreed: dict[str, studies.AgreedDataset], node: str) -> str:
    return next(each.node.state for each in agreed.values() if each.node.name == node)


def _told(session: Session, caller: Caller, study: str) -> frozenset[str] | None:
    """Of whose nodes the caller is told: members of the study of all, an owner of its own; None: all."""
    organisations = organisations_of(caller)
    if organisations is None:
        return None
    member = select(StudyMember.study).where(
        StudyMember.study == study, col(StudyMember.organisation).in_(organisations)
    )
    return None if session.exec(member).first() is not None else organisations


def _node(node: Node, asked: PreflightRequest, row: PreflightReportRow | None, now: datetime.datetime) -> NodeView:
    checks = [_presence(node, row is not None, now)]
    report = None if row is None else document_of(row.envelope, PreflightReport)
    if report is None:
        checks += [CheckView(name=name, status="unknown", says="no answer yet", next="") for name in NODE_CHECKS]
    else:
        checks += [CheckView(**check.model_dump()) for check in report.checks]
    measured = report is not None and report.figures != Figures()
    return NodeView(
        node=node.name,
        organisation=node.organisation,
        dataset=asked.dataset_of(node.name) or "",
        go=all(check.status == "ok" for check in checks),
        answered_at=None if row is None else row.received_at.isoformat(),
        checks=checks,
        differences=[] if report is None else list(report.differences),
        more=0 if report is None else report.more,
        figures=report.figures if report is not None and measured else None,
        report=None if row is None else envelope_of(row.envelope),
    )


def _presence(node: Node, has_answered: bool, now: datetime.datetime) -> CheckView:
    status: Literal["ok", "no"] = "no"
    if node.state != "active":
        says, advice = f"the node is {node.state}", "concord node activate NODE --fingerprint FINGERPRINT"
    elif not has_answered and (node.last_seen_at is None or now - node.last_seen_at > ONLINE):
        says, advice = "the node was not heard of for a while", "start it there: concord-node up; concord-node doctor"
    else:
        status, says, advice = "ok", "active", ""
    return CheckView(name="node", status=status, says=says, next=advice)
