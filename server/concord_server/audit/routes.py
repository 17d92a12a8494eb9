"""`/api/v1/audit` for auditors, `/api/node/heads` for nodes."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi import Path as InPath
from pydantic import BaseModel
from sqlmodel import col, select

from concord_server.api.bodies import OwnHead, Signed
from concord_server.api.paging import Listing, Page, paged
from concord_server.api.security import Caller, CurrentNode, allow
from concord_server.api.state import CurrentDatabase, CurrentState
from concord_server.audit import heads, service
from concord_server.audit.heads import HeadView
from concord_server.audit.tables import AuditEvent
from concord_server.nodes.service import Reason, current_roster_envelope
from concord_shared.errors import ConflictError, NotAllowedError
from concord_shared.evidence.log import GENESIS
from concord_shared.plan.section import Name
from concord_shared.protocol import Heads
from concord_shared.signing import public_text

__all__ = ["router"]

router = APIRouter(prefix="/api")
Filter = Annotated[str | None, Query(max_length=300)]
SEQUENCE_MAX = (1 << 31) - 1
Since = Annotated[int, Query(ge=0, le=SEQUENCE_MAX, description="A size of the log that the caller remembers.")]
Sequence = Annotated[int, InPath(ge=1, le=SEQUENCE_MAX)]
ENTRIES_MAX = 1000


def auditor(caller: Annotated[Caller, Depends(allow("federation-admin", "auditor"))]) -> Caller:
    """Raises: NotAllowedError: not of the whole federation."""
    if not caller.may("", "auditor"):
        raise NotAllowedError("the audit log tells of all organisations: it needs the role auditor of the federation")
    return caller


Auditor = Annotated[Caller, Depends(auditor)]


class EventView(BaseModel):
    """actor: `person:NAME`, `node:NAME`, `address:IP` or `coordinator`; action: `subject:verb`."""

    id: int
    at: str
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]


class Entries(BaseModel):
    """items: body (canonical JSON, as it is hashed) and hash of each."""

    items: list[dict[str, str]]


class SignedHead(BaseModel):
    """head: signed by `key`, which the roster (signed by the membership key) names as the coordinator's.

    proof: that the log begins with the `since` entries that were asked for.
    """

    head: Signed
    key: str
    proof: list[str]
    roster: Signed
    root_certificate: str
    membership_certificate: str


class EntryProof(BaseModel):
    """before: the hash of the entry before; proof: of inclusion under `head`."""

    body: str
    before: str
    proof: list[str]
    head: Signed
    key: str


@router.get("/v1/audit", tags=["audit"])
def list_events(
    _: Auditor,
    database: CurrentDatabase,
    page: Page,
    actor: Filter = None,
    action: Filter = None,
    subject: Filter = None,
) -> Listing[EventView]:
    """What happened, newest first. For those who audit the whole federation."""
    query = select(AuditEvent)
    for column, wanted in ((AuditEvent.actor, actor), (AuditEvent.action, action), (AuditEvent.subject, subject)):
        if wanted is not None:
            query = query.where(col(column) == wanted)
    with database.reading() as session:
        return paged(session, query, col(AuditEvent.id), page, _view, newest_first=True)


def _view(row: AuditEvent) -> EventView:
    return EventView(
        id=row.id,
        at=row.at.isoformat(),
        actor=row.actor,
        action=row.action,
        subject=row.subject,
        detail=row.detail,
    )


@router.get("/v1/audit/head", tags=["audit"])
def show_head(_: Auditor, state: CurrentState, since: Since = 0) -> SignedHead:
    """The log's head, signed now, and how its signer is known."""
    with state.database.reading() as session:
        found, envelope = service.signed_head(session, state.home.settings.federation, state.signer)
        return SignedHead(
            head=envelope,
            key=public_text(state.signer.public_key()),
            proof=list(service.grown_since(session, since, found.size)),
            roster=current_roster_envelope(session),
            root_certificate=state.authority.root_pem,
            membership_certificate=state.authority.membership_pem,
        )


@router.get("/v1/audit/entries", tags=["audit"])
def list_entries(
    _: Auditor,
    database: CurrentDatabase,
    first: Annotated[int, Query(ge=1, le=SEQUENCE_MAX)] = 1,
    limit: Annotated[int, Query(ge=1, le=ENTRIES_MAX)] = ENTRIES_MAX,
) -> Entries:
    """Entries as they are hashed, oldest first."""
    with database.reading() as session:
        return Entries(
            items=[
                {"body": service.entry_of(row).canonical.decode(), "hash": row.hash}
                for row in service.entries(session, first, limit)
            ]
        )


@router.get("/v1/audit/entries/{sequence}/proof", tags=["audit"])
def prove(sequence: Sequence, _: Auditor, state: CurrentState) -> EntryProof:
    """One entry, and the proof that it is in the log."""
    with state.database.reading() as session:
        found, envelope = service.signed_head(session, state.home.settings.federation, state.signer)
        proof = service.proof_of(session, sequence, found.size)
        rows = {row.id: row for row in service.entries(session, max(1, sequence - 1), 2)}
        return EntryProof(
            body=service.entry_of(rows[sequence]).canonical.decode(),
            before=rows[sequence - 1].hash if sequence > 1 else GENESIS.hex(),
            proof=list(proof),
            head=envelope,
            key=public_text(state.signer.public_key()),
        )


@router.get("/v1/audit/heads", tags=["audit"])
def list_heads(_: Auditor, database: CurrentDatabase) -> Listing[HeadView]:
    """What is remembered of each node's own log; an alarm where one was rewritten."""
    with database.reading() as session:
        return Listing(items=heads.views(session), next=None)


@router.post("/v1/audit/heads/{node}/accept", tags=["audit"])
def accept(
    node: Name, body: Reason, caller: Annotated[Caller, Depends(allow("federation-admin"))], database: CurrentDatabase
) -> HeadView:
    """Ends the alarm about a node's log, after a person has looked: it goes on from what the node has now."""
    with database.session() as session:
        return heads.accept(session, caller, node, body.reason)


@router.get("/node/heads", tags=["node channel"])
def tell_heads(node: CurrentNode, state: CurrentState, since: Since = 0) -> Heads:
    """The coordinator's head, with the proof that it follows from the one that the node remembers."""
    with state.database.reading() as session:
        found, envelope = service.signed_head(session, state.home.settings.federation, state.signer)
        return Heads(
            head=envelope,
            proof=service.grown_since(session, since, found.size),
            remembered=heads.remembered(session, node),
        )


@router.post("/node/heads", status_code=204, tags=["node channel"])
def take_head(body: OwnHead, node: CurrentNode, state: CurrentState) -> None:
    """Takes the head of the node's own log, with the proof that it follows from the one before."""
    with state.database.session() as session:
        alarm = heads.take(session, node, body, state.home.settings.federation)
    if alarm:
        error = ConflictError(f"{alarm}; the coordinator's people were told")
        error.code = "log-forked"
        raise error
