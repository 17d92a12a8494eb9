"""One run in one file, for somebody who trusts neither the coordinator nor the partners.

A zip without compression, whose members are these, in this order, each at most once:

    index.json      which files there are, with size and SHA-256; signed by the coordinator
    keys.json       from the federation's root to everybody's keys, as of the roster that the manifest names
    manifest.json   signed by the organisation that started the run
    plan.json       what was run
    approvals.json  signed by the nodes; of a private run their digests only, for they tell rows
    environment.json, rounds.json, metrics.json
    updates.json    for each Update that was taken the coordinator's receipt, and the node's own word
    audit.json      the run's entries of the audit log, with proofs, under a signed head
    guarantee.json  what is promised about privacy, where the run has a label
    release.json    signed, where the model was released
    model-card.md
    model.safetensors

Nothing is ever unpacked: members are read where they lie. `write_capsule` and `open_capsule` are the two ends.
"""

import hashlib
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, ClassVar, Literal, Self, cast

from pydantic import Field, ValidationError

from concord_shared.documents import Id, ModelFile, Seconds
from concord_shared.errors import ArtefactError, DocumentRefusedError
from concord_shared.files import explain, file_digest, replacing
from concord_shared.plan.section import Name
from concord_shared.signing import Document, Envelope, PrivateKey, seal

__all__ = ["INDEX", "MEMBERS", "MODEL", "Capsule", "CapsuleIndex", "open_capsule", "write_capsule"]

INDEX, MODEL = "index.json", "model.safetensors"
MEMBERS = (
    INDEX,
    "keys.json",
    "manifest.json",
    "plan.json",
    "approvals.json",
    "environment.json",
    "rounds.json",
    "metrics.json",
    "updates.json",
    "audit.json",
    "guarantee.json",
    "release.json",
    "model-card.md",
    MODEL,
)
NEEDED = frozenset(MEMBERS) - {"guarantee.json", "release.json", "model-card.md", MODEL}
MEMBER_BYTES_MAX, MODEL_BYTES_MAX = 256 << 20, 64 << 30
DIRECTORY_BYTES_MAX = 64 << 10
END = struct.Struct("<4s4H2LH")
LOCAL_HEADER, WIDE_SIZES = 30, 20
"""Bytes before a member's name; and behind it, where a size may not fit into 32 bits."""
MOMENT = (1980, 1, 1, 0, 0, 0)
MODE = 0o100600 << 16
CHUNK = 1 << 20


class CapsuleIndex(Document):
    """files: all members but the index itself. state: how the run ended."""

    SCHEMA: ClassVar[str] = "concord/capsule/1"
    federation: Name
    run: Id
    state: Literal["succeeded", "failed", "stopped"]
    files: tuple[ModelFile, ...] = Field(max_length=len(MEMBERS))
    issued_at: Seconds


def write_capsule(path: Path, index: CapsuleIndex, members: Mapping[str, bytes | Path], key: PrivateKey) -> None:
    """Replaces `path`. index: without files, which are those of `members`; the same members make the same bytes.

    Raises:
        ArtefactError: the file system refuses.
    """
    assert set(members) <= set(MEMBERS[1:])
    try:
        named = [name for name in MEMBERS if name in members]
        files = tuple(_described(name, members[name]) for name in named)
        signed = seal(index.model_copy(update={"files": files}), key).model_dump_json().encode()
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name in (INDEX, *named):
                _add(archive, name, signed if name == INDEX else members[name])
    except OSError as error:
        raise ArtefactError(f"cannot write {path}: {explain(error)}") from error


