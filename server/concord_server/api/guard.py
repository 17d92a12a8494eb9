"""What every request passes before its route, and every answer after it. Plain ASGI, so that streams stay streams.

In this order: a protocol version for nodes, a rate, a size, which is small for strangers; then security headers on
whatever is answered.

The rate is that of a node's certificate, which TLS has verified, of a token that a person's route has taken, and for
everybody else that of the address: an invented token buys nothing.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass

from sqlmodel import select
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from concord_server.api.problems import problem
from concord_server.api.security import holds, token_digest
from concord_server.database import utc_now
from concord_server.people.tables import ApiToken
from concord_server.rates import BUCKETS_MAX, TokenBuckets, address_of, paced
from concord_shared.errors import ConcordError
from concord_shared.protocol import PROTOCOL, PROTOCOL_HEADER

__all__ = ["Guard", "Limits", "TokenBuckets"]

BODY_BYTES_MAX = 6 << 20
"""A signed document of the largest size, in its envelope."""
STRANGER_BYTES_MAX, ENROLMENT_BYTES_MAX = 64 << 10, 16 << 10
"""Of callers with neither a token that holds nor a certificate: bodies are read before a route asks who sent them."""
TOO_LARGE = "the body is too large; at most {} bytes, and more only with a valid token or a node's certificate"
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


class Guard:
    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._all = TokenBuckets(limits.requests_per_minute)
        self._enrolments = TokenBuckets(limits.enrolments_per_minute)
        self._tokens = _Tokens()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        send = _with_headers(send)
        refusal = _wrong_protocol(scope["path"], headers) or self._too_many(scope, headers)
        bytes_max = 0 if refusal else await self._bytes_max(scope, headers)
        if refusal is None and b"transfer-encoding" not in headers and _stated(headers) > bytes_max:
            refusal = problem(413, TOO_LARGE.format(bytes_max))
        if refusal is not None:
            await refusal(scope, receive, send)
        else:
            await self._app(scope, _limited(receive, bytes_max), self._tokens.watching(scope, headers, send))

    async def _bytes_max(self, scope: Scope, headers: dict[bytes, bytes]) -> int:
        """How large a body this caller may send. A token that no answer has confirmed yet is looked up, if need be."""
        if scope["path"] == "/api/enrol":
            return ENROLMENT_BYTES_MAX
        if scope.get("extensions", {}).get("tls.peer") is not None or _token(headers) in self._tokens:
            return BODY_BYTES_MAX
        if b"authorization" in headers and _stated(headers) > STRANGER_BYTES_MAX:
            return BODY_BYTES_MAX if await run_in_threadpool(_holds, scope, headers) else STRANGER_BYTES_MAX
        return STRANGER_BYTES_MAX

    def _too_many(self, scope: Scope, headers: dict[bytes, bytes]) -> ASGIApp | None:
        now = time.monotonic()
        wait = self._all.wait_s(self._caller(scope, headers), now)
        if scope["path"] == "/api/enrol":
            wait = max(wait, self._enrolments.wait_s(_address(scope), now))
        if not wait:
            return None
        return problem(429, f"too many requests; wait {wait:.0f} s", headers={"Retry-After": str(int(wait) + 1)})

    def _caller(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Who a request counts for."""
        certificate = scope.get("extensions", {}).get("tls.peer")
        if certificate is not None:
            return f"certificate:{hash(certificate)}"
        token = _token(headers)
        return f"token:{token}" if token in self._tokens else f"address:{_address(scope)}"


class _Tokens:
    """Tokens that hold, as far as answers tell: one below /api/v1 that is no refusal was given to a person who is
    signed in, as every route there asks for that. A token that is refused later counts as invented again.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, token: int) -> bool:
        return token in self._known

    def watching(self, scope: Scope, headers: dict[bytes, bytes], send: Send) -> Send:
        """`send`, which also learns from the answer whether this request's token holds."""
        if b"authorization" not in headers or not scope["path"].startswith("/api/v1/"):
            return send
        token = _token(headers)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._learn(token, message["status"])
            await send(message)

        return sending

    def _learn(self, token: int, status: int) -> None:
        if 200 <= status < 300:
            self._known[token] = None
            self._known.move_to_end(token)
            if len(self._known) > BUCKETS_MAX:
                self._known.popitem(last=False)
        elif status == 401:
            self._known.pop(token, None)


def _holds(scope: Scope, headers: dict[bytes, bytes]) -> bool:
    """Whether a person's token is valid now."""
    token = headers[b"authorization"].partition(b" ")[2].strip().decode("latin-1")
    try:
        with scope["app"].state.concord.database.reading() as session:
            row = session.exec(select(ApiToken).where(ApiToken.digest == token_digest(token))).first()
            return row is not None and holds(row, utc_now())
    except ConcordError:
        return False


def _token(headers: dict[bytes, bytes]) -> int:
    """Stands for a token here, however the header is spaced; the token itself is kept nowhere."""
    return hash(headers.get(b"authorization", b"").partition(b" ")[2].strip())


def _address(scope: Scope) -> str:
    return address_of(scope.get("client"))


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


def _stated(headers: dict[bytes, bytes]) -> int:
    """How many bytes a body has at most, as far as its headers tell."""
    length = headers.get(b"content-length", b"0")
    return BODY_BYTES_MAX + 1 if b"transfer-encoding" in headers or not length.isdigit() else int(length[:20])


def _limited(receive: Receive, bytes_max: int) -> Receive:
    """A body without a stated length, or with a false one, ends at the same limit; and one that stalls ends, too."""
    seen, pacing = 0, paced(receive)

    async def limited() -> Message:
        nonlocal seen
        try:
            message = await pacing()
        except TimeoutError:
            raise HTTPException(408, "the body came too slowly; send it again", {"Connection": "close"}) from None
        seen += len(message.get("body", b""))
        if seen > bytes_max:
            raise HTTPException(413, TOO_LARGE.format(bytes_max))
        return message

    return limited


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            there = {name for name, _ in message["headers"]}
            message["headers"] = [*message["headers"], *(each for each in HEADERS if each[0] not in there)]
        await send(message)

    return sending
