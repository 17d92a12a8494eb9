"""How much each caller may ask, how many connections it may hold, and how slowly it may speak."""

import asyncio
import ipaddress
import logging
import resource
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from concord_server.tls import PeerCertificateProtocol

__all__ = [
    "BUCKETS_MAX",
    "TokenBuckets",
    "address_of",
    "bounded_protocol",
    "make_room",
    "paced",
]

log = logging.getLogger(__name__)
BUCKETS_MAX = 10_000
FILES = 256
"""What a process keeps open besides its connections: the database, logs, parts of messages."""
HEADERS_S = 15.0
"""How long a connection may take to say what it wants; between two requests it may be silent for longer."""
SILENCE_S, GRACE_S, BYTES_PER_S = 10.0, 30.0, 16_000
"""A body never stops for longer than the first, and comes at this rate after the second."""
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


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


def address_of(client: Any) -> str:
    """Of IPv6 the network of 64 bits: whoever has one address there has them all."""
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0] if client else "")
    except ValueError:
        return str(client[0]) if client else "unknown"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(getattr(address, "ipv4_mapped", None) or address)


def paced(receive: Receive) -> Receive:
    """`receive`, which raises TimeoutError where a body stops or trickles; what follows the body may take its time."""
    now = asyncio.get_running_loop().time
    began, size, ended = now(), 0, False

    async def pacing() -> MutableMapping[str, Any]:
        nonlocal size, ended
        if ended:
            return await receive()
        async with asyncio.timeout(SILENCE_S):
            message = await receive()
        size += len(message.get("body", b""))
        ended = not message.get("more_body")
        if not ended and now() - began > GRACE_S + size / BYTES_PER_S:
            raise TimeoutError
        return message

    return pacing


def make_room(connections: int) -> None:
    """Lets this process hold so many connections, as far as the system allows; says so where it does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
        if allowed < wanted:
            log.warning(
                "fewer connections than the settings say: the system lets this process open too few files",
                extra={"connections_max": connections, "files": allowed, "then": f"ulimit -n {wanted}"},
            )


def bounded_protocol(per_caller: int) -> type[PeerCertificateProtocol]:
    """The protocol of one listener: of each caller so many connections, and none that says nothing.

    A caller is who its certificate says, so that nodes behind one address do not take each other's place, and where
    there is none, the address.
    """
    held: Counter[str] = Counter()

    class BoundedProtocol(PeerCertificateProtocol):
        _caller = ""
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            secured = transport.get_extra_info("ssl_object")
            certificate = secured.getpeercert(binary_form=True) if secured is not None else None
            caller = str(hash(certificate)) if certificate else address_of(transport.get_extra_info("peername"))
            if held[caller] >= per_caller:
                transport.abort()
                return
            held[caller] += 1
            self._caller = caller
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            if self._caller:
                super().data_received(data)
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if not self._caller:
                return
            held[self._caller] -= 1
            if not held[self._caller]:
                del held[self._caller]
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Whoever has begun to speak comes to the end of its headers in time."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(HEADERS_S, self._give_up)

        def _unwatch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _give_up(self) -> None:
            self._deadline = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

    return BoundedProtocol
