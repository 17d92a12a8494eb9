"""One daemon a home: a locked file with its process in it. The lock ends with the process, however that ends."""

import contextlib
import os
import time
from collections.abc import Iterator

from concord_client.home import NodeHome
from concord_shared.errors import ArtefactError
from concord_shared.files import explain

__all__ = ["claim_home", "running_daemon"]

PATIENCE_S = 0.5


@contextlib.contextmanager
def claim_home(home: NodeHome) -> Iterator[None]:
    """Raises: ArtefactError: another daemon works with this home."""
    try:
        descriptor = os.open(home.daemon_pid, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ArtefactError(f"cannot write {home.daemon_pid}: {explain(error)}") from error
    try:
        deadline = time.monotonic() + PATIENCE_S
        while _lock(descriptor) is False:  # someone may only have looked whether it is free
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise ArtefactError(f"{home.path}: another concord-node up works with this home; see concord-node status")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def running_daemon(home: NodeHome) -> int | None:
    """The process of the daemon that works with this home now, or None. What a dead one left behind is not believed."""
    try:
        descriptor = os.open(home.daemon_pid, os.O_RDWR)
    except OSError:
        return None
    try:
        pid = os.read(descriptor, 20).decode("ascii", "replace")
        return int(pid) if pid.isdecimal() and _lock(descriptor) is not True else None
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether it was free; None where the system has no such locks, and the file alone is believed."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
