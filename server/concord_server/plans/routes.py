"""`/api/v1/plans`."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from sqlmodel import Session, col, select

from concord_server.api.idempotency import Once
from concord_server.api.paging import Listing, Page, paged
from concord_server.api.security import Caller, SignedIn, allow
from concord_server.api.state import CurrentDatabase, CurrentHome
from concord_server.plans import service
from concord_server.plans.service import NewPlan, PlanDetail, PlanView
from concord_server.plans.tables import PlanRow
from concord_shared.documents import Digest, Id

__all__ = ["router"]

router = APIRouter(prefix="/api/v1/plans", tags=["plans"])


@router.post("", status_code=201)
def submit(
    body: NewPlan, caller: Annotated[Caller, Depends(allow("researcher", "org-admin"))], home: CurrentHome, once: Once
) -> PlanDetail:
    """Submits a plan to a study; the nodes whose data serve it are asked to decide."""

    def work(session: Session) -> PlanDetail:
        return service.detail(session, caller, service.submit(session, caller, body, home.settings))

    return once(PlanDetail, work)


@router.get("")
def list_all(
    caller: SignedIn, database: CurrentDatabase, page: Page, study: Annotated[Id | None, Query()] = None
) -> Listing[PlanView]:
    with database.reading() as session:
        query = select(PlanRow).where(service.in_studies(caller, study))
        return paged(session, query, col(PlanRow.digest), page, service.view)


@router.get("/{digest}")
def show(digest: Digest, caller: SignedIn, database: CurrentDatabase) -> PlanDetail:
    with database.reading() as session:
        return service.detail(session, caller, service.find(session, caller, digest))
