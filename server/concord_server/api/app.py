"""The control plane as one ASGI application. Its routes are the nouns' own; here is what they share."""

import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from sqlalchemy import text
from starlette.responses import JSONResponse, Response

from concord_server.api import metrics
from concord_server.api.guard import Guard, Limits
from concord_server.api.problems import PROBLEMS, handle_problems
from concord_server.api.security import public
from concord_server.api.state import CurrentDatabase, State
from concord_server.settings import Home
from concord_shared import __version__
from concord_shared.protocol import Problem

__all__ = ["create_app"]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


NOUNS = ("organisations", "people", "nodes", "datasets", "studies", "plans", "preflights", "runs", "models", "audit")
DESCRIPTION = (
    "People use `/api/v1` with a bearer token; nodes use `/api/node` with their certificate. "
    "Errors are problem+json; lists are pages; creations take an `Idempotency-Key`."
)


def create_app(home: Home) -> FastAPI:
    """The application over a coordinator's directory, whose database is there and of this schema.

    Raises:
        ArtefactError, DocumentRefusedError: keys or certificates are missing, damaged or out of date.
    """
    settings = home.settings
    app = FastAPI(
        title="concord",
        version=__version__,
        description=DESCRIPTION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        responses=PROBLEMS,
        strict_content_type=False,  # bodies are JSON, whatever a caller calls them; no browser calls with cookies
        lifespan=_lifespan,
    )
    app.state.concord = State(home)
    handle_problems(app)
    app.state.metrics = metrics.Metrics()
    app.add_middleware(metrics.Measured, metrics=app.state.metrics)
    app.add_middleware(Guard, limits=Limits(settings.requests_per_minute, settings.enrolments_per_minute))
    app.include_router(_own_routes())
    app.include_router(metrics.router)
    for noun in NOUNS:
        app.include_router(importlib.import_module(f"concord_server.{noun}.routes").router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.concord.refusals.start()
    yield
    app.state.concord.closing.set()
    app.state.concord.refusals.stop()


def _own_routes() -> APIRouter:
    router = APIRouter(tags=["service"], dependencies=[Depends(public)])

    @router.get("/api/health")
    def health(database: CurrentDatabase) -> Health:
        """Answers while the process lives and the database can be used."""
        with database.reading() as session:
            session.execute(text("SELECT 1"))
        return Health()

    @router.get("/api/openapi.json", include_in_schema=False)
    def openapi(request: Request) -> Response:
        return JSONResponse(request.app.openapi())

    return router


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, with our problems in the place of its own validation errors."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = schema.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    app.openapi_schema = schema
    return schema
