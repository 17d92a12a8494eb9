"""Objects of messages on the disk: eight replies of 100 MB wait there and not in memory."""

import errno
import itertools
import logging
import shutil
import weakref
from pathlib import Path

from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

__all__ = ["SPOOL_BYTES_MAX", "SpoolFullError", "SpooledObjectStore"]

log = logging.getLogger(__name__)
SPOOLED_FROM_BYTES = 64 << 10
SPOOL_BYTES_MAX = 100_000 << 20


class SpoolFullError(BaseException):
    """There is no room for an object just now; whoever sends it tries again.

    Not an `Exception`: Flower's link state takes every one of those for "this object is not wanted any more", and a
    node would drop its reply.
    """


class SpooledObjectStore(InMemoryObjectStore):
    """Flower's in-memory store of objects, the larger ones in files of `directory` until they are deleted.

    bytes_max: of all files together.
    """

    def __init__(self, directory: Path, bytes_max: int = SPOOL_BYTES_MAX) -> None:
        super().__init__()
        shutil.rmtree(directory, ignore_errors=True)  # of a process that was killed
        directory.mkdir(parents=True, mode=0o700)
        self._directory = directory
        self._numbers = itertools.count()
        self._files: dict[str, Path] = {}
        self._bytes, self._bytes_max = 0, bytes_max
        self._full = False

    def put(self, object_id: str, object_content: bytes) -> None:
        """Raises: SpoolFullError: the disk or the spool is full; nothing of the object was kept."""
        if len(object_content) < SPOOLED_FROM_BYTES:
            super().put(object_id, object_content)
            return
        if get_object_id(object_content) != object_id:
            raise ValueError(f"Object ID {object_id} does not match content hash")
        validate_object_content(object_content)
        path, size = self._directory / str(next(self._numbers)), len(object_content)
        self._write(path, object_content)
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None or entry.is_available:
                self._drop(object_id, path, size)
                if entry is None:
                    raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
                return
            self._files[object_id] = path
            entry.is_available = True
            weakref.finalize(entry, self._drop, object_id, path, size)

    def get(self, object_id: str) -> bytes | None:
        with self.lock_store:
            path = self._files.get(object_id)
            if path is not None:
                return path.read_bytes()
            return super().get(object_id)

    def _write(self, path: Path, content: bytes) -> None:
        """The whole file, or none."""
        try:
            with self.lock_store:
                if self._bytes + len(content) > self._bytes_max:
                    raise OSError(errno.EDQUOT, f"messages have {self._bytes_max} bytes, see spool_quota_mb")
                self._bytes += len(content)
            try:
                path.write_bytes(content)
            except OSError:
                self._drop("", path, len(content))
                raise
        except OSError as error:
            if not self._full:
                log.error("no room for messages; senders try again", extra={"reason": str(error)})
            self._full = True
            reason = f"the coordinator's disk is full: {error.strerror}; its people must make room"
            raise SpoolFullError(reason) from error
        self._full = False

    def _drop(self, object_id: str, path: Path, size: int) -> None:
        """Its entry was deleted: nobody will ask again."""
        with self.lock_store:
            self._bytes -= size
            if self._files.get(object_id) == path:
                del self._files[object_id]
        path.unlink(missing_ok=True)
