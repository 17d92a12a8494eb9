"""Evidence in files, verified without asking anybody: a log, or the proof of one entry."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from concord_shared.errors import ArtefactError
from concord_shared.evidence.log import LOG_BYTES_MAX, verify_log
from concord_shared.evidence.proofs import EntryProof, read_proof, verify_entry
from concord_shared.files import explain

__all__ = ["read_limited", "verify_file"]


def verify_file(path: Path, trusted: str | None, remembered: Sequence[tuple[int, str]] = ()) -> dict[str, Any]:
    """What a file of `audit export` or `audit prove` shows, if all of it holds.

    Raises:
        LogBrokenError: an entry of the log was altered, removed, reordered or cut; says which.
        DocumentRefusedError: it is something else. ArtefactError: it cannot be read.
    """
    content = read_limited(path, LOG_BYTES_MAX)
    if f'"{EntryProof.SCHEMA}"'.encode() in content[:100]:
        entry, head, key = verify_entry(read_proof(content), trusted)
        return {"log": head.log, "head": head.mark, "key": key, "entry": entry.model_dump(mode="json")}
    return verify_log(content, trusted, remembered).model_dump(mode="json")


def read_limited(path: Path, bytes_max: int) -> bytes:
    """Raises: ArtefactError: it cannot be read, or is larger."""
    try:
        size = path.stat().st_size
        if size > bytes_max:
            raise ArtefactError(f"{path} has {size} bytes, expected at most {bytes_max}")
        return path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {explain(error)}") from error
