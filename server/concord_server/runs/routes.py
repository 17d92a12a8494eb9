"""`/api/v1/runs` for people, `/api/node/approvals` for nodes."""

import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field
from sqlmodel import col, select
from starlette.background import BackgroundTask

from concord_server.api.bodies import Signed
from concord_server.api.idempotency import Once
from concord_server.api.paging import Listing, Page, paged
from concord_server.api.security import Caller, CurrentNode, SignedIn, allow
from concord_server.api.state import CurrentDatabase, CurrentHome, CurrentState
from concord_server.runs import capsule, logs, receipts, service, watching
from concord_server.runs.service import NewRun, RunDetail, RunReport
from concord_server.runs.tables import Run
from concord_server.studies.reach import in_reach
from concord_shared.documents import Id
from concord_shared.plan.section import Name
from concord_shared.protocol import Receipts

__all__ = ["router"]

router = APIRouter(prefix="/api")
Researcher = Annotated[Caller, Depends(allow("researcher", "org-admin"))]
INDEX_MAX = (1 << 31) - 1


class Lift(BaseModel, extra="forbid"):
    """reason: kept in the audit log."""

    reason: str = Field("", max_length=300)


class Log(BaseModel):
    items: list[dict[str, Any]]


@router.post("/v1/runs", status_code=201, tags=["runs"])
def start(body: NewRun, caller: Researcher, once: Once, home: CurrentHome) -> RunDetail:
    """Starts a run. It waits for the nodes' approvals, then for a worker."""
    return once(
        RunDetail,
        lambda session: service.detail(
            session, service.start(session, caller, body.manifest, home.settings, body.priority)
        ),
    )


@router.get("/v1/runs", tags=["runs"])
def list_all(
    caller: SignedIn,
    database: CurrentDatabase,
    page: Page,
    study: Annotated[Id | None, Query()] = None,
    state: Annotated[Literal["waiting", "queued", "running", "succeeded", "failed", "stopped"] | None, Query()] = None,
) -> Listing[RunReport]:
    """Runs of the caller's studies, the newest first."""
    query = select(Run).where(in_reach(caller, Run.study, agreed=True))
    if study is not None:
        query = query.where(Run.study == study)
    if state is not None:
        query = query.where(Run.state == state)
    with database.reading() as session:
        return paged(session, query, col(Run.sequence), page, lambda run: service.view(session, run), newest_first=True)


@router.get("/v1/runs/{run}", tags=["runs"])
def show(run: Id, caller: SignedIn, database: CurrentDatabase) -> RunDetail:
    with database.reading() as session:
        return service.detail(session, service.find(session, caller, run))


@router.get("/v1/runs/{run}/statistics", tags=["runs"])
def show_statistics(run: Id, caller: SignedIn, database: CurrentDatabase) -> service.Statistics:
    """What a run of a plan of kind statistics found, of all nodes' rows together."""
    with database.reading() as session:
        return service.statistics_of(session, service.find(session, caller, run))


@router.post("/v1/runs/{run}/stop", tags=["runs"])
def stop(run: Id, caller: Researcher, database: CurrentDatabase) -> RunDetail:
    """Asks a run to stop; one that has begun does so within a round trip, and keeps its last model."""
    with database.session() as session:
        return service.detail(session, service.stop(session, caller, run))


@router.get("/v1/runs/{run}/capsule", response_class=FileResponse, tags=["runs"])
def export(run: Id, caller: SignedIn, state: CurrentState) -> FileResponse:
    """All evidence of a run that ended, in one signed file; to verify it needs the root's fingerprint and no more."""
    path = state.home.runs / f".{run}.{secrets.token_hex(4)}.capsule"
    with state.database.reading() as session:
        found = service.find(session, caller, run)
        capsule.check_export(session, caller, found)
        capsule.export(session, state.home.path, found, state.authority, state.signer, path)
    cleaning = BackgroundTask(path.unlink, missing_ok=True)
    return FileResponse(path, media_type="application/zip", filename=f"{run}.capsule", background=cleaning)


@router.post("/v1/runs/{run}/quarantine/{node}/lift", tags=["runs"])
def lift(run: Id, node: Name, body: Lift, caller: Researcher, database: CurrentDatabase) -> RunDetail:
    """Has a robust run ask a node again that it left out, to its end, whatever the node sends."""
    with database.session() as session:
        row = service.find(session, caller, run)
        service.lift(session, caller, row, node, body.reason)
        return service.detail(session, row)


@router.get("/v1/runs/{run}/logs", tags=["runs"])
def show_log(
    run: Id,
    caller: SignedIn,
    database: CurrentDatabase,
    home: CurrentHome,
    limit: Annotated[int, Query(ge=1, le=5000)] = 200,
) -> Log:
    """The last lines that workers wrote of a run, oldest first."""
    with database.reading() as session:
        service.find(session, caller, run)
    return Log(items=logs.tail(home.runs, run, limit))


def watched(run: Id, caller: SignedIn, database: CurrentDatabase) -> str:
    """The run, before the stream begins: afterwards nothing can be refused any more."""
    with database.reading() as session:
        return service.find(session, caller, run).id


@router.get("/v1/runs/{run}/events", response_class=EventSourceResponse, tags=["runs"])
async def watch(
    run: Annotated[str, Depends(watched)],
    state: CurrentState,
    after: Annotated[int | None, Query(ge=0, le=INDEX_MAX, description="As Last-Event-ID, which it overrides.")] = None,
    last_event_id: Annotated[int | None, Header(ge=0, le=INDEX_MAX)] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: `state`, `round` (its id is to be sent back as Last-Event-ID), `end`."""
    seen = last_event_id if after is None else after
    async for event in watching.follow(state, run, -1 if seen is None else seen):
        yield event


@router.get("/node/receipts", tags=["node channel"])
def tell_receipts(
    node: CurrentNode,
    database: CurrentDatabase,
    after: Annotated[int, Query(ge=0, le=INDEX_MAX, description="The `cursor` of the answer before.")] = 0,
) -> Receipts:
    """Receipts for the node's own Updates that were taken, oldest first."""
    with database.reading() as session:
        return receipts.of_node(session, node.name, after)


@router.post("/node/approvals", status_code=204, tags=["node channel"])
def approve(body: Signed, node: CurrentNode, database: CurrentDatabase) -> None:
    """Takes an Approval, signed by the node's identity key. The same one again changes nothing."""
    with database.session() as session:
        service.take_approval(session, node, body)
