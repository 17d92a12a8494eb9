"""Enrolment: from an invitation's one line to a node that can prove who it is. And renewal of what expires.

1  the coordinator's root certificate, over a connection that proves nothing yet and carries nothing secret
2  the root is the one that the invitation names; it signed the membership key
3  a second connection, to a server that the root vouches for (or an authority that a person named)
4  three keys, made here; a request and a claim signed by them; the token admits, once
5  the certificate is for our key and our name; the roster has our keys
6  everything is written, node.toml last
"""

import base64
import datetime
import hashlib
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)

from concord_client.control import Connection, ControlChannel, is_untrusted, read_answer
from concord_client.home import NodeConfig, NodeHome, add_authorities
from concord_client.policy import write_default
from concord_client.store import NodeStore
from concord_client.sync import check_own_row, pin_keys
from concord_shared.certificates import membership_key, read_certificate, spiffe_of
from concord_shared.documents import EnrolmentClaim, NodeState, Roster
from concord_shared.errors import ApiError, ArtefactError, DocumentRefusedError, UnreachableError, UsageError
from concord_shared.files import write_atomically
from concord_shared.protocol import Certificate, EnrolRequest, EnrolResponse, InvitationLine, RenewRequest, Trust
from concord_shared.signing import (
    PrivateKey,
    PublicKey,
    fingerprint,
    new_identity_key,
    open_envelope,
    public_text,
    read_public_text,
    seal,
    write_private_key,
)

__all__ = [
    "Enrolled",
    "certificate_ends",
    "check_chain",
    "enrol",
    "overdue",
    "read_organisation_key",
    "renew_if_due",
]

CLOCK_SKEW_S_MAX = 300
RENEW_AT = 2 / 3
Transports = Callable[[ssl.SSLContext], httpx.BaseTransport | None]


@dataclass(frozen=True)
class Enrolled:
    """identity: the fingerprint that both sides compare. organisation_key: of the own organisation, if it has one yet;
    confirmed: a person gave it, rather than the coordinator.
    """

    home: NodeHome
    identity: str
    state: NodeState
    organisation_key: str | None
    confirmed: bool


@dataclass(frozen=True)
class _Keys:
    tls: EllipticCurvePrivateKey
    flower: EllipticCurvePrivateKey
    identity: PrivateKey


def enrol(
    line: InvitationLine,
    path: Path,
    organisation_key: PublicKey | None = None,
    ca: str = "",
    proxy: str = "",
    clock: Callable[[], float] = time.time,
    transports: Transports = lambda context: None,
    system_ca: bool = False,
) -> Enrolled:
    """Makes this machine the node of the invitation.

    Args:
        organisation_key: of the node's own organisation, from its own people; None to take the roster's.
        ca: a file of further authorities, such as a company's.
        transports: for tests.
        system_ca: the coordinator shows a certificate of the system's authorities; whoever these vouch for sees the
            invitation's token.

    Raises:
        UsageError: the home is that of another node.
        DocumentRefusedError: the coordinator is not the one that invited, or answers with something that is not ours.
        UnreachableError, ApiError: nobody there, or not admitted.
    """
    _check_free(path, line)
    home = NodeHome.prepare(path)
    with NodeStore(home.database) as store:
        with _verified(line, store, ca, proxy, clock, transports, system_ca) as (connection, trust):
            now = _utc(clock())
            signer = membership_key(trust.root_certificate, trust.membership_certificate, line.root, now)
            keys = _keys(home)
            response = _ask(connection, line, trust.federation, keys, int(clock()))
        config = NodeConfig(
            federation=trust.federation,
            organisation=line.organisation,
            node=line.node,
            url=connection.url,
            superlink=trust.superlink,
            root=line.root,
            ca=str(Path(ca).expanduser().resolve()) if ca else "",
            system_ca=system_ca,
            proxy=proxy,
        )
        check_chain(response.certificate, trust.root_certificate, config, keys.tls, now)
        roster = open_envelope(response.roster, Roster, [signer])
        check_own_row(roster, config, keys.identity.public_key(), keys.flower.public_key())
        _check_organisation_key(roster, line.organisation, organisation_key)
        if organisation_key is not None:
            store.pin_organisation(line.organisation, public_text(organisation_key))
        pin_keys(store, roster)
        store.put("roster", str(roster.version), response.roster)
        store.set_fact("roster", str(roster.version))
        store.cursor = 0  # a number from before must not hide what comes
        store.set_fact("state", response.state)
        write_default(home.policy_file)
        pinned = store.organisation_key(line.organisation)
    NodeHome.create(path, config, trust.root_certificate, trust.membership_certificate, response.certificate.chain)
    return Enrolled(
        home,
        fingerprint(keys.identity.public_key()),
        response.state,
        None if pinned is None else fingerprint(read_public_text(pinned)),
        organisation_key is not None,
    )


