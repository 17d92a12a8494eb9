"""`/api/v1/invitations`, `/api/v1/nodes`, `/api/v1/roster` for people; the nodes' own channel is in `channel.py`."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from sqlmodel import Session, col, select

from concord_server.api.idempotency import Once
from concord_server.api.paging import Listing, Page, paged
from concord_server.api.security import Caller, SignedIn, allow
from concord_server.api.state import CurrentDatabase, CurrentState
from concord_server.nodes import channel, enrolment, service
from concord_server.nodes.enrolment import InvitationMade, InvitationView, NewInvitation
from concord_server.nodes.service import Activation, NodeView, Reason
from concord_server.nodes.tables import Invitation, Node
from concord_shared.plan.section import Name
from concord_shared.signing import Envelope

__all__ = ["router"]

people = APIRouter(prefix="/api/v1", tags=["nodes"])
Admin = Annotated[Caller, Depends(allow("federation-admin", "org-admin"))]


@people.post("/invitations", status_code=201)
def invite(body: NewInvitation, caller: Admin, state: CurrentState, once: Once) -> InvitationMade:
    """Invites a node. The line admits it once; it is shown this once."""
    host, port = state.home.settings.control_address

    def work(session: Session) -> InvitationMade:
        return enrolment.invite(session, caller, body, state.authority, host, port)

    return once(InvitationMade, work, secret=True)


@people.get("/invitations")
def list_invitations(caller: Admin, database: CurrentDatabase, page: Page) -> Listing[InvitationView]:
    """Invitations of the organisations that one administers."""
    query = select(Invitation)
    if "federation-admin" not in caller.roles:
        mine = [place for role, place in caller.grants if role == "org-admin"]
        query = query.where(col(Invitation.organisation).in_(mine))
    with database.reading() as session:
        return paged(session, query, col(Invitation.id), page, enrolment.invitation_view)


@people.delete("/invitations/{invitation_id}")
def withdraw(invitation_id: str, caller: Admin, database: CurrentDatabase) -> InvitationView:
    """Withdraws an invitation that was not used."""
    with database.session() as session:
        return enrolment.withdraw(session, caller, invitation_id)


@people.get("/nodes")
def list_nodes(
    _: SignedIn,
    database: CurrentDatabase,
    page: Page,
    organisation: Annotated[Name | None, Query()] = None,
    state: Annotated[Literal["enrolled", "active", "suspended", "revoked"] | None, Query()] = None,
) -> Listing[NodeView]:
    query = select(Node)
    if organisation is not None:
        query = query.where(Node.organisation == organisation)
    if state is not None:
        query = query.where(Node.state == state)
    with database.reading() as session:
        return paged(session, query, col(Node.name), page, service.view)


@people.get("/nodes/{name}")
def show(name: Name, _: SignedIn, database: CurrentDatabase) -> NodeView:
    with database.reading() as session:
        return service.view(service.find(session, name))


@people.post("/nodes/{name}/activate")
def activate(name: Name, body: Activation, caller: Admin, state: CurrentState) -> NodeView:
    """Admits a node, after a person compared its fingerprint with what its owner sees."""
    with state.database.session() as session:
        return service.view(service.activate(session, caller, name, body, state.authority))


@people.post("/nodes/{name}/suspend")
def suspend(name: Name, body: Reason, caller: Admin, state: CurrentState) -> NodeView:
    """Takes a node out of all work, until it is activated again."""
    with state.database.session() as session:
        return service.view(service.suspend(session, caller, name, body.reason, state.authority))


@people.post("/nodes/{name}/revoke")
def revoke(name: Name, body: Reason, caller: Admin, state: CurrentState) -> NodeView:
    """Ends a node's membership, at once and for good."""
    with state.database.session() as session:
        node = service.manageable(session, caller, name)
        return service.view(service.revoke(session, caller.actor, node, body.reason, state.authority))


@people.get("/roster")
def roster(_: SignedIn, database: CurrentDatabase) -> Envelope:
    """The latest roster, signed by the membership key."""
    with database.reading() as session:
        return service.current_roster_envelope(session)


router = APIRouter()
router.include_router(people)
router.include_router(channel.router)
