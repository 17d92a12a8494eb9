"""`/api/v1/studies` and `/api/v1/agreements`. Whatever changes something is a signed document."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from sqlmodel import col, select

from concord_server.api.bodies import Signed
from concord_server.api.idempotency import Once
from concord_server.api.paging import Listing, Page, paged
from concord_server.api.security import Caller, SignedIn, allow
from concord_server.api.state import CurrentDatabase
from concord_server.studies import agreements, service
from concord_server.studies.agreements import AgreementView
from concord_server.studies.reach import in_reach
from concord_server.studies.service import Participants, StudyDetail, StudyView
from concord_server.studies.tables import AgreementRow, StudyRow
from concord_shared.documents import Id

__all__ = ["router"]

router = APIRouter(prefix="/api/v1")
Researcher = Annotated[Caller, Depends(allow("researcher", "org-admin"))]
Steward = Annotated[Caller, Depends(allow("data-steward", "org-admin"))]


@router.post("/studies", status_code=201, tags=["studies"])
def create(body: Signed, caller: Researcher, once: Once) -> StudyDetail:
    """Takes a Study, signed by its organisation."""
    return once(StudyDetail, lambda session: service.detail(session, service.create(session, caller, body)))


@router.get("/studies", tags=["studies"])
def list_all(caller: SignedIn, database: CurrentDatabase, page: Page) -> Listing[StudyView]:
    """Studies of the caller's organisations, and those that asked for their datasets."""
    with database.reading() as session:
        query = select(StudyRow).where(in_reach(caller, StudyRow.study))
        return paged(session, query, col(StudyRow.study), page, service.view)


@router.get("/studies/{study}", tags=["studies"])
def show(study: Id, caller: SignedIn, database: CurrentDatabase) -> StudyDetail:
    with database.reading() as session:
        return service.detail(session, service.find(session, caller, study))


@router.get("/studies/{study}/participants", tags=["studies"])
def participants(study: Id, caller: SignedIn, database: CurrentDatabase) -> Participants:
    """What the manifest of a run is made from: agreed datasets in their current versions, and the roster's version."""
    with database.reading() as session:
        return service.participants(session, caller, service.find(session, caller, study).study)


@router.post("/agreements", status_code=201, tags=["agreements"])
def request(body: Signed, caller: Researcher, once: Once) -> AgreementView:
    """Takes an Agreement, signed by the requester."""
    return once(AgreementView, lambda session: agreements.view(agreements.request(session, caller, body)))


@router.get("/agreements", tags=["agreements"])
def list_agreements(
    caller: SignedIn,
    database: CurrentDatabase,
    page: Page,
    study: Annotated[Id | None, Query()] = None,
    state: Annotated[Literal["requested", "offered", "agreed", "withdrawn"] | None, Query()] = None,
) -> Listing[AgreementView]:
    """Agreements to which one of the caller's organisations is a party."""
    query = select(AgreementRow).where(agreements.party(caller))
    if study is not None:
        query = query.where(AgreementRow.study == study)
    if state is not None:
        query = query.where(AgreementRow.state == state)
    with database.reading() as session:
        return paged(session, query, col(AgreementRow.agreement), page, agreements.view)


@router.get("/agreements/{agreement}", tags=["agreements"])
def show_agreement(agreement: Id, caller: SignedIn, database: CurrentDatabase) -> AgreementView:
    with database.reading() as session:
        return agreements.view(agreements.find(session, caller, agreement))


@router.post("/agreements/{agreement}/offer", tags=["agreements"])
def offer(agreement: Id, body: Signed, caller: Steward, database: CurrentDatabase) -> AgreementView:
    """Takes the Agreement with the owner's terms, signed by the owner; the bytes of the request agree at once."""
    with database.session() as session:
        return agreements.view(agreements.offer(session, caller, agreement, body))


@router.post("/agreements/{agreement}/agree", tags=["agreements"])
def agree(agreement: Id, body: Signed, caller: Researcher, database: CurrentDatabase) -> AgreementView:
    """Takes the offered Agreement, signed by the requester."""
    with database.session() as session:
        return agreements.view(agreements.agree(session, caller, agreement, body))


@router.post("/agreements/{agreement}/withdraw", tags=["agreements"])
def withdraw(agreement: Id, body: Signed, caller: Steward, database: CurrentDatabase) -> AgreementView:
    """Takes a Withdrawal, signed by the owner. Runs that live by the agreement stop."""
    with database.session() as session:
        return agreements.view(agreements.withdraw(session, caller, agreement, body))
