"""TLS of the two listeners: who must show a certificate, and what the application then knows of it.

uvicorn terminates TLS but keeps the peer's certificate to itself; the protocol below puts it into the ASGI scope.

Certificates are renewed in their files while processes run: a listener follows them (`keep_fresh`), the worker reads
them for each new connection (`FreshContext`). Connections that there are go on.
"""

import asyncio
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from concord_shared.errors import ArtefactError, ConcordError
from concord_shared.files import explain

__all__ = [
    "PEER",
    "FreshContext",
    "PeerCertificateProtocol",
    "keep_fresh",
    "peer_certificate",
    "server_context",
    "uvicorn_factory",
]

log = logging.getLogger(__name__)
PEER = "tls.peer"
REFRESH_S = 60.0


def server_context(
    certificate: Path, key: Path, client_ca: str, client: Literal["optional", "required"]
) -> ssl.SSLContext:
    """TLS 1.2 or newer; a client certificate, where shown, must chain to `client_ca` (PEM text).

    Raises:
        ArtefactError: certificate or key cannot be read, or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, certificate, key)
    context.load_verify_locations(cadata=client_ca)
    context.verify_mode = ssl.CERT_REQUIRED if client == "required" else ssl.CERT_OPTIONAL
    return context


async def keep_fresh(
    context: ssl.SSLContext, certificate: Path, key: Path, renew: Callable[[], object] = lambda: None
) -> None:
    """For ever, every minute: renews what is due, and shows in new handshakes whatever lies in the files then.

    Runs in the listener's own loop: nothing else uses the context meanwhile.
    """
    shown: int | None = None
    while True:
        try:
            await asyncio.to_thread(renew)
            changed_at = (await asyncio.to_thread(certificate.stat)).st_mtime_ns
            if changed_at != shown:
                _load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, key)  # what does not fit harms nothing here
                _load(context, certificate, key)
                shown = changed_at
        except (ConcordError, OSError) as error:
            log.error("certificate cannot be renewed", extra={"reason": str(error)})
        await asyncio.sleep(REFRESH_S)


class FreshContext(ssl.SSLContext):
    """A client's TLS towards `authority` (a file of PEM): each new connection shows the certificate that lies in the
    files then, so that whoever has the context need not know of renewals.
    """

    _files: tuple[Path, Path, Path]

    def __new__(cls, authority: Path, certificate: Path, key: Path) -> Self:
        context = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        context._files = authority, certificate, key
        return context

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        """Raises: ssl.SSLError, OSError: also where the files cannot be read, or do not belong together (yet)."""
        authority, certificate, key = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(authority)
        context.load_cert_chain(certificate, key)
        return context.wrap_socket(*arguments, **options)


def _load(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise ArtefactError(f"{certificate} and {key}: not a certificate and its key: {error.reason}") from error
    except OSError as error:
        raise ArtefactError(f"cannot read {certificate} or {key}: {explain(error)}") from error


class PeerCertificateProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type] # httptools' or h11's, whichever is there
    """uvicorn's HTTP protocol, with the peer's certificate (DER, or None) in `scope["extensions"]`."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        secured = transport.get_extra_info("ssl_object")
        certificate = secured.getpeercert(binary_form=True) if secured is not None else None
        application: Any = self.app  # type: ignore[has-type] # set by either base

        async def with_peer(scope: Any, receive: Any, send: Any) -> None:
            scope["extensions"] = {**scope.get("extensions", {}), PEER: certificate}
            await application(scope, receive, send)

        self.app = with_peer

    def shutdown(self) -> None:
        """Ends an idle connection at once: TLS would wait half a minute for the other side to say goodbye too.

        Not after another `close()`: asyncio would take the second of two for the end, and abort nothing.
        """
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
        else:
            super().shutdown()


def peer_certificate(scope: Any) -> bytes | None:
    """The DER certificate that the other side showed and TLS verified, or None."""
    certificate: bytes | None = scope.get("extensions", {}).get(PEER)
    return certificate


def uvicorn_factory(context: ssl.SSLContext) -> Any:
    """For uvicorn's `ssl_context_factory`: this context, whatever its own options say."""
    return lambda config, default: context
