"""`concord server status DIR`: what runs, and whether it answers."""

import datetime
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import col, select

from concord_server.audit.tables import NodeHead
from concord_server.client import Coordinator
from concord_server.settings import Home
from concord_shared.certificates import read_certificate
from concord_shared.errors import ConcordError

__all__ = ["status"]


def status(path: Path, wait_s: float = 0.0) -> dict[str, Any]:
    """healthy: every process lives, the API answers over TLS, and the SuperLink's port is open.

    wait_s: how long to wait for that.
    """
    home = Home.open(path)
    deadline = time.monotonic() + wait_s
    while True:
        found = _look(home)
        if found["healthy"] or time.monotonic() >= deadline:
            return found
        time.sleep(0.1)


def _look(home: Home) -> dict[str, Any]:
    up = _read_up(home)
    ports = up["ports"]
    processes = {name: _process(pid, up["restarts"][name]) for name, pid in up["pids"].items()}
    health = _health(home, ports["control"]) if "control" in processes else None
    superlink = _listens(home, ports["superlink"]) if "superlink" in processes else None
    alive = bool(processes) and all(each["alive"] for each in processes.values())
    return {
        "directory": str(home.path),
        "federation": home.settings.federation,
        "running": up["supervisor"] is not None and _alive(up["supervisor"]),
        "healthy": alive and (health is None or health.get("status") == "ok") and superlink is not False,
        "supervisor": up["supervisor"],
        "processes": processes,
        "ports": ports,
        "started": up["started"],
        "health": health,
        "alarms": _alarms(home),
        "certificates": _certificates(home),
    }


def _alarms(home: Home) -> dict[str, str]:
    """By node, why its log is not what it was; none is told where the database does not answer."""
    database = home.database()
    try:
        with database.reading() as session:
            rows = session.exec(select(NodeHead).where(NodeHead.alarm != "").order_by(col(NodeHead.node)))
            return {row.node: row.alarm for row in rows}
    except (ConcordError, SQLAlchemyError):
        return {}
    finally:
        database.close()


def _read_up(home: Home) -> dict[str, Any]:
    """What the supervisor wrote down; it takes it away when it ends."""
    try:
        found: dict[str, Any] = json.loads(home.up_file.read_text("utf-8"))
    except (OSError, ValueError):
        return {"supervisor": None, "pids": {}, "restarts": {}, "ports": {}, "started": None}
    return found


def _process(pid: int | None, restarts: int) -> dict[str, Any]:
    return {"pid": pid, "alive": pid is not None and _alive(pid), "restarts": restarts}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """It has ended, and whoever started it has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] == "Z"
    except (OSError, ValueError):
        return False


def _health(home: Home, port: int) -> dict[str, Any]:
    try:
        url, name = f"https://{home.settings.own_host}:{port}", home.settings.public_host
        with Coordinator(url, root_pem=_trusted(home), hostname=name) as coordinator:
            return coordinator.get("/api/health")
    except ConcordError as error:
        return {"status": "unreachable", "reason": str(error)}


def _listens(home: Home, port: int) -> bool:
    try:
        with socket.create_connection((_address(home), port), timeout=2):
            return True
    except OSError:
        return False


def _address(home: Home) -> str:
    """Where this machine reaches its own listeners."""
    return home.settings.own_host.strip("[]")


def _trusted(home: Home) -> str:
    """The federation's root; for a listener with another certificate, that one too."""
    files = [home.root_certificate, *([Path(home.settings.certificate)] if home.settings.certificate else [])]
    return "\n".join(each.read_text("ascii") for each in files)


def _certificates(home: Home) -> dict[str, str]:
    """Until when each holds."""
    ends = {}
    for name, path in (("membership", home.membership_certificate), ("server", home.server_certificate)):
        until: datetime.datetime = read_certificate(path.read_text("ascii")).not_valid_after_utc
        ends[name] = until.isoformat()
    return ends
