"""The federation's certificates: root → membership → server, worker and nodes. All keys are on P-256.

Of a certificate request only its key is used, after its own signature is checked: names, uses and lifetimes are this
module's, whatever the request asks for. `concord_shared.certificates` verifies what is made here.
"""

import datetime
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from concord_server.settings import Home
from concord_shared.certificates import membership_key, read_certificate, root_fingerprint
from concord_shared.errors import ArtefactError, DocumentRefusedError, UsageError
from concord_shared.files import explain, write_atomically
from concord_shared.signing import PublicKey, fingerprint, public_text, read_private_key, write_private_key

__all__ = [
    "Authority",
    "Leaf",
    "issue_own",
    "make_membership",
    "make_root",
    "read_request",
    "renew_membership",
    "renew_own",
]

ROOT_DAYS = 3650
MEMBERSHIP_DAYS = 90
SERVER_DAYS = 60
SKEW = datetime.timedelta(minutes=10)
"""How much a clock may be behind ours and still find a new certificate valid."""
HOST = re.compile(
    r"(?=.{1,253}\Z)(\*\.)?([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
)


@dataclass(frozen=True)
class Leaf:
    """chain: PEM, the leaf first, then the membership certificate. serial: hexadecimal."""

    chain: str
    serial: str
    not_after: datetime.datetime


