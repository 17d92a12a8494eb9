"""Signatures on the messages of a round, between machines. Step 9 of the walk.

An offer is signed by the coordinator's key, a reply by the node's identity key. What is signed: every field of the
offer (which names run, round, attempt, plan, model, layout and node), the broadcast state's bytes, and for a reply the
bytes of every block and the notes. The model's bytes are covered by the offer's `model_digest`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from flwr.app import ArrayRecord, ConfigRecord, Message

from concord_shared.canonical import canonical_bytes
from concord_shared.errors import DocumentRefusedError
from concord_shared.signing import PrivateKey, PublicKey, sign_bytes, verify_bytes

__all__ = [
    "Sent",
    "attach_sent",
    "check_statement",
    "name_charge",
    "sent_of",
    "sign_offer",
    "sign_reply",
    "verify_offer",
    "verify_reply",
]

OFFER = b"concord/offer/1\0"
REPLY = b"concord/reply/1\0"
SIGNATURE = "signature"
CHARGE = "charge"


def sign_offer(message: Message, key: PrivateKey) -> None:
    _sign(message, key, OFFER)


def verify_offer(message: Message, key: PublicKey) -> None:
    """Raises: DocumentRefusedError: not signed by the coordinator."""
    _verify(message, key, OFFER, "offer")


def sign_reply(message: Message, key: PrivateKey) -> str:
    """Signs an answer, which has content: a decline has none to sign. The digest of what was signed, hexadecimal."""
    return _sign(message, key, REPLY)


@dataclass(frozen=True)
class Sent:
    """A node's word for a reply, to keep. statement: what it signed the SHA-256 of: canonical JSON."""

    statement: bytes
    signature: bytes

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.statement).hexdigest()

    @property
    def charge(self) -> str | None:
        """The digest of the charge in the node's privacy ledger, as it named it: see `name_charge`."""
        try:
            found = json.loads(self.statement)[CHARGE]["digest"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return found if isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found) else None


def name_charge(reply: Message, digest: str) -> None:
    """Before it is signed: what this Update was charged for, at the node that sends it."""
    reply.content[CHARGE] = ConfigRecord({"digest": digest})


def verify_reply(message: Message, key: PublicKey) -> Sent | None:
    """What the node signed; None for a decline, which has nothing to sign.

    Raises:
        DocumentRefusedError: not signed by the node that sent it.
    """
    return None if message.has_error() else _verify(message, key, REPLY, "reply")


def attach_sent(message: Message, sent: Sent) -> None:
    """Lets the verified word travel on with its message, on this side of the wire."""
    message.content[SIGNATURE] = ConfigRecord({"ed25519": sent.signature, "statement": sent.statement})


def sent_of(message: Message) -> Sent | None:
    """What `attach_sent` put there; None where nothing was signed, as in a simulation."""
    record: Mapping[str, Any] = message.content.config_records.get(SIGNATURE) or {}
    statement, signature = record.get("statement"), record.get("ed25519")
    return Sent(statement, signature) if isinstance(statement, bytes) and isinstance(signature, bytes) else None


def check_statement(sent: Sent, key: PublicKey) -> dict[str, Any]:
    """What a node signed, without the message that it came with.

    Raises:
        DocumentRefusedError: the signature is not the node's.
    """
    try:
        verify_bytes(key, sent.signature, REPLY + hashlib.sha256(sent.statement).digest())
        found = json.loads(sent.statement)
    except (InvalidSignature, ValueError, RecursionError) as error:
        raise DocumentRefusedError("the signature of a reply's statement is wrong") from error
    if not isinstance(found, dict):
        raise DocumentRefusedError("a reply's statement is not a record")
    return found


def _sign(message: Message, key: PrivateKey, purpose: bytes) -> str:
    digest = hashlib.sha256(_statement(message)).digest()
    message.content[SIGNATURE] = ConfigRecord({"ed25519": sign_bytes(key, purpose + digest)})
    return digest.hex()


def _verify(message: Message, key: PublicKey, purpose: bytes, what: str) -> Sent:
    record = message.content.config_records.get(SIGNATURE)
    signature = None if record is None else record.get("ed25519")
    if not isinstance(signature, bytes):
        raise DocumentRefusedError(f"the {what} is not signed")
    sent = Sent(_statement(message), signature)
    try:
        verify_bytes(key, signature, purpose + hashlib.sha256(sent.statement).digest())
    except InvalidSignature as error:
        raise DocumentRefusedError(f"the signature of the {what} is wrong") from error
    return sent


def _statement(message: Message) -> bytes:
    """Canonical JSON over everything but the signature itself and the model's bytes, which the offer's digest names."""
    content: dict[str, Any] = {}
    for name, record in message.content.items():
        if name == SIGNATURE:
            continue
        if isinstance(record, ArrayRecord):
            content[name] = {key: _array(array) for key, array in record.items() if (name, key) != ("model", "theta")}
        elif isinstance(record, ConfigRecord):
            content[name] = {key: _plain(value) for key, value in record.items()}
        else:
            raise DocumentRefusedError(f"a message of a round holds no {type(record).__name__}")
    try:
        return canonical_bytes(content)
    except (TypeError, ValueError) as error:
        raise DocumentRefusedError(f"a message of a round cannot be read: {error}") from error


def _array(array: Any) -> list[Any]:
    return [array.dtype, list(array.shape), array.stype, hashlib.sha256(array.data).hexdigest()]


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value
