"""The control channel of nodes: `/api/trust`, `/api/enrol`, `/api/node/…` (see `concord_shared.protocol`)."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool

from concord_server.api.bodies import Enrolment, Renewal, Signed
from concord_server.api.security import CurrentNode, public
from concord_server.api.state import CurrentState, State
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.nodes import enrolment, ledger_heads, service
from concord_server.nodes.trust import trust_of
from concord_shared.documents import Leave
from concord_shared.errors import ApiError, ConcordError, DocumentRefusedError, UnavailableError
from concord_shared.protocol import WAIT_S_MAX, Certificate, EnrolResponse, LedgerWitness, Trust, Updates
from concord_shared.signing import open_envelope, read_public_text

__all__ = ["router"]

router = APIRouter(prefix="/api", tags=["node channel"])
SEQUENCE_MAX = (1 << 53) - 1


@router.get("/trust", dependencies=[Depends(public)])
def trust(state: CurrentState) -> Trust:
    """What a node verifies everything else with; it pins the root key's fingerprint."""
    return trust_of(state.home.settings, state.authority)


@router.post("/enrol", dependencies=[Depends(public)])
def enrol(body: Enrolment, request: Request, state: CurrentState) -> EnrolResponse:
    """Admits a node by its invitation's token, once."""
    try:
        with state.database.session() as session:
            return enrolment.enrol(session, body, state.authority, state.home.settings.certificate_days)
    except UnavailableError:
        raise
    except ConcordError as error:
        _audit_refused(state, request, body, error)
        raise


@router.get("/node/updates")
async def updates(
    node: CurrentNode,
    state: CurrentState,
    after: Annotated[int, Query(ge=0, le=SEQUENCE_MAX, description="The `cursor` of the answer before.")] = 0,
    wait_s: Annotated[float, Query(ge=0, le=WAIT_S_MAX, description="How long to wait for something new.")] = 0,
) -> Updates:
    """Answers at once where there is something new, where the node's state changes, and where the coordinator ends."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + wait_s
    while True:
        seen = state.outbox.mark
        found = await run_in_threadpool(service.updates, state.database, node.name, after)
        left = deadline - loop.time()
        if found.updates or found.state != node.state or left <= 0 or state.closing.is_set():
            return found
        await state.outbox.wait(seen, left)


@router.post("/node/renew")
def renew(body: Renewal, node: CurrentNode, state: CurrentState) -> Certificate:
    """A new certificate for the key of this request; the old one holds until the new one is used."""
    with state.database.session() as session:
        return enrolment.renew(session, node.name, body.request, state.authority, state.home.settings.certificate_days)


@router.post("/node/leave", status_code=204)
def leave(body: Signed, node: CurrentNode, state: CurrentState) -> None:
    """A node's own end; from now on it is revoked."""
    document = open_envelope(body, Leave, [read_public_text(node.identity_key)])
    if document.node != node.name:
        raise DocumentRefusedError(f"{node.name} cannot leave for {document.node}")
    enrolment.check_clock(document.issued_at, utc_now())
    with state.database.session() as session:
        service.revoke(session, node.actor, service.find(session, node.name), document.reason, state.authority)


@router.post("/node/ledger-head", status_code=204)
def note_ledger(body: Signed, node: CurrentNode, state: CurrentState) -> None:
    """Where a node's privacy ledger stands, by its own signed word: for itself, should it ever lose a part of it."""
    with state.database.session() as session:
        ledger_heads.take(session, node, body)


@router.get("/node/ledger-head")
def ledger_head(node: CurrentNode, state: CurrentState) -> LedgerWitness:
    """The furthest that the node said of its ledger."""
    with state.database.reading() as session:
        return LedgerWitness(head=ledger_heads.newest(session, node))


def _audit_refused(state: State, request: Request, body: Enrolment, error: ConcordError) -> None:
    address = request.client.host if request.client else "unknown"
    code = error.code if isinstance(error, ApiError) else "document-refused"
    with state.database.session() as session:
        record(session, f"address:{address}", "node:enrol-refused", "enrolment", code=code, reason=str(error)[:500])
