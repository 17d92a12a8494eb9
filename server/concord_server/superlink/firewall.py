"""The door of the SuperLink: which calls whom, how many bytes, and answers that wait instead of being polled for.

    a node (its certificate is that of an active node)       the Fleet calls, with its own Flower key, in its own name
    the coordinator's worker (its own certificate)           the Runtime calls and /rooms/*
    anybody who got through TLS                              /health
    everything else, of everybody                            403, and noted; too often in a minute: 429, and not noted

Each request of a node proves two keys: that of its certificate, by TLS, and Flower's, by a signed time.
"""

import asyncio
import base64
import contextlib
import datetime
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from flwr.common.constant import TIMESTAMP_HEADER
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TASK_TOKEN_HEADER
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from concord_server.rates import TokenBuckets, address_of, paced
from concord_server.superlink.access import AccessList, FleetNode, Peer, peer_of
from concord_server.superlink.calls import FLEET, RUNTIME, CallRefusedError, call_fleet, call_runtime, node_of
from concord_server.superlink.rooms import Rooms
from concord_server.tls import peer_certificate

__all__ = ["LAST_HEADER", "WAIT_HEADER", "Firewall", "Refused"]

log = logging.getLogger(__name__)
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Refused = Callable[[str, str, str], None]
Headers = Mapping[str, str]

WAIT_HEADER = "concord-wait"
LAST_HEADER = "concord-last"
WAIT_S_MAX = 25.0
BODY_BYTES_MAX = 6 << 20
"""A chunk of an array is 5 MiB; nothing that is sent here is larger."""
TREE_BYTES_MAX, CALL_BYTES_MAX = 2 << 20, 64 << 10
"""Of the names of a reply's parts; of a node's calls that carry neither parts nor names."""
UPLOADS_AT_A_TIME = 8
"""Chunks that are being received at the same time, of each node one: a further one waits in its socket, not in memory.
"""
CLOCKS_APART_S = 300.0
REFUSALS_PER_MINUTE = 120
CLOSING_S = 0.5
"""How long a waiting answer may keep a process that is told to end."""


