"""Who may reach the SuperLink: the active nodes, as the database says, never older than a second or two."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cryptography import x509

from concord_shared.certificates import spiffe_of
from concord_shared.errors import DocumentRefusedError
from concord_shared.signing import fingerprint

__all__ = ["AccessList", "FleetNode", "peer_of"]

log = logging.getLogger(__name__)
REFRESH_S = 1.0


@dataclass(frozen=True)
class FleetNode:
    """One row of the roster, as far as the SuperLink needs it. tls_key: fingerprint; flower_key: PEM."""

    name: str
    spiffe: str
    tls_key: str
    flower_key: bytes


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a connection: the name in its certificate, and its key's fingerprint."""

    spiffe: str
    tls_key: str


def peer_of(certificate: bytes | None) -> Peer | None:
    """The peer of a certificate (DER) that TLS has verified; None for none or a foreign kind."""
    if certificate is None:
        return None
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        return Peer(spiffe_of(parsed), fingerprint(parsed.public_key()))  # type: ignore[arg-type]
    except (ValueError, AttributeError, DocumentRefusedError):
        return None


class AccessList:
    """The active nodes by their certificate's name; `load` is asked again every second, in its own thread.

    Where `load` fails (a locked or vanished database) the last answer holds for `stale_max_s`, then nobody may.
    """

    def __init__(
        self,
        load: Callable[[], Mapping[str, FleetNode]],
        changed: Callable[[Mapping[str, FleetNode]], None],
        stale_max_s: float = 60.0,
    ) -> None:
        self._load, self._changed = load, changed
        self._nodes: Mapping[str, FleetNode] = {}
        self._failures_max, self._failures = int(stale_max_s / REFRESH_S), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh_for_ever, name="access", daemon=True)

    def start(self) -> None:
        self.refresh()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def find(self, peer: Peer) -> FleetNode | None:
        """The active node of this name *and* this key: a revoked key is refused even while its certificate lives."""
        node = self._nodes.get(peer.spiffe)
        return node if node is not None and node.tls_key == peer.tls_key else None

    def refresh(self) -> None:
        try:
            nodes = self._load()
        except Exception:  # whatever a database driver raises: no answer must not mean "as before" for ever
            log.exception("the list of nodes cannot be read")
            self._failures += 1
            nodes = {} if self._failures > self._failures_max else self._nodes
        else:
            self._failures = 0
        if nodes != self._nodes:
            self._nodes = nodes
            self._changed(nodes)

    def _refresh_for_ever(self) -> None:
        while not self._stop.wait(REFRESH_S):
            self.refresh()