def renew_if_due(home: NodeHome, channel: ControlChannel, now: float) -> bool:
    """Asks for a new certificate for the same key once two thirds of the old one's life are over; True if it came.

    Raises:
        DocumentRefusedError: what came is not ours; the old one stays.
        UnreachableError, ApiError: not now.
    """
    current = read_certificate(home.certificate_pem())
    begins, ends = current.not_valid_before_utc.timestamp(), current.not_valid_after_utc.timestamp()
    if now < begins + RENEW_AT * (ends - begins):
        return False
    tls = home.tls_key()
    answer = channel.renew(RenewRequest(request=_request(tls, home.config.node)), home.config.node)
    check_chain(answer, home.root_pem(), home.config, tls, _utc(now))
    write_atomically(home.certificate, answer.chain)
    return True


def certificate_ends(home: NodeHome) -> datetime.datetime:
    """When the node's certificate expires, UTC."""
    return read_certificate(home.certificate_pem()).not_valid_after_utc


def overdue(home: NodeHome, now: float) -> str:
    """What to do about a certificate that has ended, which no coordinator renews; nothing where it holds."""
    ends = certificate_ends(home)
    if now < ends.timestamp():
        return ""
    config = home.config
    return (
        f"this node's certificate ended {ends:%Y-%m-%d %H:%M} UTC. If this machine's clock is right, ask the "
        f"coordinator's administrator to revoke the node and to invite it again (concord node revoke {config.node}; "
        f"concord invite {config.node} --organisation {config.organisation}), and enrol with that invitation in this "
        "same home: concord-node enrol INVITATION. Keys, data and decisions stay as they are"
    )


def read_organisation_key(path: Path) -> PublicKey:
    """A public key in PEM, or as `concord keys init` writes it. Raises: ArtefactError, DocumentRefusedError."""
    try:
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"cannot read the organisation's key {path}: {error}") from error
    if text.startswith("-----BEGIN PUBLIC KEY-----"):
        text = base64.b64encode(_der(text)).decode()
    return read_public_text(text)


def check_chain(
    certificate: Certificate, root: str, config: NodeConfig, tls: EllipticCurvePrivateKey, now: datetime.datetime
) -> None:
    """Refuses a certificate that is not ours.

    1 the chain is a certificate and its issuer; 2 the pinned root signed the issuer; 3 the issuer signed the
    certificate; 4 it is for our key; 5 it carries our name and no other; 6 it is no authority; 7 it is valid now.

    Raises:
        DocumentRefusedError: with the check that it failed.
    """
    try:
        own, issuer = x509.load_pem_x509_certificates(certificate.chain.encode())[:2]
    except ValueError as error:
        raise DocumentRefusedError("the coordinator gave no certificate with its issuer") from error
    membership_key(root, issuer.public_bytes(serialization.Encoding.PEM).decode(), config.root, now)
    try:
        own.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise DocumentRefusedError("the certificate that came is not signed by the membership key") from error
    if own.public_key() != tls.public_key():
        raise DocumentRefusedError("the certificate that came is for another key than this node's")
    if spiffe_of(own) != config.spiffe:
        raise DocumentRefusedError(f"the certificate that came names {spiffe_of(own)}, expected {config.spiffe}")
    if any(extension.value.ca for extension in own.extensions if isinstance(extension.value, x509.BasicConstraints)):
        raise DocumentRefusedError("the certificate that came is that of an authority; a node is none")
    if not own.not_valid_before_utc <= now <= own.not_valid_after_utc:
        raise DocumentRefusedError(
            f"the certificate that came is valid from {own.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{own.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M}: check this machine's clock"
        )


def _check_free(path: Path, line: InvitationLine) -> None:
    """A home that is enrolled may enrol again as the same node only: with a new invitation, for a new certificate."""
    if not NodeHome(path).is_enrolled:
        return
    config = NodeHome.open(path).config
    if (config.organisation, config.node, config.root) != (line.organisation, line.node, line.root):
        raise UsageError(
            f"{path} is the home of {config.organisation}/{config.node}, this invitation is for "
            f"{line.organisation}/{line.node}. Name another home with --home DIR, or leave first: concord-node leave"
        )


