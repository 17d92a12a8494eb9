"""What every request passes before its route, and every answer after it. Plain ASGI, so that streams stay streams.

In this order: a protocol version for nodes, a size, a rate; then security headers on whatever is answered.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from concord_server.api.problems import problem
from concord_shared.protocol import PROTOCOL, PROTOCOL_HEADER

__all__ = ["Guard", "Limits", "TokenBuckets"]

BODY_BYTES_MAX = 6 << 20
"""A signed document of the largest size, in its envelope."""
BUCKETS_MAX = 10_000
HEADERS = [
    (b"strict-transport-security", b"max-age=31536000"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cache-control", b"no-store"),
    (PROTOCOL_HEADER.lower().encode(), str(PROTOCOL).encode()),
]


@dataclass(frozen=True)
class Limits:
    requests_per_minute: int
    enrolments_per_minute: int


class TokenBuckets:
    """How much each caller may still ask: a minute's worth at once, refilled steadily. The oldest callers are
    forgotten, so that nobody can fill the memory.
    """

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: str, now: float) -> float:
        """0 if this request is within the rate, and counts it; otherwise the seconds until one would be."""
        left, since = self._buckets.pop(caller, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - since) * self._per_minute / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / self._per_minute
        self._buckets[caller] = (left - 1 if left >= 1 else left, now)
        while len(self._buckets) > BUCKETS_MAX:
            self._buckets.popitem(last=False)
        return wait


class Guard:
    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._all = TokenBuckets(limits.requests_per_minute)
        self._enrolments = TokenBuckets(limits.enrolments_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        send = _with_headers(send)
        refusal = _wrong_protocol(scope["path"], headers) or _too_large(headers) or self._too_many(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
        else:
            await self._app(scope, _limited(receive), send)

    def _too_many(self, scope: Scope, headers: dict[bytes, bytes]) -> ASGIApp | None:
        now = time.monotonic()
        wait = self._all.wait_s(_caller(scope, headers), now)
        if scope["path"] == "/api/enrol":
            wait = max(wait, self._enrolments.wait_s(_address(scope), now))
        if not wait:
            return None
        return problem(429, f"too many requests; wait {wait:.0f} s", headers={"Retry-After": str(int(wait) + 1)})


def _caller(scope: Scope, headers: dict[bytes, bytes]) -> str:
    """Who a request counts for. A certificate was verified; a token was not yet, so its address counts with it."""
    certificate = scope.get("extensions", {}).get("tls.peer")
    if certificate is not None:
        return f"certificate:{hash(certificate)}"
    return f"{_address(scope)}:{hash(headers.get(b'authorization', b''))}"


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


def _wrong_protocol(path: str, headers: dict[bytes, bytes]) -> ASGIApp | None:
    spoken = headers.get(PROTOCOL_HEADER.lower().encode(), b"").decode("latin-1")[:20]
    needed = path.startswith("/api/node/") or path == "/api/enrol"
    if spoken == str(PROTOCOL) or (not spoken and not needed):
        return None
    return problem(
        426,
        f"this coordinator speaks the protocol {PROTOCOL}, the request {spoken or 'names none'}; "
        f"install the matching version of concord-node ({PROTOCOL_HEADER}: {PROTOCOL})",
        headers={"Upgrade": f"concord/{PROTOCOL}", "Connection": "Upgrade"},
    )


def _too_large(headers: dict[bytes, bytes]) -> ASGIApp | None:
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) <= BODY_BYTES_MAX:
        return None
    return problem(413, f"the body is too large; at most {BODY_BYTES_MAX} bytes")


def _limited(receive: Receive) -> Receive:
    """A body without a stated length, or with a false one, ends at the same limit."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > BODY_BYTES_MAX:
            raise HTTPException(413, f"the body is too large; at most {BODY_BYTES_MAX} bytes")
        return message

    return limited


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *(each for each in HEADERS if each[0] not in there)]
        await send(message)

    return sending
