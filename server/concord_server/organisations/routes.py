"""`/api/v1/organisations`."""

from typing import Annotated

from fastapi import APIRouter, Depends
from sqlmodel import Session, col, select

from concord_server.api.idempotency import Once
from concord_server.api.paging import Listing, Page, paged
from concord_server.api.security import Caller, SignedIn, allow
from concord_server.api.state import CurrentDatabase, CurrentState
from concord_server.nodes.service import publish_roster
from concord_server.organisations import service
from concord_server.organisations.service import NewKey, NewOrganisation, OrganisationView
from concord_server.organisations.tables import Organisation
from concord_shared.plan.section import Name

__all__ = ["router"]

router = APIRouter(prefix="/api/v1/organisations", tags=["organisations"])


@router.post("", status_code=201)
def create(
    body: NewOrganisation,
    caller: Annotated[Caller, Depends(allow("federation-admin"))],
    state: CurrentState,
    once: Once,
) -> OrganisationView:
    def work(session: Session) -> OrganisationView:
        row = service.create(session, caller.actor, body)
        publish_roster(session, state.authority)
        return service.view(row)

    return once(OrganisationView, work)


@router.get("")
def list_all(_: SignedIn, database: CurrentDatabase, page: Page) -> Listing[OrganisationView]:
    with database.reading() as session:
        return paged(session, select(Organisation), col(Organisation.name), page, service.view)


@router.get("/{name}")
def show(name: Name, _: SignedIn, database: CurrentDatabase) -> OrganisationView:
    with database.reading() as session:
        return service.view(service.find(session, name))


@router.put("/{name}/key")
def register_key(
    name: Name, body: NewKey, caller: Annotated[Caller, Depends(allow("org-admin"))], state: CurrentState
) -> OrganisationView:
    """Registers the key that the organisation signs with; its fingerprint is for both sides to compare."""
    with state.database.session() as session:
        row = service.register_key(session, caller, name, body)
        publish_roster(session, state.authority)
        return service.view(row)