class Capsule:
    """An open capsule; every member is what the index says. A context manager."""

    def __init__(self, archive: zipfile.ZipFile, index: CapsuleIndex, envelope: Envelope) -> None:
        self._archive, self.index, self.envelope = archive, index, envelope
        self._files = {file.name: file for file in index.files}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def has(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> bytes:
        """Raises: DocumentRefusedError: other bytes than the index says."""
        with self.open(name) as (file, size):
            return file.read(size)

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """A member as a file, read twice: first as a whole against its digest."""
        digest = hashlib.sha256()
        with _reading(name), self._archive.open(name) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != self._files[name].sha256:
            raise DocumentRefusedError(f"{name} was altered: it is not the file that the index names")
        with _reading(name), self._archive.open(name) as file:
            yield cast(BinaryIO, file), self._files[name].size


def open_capsule(path: Path) -> Capsule:
    """A capsule whose index is *not verified yet* (its signer is in keys.json), after these checks:

    1. a zip with nothing before, between, behind or commented in it, of at most a few known members, in their order
    2. nothing is compressed or encrypted, sizes are within limits
    3. the index is one, and names exactly the other members, with their sizes

    Raises:
        DocumentRefusedError: with the check that it failed. ArtefactError: it cannot be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            _check_end(file, size)
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {explain(error)}") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise DocumentRefusedError(f"{path} is not a capsule: {str(error)[:100]}") from error
    try:
        infos = archive.infolist()
        _check_members(infos, size, archive.start_dir)
        with _reading(INDEX):
            envelope = Envelope.model_validate_json(archive.read(INDEX))
        index = CapsuleIndex.from_canonical(envelope.bytes)
        named = [(each.name, each.size) for each in index.files]
        if named != [(each.filename, each.file_size) for each in infos[1:]]:
            raise DocumentRefusedError("the index names other files, or other sizes, than the capsule holds")
        return Capsule(archive, index, envelope)
    except (ValidationError, ValueError) as error:
        archive.close()
        raise DocumentRefusedError("the capsule's index cannot be read") from error
    except BaseException:
        archive.close()
        raise


def _check_end(file: BinaryIO, size: int) -> None:
    """The archive ends with its directory, without a comment; the directory is small enough to be read at all."""
    if size < END.size:
        raise ValueError("it is too short")
    file.seek(size - END.size)
    mark, disk, first, here, count, length, offset, comment = END.unpack(file.read(END.size))
    if mark != b"PK\5\6" or disk or first or comment:
        raise ValueError("it does not end as one")
    if here != count or count > len(MEMBERS) or length > DIRECTORY_BYTES_MAX:
        raise ValueError("its directory is too large")
    if offset != 0xFFFFFFFF and offset + length + END.size != size:
        raise ValueError("something lies between its parts")


def _check_members(infos: list[zipfile.ZipInfo], size: int, directory: int) -> None:
    """directory: where it begins: right behind the last member, as each member does behind the one before."""
    names = [each.filename for each in infos]
    known = [name for name in MEMBERS if name in names]
    if names != known or not set(known) >= NEEDED or names[:1] != [INDEX]:
        raise DocumentRefusedError(f"expected the members {', '.join(MEMBERS[:4])} … in this order, got {names[:20]}")
    place, ends = 0, [*(each.header_offset for each in infos[1:]), directory]
    for each, end in zip(infos, ends, strict=True):
        limit = MODEL_BYTES_MAX if each.filename == MODEL else MEMBER_BYTES_MAX
        if each.compress_type != zipfile.ZIP_STORED or each.compress_size != each.file_size or each.flag_bits:
            raise DocumentRefusedError(
                f"{each.filename} is compressed or encrypted; a capsule stores files as they are"
            )
        if each.file_size > min(limit, size):
            raise DocumentRefusedError(f"{each.filename} has {each.file_size} bytes, expected at most {limit}")
        if each.extra and each.file_size < 1 << 31:
            raise DocumentRefusedError(f"{each.filename} carries more than its bytes")
        if each.comment or each.date_time != MOMENT or each.external_attr != MODE or each.header_offset != place:
            raise DocumentRefusedError(f"{each.filename} is not stored as a capsule stores files")
        beside = end - place - LOCAL_HEADER - len(each.filename) - each.file_size
        if beside != 0 and not (beside == WIDE_SIZES and each.file_size > 1 << 30):
            raise DocumentRefusedError(f"{each.filename} is not stored as a capsule stores files: {beside} bytes more")
        place = end


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, RuntimeError, struct.error) as error:
        raise DocumentRefusedError(f"{name} cannot be read: {str(error)[:100]}") from error


def _described(name: str, content: bytes | Path) -> ModelFile:
    if isinstance(content, bytes):
        return ModelFile(name=name, sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    return ModelFile(name=name, sha256=file_digest(content), size=content.stat().st_size)


def _add(archive: zipfile.ZipFile, name: str, content: bytes | Path) -> None:
    info = zipfile.ZipInfo(name, MOMENT)
    info.create_system, info.external_attr = 3, MODE
    info.file_size = len(content) if isinstance(content, bytes) else content.stat().st_size
    with archive.open(info, "w") as target:
        if isinstance(content, bytes):
            target.write(content)
            return
        with content.open("rb") as source:
            while chunk := source.read(CHUNK):
                target.write(chunk)
