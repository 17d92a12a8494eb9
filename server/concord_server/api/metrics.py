"""`/metrics` for Prometheus: what was asked and how long it took, how many nodes and runs there are in which state."""

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy import func
from sqlmodel import Session, col, select
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from concord_server.api.security import bearer, signed_in
from concord_server.api.state import CurrentDatabase, CurrentState
from concord_server.nodes.tables import Node
from concord_server.runs.tables import Run
from concord_shared.errors import NotAllowedError

__all__ = ["Measured", "Metrics", "may_read_metrics", "router"]

router = APIRouter(tags=["service"])
READERS = {"federation-admin", "auditor"}


class Metrics:
    """One registry an application, so that two in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route")
        self.requests = Counter(
            "concord_requests", "Requests that were answered.", (*labels, "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "concord_request_seconds", "Until the answer began; long polls wait on purpose.", labels,
            registry=self.registry,
        )  # fmt: skip
        self.nodes = Gauge("concord_nodes", "Nodes by state.", ("state",), registry=self.registry)
        self.runs = Gauge("concord_runs", "Runs by state.", ("state",), registry=self.registry)

    def count(self, session: Session) -> None:
        """Takes what the database knows."""
        for gauge, column in ((self.nodes, col(Node.state)), (self.runs, col(Run.state))):
            gauge.clear()
            for state, number in session.exec(select(column, func.count()).group_by(column)):
                gauge.labels(state).set(number)


class Measured:
    """Counts and times every request by its route, never by its path: a path can hold anything."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._note(scope, message["status"], time.perf_counter() - began)
            await send(message)

        await self._app(scope, receive, sending)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if route != "none" else "any"
        self._metrics.requests.labels(method, route, status).inc()
        self._metrics.seconds.labels(method, route).observe(seconds)


def may_read_metrics(
    request: Request, state: CurrentState, database: CurrentDatabase, _: Annotated[object, Depends(bearer)] = None
) -> None:
    """A policy: anyone where the settings say so, otherwise a federation-admin or an auditor."""
    if not state.home.settings.metrics and not signed_in(request, database).roles & READERS:
        raise NotAllowedError("this needs one of the roles federation-admin, auditor; ask an admin")


@router.get(
    "/metrics",
    dependencies=[Depends(may_read_metrics)],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(request: Request, database: CurrentDatabase) -> Response:
    """In Prometheus' text format."""
    found: Metrics = request.app.state.metrics
    with database.reading() as session:
        found.count(session)
    return Response(generate_latest(found.registry), media_type=CONTENT_TYPE_LATEST)
