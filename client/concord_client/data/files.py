"""The files behind a SPEC: which they are, whether the owner exposed them, and whether they stayed as they were."""

import contextlib
import gzip
import importlib.util
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from concord_shared.errors import DataError, SourceError
from concord_shared.files import explain

__all__ = ["check_roots", "files_of", "open_bounded", "stamps_of", "unchanged"]

FILES_MAX = 5_000_000
EXPANSION_MAX = 200
"""Bytes that a compressed table may give for each of its own; tables of numbers and text give 3 to 30."""
EXPANDED_FREE_BYTES = 64 << 20
GZIP = b"\x1f\x8b"


def files_of(spec: str) -> dict[str, Path]:
    """What a resolved SPEC reads, by name; "" for a single file. Names that begin with a dot are left out.

    Raises:
        DataError: nothing is there.
    """
    found = _there(spec)
    if not found:
        raise DataError(f"{spec.partition(':')[2]}: no files; name the directory that holds those of the data")
    return found


def _there(spec: str) -> dict[str, Path]:
    adapter, _, where = spec.partition(":")
    path = _bundled_digits() if adapter == "digits" else Path(where)
    if path.is_file():
        return {"": path}
    found = {}
    for directory, folders, names in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                file = Path(directory) / name
                found[file.relative_to(path).as_posix()] = file
        if len(found) > FILES_MAX:
            raise DataError(f"{path}: more than {FILES_MAX} files")
    return dict(sorted(found.items()))


def stamps_of(files: Mapping[str, Path]) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file."""
    try:
        found = {name: file.stat() for name, file in files.items()}
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {explain(error)}") from error
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


@contextlib.contextmanager
def unchanged(spec: str) -> Iterator[None]:
    """Around a reading of all of `spec`; where no files are there, the reader says which it expects.

    Raises:
        SourceError: a file of it changed in the meantime, so that what was read may be neither the old nor the new.
    """
    before = stamps_of(_there(spec))
    yield
    try:
        same = stamps_of(_there(spec)) == before
    except DataError:
        same = False
    if not same:
        raise SourceError(spec, "changed while it was read; let whatever writes it finish, and try again")


def check_roots(files: Mapping[str, Path], roots: Sequence[str]) -> None:
    """Whether the owner exposed these files. roots: of the policy; none: whatever the owner registers.

    Raises:
        SourceError: one of them lies elsewhere, or is a link that leads there.
    """
    if not roots:
        return
    allowed = [Path(root).expanduser().resolve() for root in roots]
    outside = sum(
        not any(real.is_relative_to(root) for root in allowed) for real in (file.resolve() for file in files.values())
    )
    if outside:
        raise SourceError(
            next(iter(files.values())),
            f"{outside} of {len(files)} files lie outside of what the owner exposed: data.roots in policy.toml",
        )


def open_bounded(file: Path) -> IO[bytes]:
    """A file of text, or its content where it is compressed by gzip.

    Raises:
        OSError: it cannot be opened. While reading, SourceError: it expands beyond all measure.
    """
    plain = file.open("rb")
    if plain.peek(2)[:2] != GZIP:
        return plain
    plain.close()
    limit = max(EXPANDED_FREE_BYTES, EXPANSION_MAX * file.stat().st_size)
    return io.BufferedReader(_Expanding(file, gzip.GzipFile(file), limit))


class _Expanding(io.RawIOBase):
    """Counts what comes out of a compressed file."""

    def __init__(self, file: Path, content: gzip.GzipFile, bytes_max: int) -> None:
        self._file, self._content, self._left = file, content, bytes_max

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._content.readinto(buffer)
        self._left -= size
        if self._left < 0:
            raise SourceError(
                self._file,
                f"gives more than {EXPANSION_MAX} bytes for each of its own: no table does. Uncompress it yourself if "
                "you trust it",
            )
        return size

    def close(self) -> None:
        if not self.closed:
            self._content.close()
        super().close()


def _bundled_digits() -> Path:
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError("the digits come with scikit-learn, which is not installed")
    return Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
