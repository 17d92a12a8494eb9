"""`python -m concord_server.superlink DIR`: started and kept by `concord server up`."""

import signal
import sys
from pathlib import Path
from types import FrameType

from sqlmodel import select

from concord_server.audit.service import record as audit
from concord_server.logs import start_logging
from concord_server.nodes.tables import Node
from concord_server.settings import Home
from concord_server.superlink.environment import quiet_flower


def main() -> None:
    home = Home.open(Path(sys.argv[1]))
    settings, database = home.settings, home.database()
    start_logging("superlink", settings.log_level)
    quiet_flower(home.path)
    from concord_server.refusals import Refusals, actor_of
    from concord_server.superlink.access import FleetNode
    from concord_server.superlink.app import build_superlink, fleet_key, superlink_server

    database.check()

    def load() -> dict[str, FleetNode]:
        with database.reading() as session:
            rows = session.exec(select(Node).where(Node.state == "active")).all()
        nodes = [
            FleetNode(
                row.name,
                f"spiffe://{settings.federation}/{row.organisation}/{row.name}",
                row.tls_key,
                fleet_key(row.flower_key),
            )
            for row in rows
        ]
        return {node.spiffe: node for node in nodes}

    worker = f"spiffe://{settings.federation}/coordinator/worker"

    def write(who: str, path: str, reason: str, times: int) -> None:
        with database.session() as session:
            audit(session, actor_of(who, worker), "superlink:call-refused", path, reason=reason, times=times)

    refusals = Refusals(write)
    spool, spool_bytes_max = home.path / "flower" / "spool", settings.spool_quota_mb << 20
    firewall, access = build_superlink(load, worker, spool, refusals.note, spool_bytes_max)
    server = superlink_server(
        firewall,
        settings.host,
        settings.superlink_port,
        home.server_certificate,
        home.server_key,
        home.root_certificate.read_text("ascii") + home.membership_certificate.read_text("ascii"),
        settings.connections_max,
        settings.connections_per_caller,
    )
    handle_exit = server.handle_exit

    def end(sig: int, frame: FrameType | None) -> None:
        firewall.closing = True
        handle_exit(sig, frame)

    server.handle_exit = end  # type: ignore[method-assign]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn gives it on at its end, and what follows is done
    access.start()
    refusals.start()
    try:
        server.run()
    finally:
        access.stop()
        refusals.stop()


main()
