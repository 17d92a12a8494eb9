"""`/api/v1/studies/{study}/preflights` for people, `/api/node/preflights` for nodes."""

from typing import Annotated

from fastapi import APIRouter, Depends
from sqlmodel import col, select

from concord_server.api.bodies import Signed
from concord_server.api.idempotency import Once
from concord_server.api.paging import Listing, Page, paged
from concord_server.api.security import Caller, CurrentNode, SignedIn, allow
from concord_server.api.state import CurrentDatabase
from concord_server.preflights import service
from concord_server.preflights.service import PreflightDetail, PreflightView
from concord_server.preflights.tables import PreflightRow
from concord_server.studies import service as studies
from concord_server.studies.reach import in_reach
from concord_shared.documents import Id

__all__ = ["router"]

router = APIRouter(prefix="/api")
Researcher = Annotated[Caller, Depends(allow("researcher", "org-admin"))]


@router.post("/v1/studies/{study}/preflights", status_code=201, tags=["studies"])
def request(study: Id, body: Signed, caller: Researcher, once: Once) -> PreflightDetail:
    """Takes a PreflightRequest, signed by a member of the study; each node that it names is asked."""
    return once(
        PreflightDetail,
        lambda session: service.detail(session, caller, service.request(session, caller, study, body)),
    )


@router.get("/v1/studies/{study}/preflights", tags=["studies"])
def list_all(study: Id, caller: SignedIn, database: CurrentDatabase, page: Page) -> Listing[PreflightView]:
    """Preflights of a study, by id."""
    query = select(PreflightRow).where(PreflightRow.study == study, in_reach(caller, PreflightRow.study, agreed=True))
    with database.reading() as session:
        studies.find(session, caller, study)
        return paged(session, query, col(PreflightRow.preflight), page, service.view)


@router.get("/v1/studies/{study}/preflights/{preflight}", tags=["studies"])
def show(study: Id, preflight: Id, caller: SignedIn, database: CurrentDatabase) -> PreflightDetail:
    """What the nodes have answered so far: a check each, ok, no or unknown."""
    with database.reading() as session:
        return service.detail(session, caller, service.find(session, caller, study, preflight))


@router.post("/node/preflights", status_code=204, tags=["node channel"])
def answer(body: Signed, node: CurrentNode, database: CurrentDatabase) -> None:
    """Takes a PreflightReport, signed by the node's identity key. The same one again changes nothing."""
    with database.session() as session:
        service.take_report(session, node, body)
