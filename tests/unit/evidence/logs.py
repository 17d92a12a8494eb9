"""Logs for tests."""

from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from concord_shared.evidence.heads import TreeHead
from concord_shared.evidence.log import GENESIS, Entry, Frontier, entry_hash, export_log
from concord_shared.signing import new_identity_key, seal

KEY = new_identity_key()


def entries_of(count: int, **changed: Any) -> list[Entry]:
    return [
        Entry(sequence=number, at="2026-01-01T00:00:00.000000+00:00", actor="coordinator", action="run:step",
              subject="run", detail={"n": number} | changed)
        for number in range(1, count + 1)
    ]  # fmt: skip


def chain_of(entries: list[Entry]) -> list[tuple[bytes, bytes]]:
    found, before = [], GENESIS
    for entry in entries:
        before = entry_hash(before, entry.canonical)
        found.append((entry.canonical, before))
    return found


def head_of(chain: list[tuple[bytes, bytes]], log: str = "hearts/coordinator") -> TreeHead:
    tree = Frontier()
    for _, leaf in chain:
        tree.append(leaf)
    return TreeHead(log=log, size=len(chain), root=tree.root.hex(), issued_at=1)


def written(chain: list[tuple[bytes, bytes]], key: Ed25519PrivateKey = KEY, head: TreeHead | None = None) -> bytes:
    return b"".join(export_log(seal(head or head_of(chain), key), key.public_key(), chain))
