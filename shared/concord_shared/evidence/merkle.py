"""One hash over a log that only grows, and short proofs about it: the Merkle tree of RFC 6962, section 2.1.

                    root of 5 leaves
                   /                \\
            (2, 0)                   (0, 4)         a subtree (level, index) is full: it covers the
           /      \\                                  leaves index·2^level … (index + 1)·2^level − 1
      (1, 0)      (1, 1)
      /   \\       /   \\
    (0,0) (0,1) (0,2) (0,3)

A full subtree never changes again, so it is stored once, when its last leaf is appended. Every root and every proof is
made from stored ones. Pure: `read(level, index)` gives the 32 bytes of a full subtree, from wherever they lie.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

from concord_shared.errors import DocumentRefusedError

__all__ = [
    "HASH_BYTES",
    "PROOF_MAX",
    "Read",
    "completed",
    "consistency_proof",
    "inclusion_proof",
    "leaf_hash",
    "root_of",
    "verify_consistency",
    "verify_inclusion",
]

HASH_BYTES = 32
PROOF_MAX = 64
"""Hashes in a proof: no log has 2^63 entries."""
Read = Callable[[int, int], bytes]


def leaf_hash(data: bytes) -> bytes:
    """SHA-256(0x00 ‖ data)."""
    return hashlib.sha256(b"\0" + data).digest()


def _node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 ‖ left ‖ right): no leaf can pass for a node, nor a node for a leaf."""
    return hashlib.sha256(b"\1" + left + right).digest()


def completed(index: int, leaf: bytes, read: Read) -> Iterator[tuple[int, int, bytes]]:
    """The full subtrees `(level, index, hash)` above the leaf that leaf number `index` completes, lowest first."""
    level, found = 0, leaf
    while index & 1:
        found = _node_hash(read(level, index - 1), found)
        level, index = level + 1, index >> 1
        yield level, index, found


def root_of(size: int, read: Read) -> bytes:
    """The hash of the first `size` leaves; SHA-256 of nothing where there are none."""
    return _range(0, size, read) if size else hashlib.sha256().digest()


def inclusion_proof(index: int, size: int, read: Read) -> list[bytes]:
    """The hashes that lead from leaf `index` to the root of `size` leaves, lowest first (RFC 6962, 2.1.1)."""
    assert 0 <= index < size
    return _path(index, 0, size, read)


def consistency_proof(old: int, new: int, read: Read) -> list[bytes]:
    """The hashes that show that the first `old` of `new` leaves are those of before (RFC 6962, 2.1.2)."""
    assert 0 <= old <= new
    return _sub_proof(old, 0, new, True, read) if 0 < old < new else []


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Raises: DocumentRefusedError: the leaf is not number `index` of the log of that size and root (RFC 9162,
    2.1.3.2)."""
    _check_sizes(proof)
    if not 0 <= index < size:
        raise DocumentRefusedError(f"entry {index + 1} cannot be in a log of {size} entries")
    first, last, found = index, size - 1, leaf
    for part in proof:
        if last == 0:
            raise DocumentRefusedError("the proof of inclusion is longer than the log is high")
        if first & 1 or first == last:
            found = _node_hash(part, found)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            found = _node_hash(found, part)
        first, last = first >> 1, last >> 1
    if last or found != root:
        raise DocumentRefusedError(f"entry {index + 1} is not in the log of {size} entries with this root")


def verify_consistency(old: int, old_root: bytes, new: int, new_root: bytes, proof: Sequence[bytes]) -> None:
    """Raises: DocumentRefusedError: the log of `new` leaves does not begin with that of `old` leaves (RFC 9162,
    2.1.4.2)."""
    _check_sizes(proof)
    if new < old:
        raise DocumentRefusedError(f"the log was cut: it had {old} entries, now it has {new}")
    if old in (0, new):
        if proof or (old == new and old_root != new_root):
            raise DocumentRefusedError(f"two different logs of {new} entries: one of them is a fork")
        return
    parts = list(proof)
    if old & (old - 1) == 0:  # the old root is itself a full subtree
        parts.insert(0, old_root)
    if not parts:
        raise DocumentRefusedError("the proof of consistency is empty")
    first, last = old - 1, new - 1
    while first & 1:
        first, last = first >> 1, last >> 1
    before = after = parts[0]
    for part in parts[1:]:
        if last == 0:
            raise DocumentRefusedError("the proof of consistency is longer than the log is high")
        if first & 1 or first == last:
            before, after = _node_hash(part, before), _node_hash(part, after)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            after = _node_hash(after, part)
        first, last = first >> 1, last >> 1
    if last or before != old_root or after != new_root:
        raise DocumentRefusedError(
            f"the log of {new} entries does not begin with the {old} entries of before: it was rewritten"
        )


def _check_sizes(proof: Sequence[bytes]) -> None:
    if len(proof) > PROOF_MAX or any(len(part) != HASH_BYTES for part in proof):
        raise DocumentRefusedError(f"a proof has at most {PROOF_MAX} hashes of {HASH_BYTES} bytes")


def _range(start: int, stop: int, read: Read) -> bytes:
    """The hash of leaves start … stop − 1, where `start` is a multiple of the power of two that covers them."""
    size = stop - start
    if size & (size - 1) == 0:
        level = size.bit_length() - 1
        return read(level, start >> level)
    middle = start + _split(size)
    return _node_hash(_range(start, middle, read), _range(middle, stop, read))


def _split(size: int) -> int:
    """The largest power of two below `size`."""
    return 1 << ((size - 1).bit_length() - 1)


def _path(index: int, start: int, stop: int, read: Read) -> list[bytes]:
    if stop - start == 1:
        return []
    middle = start + _split(stop - start)
    if index < middle:
        return [*_path(index, start, middle, read), _range(middle, stop, read)]
    return [*_path(index, middle, stop, read), _range(start, middle, read)]


def _sub_proof(old: int, start: int, stop: int, known: bool, read: Read) -> list[bytes]:
    """known: the other side knows the hash of leaves start … stop − 1 by itself, where those are all old ones."""
    if old == stop:
        return [] if known else [_range(start, stop, read)]
    middle = start + _split(stop - start)
    if old <= middle:
        return [*_sub_proof(old, start, middle, known, read), _range(middle, stop, read)]
    return [*_sub_proof(old, middle, stop, False, read), _range(start, middle, read)]
