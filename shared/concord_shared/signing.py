"""Keys, and documents that their owners sign (DSSE: the signature covers the very bytes that travel).

A signed document is JSON in canonical form, wrapped with its type and its signatures. The receiver knows beforehand
whose signatures it needs; a key that travels with a document is never trusted because of that.
"""

import base64
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, ValidationError

from concord_shared.canonical import canonical_bytes
from concord_shared.errors import ArtefactError, DocumentRefusedError
from concord_shared.files import explain

__all__ = [
    "Document",
    "Envelope",
    "PrivateKey",
    "PublicKey",
    "Signature",
    "fingerprint",
    "new_identity_key",
    "open_envelope",
    "public_text",
    "read_private_key",
    "read_public_text",
    "seal",
    "sign_bytes",
    "verify_bytes",
    "write_private_key",
]

PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey
PublicKey = Ed25519PublicKey | EllipticCurvePublicKey
PAYLOAD_BYTES_MAX = 4 << 20
SIGNATURES_MAX = 8


class Record(BaseModel):
    """Anything that travels between parties: frozen, strict, closed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Document(Record):
    """What can be signed. Holds no floats; times are whole seconds of Unix time, UTC."""

    SCHEMA: ClassVar[str]

    @classmethod
    def payload_type(cls) -> str:
        return f"application/vnd.{cls.SCHEMA.replace('/', '.')}+json"

    @property
    def canonical(self) -> bytes:
        return canonical_bytes({"schema": self.SCHEMA, **self.model_dump(mode="json")})

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, hexadecimal."""
        return hashlib.sha256(self.canonical).hexdigest()

    @classmethod
    def from_canonical(cls, payload: bytes) -> Self:
        """Raises: DocumentRefusedError: not exactly the canonical bytes of such a document."""
        try:
            fields = json.loads(payload)
            if not isinstance(fields, dict) or fields.pop("schema", None) != cls.SCHEMA:
                raise ValueError(f"expected the schema {cls.SCHEMA}")
            document = cls.model_validate_json(json.dumps(fields))
        except (ValueError, ValidationError, RecursionError) as error:
            raise DocumentRefusedError(f"not a document of {cls.SCHEMA}: {_short(error)}") from error
        if document.canonical != payload:
            raise DocumentRefusedError(f"a document of {cls.SCHEMA} is not in canonical form")
        return document


class Signature(Record):
    """key: the fingerprint of the signer's public key, to find it by; never to trust it by."""

    key: str
    signature: str


class Envelope(Record):
    """A signed document as it travels. payload and signature are base64."""

    payload_type: str
    payload: str
    signatures: tuple[Signature, ...]

    def signed_by(self, key: PrivateKey) -> "Envelope":
        """The same document with one more signature."""
        signature = sign_bytes(key, _encode(self.payload_type, self.bytes))
        mine = Signature(key=fingerprint(key.public_key()), signature=base64.b64encode(signature).decode())
        others = tuple(each for each in self.signatures if each.key != mine.key)
        return self.model_copy(update={"signatures": (*others, mine)})

    @property
    def bytes(self) -> bytes:
        """The document's canonical bytes, unverified."""
        try:
            return base64.b64decode(self.payload, validate=True)
        except ValueError as error:
            raise DocumentRefusedError("the payload of a signed document is not base64") from error

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.bytes).hexdigest()


Kind = TypeVar("Kind", bound=Document)


def seal(document: Document, *keys: PrivateKey) -> Envelope:
    """The document with a signature of each key."""
    payload = base64.b64encode(document.canonical).decode()
    envelope = Envelope(payload_type=document.payload_type(), payload=payload, signatures=())
    for key in keys:
        envelope = envelope.signed_by(key)
    return envelope