@contextmanager
def _verified(
    line: InvitationLine,
    store: NodeStore,
    ca: str,
    proxy: str,
    clock: Callable[[], float],
    transports: Transports,
    system_ca: bool,
) -> Iterator[tuple[Connection, Trust]]:
    """A connection to the coordinator that invited, and what it says of itself."""
    host = f"[{line.host}]" if ":" in line.host else line.host
    url = f"https://{host}:{line.port}"

    def connect(context: ssl.SSLContext) -> Connection:
        return Connection(url, context, store, proxy, clock, transports(context))

    first = _trust(connect(_blind_context()))
    membership_key(first.root_certificate, first.membership_certificate, line.root, _utc(clock()))
    connection = connect(_server_context(first.root_certificate, ca, system_ca))
    try:
        trust = _trusted(connection, system_ca)
        _check_trust(first, trust, clock())
        yield connection, trust
    finally:
        connection.close()


def _trusted(connection: Connection, system_ca: bool) -> Trust:
    try:
        return connection.trust()
    except UnreachableError as error:
        if system_ca or not is_untrusted(error):
            raise
        raise UnreachableError(
            f"{error}. The invitation was not sent. Where the coordinator's people say that theirs is of a public "
            "authority, add --system-ca"
        ) from error


def _trust(connection: Connection) -> Trust:
    try:
        return connection.trust()
    finally:
        connection.close()


def _check_trust(first: Trust, trust: Trust, now: float) -> None:
    if (first.root_certificate, first.membership_certificate) != (trust.root_certificate, trust.membership_certificate):
        raise DocumentRefusedError("the coordinator shows other certificates over the verified connection than before")
    if abs(trust.now - now) > CLOCK_SKEW_S_MAX:
        raise DocumentRefusedError(
            f"this machine's clock and the coordinator's differ by {abs(trust.now - now):.0f} s, expected at most "
            f"{CLOCK_SKEW_S_MAX} s: signatures and certificates have times. Set the clock (NTP) and enrol again"
        )


def _keys(home: NodeHome) -> _Keys:
    """The home's keys; new ones for those that are not there. They outlive a failed enrolment, for the next try."""
    makers: dict[str, Callable[[], PrivateKey]] = {
        "tls": lambda: generate_private_key(SECP256R1()),
        "flower": lambda: generate_private_key(SECP384R1()),
        "identity": new_identity_key,
    }
    for name, make in makers.items():
        if not home.key_file(name).exists():
            write_private_key(home.key_file(name), make())
    return _Keys(home.tls_key(), home.flower_key(), home.identity_key())


def _ask(connection: Connection, line: InvitationLine, federation: str, keys: _Keys, now: int) -> EnrolResponse:
    claim = EnrolmentClaim(
        federation=federation,
        organisation=line.organisation,
        node=line.node,
        token_digest=hashlib.sha256(line.token.encode()).hexdigest(),
        tls_key=public_text(keys.tls.public_key()),
        identity_key=public_text(keys.identity.public_key()),
        flower_key=public_text(keys.flower.public_key()),
        issued_at=now,
    )
    request = EnrolRequest(
        token=line.token, claim=seal(claim, keys.identity, keys.flower), request=_request(keys.tls, line.node)
    )
    subject = f"{line.organisation}/{line.node}"
    try:
        answer = connection.post("/api/enrol", "enrolment", subject, request.model_dump_json().encode())
    except ApiError as error:
        error.args = (f"{connection.url} did not admit this node: {error}",)
        raise
    return read_answer(EnrolResponse, answer, connection.url)


def _request(tls: EllipticCurvePrivateKey, node: str) -> str:
    """A certificate request; the coordinator uses its key only."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, node)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(tls, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def _check_organisation_key(roster: Roster, organisation: str, given: PublicKey | None) -> None:
    listed = next((each.key for each in roster.organisations if each.name == organisation), None)
    if given is not None and listed is not None and fingerprint(read_public_text(listed)) != fingerprint(given):
        raise DocumentRefusedError(
            f"the roster has key {fingerprint(read_public_text(listed))[:16]}… for {organisation}, the file that you "
            f"gave {fingerprint(given)[:16]}…: ask your organisation's people which one is theirs, before anything else"
        )


def _blind_context() -> ssl.SSLContext:
    """Believes any server: for the first look only, whose content is checked against the invitation."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _server_context(root: str, ca: str, system_ca: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    add_authorities(context, root, ca, system_ca)
    return context


def _utc(now: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(now, datetime.UTC)


def _der(pem: str) -> bytes:
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except ValueError as error:
        raise DocumentRefusedError("not a public key in PEM") from error
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
