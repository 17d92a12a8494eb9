"""A log of what happened: entries chained by hashes, and the log as a file that anybody can verify.

    hash(n) = SHA-256(0x00 ‖ hash(n − 1) ‖ body(n))      hash(0) = 32 zero bytes

body is the entry's canonical JSON. The hash of an entry is also its leaf in the Merkle tree, so that a signed head over
the tree stands for the whole chain. As a file:

    {"head":…,"key":…,"schema":"concord/audit-log/1"}     the signed head, and the public key of its signer
    {"body":{…},"hash":"…"}                               one line an entry, all of it canonical JSON
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from pydantic import Field, ValidationError

from concord_shared.canonical import canonical_bytes
from concord_shared.documents import Count, Line
from concord_shared.errors import DocumentRefusedError, LogBrokenError
from concord_shared.evidence.heads import TreeHead, is_canonical_base64
from concord_shared.evidence.merkle import HASH_BYTES, Read, completed, leaf_hash, root_of
from concord_shared.signing import (
    Document,
    Envelope,
    PublicKey,
    Record,
    fingerprint,
    open_envelope,
    public_text,
    read_public_text,
)

__all__ = [
    "GENESIS",
    "LOG_BYTES_MAX",
    "Entry",
    "Frontier",
    "VerifiedLog",
    "chained",
    "entry_hash",
    "entry_line",
    "export_log",
    "plain_detail",
    "verify_log",
]

LOG_SCHEMA = "concord/audit-log/1"
LOG_BYTES_MAX = 4 << 30
HEADER_BYTES_MAX = 64 << 10
GENESIS = bytes(HASH_BYTES)
_BEFORE, _BETWEEN, _AFTER = b'{"body":', b',"hash":"', b'"}'
_TAIL = len(_BETWEEN) + 2 * HASH_BYTES + len(_AFTER)


class Entry(Document):
    """One thing that happened. sequence counts from 1, without gaps. at: UTC, ISO 8601 to the microsecond.

    actor: `person:NAME`, `node:NAME`, `address:IP`, `coordinator` or `owner`; action: `subject:verb`.
    """

    SCHEMA: ClassVar[str] = "concord/audit-entry/1"
    sequence: int = Field(ge=1, lt=1 << 53)
    at: Line
    actor: str
    action: Line
    subject: str
    detail: dict[str, Any]


class VerifiedLog(Record):
    """What a verified file is: whose log, how many entries, its root, who signed it (a key's fingerprint)."""

    log: str
    entries: Count
    root: str
    signed_at: int
    key: str


def entry_hash(before: bytes, body: bytes) -> bytes:
    return leaf_hash(before + body)


def plain_detail(detail: Any) -> Any:
    """JSON as every database gives it back: what cannot be encoded is replaced, tuples are lists."""
    return json.loads(json.dumps(detail, ensure_ascii=False).encode("utf-8", "replace"))


def chained(entry: Entry, before: bytes, read: Read) -> tuple[bytes, list[tuple[int, int, bytes]]]:
    """The hash of an entry that follows the one with the hash `before`, and the subtrees that it completes."""
    found = entry_hash(before, entry.canonical)
    return found, list(completed(entry.sequence - 1, found, read))


class Frontier:
    """The newest full subtree of every level: all that a root needs while entries are appended."""

    def __init__(self) -> None:
        self.size = 0
        self._newest: dict[int, tuple[int, bytes]] = {}

    def append(self, leaf: bytes) -> None:
        above = list(completed(self.size, leaf, self._read))
        for level, index, found in ((0, self.size, leaf), *above):
            self._newest[level] = index, found
        self.size += 1

    @property
    def root(self) -> bytes:
        return root_of(self.size, self._read)

    def _read(self, level: int, index: int) -> bytes:
        there, found = self._newest[level]
        assert there == index
        return found


# A log as a file


def entry_line(body: bytes, found: bytes) -> bytes:
    return _BEFORE + body + _BETWEEN + found.hex().encode() + _AFTER + b"\n"


def export_log(head: Envelope, key: PublicKey, entries: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """The lines of the file. entries: body and hash of each."""
    header = {"schema": LOG_SCHEMA, "head": head.model_dump(mode="json"), "key": public_text(key)}
    yield canonical_bytes(header) + b"\n"
    for body, found in entries:
        yield entry_line(body, found)


def verify_log(content: bytes, trusted: str | None = None, remembered: Sequence[tuple[int, str]] = ()) -> VerifiedLog:
    """Verifies a log's file, whole, without asking anybody:

    1. each entry's hash covers what it says and the hash before it
    2. the head is signed by the key `trusted` (a fingerprint; None to be told whose it is)
    3. the entries are exactly as many as the head says, and their root is the head's
    4. the log begins with every one of the `remembered` heads `(size, root)`

    What was cut off together with its head, and what was rewritten and signed anew, is found by (4) alone: by someone
    who remembers a head from before.

    Raises:
        LogBrokenError: an entry was altered, removed, inserted, reordered or cut; says which.
        DocumentRefusedError: the head is not what it claims to be.
    """
    if not content.endswith(b"\n") or len(content) > LOG_BYTES_MAX:
        raise DocumentRefusedError("not a log: the file is empty, too large, or its last line is cut")
    header, *lines = content[:-1].split(b"\n")
    hashes, before = [], GENESIS
    for number, line in enumerate(lines, 1):  # first the chain alone: it tells which entry it was
        body, stated = _parts(line)
        before = entry_hash(before, body)
        if stated != before.hex().encode():
            raise _diagnosed(lines, number)
        hashes.append(before)
    tree = Frontier()
    roots = {size: {root for other, root in remembered if other == size} for size, _ in remembered}
    for number, leaf in enumerate(hashes, 1):
        tree.append(leaf)
        if number in roots and roots[number] != {tree.root.hex()}:
            raise LogBrokenError(
                f"the log was rewritten: its first {number} entries are not those of the head that you remember",
                number,
            )
    key, head = _header(header, trusted)
    _check_head(head, len(lines), tree.root.hex())
    for size in roots:
        if size > len(lines):
            raise LogBrokenError(
                f"the log was cut: you remember {size} entries, it has {len(lines)}; entry {len(lines) + 1} is the "
                "first that is missing",
                len(lines) + 1,
            )
    for number, line in enumerate(lines, 1):
        if Entry.from_canonical(_parts(line)[0]).sequence != number:
            raise LogBrokenError(f"entry {number} carries another number; whoever signed this log numbered it wrongly",
                                 number)  # fmt: skip
    return VerifiedLog(log=head.log, entries=head.size, root=head.root, signed_at=head.issued_at, key=fingerprint(key))


def _check_head(head: TreeHead, entries: int, root: str) -> None:
    if entries < head.size:
        raise LogBrokenError(
            f"the log was cut: it holds {entries} entries, its signed head says {head.size}; entry {entries + 1} is "
            "the first that is missing",
            entries + 1,
        )
    if entries > head.size:
        raise LogBrokenError(
            f"entries were added: the log holds {entries}, its signed head says {head.size}; entry {head.size + 1} is "
            "covered by no signature",
            head.size + 1,
        )
    if root != head.root:
        raise LogBrokenError(
            "the entries follow each other, and are not those that the head was signed for: some were rewritten, with "
            "all that come after them",
            None,
        )


def _header(line: bytes, trusted: str | None) -> tuple[PublicKey, TreeHead]:
    """The signer's key and the head, in exactly this spelling."""
    if len(line) > HEADER_BYTES_MAX:
        raise DocumentRefusedError("the first line of the log is too long for a signed head")
    try:
        found = json.loads(line)
        envelope = Envelope.model_validate_json(json.dumps(found["head"]))
        key = read_public_text(found["key"])
        same = canonical_bytes({"schema": LOG_SCHEMA, "head": found["head"], "key": public_text(key)}) == line
    except (ValueError, TypeError, KeyError, RecursionError, ValidationError) as error:
        raise DocumentRefusedError("the first line of the log is not a signed head") from error
    spelled = [envelope.payload, *(each.signature for each in envelope.signatures)]
    if not same or len(envelope.signatures) != 1 or not all(map(is_canonical_base64, spelled)):
        raise DocumentRefusedError("the first line of the log was altered: it is not as its writer spells it")
    if trusted is not None and fingerprint(key) != trusted:
        raise DocumentRefusedError(
            f"the log is signed by key {fingerprint(key)[:16]}…, expected {trusted[:16]}…: it is another one's log, or "
            "somebody signed it anew"
        )
    return key, open_envelope(envelope, TreeHead, [key])


def _parts(line: bytes) -> tuple[bytes, bytes]:
    """Body and stated hash, hexadecimal; an empty one where the line has not the form of an entry."""
    if line[: len(_BEFORE)] != _BEFORE or line[-_TAIL : len(_BETWEEN) - _TAIL] != _BETWEEN or line[-2:] != _AFTER:
        return line, b""
    return line[len(_BEFORE) : -_TAIL], line[len(_BETWEEN) - _TAIL : -len(_AFTER)]


def _diagnosed(lines: Sequence[bytes], number: int) -> LogBrokenError:
    """What happened at line `number`, the first that does not follow from those before it."""
    before = GENESIS if number == 1 else _hash(_parts(lines[number - 2])[1])
    body, stated = _parts(lines[number - 1])
    here = _number_of(body)
    after, hash_after = _parts(lines[number]) if number < len(lines) else (b"", b"")
    if stated and here is not None and here != number and _number_of(after) != number + 1:
        if any(_number_of(_parts(line)[0]) == number for line in lines[number : number + 1000]):
            return LogBrokenError(f"entries are out of order: entry {here} stands in the place of entry {number}",
                                  number)  # fmt: skip
        if here > number:
            gone = f"entry {number} was" if here == number + 1 else f"entries {number} to {here - 1} were"
            return LogBrokenError(f"{gone} removed: entry {here} stands in its place", number)
        return LogBrokenError(f"entry {here} stands a second time, in the place of entry {number}", number)
    if hash_after and _fits(entry_hash(before, body), after, hash_after):
        return LogBrokenError(f"the hash of entry {number} was altered; what it says is as it was", number)
    also = f" (or entry {number - 1} was, together with its hash)" if number > 1 else ""
    return LogBrokenError(f"entry {number} was altered: what it says is not what its hash covers{also}", number)


def _fits(before: bytes, body: bytes, stated: bytes) -> bool:
    return entry_hash(before, body).hex().encode() == stated


def _hash(stated: bytes) -> bytes:
    return bytes.fromhex(stated.decode("ascii"))


def _number_of(body: bytes) -> int | None:
    try:
        found = json.loads(body)["sequence"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if isinstance(found, int) else None
