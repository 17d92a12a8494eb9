"""Studies: a purpose, and the organisations that pursue it. Who may see one is said in `reach`."""

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import BaseModel
from sqlmodel import Session, col, select

from concord_server.api.bodies import Signed
from concord_server.api.security import Caller
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.datasets.tables import DatasetCardRow
from concord_server.nodes.service import current_roster
from concord_server.nodes.tables import Node
from concord_server.organisations.tables import Organisation
from concord_server.studies.envelopes import check_issued, document_of, envelope_of, keep, open_signed
from concord_server.studies.reach import in_reach
from concord_server.studies.tables import AgreementDataset, AgreementRow, StudyMember, StudyRow
from concord_shared.documents import Agreement, Study
from concord_shared.errors import ConflictError, NotAllowedError, NotFoundError
from concord_shared.signing import Envelope

__all__ = [
    "AgreedDataset",
    "Participants",
    "StudyDetail",
    "StudyView",
    "agreed_datasets",
    "agreed_nodes",
    "agreements_over",
    "check_member",
    "create",
    "detail",
    "find",
    "member_nodes",
    "members",
    "participants",
    "view",
]


class StudyView(BaseModel):
    study: str
    title: str
    organisation: str
    digest: str
    created_at: str


class StudyDetail(StudyView):
    """members: with the study's own organisation. document: as that organisation signed it."""

    purpose: str
    members: list[str]
    document: Signed


class Candidate(BaseModel):
    """An agreed dataset that a run may name now; the numbers are those of the agreement."""

    name: str
    node: str
    organisation: str
    dataset: str
    dataset_version: str
    state: str
    agreement: str
    minimum_cohort: int
    rounds_max: int
    not_after: int


class Participants(BaseModel):
    """What the manifest of a run is made from."""

    roster_version: int
    items: list[Candidate]


@dataclass(frozen=True)
class AgreedDataset:
    """A dataset that serves a study, as its card stands now; terms: of the agreement that lasts longest."""

    card: DatasetCardRow
    node: Node
    agreement: Agreement


def create(session: Session, caller: Caller, envelope: Envelope) -> StudyRow:
    """Stores a study, after these checks: its organisation signed it, the caller may speak for that, its members
    exist. The same study again changes nothing.
    """
    given = Study.from_canonical(envelope.bytes)
    caller.check(given.organisation, "researcher", "org-admin")
    open_signed(session, envelope, Study, given.organisation)
    check_issued(given.issued_at, int(utc_now().timestamp()))
    before = session.get(StudyRow, given.study)
    if before is not None:
        if before.digest == given.digest:
            return before
        raise ConflictError(f"the id {given.study} is taken; choose another one")
    everyone = sorted({given.organisation, *given.members})
    _check_organisations(session, everyone)
    row = StudyRow(
        study=given.study,
        organisation=given.organisation,
        title=given.title,
        digest=given.digest,
        envelope=keep(envelope),
    )
    session.add(row)
    session.flush()
    session.add_all(StudyMember(study=given.study, organisation=name) for name in everyone)
    record(session, caller.actor, "study:create", given.study, digest=given.digest, members=everyone)
    return row


def find(session: Session, caller: Caller, study: str) -> StudyRow:
    """Raises: NotFoundError: there is none, or none that the caller may know of."""
    row = session.exec(select(StudyRow).where(StudyRow.study == study, in_reach(caller, StudyRow.study))).first()
    if row is None:
        raise NotFoundError(f"no study {study[:80]!r}; list them with: concord study list")
    return row


def view(row: StudyRow) -> StudyView:
    return StudyView(
        study=row.study,
        title=row.title,
        organisation=row.organisation,
        digest=row.digest,
        created_at=row.created_at.isoformat(),
    )


def detail(session: Session, row: StudyRow) -> StudyDetail:
    return StudyDetail(
        **view(row).model_dump(),
        purpose=document_of(row.envelope, Study).purpose,
        members=members(session, row.study),
        document=envelope_of(row.envelope),
    )