def open_envelope(envelope: Envelope, kind: type[Kind], signers: Iterable[PublicKey]) -> Kind:
    """The document, after these checks: its size, its type, a signature of *every* signer, its canonical form.

    Raises:
        DocumentRefusedError: with the check that it failed.
    """
    signers = list(signers)
    assert signers, "a document that nobody need have signed proves nothing"
    if len(envelope.payload) > PAYLOAD_BYTES_MAX or len(envelope.signatures) > SIGNATURES_MAX:
        raise DocumentRefusedError(f"a signed document of {kind.SCHEMA} is too large")
    if envelope.payload_type != kind.payload_type():
        raise DocumentRefusedError(f"expected {kind.payload_type()}, got {envelope.payload_type[:80]}")
    payload = envelope.bytes
    for signer in signers:
        _check_signature(envelope, payload, signer, kind)
    return kind.from_canonical(payload)


def _check_signature(envelope: Envelope, payload: bytes, signer: PublicKey, kind: type[Document]) -> None:
    wanted = fingerprint(signer)
    for signature in envelope.signatures:
        if signature.key != wanted:
            continue
        try:
            raw = base64.b64decode(signature.signature, validate=True)
            verify_bytes(signer, raw, _encode(envelope.payload_type, payload))
        except (ValueError, InvalidSignature) as error:
            raise DocumentRefusedError(
                f"the signature of key {wanted[:16]} on a document of {kind.SCHEMA} is wrong"
            ) from error
        return
    raise DocumentRefusedError(f"a document of {kind.SCHEMA} lacks the signature of key {wanted[:16]}")


def _encode(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding, so that a signature is over type and content and nothing else."""
    name = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(name), name, len(payload), payload)


def sign_bytes(key: PrivateKey, data: bytes) -> bytes:
    return key.sign(data) if isinstance(key, Ed25519PrivateKey) else key.sign(data, ECDSA(hashes.SHA256()))


def verify_bytes(key: PublicKey, signature: bytes, data: bytes) -> None:
    """Raises: InvalidSignature."""
    if isinstance(key, Ed25519PublicKey):
        key.verify(signature, data)
    else:
        key.verify(signature, data, ECDSA(hashes.SHA256()))


# Keys


def new_identity_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def _public_der(key: PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_text(key: PublicKey) -> str:
    """A public key as it stands in documents: base64 of its SubjectPublicKeyInfo."""
    return base64.b64encode(_public_der(key)).decode()


def read_public_text(text: str) -> PublicKey:
    """Raises: DocumentRefusedError: not an Ed25519 or elliptic-curve public key."""
    try:
        key = serialization.load_der_public_key(base64.b64decode(text, validate=True))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DocumentRefusedError("not a public key: expected base64 of a SubjectPublicKeyInfo") from error
    if not isinstance(key, (Ed25519PublicKey, EllipticCurvePublicKey)):
        raise DocumentRefusedError(f"expected an Ed25519 or elliptic-curve key, got {type(key).__name__}")
    return key


def fingerprint(key: PublicKey) -> str:
    """SHA-256 of the SubjectPublicKeyInfo, hexadecimal: what people compare."""
    return hashlib.sha256(_public_der(key)).hexdigest()


def write_private_key(path: Path, key: PrivateKey, passphrase: bytes | None = None) -> None:
    """A new PKCS#8 file that only its owner may read; an existing file is never replaced.

    Raises:
        ArtefactError: the file exists, or cannot be written.
    """
    protection: Any = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    content = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ArtefactError(f"{path} exists already; a key is never replaced. Move it away first") from error
    except OSError as error:
        raise ArtefactError(f"cannot write the key {path}: {explain(error)}") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_private_key(path: Path, passphrase: bytes | None = None) -> PrivateKey:
    """Raises: ArtefactError: missing, damaged, a wrong passphrase, or open to other users."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        content = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read the key {path}: {explain(error)}") from error
    if os.name == "posix" and mode & 0o077:
        raise ArtefactError(f"{path}: others may read this key (mode {mode:o}). Run: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(content, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ArtefactError(f"{path}: not a private key, or a wrong passphrase: {_short(error)}") from error
    if not isinstance(key, (Ed25519PrivateKey, EllipticCurvePrivateKey)):
        raise ArtefactError(f"{path}: expected an Ed25519 or elliptic-curve key, got {type(key).__name__}")
    return key


def _short(error: Exception) -> str:
    return str(error).replace("\n", " ")[:200]
