"""Errors as callers see them: problem+json, always, and never the inside of the coordinator."""

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from concord_shared.errors import (
    ApiError,
    ArtefactError,
    ConcordError,
    DocumentRefusedError,
    PlanError,
    TooManyError,
    UsageError,
)
from concord_shared.protocol import Problem

__all__ = ["PROBLEMS", "handle_problems", "problem"]

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
ERRORS_MAX = 20
CODES = {
    400: "invalid",
    401: "not-signed-in",
    403: "not-allowed",
    404: "not-found",
    405: "method-not-allowed",
    409: "conflict",
    413: "too-large",
    415: "media-type",
    422: "invalid",
    426: "protocol",
    429: "too-many",
    503: "unavailable",
}
REFUSED: dict[type[ConcordError], str] = {
    DocumentRefusedError: "document-refused",
    PlanError: "plan-invalid",
    UsageError: "invalid",
}
"""Errors of the shared code that a caller's input can cause: status 400, with their message."""

PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": HTTPStatus(status).phrase,
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status in (400, 401, 403, 404, 405, 409, 413, 415, 422, 426, 429, 500, 503)
}
"""The `responses` of every route."""


def problem(
    status: int,
    detail: str,
    code: str = "",
    errors: tuple[str, ...] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem+json answer."""
    content = Problem(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail,
        code=code or CODES.get(status, "error"),
        errors=errors,
    )
    return Response(content.model_dump_json(), status, headers, MEDIA_TYPE)


def handle_problems(app: FastAPI) -> None:
    """Gives every error of `app` its answer."""
    app.add_exception_handler(ConcordError, _concord_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)


async def _concord_error(request: Request, error: Exception) -> Response:
    if isinstance(error, TooManyError):
        return problem(error.status, str(error), error.code, headers={"Retry-After": "5"})
    if isinstance(error, ApiError):
        if error.status >= 500:
            log.error("unavailable", exc_info=error, extra={"path": request.url.path})
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        return problem(error.status, str(error), error.code, headers=headers)
    for kind, code in REFUSED.items():
        if isinstance(error, kind):
            if node := getattr(request.state, "node", None):  # what a node sent and cannot have sent honestly
                refusals = request.app.state.concord.refusals
                await run_in_threadpool(refusals.note, f"node:{node}", request.url.path, code)
            return problem(400, str(error), code)
    if isinstance(error, ArtefactError):
        log.error("storage failed", exc_info=error, extra={"path": request.url.path})
        return problem(503, "the coordinator's storage failed; its log says how. Nothing was changed; try again")
    return await _unexpected(request, error)


async def _invalid(_: Request, error: Exception) -> Response:
    """One line a field. What the caller sent is not repeated."""
    assert isinstance(error, RequestValidationError)
    lines = tuple(f"{'.'.join(map(str, each['loc']))}: {each['msg']}"[:300] for each in error.errors()[:ERRORS_MAX])
    return problem(422, "the request is not as the API describes it; see errors", errors=lines)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    details = {404: f"nothing is at {request.url.path[:200]}", 405: f"{request.method} is not for this path"}
    return problem(error.status_code, details.get(error.status_code, str(error.detail)), headers=error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error, extra={"path": request.url.path, "method": request.method})
    return problem(500, "an error of the coordinator's own; its log says more")
