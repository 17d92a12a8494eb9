"""Signatures on the messages of a round, between machines. Step 9 of the walk.

An offer is signed by the coordinator's key, a reply by the node's identity key. What is signed: every field of the
offer (which names run, round, attempt, plan, model, layout and node), the broadcast state's bytes, and for a reply the
bytes of every block and the notes. The model's bytes are covered by the offer's `model_digest`.
"""

import hashlib
from typing import Any

from cryptography.exceptions import InvalidSignature
from flwr.app import ArrayRecord, ConfigRecord, Message

from concord_shared.canonical import canonical_bytes
from concord_shared.errors import DocumentRefusedError
from concord_shared.signing import PrivateKey, PublicKey, sign_bytes, verify_bytes

__all__ = ["sign_offer", "sign_reply", "verify_offer", "verify_reply"]

OFFER = b"concord/offer/1\0"
REPLY = b"concord/reply/1\0"
SIGNATURE = "signature"


def sign_offer(message: Message, key: PrivateKey) -> None:
    _sign(message, key, OFFER)


def verify_offer(message: Message, key: PublicKey) -> None:
    """Raises: DocumentRefusedError: not signed by the coordinator."""
    _verify(message, key, OFFER, "offer")


def sign_reply(message: Message, key: PrivateKey) -> str:
    """Signs an answer, which has content: a decline has none to sign. The digest of what was signed, hexadecimal."""
    return _sign(message, key, REPLY)


def verify_reply(message: Message, key: PublicKey) -> None:
    """Raises: DocumentRefusedError: not signed by the node that sent it."""
    if not message.has_error():
        _verify(message, key, REPLY, "reply")


def _sign(message: Message, key: PrivateKey, purpose: bytes) -> str:
    digest = _digest(message)
    message.content[SIGNATURE] = ConfigRecord({"ed25519": sign_bytes(key, purpose + digest)})
    return digest.hex()


def _verify(message: Message, key: PublicKey, purpose: bytes, what: str) -> None:
    record = message.content.config_records.get(SIGNATURE)
    signature = None if record is None else record.get("ed25519")
    if not isinstance(signature, bytes):
        raise DocumentRefusedError(f"the {what} is not signed")
    try:
        verify_bytes(key, signature, purpose + _digest(message))
    except InvalidSignature as error:
        raise DocumentRefusedError(f"the signature of the {what} is wrong") from error


def _digest(message: Message) -> bytes:
    """SHA-256 over everything but the signature itself and the model's bytes, which the offer's digest names."""
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
        return hashlib.sha256(canonical_bytes(content)).digest()
    except (TypeError, ValueError) as error:
        raise DocumentRefusedError(f"a message of a round cannot be read: {error}") from error


def _array(array: Any) -> list[Any]:
    return [array.dtype, list(array.shape), array.stype, hashlib.sha256(array.data).hexdigest()]


def _plain(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value