def participants(session: Session, caller: Caller, study: str) -> Participants:
    """The datasets that serve a study now, in name order; none for an owner whose own do not."""
    told = select(StudyRow.study).where(StudyRow.study == study, in_reach(caller, StudyRow.study, agreed=True))
    known = session.exec(told).first() is not None
    agreed = agreed_datasets(session, study, int(utc_now().timestamp())) if known else {}
    return Participants(
        roster_version=current_roster(session).version,
        items=[
            Candidate(
                name=name,
                node=each.node.name,
                organisation=each.card.organisation,
                dataset=each.card.dataset,
                dataset_version=each.card.version,
                state=each.node.state,
                agreement=each.agreement.agreement,
                minimum_cohort=each.agreement.terms.minimum_cohort,
                rounds_max=each.agreement.terms.rounds_max,
                not_after=each.agreement.terms.not_after,
            )
            for name, each in agreed.items()
        ],
    )


def members(session: Session, study: str) -> list[str]:
    """The organisations that may start runs in it."""
    query = select(StudyMember.organisation).where(StudyMember.study == study)
    return list(session.exec(query.order_by(col(StudyMember.organisation))))


def check_member(session: Session, study: str, organisation: str) -> None:
    """Raises: NotAllowedError."""
    if session.get(StudyMember, (study, organisation)) is None:
        raise NotAllowedError(f"{organisation} is not a member of the study {study}")


def agreed_datasets(session: Session, study: str, now: int) -> dict[str, AgreedDataset]:
    """By `node/dataset`, in name order: what serves the study now."""
    query = (
        select(AgreementRow, DatasetCardRow, Node)
        .join(AgreementDataset, col(AgreementDataset.agreement) == col(AgreementRow.agreement))
        .join(
            DatasetCardRow,
            (col(DatasetCardRow.node) == col(AgreementDataset.node))
            & (col(DatasetCardRow.dataset) == col(AgreementDataset.dataset)),
        )
        .join(Node, col(Node.name) == col(AgreementDataset.node))
        .where(AgreementRow.study == study, AgreementRow.state == "agreed")
    )
    found: dict[str, AgreedDataset] = {}
    for row, card, node in session.exec(query):
        agreement = document_of(row.envelope, Agreement)
        before = found.get(card.name)
        longest = before is None or before.agreement.terms.not_after < agreement.terms.not_after
        if agreement.terms.not_after > now and longest:
            found[card.name] = AgreedDataset(card, node, agreement)
    return dict(sorted(found.items()))


def agreements_over(session: Session, study: str, dataset: str) -> list[Agreement]:
    """Those that opened a `node/dataset` to the study, in force or over."""
    node, _, name = dataset.partition("/")
    query = (
        select(AgreementRow)
        .join(AgreementDataset, col(AgreementDataset.agreement) == col(AgreementRow.agreement))
        .where(AgreementRow.study == study, col(AgreementRow.state).in_(("agreed", "withdrawn")))
        .where(AgreementDataset.node == node, AgreementDataset.dataset == name)
    )
    return [document_of(row.envelope, Agreement) for row in session.exec(query)]


def agreed_nodes(session: Session, study: str) -> list[str]:
    """Nodes with a dataset that serves the study; revoked ones are told nothing."""
    query = (
        select(AgreementDataset.node)
        .join(AgreementRow, col(AgreementRow.agreement) == col(AgreementDataset.agreement))
        .where(AgreementRow.study == study, AgreementRow.state == "agreed")
    )
    return _told(session, session.exec(query))


def member_nodes(session: Session, study: str) -> list[str]:
    """All nodes of the study's members."""
    query = select(Node.name).join(StudyMember, col(StudyMember.organisation) == col(Node.organisation))
    return _told(session, session.exec(query.where(StudyMember.study == study)))


def _told(session: Session, names: Iterable[str]) -> list[str]:
    wanted = sorted(set(names))
    query = select(Node.name).where(col(Node.name).in_(wanted), Node.state != "revoked")
    return list(session.exec(query.order_by(col(Node.name))))


def _check_organisations(session: Session, names: list[str]) -> None:
    known = set(session.exec(select(Organisation.name).where(col(Organisation.name).in_(names))))
    if missing := sorted(set(names) - known):
        raise ConflictError(f"no such organisation: {', '.join(missing[:10])}; members are organisations' names")
