"""The SuperLink's process: Flower's link state and handlers behind the firewall, on a listener of their own."""

import asyncio
import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path

import uvicorn
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.federation import NoOpFederationManager

from concord_server.rates import bounded_protocol, make_room
from concord_server.superlink.access import AccessList, FleetNode
from concord_server.superlink.firewall import Firewall, Refused
from concord_server.superlink.rooms import Rooms
from concord_server.superlink.spool import SPOOL_BYTES_MAX, SpooledObjectStore
from concord_server.tls import keep_fresh, server_context, uvicorn_factory
from concord_shared.signing import read_public_text

__all__ = ["build_superlink", "fleet_key", "superlink_server"]


def fleet_key(public: str) -> bytes:
    """A Flower key as a roster writes it, in the form in which Flower's requests carry it."""
    return public_key_to_bytes(read_public_text(public))  # type: ignore[arg-type]


def build_superlink(
    load: Callable[[], Mapping[str, FleetNode]],
    worker: str,
    spool: Path,
    refused: Refused,
    spool_bytes_max: int = SPOOL_BYTES_MAX,
) -> tuple[Firewall, AccessList]:
    """A SuperLink with its state in memory, large objects in `spool`; the access list is not started yet.

    worker: the spiffe name of the coordinator's worker.
    """
    objects = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
    objects.store_instance = SpooledObjectStore(spool, spool_bytes_max)
    state = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), objects).state()
    rooms = Rooms(state)
    access = AccessList(load, rooms.admit)
    return Firewall(state, rooms, access, worker, refused), access


class _Server(uvicorn.Server):
    """uvicorn, which shows the certificate that lies in its files, however long it lives."""

    def __init__(self, config: uvicorn.Config, context: ssl.SSLContext, certificate: Path, key: Path) -> None:
        super().__init__(config)
        self._files = context, certificate, key

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        fresh = asyncio.create_task(keep_fresh(*self._files))
        try:
            await super().serve(sockets)
        finally:
            fresh.cancel()


def superlink_server(
    firewall: Firewall,
    host: str,
    port: int,
    certificate: Path,
    key: Path,
    client_ca: str,
    connections_max: int,
    connections_per_caller: int,
) -> uvicorn.Server:
    """The listener: whoever connects shows a certificate that chains to `client_ca`. `run()` serves until SIGTERM.

    Raises:
        ArtefactError: certificate or key cannot be read, or do not belong together.
    """
    context = server_context(certificate, key, client_ca, client="required")
    make_room(connections_max)
    return _Server(
        uvicorn.Config(
            firewall,
            host=host,
            port=port,
            http=bounded_protocol(connections_per_caller),
            limit_concurrency=connections_max,
            ws="none",
            lifespan="off",
            ssl_context_factory=uvicorn_factory(context),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
        ),
        context,
        certificate,
        key,
    )
