"""The SuperLink's process: Flower's link state and handlers behind the firewall, on a listener of their own."""

from collections.abc import Callable, Mapping
from pathlib import Path

import uvicorn
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.federation import NoOpFederationManager

from concord_server.superlink.access import AccessList, FleetNode
from concord_server.superlink.firewall import Firewall, Refused
from concord_server.superlink.rooms import Rooms
from concord_server.superlink.spool import SpooledObjectStore
from concord_server.tls import PeerCertificateProtocol, server_context, uvicorn_factory
from concord_shared.signing import read_public_text

__all__ = ["build_superlink", "fleet_key", "superlink_server"]


def fleet_key(public: str) -> bytes:
    """A Flower key as a roster writes it, in the form in which Flower's requests carry it."""
    return public_key_to_bytes(read_public_text(public))  # type: ignore[arg-type]


def build_superlink(
    load: Callable[[], Mapping[str, FleetNode]], worker: str, spool: Path, refused: Refused
) -> tuple[Firewall, AccessList]:
    """A SuperLink with its state in memory, large objects in `spool`; the access list is not started yet.

    worker: the spiffe name of the coordinator's worker.
    """
    objects = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
    objects.store_instance = SpooledObjectStore(spool)
    state = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), objects).state()
    rooms = Rooms(state)
    access = AccessList(load, rooms.admit)
    return Firewall(state, rooms, access, worker, refused), access


def superlink_server(
    firewall: Firewall, host: str, port: int, certificate: Path, key: Path, client_ca: str
) -> uvicorn.Server:
    """The listener: whoever connects shows a certificate that chains to `client_ca`. `run()` serves until SIGTERM."""
    context = server_context(certificate, key, client_ca, client="required")
    return uvicorn.Server(
        uvicorn.Config(
            firewall,
            host=host,
            port=port,
            http=PeerCertificateProtocol,
            ws="none",
            lifespan="off",
            ssl_context_factory=uvicorn_factory(context),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=2,
        )
    )
