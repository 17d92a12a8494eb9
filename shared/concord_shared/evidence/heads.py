"""What the owner of a log signs from time to time, and what the others remember: how many entries, and their root.

Whoever holds a head of a log demands of each later one a proof that it only grew. One that was cut, rewritten or forked
has no such proof, whoever signs it. Two parties who never compare what they hold could be shown two logs.
"""

import base64
import re
from collections.abc import Sequence
from typing import ClassVar

from concord_shared.documents import Count, Digest, Line, Seconds
from concord_shared.errors import DocumentRefusedError, LogForkedError, UsageError
from concord_shared.evidence.merkle import verify_consistency
from concord_shared.signing import Document

__all__ = ["TreeHead", "check_grown", "coordinator_log", "is_canonical_base64", "node_log", "read_mark"]


class TreeHead(Document):
    """log: whose, `coordinator_log` or `node_log`. root: of the Merkle tree over the first `size` entries."""

    SCHEMA: ClassVar[str] = "concord/tree-head/1"
    log: Line
    size: Count
    root: Digest
    issued_at: Seconds

    @property
    def mark(self) -> str:
        """As people compare it."""
        return f"{self.size}:{self.root}"


def coordinator_log(federation: str) -> str:
    return f"{federation}/coordinator"


def node_log(federation: str, organisation: str, node: str) -> str:
    return f"{federation}/{organisation}/{node}"


def check_grown(before: TreeHead, after: TreeHead, proof: Sequence[str]) -> None:
    """`after` is a head of the same log, which only grew since `before`.

    Raises:
        LogForkedError: it was cut, rewritten or forked, or is another log; with the two heads.
    """
    try:
        if before.log != after.log:
            raise DocumentRefusedError(f"a head of the log {after.log}, expected one of {before.log}")
        parts = [bytes.fromhex(part) for part in proof]
        verify_consistency(before.size, bytes.fromhex(before.root), after.size, bytes.fromhex(after.root), parts)
    except (ValueError, DocumentRefusedError) as error:
        raise LogForkedError(f"{error} (remembered {before.mark[:24]}…, shown {after.mark[:24]}…)") from error


def read_mark(text: str) -> tuple[int, str]:
    """`SIZE:ROOT`, as `TreeHead.mark` writes it. Raises: UsageError."""
    match = re.fullmatch(r"(\d{1,15}):([0-9a-f]{64})", text.strip().lower())
    if match is None:
        raise UsageError(f"expected SIZE:ROOT, as `audit head` prints it, got {text[:80]!r}")
    return int(match[1]), match[2]


def is_canonical_base64(text: str) -> bool:
    """Whether nobody else's spelling means the same bytes."""
    try:
        return base64.b64encode(base64.b64decode(text, validate=True)).decode() == text
    except ValueError:
        return False
