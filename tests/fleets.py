"""A SuperLink on loopback with its own small certificate authority, and nodes that answer from threads."""

import contextlib
import datetime
import ipaddress
import json
import logging
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
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
from concord_shared.files import write_atomically
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
    """A SuperLink in a process of its own; `nodes` is what its access list reads, from a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.authority.issue("server", [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        (folder / "ca.pem").write_text(self.authority.pem)
        self.worker_tls = self._context("worker", WORKER)[0]
        self.coordinator = Ed25519PrivateKey.generate()
        self.nodes: dict[str, FleetNode] = {}
        self._known: dict[str, int] = {}
        self.write_nodes()
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def refusals(self) -> list[list[str]]:
        path = self.folder / "refusals.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def start(self) -> None:
        command = [sys.executable, __file__, str(self.folder), str(self.port)]
        with (self.folder / "superlink.log").open("a") as log:
            self._process = subprocess.Popen(command, stderr=log)
        with httpx.Client(verify=self.worker_tls) as client:
            for _ in range(600):
                try:
                    client.get(f"https://{self.address}/health").raise_for_status()
                    return
                except httpx.HTTPError:
                    time.sleep(0.05)
        raise AssertionError((self.folder / "superlink.log").read_text())

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def forget(self) -> None:
        """No nodes, no refusals: for the next test."""
        self.nodes.clear()
        self.write_nodes()
        (self.folder / "refusals.jsonl").unlink(missing_ok=True)

    def write_nodes(self) -> None:
        rows = {name: [row.name, row.tls_key, row.flower_key.decode()] for name, row in self.nodes.items()}
        write_atomically(self.folder / "nodes.json", json.dumps(rows))

    def member(self, name: str) -> FleetMember:
        spiffe = f"spiffe://test/org/{name}"
        context, key = self._context(name, spiffe)
        flower = ec.generate_private_key(ec.SECP384R1())
        row = FleetNode(name, spiffe, fingerprint(key.public_key()), fleet_key(public_text(flower.public_key())))
        self.nodes[spiffe] = row
        self.write_nodes()
        member = FleetMember(name, context, row, flower)
        self._await_admission(member)
        return member

    def _await_admission(self, member: FleetMember) -> None:
        """The access list is read every second."""
        with httpx.Client(verify=self.worker_tls) as client:
            before = self._known.get(member.name)
            while True:
                known = client.post(f"https://{self.address}/rooms/nodes").json()["nodes"].get(member.name, {})
                if known.get("node_id") not in (None, before):
                    self._known[member.name] = known["node_id"]
                    return
                time.sleep(0.05)

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
        fleet.kill()


def main(folder: Path, port: int) -> None:
    """The SuperLink's process."""
    logging.getLogger("flwr").setLevel(logging.WARNING)

    def load() -> dict[str, FleetNode]:
        rows = json.loads((folder / "nodes.json").read_text())
        return {spiffe: FleetNode(name, spiffe, tls, flower.encode()) for spiffe, (name, tls, flower) in rows.items()}

    def refused(*refusal: str) -> None:
        with (folder / "refusals.jsonl").open("a") as file:
            file.write(json.dumps(refusal) + "\n")

    firewall, access = build_superlink(load, WORKER, folder / "spool", refused)
    access.start()
    pem, key = folder / "server.pem", folder / "server.key"
    superlink_server(firewall, "127.0.0.1", port, pem, key, (folder / "ca.pem").read_text(), 2000, 500).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