@dataclass(frozen=True)
class Authority:
    """The membership key at work: signs leaf certificates and rosters.

    coordinator_key: the public key of the offers of rounds, which stands in every roster.
    """

    federation: str
    root_pem: str
    membership_pem: str
    key: ec.EllipticCurvePrivateKey
    coordinator_key: str

    @classmethod
    def open(cls, home: Home, now: datetime.datetime) -> "Authority":
        """Raises: ArtefactError: a key is missing, not the certificate's, or the certificate is out of date."""
        try:
            root_pem = home.root_certificate.read_text("ascii")
            membership_pem = home.membership_certificate.read_text("ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ArtefactError(f"cannot read the federation's certificates in {home.path / 'pki'}: {error}") from error
        key = _read_p256(home.membership_key)
        try:
            verified = membership_key(root_pem, membership_pem, root_fingerprint(read_certificate(root_pem)), now)
        except DocumentRefusedError as error:
            raise ArtefactError(f"{error}; here: concord server renew-membership DIR --root-key FILE") from error
        if fingerprint(verified) != fingerprint(key.public_key()):
            raise ArtefactError(f"{home.membership_key} is not the key of {home.membership_certificate}")
        return cls(home.settings.federation, root_pem, membership_pem, key, _coordinator_key(home))

    @property
    def root_fingerprint(self) -> str:
        return root_fingerprint(read_certificate(self.root_pem))

    @property
    def client_ca(self) -> str:
        """What a listener verifies certificates of nodes and worker with."""
        return self.root_pem + self.membership_pem

    def node(self, organisation: str, node: str, key: PublicKey, days: int, now: datetime.datetime) -> Leaf:
        return self._client(f"spiffe://{self.federation}/{organisation}/{node}", key, days, now)

    def worker(self, key: PublicKey, now: datetime.datetime) -> Leaf:
        return self._client(f"spiffe://{self.federation}/coordinator/worker", key, SERVER_DAYS, now)

    def server(self, hosts: list[str], key: PublicKey, now: datetime.datetime) -> Leaf:
        """hosts: DNS names and addresses that the certificate is for."""
        names = x509.SubjectAlternativeName([_host(each) for each in hosts])
        return self._leaf(names, key, ExtendedKeyUsageOID.SERVER_AUTH, SERVER_DAYS, now)

    def _client(self, spiffe: str, key: PublicKey, days: int, now: datetime.datetime) -> Leaf:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe)])
        return self._leaf(names, key, ExtendedKeyUsageOID.CLIENT_AUTH, days, now)

    def _leaf(
        self,
        names: x509.SubjectAlternativeName,
        key: PublicKey,
        use: x509.ObjectIdentifier,
        days: int,
        now: datetime.datetime,
    ) -> Leaf:
        """The fixed template. A leaf never outlives the certificate that signed it."""
        issuer = read_certificate(self.membership_pem)
        until = min(now + datetime.timedelta(days=days), issuer.not_valid_after_utc)
        certificate = (
            _begin(x509.Name([]), issuer.subject, key, now - SKEW, until)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(names, critical=True)  # the subject is empty: this is the name
            .add_extension(_authority_identifier(issuer), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        chain = certificate.public_bytes(Encoding.PEM).decode() + self.membership_pem
        return Leaf(chain, f"{certificate.serial_number:x}", certificate.not_valid_after_utc)


def make_root(federation: str, now: datetime.datetime) -> tuple[ec.EllipticCurvePrivateKey, str]:
    """A new root key, and its certificate in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _authority_name(federation, "root")
    certificate = (
        _begin(name, name, key.public_key(), now - SKEW, now + datetime.timedelta(days=ROOT_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, certificate.public_bytes(Encoding.PEM).decode()


def make_membership(
    federation: str, root_key: ec.EllipticCurvePrivateKey, root_pem: str, now: datetime.datetime
) -> tuple[ec.EllipticCurvePrivateKey, str]:
    """A new membership key, and its certificate in PEM, signed by the root key."""
    root = read_certificate(root_pem)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _begin(
            _authority_name(federation, "membership"),
            root.subject,
            key.public_key(),
            now - SKEW,
            now + datetime.timedelta(days=MEMBERSHIP_DAYS) - SKEW,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True, digital_signature=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_authority_identifier(root), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    return key, certificate.public_bytes(Encoding.PEM).decode()


def read_request(pem: str) -> ec.EllipticCurvePublicKey:
    """The key of a certificate request, which proves with its own signature that the sender holds it.

    Raises:
        DocumentRefusedError: not a request, not signed by its key, or not a key on P-256.
    """
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        sound = request.is_signature_valid
        key = request.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise DocumentRefusedError("not a certificate request in PEM") from error
    if not sound:
        raise DocumentRefusedError("the certificate request is not signed by the key that it names")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise DocumentRefusedError("a node's TLS key is on the curve P-256")
    return key


def renew_membership(home: Home, root_key_file: Path, now: datetime.datetime) -> Authority:
    """A new membership key, signed by the root key; server and worker get certificates of it.

    Raises:
        ArtefactError: the root key cannot be read, or is not that of this federation.
    """
    root_key = _read_p256(root_key_file)
    try:
        root_pem = home.root_certificate.read_text("ascii")
    except OSError as error:
        raise ArtefactError(f"cannot read {home.root_certificate}: {explain(error)}") from error
    if fingerprint(root_key.public_key()) != root_fingerprint(read_certificate(root_pem)):
        raise ArtefactError(f"{root_key_file} is not the root key of the federation {home.settings.federation}")
    key, membership_pem = make_membership(home.settings.federation, root_key, root_pem, now)
    authority = Authority(home.settings.federation, root_pem, membership_pem, key, _coordinator_key(home))
    _write_key(home.membership_key, key)
    _write_certificate(home.membership_certificate, membership_pem)
    issue_own(home, authority, now)
    return authority


def issue_own(home: Home, authority: Authority, now: datetime.datetime) -> None:
    """New keys and certificates of the coordinator's own listener and worker."""
    server, worker = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    _write_key(home.server_key, server)
    _write_certificate(home.server_certificate, authority.server(_hosts(home), server.public_key(), now).chain)
    _write_key(home.worker_key, worker)
    _write_certificate(home.worker_certificate, authority.worker(worker.public_key(), now).chain)


def renew_own(home: Home, now: datetime.datetime) -> bool:
    """Issues the coordinator's own certificates anew where two thirds of their life are over, or its names changed.

    Returns whether it did. Raises: ArtefactError: as `Authority.open`.
    """
    try:
        own = [read_certificate(path.read_text("ascii")) for path in (home.server_certificate, home.worker_certificate)]
    except OSError:
        own = []
    if own and not any(_due(each, now) for each in own) and _names(own[0]) == _wanted_names(home):
        return False
    issue_own(home, Authority.open(home, now), now)
    return True


def _due(certificate: x509.Certificate, now: datetime.datetime) -> bool:
    since, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= since + (until - since) * 2 / 3


def _names(certificate: x509.Certificate) -> set[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(each.value) for each in names}


def _wanted_names(home: Home) -> set[str]:
    return {str(_host(each).value) for each in _hosts(home)}


def _hosts(home: Home) -> list[str]:
    """The names that others use, and where the coordinator's own worker reaches its SuperLink."""
    settings = home.settings
    return list(dict.fromkeys([settings.public_host, *settings.sans, settings.own_host.strip("[]")]))


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Replaces a key of the coordinator's own, whole or not at all."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    write_private_key(fresh, key)
    fresh.replace(path)


def _write_certificate(path: Path, pem: str) -> None:
    write_atomically(path, pem)
    path.chmod(0o600)


def _coordinator_key(home: Home) -> str:
    return public_text(read_private_key(home.coordinator_key).public_key())


def _read_p256(path: Path) -> ec.EllipticCurvePrivateKey:
    key = read_private_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ArtefactError(f"{path}: expected a key on P-256, got {type(key).__name__}")
    return key


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not HOST.fullmatch(name):
            raise UsageError(f"{name!r} is neither a host name nor an address") from None
        return x509.DNSName(name)


def _authority_name(federation: str, which: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, f"concord {which}"),
        ]
    )


def _begin(
    subject: x509.Name, issuer: x509.Name, key: PublicKey, since: datetime.datetime, until: datetime.datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    return builder.serial_number(x509.random_serial_number()).not_valid_before(since).not_valid_after(until)


def _authority_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    found = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
