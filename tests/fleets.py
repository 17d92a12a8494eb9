"""A SuperLink on loopback with its own small certificate authority, and nodes that answer from threads."""

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import Message

from concord_client.fleet import FleetConnection
from concord_server.superlink.access import FleetNode
from concord_server.superlink.app import build_superlink, fleet_key, superlink_server
from concord_server.superlink.transport import FlowerTransport, Party
from concord_shared.errors import ConcordError, NotAllowedError, UnreachableError
from concord_shared.signed_rounds import sign_reply
from concord_shared.signing import fingerprint, public_text
from concord_shared.transport import NodeEntry

WORKER = "spiffe://test/coordinator/worker"


@dataclass
class Authority:
    """Issues certificates into `folder`."""

    folder: Path
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        self.pem = self._certificate("ca", self.key, [], ca=True).public_bytes(Encoding.PEM).decode()

    def issue(self, name: str, names: list[x509.GeneralName]) -> tuple[Path, Path, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certificate(name, key, names, ca=False)
        paths = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
        paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return *paths, key

    def client_context(self, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.pem)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        return context

    def _certificate(
        self, name: str, key: ec.EllipticCurvePrivateKey, names: list[x509.GeneralName], *, ca: bool
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ca")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())


@dataclass
class FleetMember:
    """A node with its keys, as it would be after enrolment."""

    name: str
    tls: ssl.SSLContext
    row: FleetNode
    flower: ec.EllipticCurvePrivateKey
    identity: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)


class Fleet:
    """A SuperLink that serves in a thread; `nodes` is what its access list reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.server_files = self.authority.issue("server", [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        self.worker_tls = self._context("worker", WORKER)[0]
        self.coordinator = Ed25519PrivateKey.generate()
        self.nodes: dict[str, FleetNode] = {}
        self.refusals: list[tuple[str, str, str]] = []
        self.port = free_port()
        self._server: uvicorn.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self.firewall, self.access = build_superlink(
            lambda: dict(self.nodes),
            WORKER,
            self.folder / f"spool-{time.monotonic_ns()}",
            lambda *refusal: self.refusals.append(refusal),
        )
        certificate, key, _ = self.server_files
        self._server = superlink_server(self.firewall, "127.0.0.1", self.port, certificate, key, self.authority.pem)
        self.access.start()
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        assert self._server is not None
        self.access.stop()
        self.firewall.closing = True
        self._server.should_exit = True
        self._thread.join(10)

    def member(self, name: str) -> FleetMember:
        spiffe = f"spiffe://test/org/{name}"
        context, key = self._context(name, spiffe)
        flower = ec.generate_private_key(ec.SECP384R1())
        row = FleetNode(name, spiffe, fingerprint(key.public_key()), fleet_key(public_text(flower.public_key())))
        self.nodes[spiffe] = row
        self.access.refresh()
        return FleetMember(name, context, row, flower)

    def transport(self, members: list[FleetMember], **options: object) -> FlowerTransport:
        parties = [
            Party(NodeEntry(member.name, index + 2, 100, 100), member.identity.public_key())
            for index, member in enumerate(members)
        ]
        return FlowerTransport(
            self.address, self.worker_tls, self.coordinator, parties, reply_bytes_max=1 << 30, **options
        )  # type: ignore[arg-type]

    def _context(self, name: str, spiffe: str) -> tuple[ssl.SSLContext, ec.EllipticCurvePrivateKey]:
        certificate, path, key = self.authority.issue(name, [x509.UniformResourceIdentifier(spiffe)])
        return self.authority.client_context(certificate, path), key


def listen(
    fleet: Fleet, member: FleetMember, respond: Callable[[Message], Message], stop: threading.Event
) -> threading.Thread:
    """A node's round loop in a thread: connects again whenever the link is lost, until `stop` is set."""

    def loop() -> None:
        while not stop.is_set():
            try:
                with FleetConnection(fleet.address, member.tls, member.flower) as connection:
                    while not stop.is_set():
                        message = connection.receive(0.5)
                        if message is not None:
                            reply = respond(message)
                            sign_reply(reply, member.identity)
                            connection.reply(reply)
            except (UnreachableError, NotAllowedError):
                time.sleep(0.1)
            except ConcordError:
                continue

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    return thread


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_fleet(folder: Path) -> Iterator[Fleet]:
    fleet = Fleet(folder)
    fleet.start()
    try:
        yield fleet
    finally:
        fleet.stop()
