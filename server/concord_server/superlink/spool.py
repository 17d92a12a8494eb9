"""Objects of messages on the disk: eight replies of 100 MB wait there and not in memory."""

import itertools
import shutil
import weakref
from pathlib import Path

from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

__all__ = ["SpooledObjectStore"]

SPOOLED_FROM_BYTES = 64 << 10


class SpooledObjectStore(InMemoryObjectStore):
    """Flower's in-memory store of objects, the larger ones in files of `directory` until they are deleted."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        shutil.rmtree(directory, ignore_errors=True)  # of a process that was killed
        directory.mkdir(parents=True, mode=0o700)
        self._directory = directory
        self._numbers = itertools.count()
        self._files: dict[str, Path] = {}

    def put(self, object_id: str, object_content: bytes) -> None:
        if len(object_content) < SPOOLED_FROM_BYTES:
            super().put(object_id, object_content)
            return
        if get_object_id(object_content) != object_id:
            raise ValueError(f"Object ID {object_id} does not match content hash")
        validate_object_content(object_content)
        path = self._directory / str(next(self._numbers))
        path.write_bytes(object_content)
        with self.lock_store:
            entry = self.store.get(object_id)
            if entry is None or entry.is_available:
                path.unlink()
                if entry is None:
                    raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
                return
            self._files[object_id] = path
            entry.is_available = True
            weakref.finalize(entry, self._drop, object_id, path)

    def get(self, object_id: str) -> bytes | None:
        with self.lock_store:
            path = self._files.get(object_id)
            if path is not None:
                return path.read_bytes()
            return super().get(object_id)

    def _drop(self, object_id: str, path: Path) -> None:
        """Its entry was deleted: nobody will ask again."""
        if self._files.get(object_id) == path:
            del self._files[object_id]
        path.unlink(missing_ok=True)
