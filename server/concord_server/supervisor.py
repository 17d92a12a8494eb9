"""`concord server up DIR`: the coordinator's processes, kept alive, ended together.

    starting ──► running ──died──► waiting (back-off) ──► starting
        SIGTERM or SIGINT ──► draining (SIGTERM to all, at most 15 s, then SIGKILL) ──► ended

A child that lived for a minute begins again with the shortest wait. Children end when their parent does, however it
ended: Linux tells them. DIR/up.json says which processes and ports there are.
"""

import contextlib
import ctypes
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from concord_server.database import utc_now
from concord_server.logs import start_logging
from concord_server.settings import Home, Settings
from concord_shared.errors import ArtefactError, UsageError
from concord_shared.files import write_atomically

__all__ = ["CHILDREN", "supervise"]

log = logging.getLogger(__name__)
CHILDREN = ("control", "superlink", "worker")
WAIT_S_MIN, WAIT_S_MAX, LIVED_S = 0.5, 30.0, 60.0
DRAIN_S = 15.0
TICK_S = 0.1
AGAIN_S = 5.0
PR_SET_PDEATHSIG = 1


@dataclass
class _Child:
    """One process and its successors. wait_s: how long before the next start, if it dies now."""

    name: str
    command: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    wait_s: float = WAIT_S_MIN
    start_at: float = 0.0
    restarts: int = field(default=-1)

    def start(self, now: float) -> None:
        self.process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
            self.command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )
        self.started, self.restarts = now, self.restarts + 1

    def step(self, now: float) -> bool:
        """Starts what should run; notes what died. Returns whether something changed."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return False
            self._died(code, now)
            return True
        if now < self.start_at:
            return False
        self.start(now)
        return True

    def _died(self, code: int, now: float) -> None:
        if now - self.started >= LIVED_S:
            self.wait_s = WAIT_S_MIN
        log.error("a process died", extra={"child": self.name, "code": code, "restart_in_s": self.wait_s})
        self.process, self.start_at = None, now + self.wait_s
        self.wait_s = min(self.wait_s * 2, WAIT_S_MAX)


def supervise(path: Path, only: Sequence[str] = ()) -> None:
    """Runs the coordinator until it is told to end.

    only: some of `CHILDREN`, for those who let another supervisor keep each of them.

    Raises:
        UsageError: it is running already, or a port is taken.
        ArtefactError: directory or database cannot be used.
    """
    home = Home.open(path)
    start_logging("supervisor", home.settings.log_level)
    os.umask(0o077)
    home.database().check()
    home.database().close()
    with _alone(home), _told_to_end() as ending:
        ports = _choose_ports(home.settings)
        children = [_child(name, home, ports) for name in only or CHILDREN]
        started = utc_now().isoformat()
        log.info("coordinator is up", extra={"ports": ports})
        write_at = float("inf")
        try:
            while not ending.is_set:
                now = time.monotonic()
                changed = [child.step(now) for child in children]
                if any(changed):
                    write_at = now
                if now >= write_at:
                    write_at = float("inf") if _write_state(home, children, ports, started) else now + AGAIN_S
                time.sleep(TICK_S)
        finally:
            _drain(children)
            home.up_file.unlink(missing_ok=True)


@dataclass
class _Ending:
    is_set: bool = False


@contextlib.contextmanager
def _told_to_end() -> Iterator[_Ending]:
    """Takes SIGTERM and SIGINT as a word to end."""
    ending = _Ending()

    def end(_signal: int, _frame: FrameType | None) -> None:
        ending.is_set = True

    before = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ending
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _alone(home: Home) -> Iterator[None]:
    """One supervisor a directory. The lock is the file's, so it ends with the process."""
    with (home.path / "up.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"{home.path} is up already; see: concord server status {home.path}") from error
        yield


def _child(name: str, home: Home, ports: dict[str, int]) -> _Child:
    environment = os.environ | {f"CONCORD_{each.upper()}_PORT": str(port) for each, port in ports.items()}
    return _Child(name, [sys.executable, "-m", f"concord_server.{name}", str(home.path)], environment)


def _choose_ports(settings: Settings) -> dict[str, int]:
    """The ports of the settings, or free ones in the place of 0. All processes must know them before one starts."""
    ports = {}
    with contextlib.ExitStack() as probes:
        for name, wanted in (("control", settings.control_port), ("superlink", settings.superlink_port)):
            probe = probes.enter_context(socket.socket(_family(settings.host)))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.host, wanted))
            except OSError as error:
                raise UsageError(
                    f"cannot listen on {settings.host}:{wanted} for {name}: {error.strerror}. Change {name}_port or "
                    "host in settings.toml, or end what uses it"
                ) from error
            ports[name] = probe.getsockname()[1]
    return ports


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _write_state(home: Home, children: Sequence[_Child], ports: dict[str, int], started: str) -> bool:
    """Whether it could be written: on a full disk the coordinator goes on, and `status` knows the state before."""
    state = {
        "supervisor": os.getpid(),
        "pids": {each.name: each.process.pid if each.process else None for each in children},
        "restarts": {each.name: each.restarts for each in children},
        "ports": ports,
        "started": started,
    }
    try:
        write_atomically(home.up_file, json.dumps(state))
        home.up_file.chmod(0o600)
    except (ArtefactError, OSError) as error:
        log.error("the state of the processes cannot be written; trying again", extra={"reason": str(error)})
        return False
    return True


def _drain(children: Sequence[_Child]) -> None:
    processes = {each.name: each.process for each in children if each.process is not None}
    for process in processes.values():
        process.terminate()
    deadline = time.monotonic() + DRAIN_S
    for name, process in processes.items():
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("a process did not end in time and was killed", extra={"child": name})
            process.kill()
            process.wait()


def _end_with_parent() -> Callable[[], None] | None:
    """What a child does before it becomes its program: asks the kernel for SIGTERM when its parent is gone."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(0)

    return ask
