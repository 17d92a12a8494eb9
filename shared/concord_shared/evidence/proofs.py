"""One entry of a log, for somebody who holds nothing else of it: the entry, a signed head, and the way between."""

import json
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, ValidationError

from concord_shared.documents import Digest
from concord_shared.errors import DocumentRefusedError
from concord_shared.evidence.heads import TreeHead
from concord_shared.evidence.log import Entry, entry_hash
from concord_shared.evidence.merkle import PROOF_MAX, verify_inclusion
from concord_shared.signing import (
    Envelope,
    PublicKey,
    Record,
    fingerprint,
    open_envelope,
    public_text,
    read_public_text,
)

__all__ = ["PROOF_BYTES_MAX", "EntryProof", "proof_text", "prove_entry", "read_proof", "verify_entry"]

PROOF_BYTES_MAX = 4 << 20


class EntryProof(Record):
    """body: the entry's canonical JSON. before: the hash of the entry before it. key: that of the head's signer."""

    SCHEMA: ClassVar[str] = "concord/audit-proof/1"
    schema_: str = Field(alias="schema", pattern="^concord/audit-proof/1$")
    body: str = Field(max_length=PROOF_BYTES_MAX)
    before: Digest
    proof: tuple[Digest, ...] = Field(max_length=PROOF_MAX)
    head: Envelope
    key: str = Field(max_length=400)


def prove_entry(body: bytes, before: str, proof: Sequence[str], head: Envelope, key: PublicKey) -> EntryProof:
    return EntryProof(
        schema=EntryProof.SCHEMA,
        body=body.decode("utf-8"),
        before=before,
        proof=tuple(proof),
        head=head,
        key=public_text(key),
    )


def read_proof(content: bytes) -> EntryProof:
    """Raises: DocumentRefusedError: not a proof."""
    try:
        if len(content) > PROOF_BYTES_MAX:
            raise ValueError("too large")
        return EntryProof.model_validate_json(content)
    except (ValueError, ValidationError, RecursionError) as error:
        raise DocumentRefusedError("not a proof of an entry, as `audit prove` writes it") from error


def verify_entry(found: EntryProof, trusted: str | None = None) -> tuple[Entry, TreeHead, str]:
    """The entry, the head that it is under, and the fingerprint of the head's signer, after these checks:

    1. the head is signed by the key `trusted` (a fingerprint; None to be told whose it is)
    2. the entry's hash leads to the head's root, at the entry's own number

    Raises:
        DocumentRefusedError: with the check that failed.
    """
    key = read_public_text(found.key)
    if trusted is not None and fingerprint(key) != trusted:
        raise DocumentRefusedError(f"the proof is signed by key {fingerprint(key)[:16]}…, expected {trusted[:16]}…")
    head = open_envelope(found.head, TreeHead, [key])
    body = found.body.encode("utf-8", "surrogatepass")
    entry = Entry.from_canonical(body)
    leaf = entry_hash(bytes.fromhex(found.before), body)
    parts = [bytes.fromhex(part) for part in found.proof]
    verify_inclusion(leaf, entry.sequence - 1, head.size, parts, bytes.fromhex(head.root))
    return entry, head, fingerprint(key)


def proof_text(found: EntryProof) -> str:
    return json.dumps(found.model_dump(mode="json", by_alias=True), indent=1) + "\n"
