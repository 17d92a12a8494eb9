"""What every request passes before its route, and every answer after it. Plain ASGI, so that streams stay streams.

In this order: a protocol version for nodes, a size, a rate; then security headers on whatever is answered.

The rate is that of a node's certificate, which TLS has verified, of a token that a person's route has taken, and for
everybody else that of the address: an invented token buys nothing.
"""

import ipaddress
import time
from collections import OrderedDict
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from concord_server.api.problems import problem
from concord_server.rates import BUCKETS_MAX, TokenBuckets
from concord_shared.protocol import PROTOCOL, PROTOCOL_HEADER

__all__ = ["Guard", "Limits", "TokenBuckets"]

BODY_BYTES_MAX = 6 << 20
"""A signed document of the largest size, in its envelope."""
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
        refusal = _wrong_protocol(scope["path"], headers) or _too_large(headers) or self._too_many(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
        else:
            await self._app(scope, _limited(receive), self._tokens.watching(scope, headers, send))

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


def _token(headers: dict[bytes, bytes]) -> int:
    """Stands for a token here, however the header is spaced; the token itself is kept nowhere."""
    return hash(headers.get(b"authorization", b"").partition(b" ")[2].strip())


def _address(scope: Scope) -> str:
    """Of IPv6 the network of 64 bits: whoever has one address there has them all."""
    client = scope.get("client")
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0] if client else "")
    except ValueError:
        return str(client[0]) if client else "unknown"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(getattr(address, "ipv4_mapped", None) or address)


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
