"""Checks of the federation's certificates: root → membership → node, all elliptic-curve keys on P-256.

The root key is pinned by its fingerprint; everything else follows from its signatures.
"""

import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

from concord_shared.errors import DocumentRefusedError
from concord_shared.signing import PublicKey, fingerprint

__all__ = ["membership_key", "read_certificate", "root_fingerprint", "spiffe_of"]


def read_certificate(pem: str) -> x509.Certificate:
    """The first certificate of a PEM text. Raises: DocumentRefusedError."""
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise DocumentRefusedError("not a certificate in PEM") from error


def root_fingerprint(certificate: x509.Certificate) -> str:
    """What an invitation names and a node pins: SHA-256 of the root's public key."""
    return fingerprint(_key(certificate))


def membership_key(root_pem: str, membership_pem: str, pinned: str, now: datetime.datetime) -> PublicKey:
    """The key that signs certificates and rosters, after these checks: the root is the pinned one, it signed the
    membership certificate, that is an authority, and both are valid now.

    Raises:
        DocumentRefusedError: with the check that it failed.
    """
    root, membership = read_certificate(root_pem), read_certificate(membership_pem)
    if root_fingerprint(root) != pinned:
        raise DocumentRefusedError(
            f"the coordinator's root key is {root_fingerprint(root)[:16]}…, expected {pinned[:16]}…: this is not the "
            "coordinator that invited you, or someone is in between"
        )
    try:
        membership.verify_directly_issued_by(root)
        authority = membership.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise DocumentRefusedError("the membership certificate is not signed by the root key") from error
    if not authority:
        raise DocumentRefusedError("the membership certificate is not that of an authority")
    for name, certificate in (("root", root), ("membership", membership)):
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise DocumentRefusedError(
                f"the {name} certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
                f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M}: check this "
                "machine's clock, or ask the coordinator to renew it"
            )
    return _key(membership)


def spiffe_of(certificate: x509.Certificate) -> str:
    """The one spiffe:// name of a node's certificate. Raises: DocumentRefusedError."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise DocumentRefusedError("a certificate without a name") from error
    found = [name for name in names.get_values_for_type(x509.UniformResourceIdentifier) if name.startswith("spiffe://")]
    if len(found) != 1:
        raise DocumentRefusedError(f"expected one spiffe name in the certificate, got {len(found)}")
    return found[0]


def _key(certificate: x509.Certificate) -> EllipticCurvePublicKey:
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DocumentRefusedError("the key of a certificate cannot be read") from error
    if not isinstance(key, EllipticCurvePublicKey):
        raise DocumentRefusedError(f"expected an elliptic-curve key in the certificate, got {type(key).__name__}")
    return key
