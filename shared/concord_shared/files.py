"""Files that are either whole or absent: write, fsync, rename."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from concord_shared.errors import ArtefactError

__all__ = ["explain", "file_digest", "replacing", "sync_directory", "write_atomically"]


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replaces `path` with `content`; after a crash the old or the new file is there, never a part.

    Raises:
        ArtefactError: as `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a file to write, which takes the place of `path` at the end of the block, whole and on the disk.

    Raises:
        ArtefactError: the file system refuses (full disk, no permission, no directory).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise ArtefactError(f"cannot write {path}: {explain(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def explain(error: OSError) -> str:
    """What an `OSError` means to a person, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full. Free some space and try again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.strerror}. Give this account the right to it, or choose another place"
    return error.strerror or str(error)


def sync_directory(directory: Path) -> None:
    """Makes names in it durable."""
    if os.name == "nt":  # a directory cannot be opened there
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
