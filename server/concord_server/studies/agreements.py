"""Agreements: which datasets may serve a study, on which terms. Two organisations sign the same bytes.

    (nothing) ──request──► requested ──offer──► offered ──agree──► agreed
                               └── an offer of the very same bytes ───┘
    any of them ──withdraw──► withdrawn            requester: request, agree · owner: offer, withdraw

Every step carries a document, signed with the registered key of the organisation whose step it is. Nodes of the owner
verify all of it again.
"""

from pydantic import BaseModel
from sqlalchemy import ColumnElement, delete, true
from sqlmodel import Session, col, or_, select

from concord_server.api.bodies import Signed
from concord_server.api.security import Caller
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.datasets.tables import DatasetCardRow
from concord_server.nodes.service import notify
from concord_server.nodes.tables import Node
from concord_server.organisations.tables import Organisation
from concord_server.plans import service as plans
from concord_server.runs import service as runs
from concord_server.studies import service as studies
from concord_server.studies.envelopes import check_issued, document_of, envelope_of, keep, merged, open_signed
from concord_server.studies.reach import organisations_of
from concord_server.studies.tables import AgreementDataset, AgreementRow, StudyRow
from concord_shared.cards import beyond_terms
from concord_shared.documents import Agreement, DatasetCard, Terms, Withdrawal
from concord_shared.errors import ApiError, ConflictError, NotFoundError
from concord_shared.signing import Envelope

__all__ = ["AgreementView", "agree", "find", "offer", "party", "request", "view", "withdraw"]


class AgreementView(BaseModel):
    """state: requested | offered | agreed | withdrawn. document: the one in force, with the signatures that it has."""

    agreement: str
    study: str
    requester: str
    owner: str
    state: str
    datasets: list[str]
    terms: Terms
    digest: str
    created_at: str
    updated_at: str
    document: Signed


WITHDRAWAL_SHOWN_MAX = 300


def request(session: Session, caller: Caller, envelope: Envelope) -> AgreementRow:
    """The requester's step. The same request again changes nothing."""
    given = Agreement.from_canonical(envelope.bytes)
    study = studies.find(session, caller, given.study)
    caller.check(given.requester, "researcher", "org-admin")
    open_signed(session, envelope, Agreement, given.requester)
    studies.check_member(session, study.study, given.requester)
    before = session.get(AgreementRow, given.agreement)
    if before is not None:
        if envelope_of(before.envelope).bytes == envelope.bytes:
            return before
        raise ConflictError(f"the id {given.agreement} is taken; choose another one")
    _check(session, given, study)
    row = AgreementRow(
        agreement=given.agreement,
        study=given.study,
        requester=given.requester,
        owner=given.owner,
        state="requested",
        envelope=keep(envelope),
    )
    session.add(row)
    session.flush()
    _index(session, given)
    _audit(session, caller, "request", row, given)
    return row


def offer(session: Session, caller: Caller, agreement: str, envelope: Envelope) -> AgreementRow:
    """The owner's step: other terms or fewer datasets make an offer, the very bytes of the request an agreement."""
    row = _row(session, caller, agreement)
    caller.check(row.owner, "data-steward", "org-admin")
    standing = envelope_of(row.envelope)
    if row.state == "agreed" and standing.bytes == envelope.bytes:
        return row
    _check_state(row, "requested", "offered")
    given = open_signed(session, envelope, Agreement, row.owner)
    _check_same(row, given)
    _check(session, given, session.get_one(StudyRow, row.study))
    if row.state == "requested" and standing.bytes == envelope.bytes:
        return _conclude(session, caller, row, merged(standing, envelope))
    before = document_of(row.envelope, Agreement)
    if row.state == "offered" and given.issued_at < before.issued_at:
        raise ConflictError(f"a newer offer of {row.owner}'s stands already; look at it and sign another one")
    if more := sorted(set(given.datasets) - set(before.datasets)):
        raise ApiError(f"an offer opens what was asked for, or less; not asked for: {', '.join(more[:10])}")
    row.envelope, row.state, row.updated_at = keep(envelope), "offered", utc_now()
    session.add(row)
    _index(session, given)
    _audit(session, caller, "offer", row, given)
    return row


def agree(session: Session, caller: Caller, agreement: str, envelope: Envelope) -> AgreementRow:
    """The requester's word on an offer: its signature on the very same bytes."""
    row = _row(session, caller, agreement)
    caller.check(row.requester, "researcher", "org-admin")
    standing = envelope_of(row.envelope)
    if standing.bytes != envelope.bytes:
        raise ConflictError(f"what was signed is not what {row.owner} offers (now); look at it and sign again")
    if row.state == "agreed":
        return row
    _check_state(row, "offered")
    open_signed(session, envelope, Agreement, row.requester)
    return _conclude(session, caller, row, merged(standing, envelope))


def withdraw(session: Session, caller: Caller, agreement: str, envelope: Envelope) -> AgreementRow:
    """The owner's last word: its nodes are told, and runs that live by this agreement stop."""
    row = _row(session, caller, agreement)
    caller.check(row.owner, "data-steward", "org-admin")
    given = open_signed(session, envelope, Withdrawal, row.owner)
    if (given.agreement, given.organisation) != (row.agreement, row.owner):
        raise ApiError(f"the withdrawal is of {given.agreement} by {given.organisation}, not of {row.agreement}")
    if row.state == "withdrawn":
        return row
    known_to_nodes = row.state == "agreed"
    row.state, row.withdrawal, row.updated_at = "withdrawn", keep(envelope), utc_now()
    session.add(row)
    session.flush()
    record(session, caller.actor, "agreement:withdraw", row.agreement, reason=given.reason[:WITHDRAWAL_SHOWN_MAX])
    if known_to_nodes:
        runs.stop_unserved(session, row.study, f"{row.owner} withdrew the agreement {row.agreement}", utc_now())
        for node in _nodes(session, row):
            notify(session, node, "withdrawal", row.agreement, keep(envelope))
    return row