class Firewall:
    """The ASGI application of the SuperLink's listener.

    refused: called with who (the name in the certificate, or an address), path and reason of each refusal. closing:
    set it, and whoever waits is answered.
    """

    def __init__(self, state: LinkState, rooms: Rooms, access: AccessList, worker: str, refused: Refused) -> None:
        self._state, self._rooms, self._access = state, rooms, access
        self._worker, self._refused = worker, refused
        self._uploads = asyncio.Semaphore(UPLOADS_AT_A_TIME)
        self._uploading: dict[str, asyncio.Lock] = {}
        self._bells: dict[str, asyncio.Event] = {}
        self._turns: dict[str, int] = {}
        self._uploaded: dict[str, int] = {}
        self._refusals = TokenBuckets(REFUSALS_PER_MINUTE)
        self.closing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            response = await self._respond(scope, receive)
        except CallRefusedError as refusal:
            response = JSONResponse({"detail": str(refusal)}, refusal.status)
            if refusal.status == 503:
                response.headers["connection"] = "close"  # the rest of its body may still come
        await response(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive) -> Response:
        path: str = scope["path"]
        peer = peer_of(peer_certificate(scope))
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if path == "/health":
            return JSONResponse({"status": "ok"})
        if peer is not None and peer.spiffe == self._worker:
            return await self._serve_worker(path, headers, receive)
        node = self._access.find(peer) if peer is not None else None
        if peer is None or node is None:
            return await self._refuse(_who(peer, scope), path, "not an active node of this federation")
        try:
            return await self._serve_node(node, path, headers, receive)
        except CallRefusedError as refusal:
            if refusal.status not in (401, 403):
                raise
            return await self._refuse(_who(peer, scope), path, str(refusal))

    async def _serve_node(self, node: FleetNode, path: str, headers: Headers, receive: Receive) -> Response:
        if path not in FLEET:
            raise CallRefusedError(403, "a node has no business here")
        await run_in_threadpool(_check_flower_key, node, headers)
        if path in ("/v1/fleet/push-object", "/v1/fleet/push-messages"):
            async with self._uploading.setdefault(node.name, asyncio.Lock()), self._uploads:
                return await self._take_reply(node, path, headers, receive)
        body = await _read(receive, CALL_BYTES_MAX)
        if path == "/v1/fleet/pull-messages" and not await self._wait_for_bell(f"node {node.name}", headers):
            return _protobuf(b"")  # nobody is at the other end any more: an offer would be lost there
        response = await self._call_as(node, path, headers, body)
        if path == "/v1/fleet/activate-node":
            self._rooms.activated(node.name)
            self._ring(f"node {node.name}")
            self._ring_worker()
        elif path == "/v1/fleet/pull-messages" and response.body:
            self._ring(f"node {node.name}")  # there may be more
        return response

    async def _take_reply(self, node: FleetNode, path: str, headers: Headers, receive: Receive) -> Response:
        """What a reply consists of, once for each offer, or one of its parts."""
        if path == "/v1/fleet/push-object":
            self._count_upload(node, headers)
            return await self._call_as(node, path, headers, await _read(receive))
        response = await self._call_as(node, path, headers, await _read(receive, TREE_BYTES_MAX))
        self._uploaded[node.name] = 0
        self._ring_worker()
        return response

    async def _call_as(self, node: FleetNode, path: str, headers: Headers, body: bytes) -> Response:
        """A Fleet call, if it is in this node's own name."""
        node_id, key = node_of(path, body)
        if key != node.flower_key if node_id is None else node_id != self._rooms.node_id(node.name):
            raise CallRefusedError(403, "a call in another node's name")
        if path == "/v1/fleet/activate-node":
            await run_in_threadpool(self._rooms.make_way, node.name)
        answer = await run_in_threadpool(call_fleet, path, body, self._state, self._rooms.reply_bytes_max)
        if LAST_HEADER in headers:
            self._ring_worker()
        return _protobuf(answer)

    def _count_upload(self, node: FleetNode, headers: Headers) -> None:
        """At most the bytes of one reply since the node announced it."""
        size = headers.get("content-length", "")
        total = self._uploaded.get(node.name, 0) + (int(size) if size.isdecimal() else BODY_BYTES_MAX)
        if total > max(self._rooms.reply_bytes_max.values(), default=0):
            raise CallRefusedError(403, "more bytes than a reply of this run has")
        self._uploaded[node.name] = total

    async def _serve_worker(self, path: str, headers: Headers, receive: Receive) -> Response:
        token = headers.get(TASK_TOKEN_HEADER, "")
        body = await _read(receive)
        if path.startswith("/rooms/"):
            return await self._room(path, json.loads(body or b"{}"))
        if path not in RUNTIME:
            return await self._refuse(self._worker, path, "the worker does not use this")
        waits = path == "/v1/runtime/pull-messages"
        if waits:
            await self._wait_for_bell(f"task {token}", headers)
        try:
            answer = await run_in_threadpool(call_runtime, path, body, token, self._state)
        except CallRefusedError as refusal:
            if refusal.status == 507:
                await run_in_threadpool(self._rooms.close_of, token)  # its node would wait for the rest of the offer
            raise
        if waits and answer:
            self._ring(f"task {token}")
        return _protobuf(answer)

    async def _room(self, path: str, body: dict[str, Any]) -> Response:
        match path:
            case "/rooms/nodes":
                return JSONResponse(await run_in_threadpool(self._rooms.nodes))
            case "/rooms/open":
                return JSONResponse(await run_in_threadpool(self._rooms.open, int(body["reply_bytes_max"])))
            case "/rooms/close":
                await run_in_threadpool(self._rooms.close, int(body["run_id"]), int(body["task_id"]))
            case "/rooms/wake":
                for name in body["nodes"]:
                    self._ring(f"node {name}")
            case _:
                raise CallRefusedError(404, "no such room")
        return JSONResponse({})

    # Waiting

    def _bell(self, who: str) -> asyncio.Event:
        """A new one is rung: whoever comes for the first time looks at once."""
        if who not in self._bells:
            self._bells[who] = asyncio.Event()
            self._bells[who].set()
        return self._bells[who]

    def _ring(self, who: str) -> None:
        self._bell(who).set()

    def _ring_worker(self) -> None:
        for who, bell in self._bells.items():
            if who.startswith("task "):
                bell.set()

    async def _wait_for_bell(self, who: str, headers: Headers) -> bool:
        """Until there may be messages, or the caller's patience ends. False: it has meanwhile asked once more."""
        bell = self._bell(who)
        turn = self._turns[who] = self._turns.get(who, 0) + 1
        try:
            patience = min(WAIT_S_MAX, float(headers.get(WAIT_HEADER, "0")))
        except ValueError:
            patience = 0.0
        now = asyncio.get_running_loop().time
        until = now() + patience
        while not (bell.is_set() or self.closing or turn != self._turns[who]) and (left := until - now()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(bell.wait(), min(left, CLOSING_S))
        if turn != self._turns[who]:
            return False
        bell.clear()
        return True

    async def _refuse(self, who: str, path: str, reason: str) -> Response:
        if wait := self._refusals.wait_s(who, time.monotonic()):
            headers = {"Retry-After": str(int(wait) + 1)}
            return JSONResponse({"detail": f"refused too often; {reason}"}, 429, headers)
        await run_in_threadpool(self._refused, who, path[:200], reason)
        return JSONResponse({"detail": reason}, 403)


def _who(peer: Peer | None, scope: Scope) -> str:
    return peer.spiffe if peer is not None else address_of(scope.get("client"))


def _check_flower_key(node: FleetNode, headers: Headers) -> None:
    """Flower's second factor: a time of the last minutes, signed by the key of this node's roster row.

    Raises:
        CallRefusedError: another key, a wrong signature, or clocks that are apart.
    """
    try:
        key = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.lower()], validate=True)
        signature = base64.b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.lower()], validate=True)
        signed_at = headers[TIMESTAMP_HEADER.lower()]
        age = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(signed_at)).total_seconds()
    except (KeyError, ValueError, TypeError) as error:
        raise CallRefusedError(401, "the request is not signed with a Flower key") from error
    if key != node.flower_key:
        raise CallRefusedError(403, "the Flower key is another node's")
    if not verify_signature(bytes_to_public_key(key), signed_at.encode("ascii"), signature):
        raise CallRefusedError(401, "the signature of the request is wrong")
    if abs(age) > CLOCKS_APART_S:
        raise CallRefusedError(401, f"the node's clock is {age:+.0f} s from the coordinator's; set it")


def _protobuf(body: bytes) -> Response:
    return Response(body, media_type="application/x-protobuf")


async def _read(receive: Receive, bytes_max: int = BODY_BYTES_MAX) -> bytes:
    """Raises: CallRefusedError: the body is larger than this request may be, stalls, or is not sent to its end."""
    parts, size, pacing = [], 0, paced(receive)
    while True:
        try:
            message = await pacing()
        except TimeoutError:
            raise CallRefusedError(503, "the request came too slowly; try again") from None
        if message["type"] == "http.disconnect":
            raise CallRefusedError(400, "the request ended before its end")
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > bytes_max:
            raise CallRefusedError(413, f"this request has at most {bytes_max} bytes")
        if not message.get("more_body"):
            return b"".join(parts)
