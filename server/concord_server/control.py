"""The control plane's process: `python -m concord_server.control DIR`. The API over TLS, for people and for nodes.

SIGTERM drains: no new connection, long polls end at once, what was begun is answered, then the process ends.
"""

import asyncio
import datetime
import logging
import os
import ssl
import sys
from pathlib import Path
from types import FrameType

import uvicorn

from concord_server import pki
from concord_server.api.app import create_app
from concord_server.api.state import State
from concord_server.database import utc_now
from concord_server.logs import start_logging
from concord_server.rates import bounded_protocol, make_room
from concord_server.settings import Home
from concord_server.tls import keep_fresh, server_context, uvicorn_factory
from concord_shared.certificates import read_certificate
from concord_shared.errors import ConcordError

__all__ = ["main"]

log = logging.getLogger("concord_server.control")
DRAIN_S = 10
WARN_BEFORE = datetime.timedelta(days=21)


class _Server(uvicorn.Server):
    """uvicorn, which also tells those who wait on behalf of a caller that the end has come."""

    def __init__(self, config: uvicorn.Config, state: State) -> None:
        super().__init__(config)
        self._state = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._state.closing.set()
        super().handle_exit(sig, frame)


def main(path: Path) -> None:
    """Serves until it is told to end.

    Raises:
        ConcordError: the directory, its certificates or its database cannot be used.
    """
    home = Home.open(path)
    settings = home.settings
    start_logging("control", settings.log_level)
    os.umask(0o077)
    home.database().check()
    pki.renew_own(home, utc_now())
    _warn(home)
    app = create_app(home)
    state: State = app.state.concord
    context = _context(home, state)
    make_room(settings.connections_max)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.control_port,
        http=bounded_protocol(settings.connections_per_caller),
        limit_concurrency=settings.connections_max,
        ws="none",
        ssl_context_factory=uvicorn_factory(context),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=DRAIN_S,
    )
    log.info("control plane starts", extra={"host": settings.host, "port": settings.control_port})
    asyncio.run(_serve(_Server(config, state), home, context))


async def _serve(server: uvicorn.Server, home: Home, context: ssl.SSLContext) -> None:
    refreshing = asyncio.create_task(
        keep_fresh(context, *_own_certificate(home), renew=lambda: pki.renew_own(home, utc_now()))
    )
    try:
        await server.serve()
    finally:
        refreshing.cancel()
        home.database().close()


def _warn(home: Home) -> None:
    until = read_certificate(home.membership_certificate.read_text("ascii")).not_valid_after_utc
    if until - utc_now() < WARN_BEFORE:
        log.warning("membership key ends soon; renew it with the root key", extra={"until": until.isoformat()})
    if home.root_key.exists():
        log.warning("the root key lies on this machine; move it away", extra={"file": str(home.root_key)})


def _context(home: Home, state: State) -> ssl.SSLContext:
    certificate, key = _own_certificate(home)
    return server_context(certificate, key, state.authority.client_ca, "optional")


def _own_certificate(home: Home) -> tuple[Path, Path]:
    """An existing certificate, where the settings name one; otherwise the federation's own."""
    settings = home.settings
    if settings.certificate:
        return Path(settings.certificate), Path(settings.certificate_key or settings.certificate)
    return home.server_certificate, home.server_key


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except ConcordError as error:
        log.error("control plane cannot start", extra={"reason": str(error)})
        sys.exit(error.exit_code)