def find(session: Session, caller: Caller, agreement: str) -> AgreementRow:
    """Raises: NotFoundError: there is none, or one between others."""
    query = select(AgreementRow).where(AgreementRow.agreement == agreement, party(caller))
    row = session.exec(query).first()
    if row is None:
        raise NotFoundError(f"no agreement {agreement[:80]!r}; list them with: concord agreement list")
    return row


def party(caller: Caller) -> ColumnElement[bool]:
    """A condition: the caller belongs to one of the two organisations."""
    organisations = organisations_of(caller)
    if organisations is None:
        return true()
    return or_(col(AgreementRow.requester).in_(organisations), col(AgreementRow.owner).in_(organisations))


def view(row: AgreementRow) -> AgreementView:
    given = document_of(row.envelope, Agreement)
    return AgreementView(
        agreement=row.agreement,
        study=row.study,
        requester=row.requester,
        owner=row.owner,
        state=row.state,
        datasets=list(given.datasets),
        terms=given.terms,
        digest=given.digest,
        created_at=row.created_at.isoformat(),
        updated_at=row.updated_at.isoformat(),
        document=envelope_of(row.envelope),
    )


def _row(session: Session, caller: Caller, agreement: str) -> AgreementRow:
    """The agreement, held for this transaction."""
    find(session, caller, agreement)
    return session.get_one(AgreementRow, agreement, with_for_update=True, populate_existing=True)


def _conclude(session: Session, caller: Caller, row: AgreementRow, both: Envelope) -> AgreementRow:
    """Agreed: the owner's nodes learn of the study, of the agreement, then of the plans that are there already."""
    given = open_signed(session, both, Agreement, row.requester, row.owner)
    if given.terms.not_after <= utc_now().timestamp():
        raise ConflictError(f"the agreement {row.agreement} is over already; offer a later end")
    row.envelope, row.state, row.updated_at = keep(both), "agreed", utc_now()
    session.add(row)
    _index(session, given)
    _audit(session, caller, "agree", row, given)
    study = session.get_one(StudyRow, row.study)
    nodes = _nodes(session, row)
    for node in nodes:
        notify(session, node, "study", row.study, study.envelope)
        notify(session, node, "agreement", row.agreement, {"state": "agreed", "envelope": row.envelope})
    plans.send_all(session, row.study, nodes)
    return row


def _check(session: Session, given: Agreement, study: StudyRow) -> None:
    """The study as it stands, datasets of the owner's, an end that is yet to come, the terms of the cards."""
    now = int(utc_now().timestamp())
    check_issued(given.issued_at, now)
    if given.study_digest != study.digest:
        raise ConflictError(f"the agreement is about another version of the study {study.study}; make it anew")
    if session.get(Organisation, given.owner) is None:
        raise ConflictError(f"no organisation {given.owner}")
    if len(set(given.datasets)) != len(given.datasets):
        raise ApiError("an agreement names each dataset once")
    query = select(DatasetCardRow.name).where(
        col(DatasetCardRow.name).in_(given.datasets), DatasetCardRow.organisation == given.owner
    )
    known = set(session.exec(query))
    if missing := sorted(set(given.datasets) - known):
        raise ConflictError(f"{given.owner} has no dataset {', '.join(missing[:10])}; see: concord dataset list")
    if given.terms.not_after <= now:
        raise ApiError("terms.not_after is in the past; choose a later end")
    for name in given.datasets:
        card = document_of(session.get_one(DatasetCardRow, name).envelope, DatasetCard)
        if beyond := beyond_terms(card.terms, given):
            raise ConflictError(f"{name} is not for that, and its node would refuse: {'; '.join(beyond)}")


def _check_same(row: AgreementRow, given: Agreement) -> None:
    said = (given.agreement, given.study, given.requester, given.owner)
    if said != (row.agreement, row.study, row.requester, row.owner):
        raise ApiError(f"the document is another agreement than {row.agreement}; only terms and datasets may differ")


def _check_state(row: AgreementRow, *wanted: str) -> None:
    if row.state not in wanted:
        raise ConflictError(f"the agreement {row.agreement} is {row.state}; expected {' or '.join(wanted)}")


def _index(session: Session, given: Agreement) -> None:
    """Makes the datasets of the document in force findable."""
    session.execute(delete(AgreementDataset).where(col(AgreementDataset.agreement) == given.agreement))
    for name in given.datasets:
        node, _, dataset = name.partition("/")
        session.add(AgreementDataset(agreement=given.agreement, node=node, dataset=dataset))
    session.flush()


def _nodes(session: Session, row: AgreementRow) -> list[str]:
    query = (
        select(Node.name)
        .join(AgreementDataset, col(AgreementDataset.node) == col(Node.name))
        .where(AgreementDataset.agreement == row.agreement, Node.state != "revoked")
    )
    return sorted(set(session.exec(query)))


def _audit(session: Session, caller: Caller, verb: str, row: AgreementRow, given: Agreement) -> None:
    record(session, caller.actor, f"agreement:{verb}", row.agreement, study=row.study, digest=given.digest)
