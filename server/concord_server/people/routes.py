"""`/api/v1/people`, `/api/v1/tokens` and `/api/v1/me`."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from sqlmodel import Session, col, select

from concord_server.api.idempotency import Once
from concord_server.api.paging import Listing, Page, paged
from concord_server.api.security import Caller, Role, SignedIn, allow
from concord_server.api.state import CurrentDatabase
from concord_server.people import service
from concord_server.people.service import Grant, NewPerson, NewToken, PersonView, TokenMade, TokenView
from concord_server.people.tables import ApiToken, Person
from concord_shared.plan.section import Name

__all__ = ["router"]

router = APIRouter(prefix="/api/v1", tags=["people"])
Admin = Annotated[Caller, Depends(allow("federation-admin", "org-admin"))]


@router.get("/me")
def me(caller: SignedIn, database: CurrentDatabase) -> PersonView:
    """The person whose token this is."""
    with database.reading() as session:
        return service.view(session, service.find(session, caller.person))


@router.post("/people", status_code=201)
def create(body: NewPerson, caller: Admin, once: Once) -> PersonView:
    def work(session: Session) -> PersonView:
        return service.view(session, service.create(session, caller, body))

    return once(PersonView, work)


@router.get("/people")
def list_people(_: SignedIn, database: CurrentDatabase, page: Page) -> Listing[PersonView]:
    with database.reading() as session:
        return paged(session, select(Person), col(Person.name), page, lambda row: service.view(session, row))


@router.get("/people/{name}")
def show(name: Name, _: SignedIn, database: CurrentDatabase) -> PersonView:
    with database.reading() as session:
        return service.view(session, service.find(session, name))


@router.post("/people/{name}/roles")
def grant(name: Name, body: Grant, caller: Admin, database: CurrentDatabase) -> PersonView:
    """Grants a role; granting it again changes nothing."""
    with database.session() as session:
        person = service.find(session, name)
        service.add_grant(session, caller, person, body)
        return service.view(session, person)


@router.delete("/people/{name}/roles/{role}")
def withdraw(
    name: Name,
    role: Role,
    caller: Admin,
    database: CurrentDatabase,
    organisation: Annotated[Name | None, Query()] = None,
) -> PersonView:
    with database.session() as session:
        person = service.find(session, name)
        service.remove_grant(session, caller, person, Grant(role=role, organisation=organisation))
        return service.view(session, person)


@router.post("/tokens", status_code=201)
def create_token(body: NewToken, caller: SignedIn, once: Once) -> TokenMade:
    """Makes a token, for oneself or for a person that one administers. It is shown this once."""
    return once(TokenMade, lambda session: service.create_token(session, caller, body), secret=True)


@router.get("/tokens")
def list_tokens(caller: SignedIn, database: CurrentDatabase, page: Page) -> Listing[TokenView]:
    """One's own tokens; a federation-admin sees everyone's."""
    with database.reading() as session:
        names = {each.id: each.name for each in session.exec(select(Person))}
        query = select(ApiToken)
        if "federation-admin" not in caller.roles:
            query = query.where(ApiToken.person == service.find(session, caller.person).id)
        return paged(session, query, col(ApiToken.id), page, lambda row: service.token_view(row, names[row.person]))


@router.delete("/tokens/{token_id}")
def revoke_token(token_id: str, caller: SignedIn, database: CurrentDatabase) -> TokenView:
    """Revokes a token, at once."""
    with database.session() as session:
        return service.revoke_token(session, caller, token_id)
