"""`/metrics` for Prometheus: what was asked and how long it took, how many nodes and runs there are in which state,
what became of rounds and of nodes' replies, what the audit log notes.
"""

import threading
import time
from typing import Annotated, get_args

from fastapi import APIRouter, Depends, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sqlalchemy import func
from sqlmodel import Session, col, select
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from concord_server.api.security import bearer, signed_in
from concord_server.api.state import CurrentDatabase, CurrentState
from concord_server.audit.tables import AuditEvent
from concord_server.nodes.tables import Node
from concord_server.runs.states import RunWord
from concord_server.runs.tables import Round, Run
from concord_shared.documents import NodeState
from concord_shared.errors import NotAllowedError

__all__ = ["Measured", "Metrics", "may_read_metrics", "router"]

router = APIRouter(tags=["service"])
READERS = {"federation-admin", "auditor"}
OUTCOMES = {"counted": "survivors", "failed": "failures", "silent": "silent", "late": "late"}
"""Of a node that was asked, and where a round's record says so."""


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
        self.rounds = Counter(
            "concord_rounds", "Steps of runs: settled, or abandoned.", ("kind", "outcome"), registry=self.registry
        )
        self.replies = Counter(
            "concord_replies",
            "Nodes that were asked in a step: counted in its sum, failed (declined or refused), silent, late.",
            ("kind", "outcome"),
            registry=self.registry,
        )
        self.audited = Gauge(
            "concord_audit_events", "Lines of the audit log; refusals end in -refused.", ("action",),
            registry=self.registry,
        )  # fmt: skip
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()

    def count(self, session: Session) -> None:
        """Takes what the database knows."""
        states = ((self.nodes, col(Node.state), NodeState), (self.runs, col(Run.state), RunWord))
        for gauge, column, known in states:
            found = dict(session.exec(select(column, func.count()).group_by(column)).all())
            for state in get_args(known):
                gauge.labels(state).set(found.get(state, 0))
        for action, number in session.exec(select(AuditEvent.action, func.count()).group_by(AuditEvent.action)):
            self.audited.labels(action).set(number)
        with self._lock:
            self._count_rounds(session)

    def _count_rounds(self, session: Session) -> None:
        """Those that are new since the last time."""
        for run, last in session.exec(select(Round.run, func.max(Round.index)).group_by(Round.run)).all():
            seen = self._seen.get(run, -1)
            if last <= seen:
                continue
            fresh = (Round.run == run, Round.index > seen, Round.index <= last)
            for kind, record in session.exec(select(Round.kind, Round.record).where(*fresh)):
                self.rounds.labels(kind, "abandoned" if "aborted" in record else "settled").inc()
                for outcome, said in OUTCOMES.items():
                    self.replies.labels(kind, outcome).inc(len(record.get(said, ())))
            self._seen[run] = last


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
