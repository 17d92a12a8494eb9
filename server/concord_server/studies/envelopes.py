"""Signed documents at the coordinator's edge: opened with the keys that organisations registered, kept as they came."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from sqlmodel import Session

from concord_server.organisations.service import key_of
from concord_shared.errors import ApiError
from concord_shared.signing import Document, Envelope, open_envelope

__all__ = ["CLOCK_SKEW_S", "check_issued", "document_of", "envelope_of", "keep", "merged", "open_signed"]

CLOCK_SKEW_S = 300
Kind = TypeVar("Kind", bound=Document)


def open_signed(session: Session, envelope: Envelope, kind: type[Kind], *organisations: str) -> Kind:
    """The document, which every one of these organisations signed with its registered key.

    Raises:
        DocumentRefusedError: with the check that it failed.
    """
    return open_envelope(envelope, kind, [key_of(session, organisation) for organisation in organisations])


def check_issued(issued_at: int, now: int) -> None:
    """Raises: ApiError: the signer's clock is ahead of ours."""
    if issued_at > now + CLOCK_SKEW_S:
        raise ApiError(
            f"the document is dated {issued_at - now} s in the future; set the clock of the machine that signed it"
        )


def keep(envelope: Envelope) -> dict[str, Any]:
    """As a row or an update holds it."""
    return envelope.model_dump(mode="json")


def envelope_of(stored: Mapping[str, Any]) -> Envelope:
    """The inverse of `keep`."""
    return Envelope.model_validate_json(json.dumps(stored))


def document_of(stored: Mapping[str, Any], kind: type[Kind]) -> Kind:
    """The document of a row; its signatures were verified before it was stored."""
    return kind.from_canonical(envelope_of(stored).bytes)


def merged(one: Envelope, other: Envelope) -> Envelope:
    """One document with the signatures of both envelopes; where a key signed both, that of `other`."""
    assert one.bytes == other.bytes
    theirs = {signature.key for signature in other.signatures}
    kept = tuple(signature for signature in one.signatures if signature.key not in theirs)
    return other.model_copy(update={"signatures": (*kept, *other.signatures)})
