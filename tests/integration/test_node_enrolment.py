"""Enrolment and login over real TLS: to whom a token is shown, and with what the node then comes back."""

import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from unit.client.fake_coordinator import NODE, ORGANISATION, SERVER_AUTH, TOKEN, Authority, FakeCoordinator, pem

from concord_client.control import ControlChannel
from concord_client.enrolment import Enrolled, enrol, renew_if_due
from concord_server.client import log_in
from concord_shared.certificates import root_fingerprint, spiffe_of
from concord_shared.errors import UnreachableError
from concord_shared.protocol import InvitationLine

LOOPBACK = ipaddress.ip_address("127.0.0.1")


@dataclass
class Listener:
    """The fake coordinator behind a socket; notes the certificate that each caller showed."""

    coordinator: FakeCoordinator
    port: int
    peers: list[tuple[str, bytes | None]] = field(default_factory=list)

    @property
    def line(self) -> InvitationLine:
        root = root_fingerprint(self.coordinator.root.certificate)
        return InvitationLine("127.0.0.1", self.port, ORGANISATION, NODE, root, TOKEN)

    @property
    def posts(self) -> list[str]:
        return [request.url.path for request in self.coordinator.requests if request.method == "POST"]


@contextmanager
def listening(
    directory: Path, issuer: Authority | None = None, host: x509.GeneralName | None = None
) -> Iterator[Listener]:
    """issuer: of the server's certificate, if not the membership key."""
    now = int(time.time())
    coordinator = FakeCoordinator(now=now, root=Authority.root(now=now))
    authority = issuer or coordinator.membership
    key = generate_private_key(SECP256R1())
    names = [host or x509.IPAddress(LOOPBACK)]
    leaf = authority.issue("server", key.public_key(), names=names, usage=SERVER_AUTH, now=coordinator.now)
    chain = directory / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    chain.write_bytes(pem(leaf).encode() + authority.pem.encode() + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    context.load_verify_locations(cadata=coordinator.root.pem)
    context.verify_mode = ssl.CERT_OPTIONAL
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    listener = Listener(coordinator, server.server_address[1])

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            url = f"https://127.0.0.1:{listener.port}{self.path}"
            request = httpx.Request(self.command, url, headers=dict(self.headers), content=self.rfile.read(length))
            listener.peers.append((request.url.path, self.connection.getpeercert(binary_form=True)))
            response = coordinator.handle(request)
            self.send_response(response.status_code)
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content)

        do_GET = do_POST = answer  # noqa: N815 - their names in the standard library

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server.RequestHandlerClass = Handler
    server.handle_error = lambda *_: None  # type: ignore[method-assign] # a refused handshake is what a test wants
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield listener
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def enrol_at(listener: Listener, path: Path, **options: Any) -> Enrolled:
    return enrol(listener.line, path, **options)


def test_node_enrols_and_comes_back_with_its_certificate(tmp_path: Path) -> None:
    with listening(tmp_path) as listener:
        home = enrol_at(listener, tmp_path / "node").home
        assert all(peer is None for _, peer in listener.peers)
        with home.store() as store, ControlChannel(home, store) as channel:
            assert channel.updates(0).state == "active"
        path, peer = listener.peers[-1]
        assert path == "/api/node/updates"
        assert peer is not None
        assert spiffe_of(x509.load_der_x509_certificate(peer)) == "spiffe://fed/acme/acme-1"


def test_node_renews_with_its_old_certificate(tmp_path: Path) -> None:
    with listening(tmp_path) as listener:
        home = enrol_at(listener, tmp_path / "node").home
        with home.store() as store:
            later = time.time() + 25 * 24 * 3600
            listener.coordinator.now = int(later)
            with ControlChannel(home, store) as channel:
                assert renew_if_due(home, channel, later)
            assert listener.peers[-1][1] is not None
            home.tls_context()  # the new certificate and the key belong together


def test_token_is_not_shown_to_a_server_that_the_root_does_not_vouch_for(tmp_path: Path) -> None:
    """It relays the right /api/trust, as anyone in between could."""
    with listening(tmp_path, Authority.root(now=int(time.time())).authority(now=int(time.time()))) as listener:
        with pytest.raises(UnreachableError, match="does not trust"):
            enrol_at(listener, tmp_path / "node")
        assert listener.posts == []
        assert TOKEN.encode() not in b"".join(request.content for request in listener.coordinator.requests)


def test_token_is_not_shown_to_a_server_with_another_name(tmp_path: Path) -> None:
    with listening(tmp_path, host=x509.DNSName("other.example")) as listener:
        with pytest.raises(UnreachableError, match="does not trust"):
            enrol_at(listener, tmp_path / "node")
        assert listener.posts == []


def test_node_of_the_federation_cannot_pose_as_the_coordinator(tmp_path: Path) -> None:
    """A node's certificate is signed by the same membership key, but for clients only."""
    with listening(tmp_path) as listener:
        home = enrol_at(listener, tmp_path / "node").home
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(home.certificate, home.key_file("tls"))
        client = home.tls_context()
        client.check_hostname = False  # its purpose alone must be enough
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        shake_hands(client, server)


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [server.wrap_bio(one, other, server_side=True), client.wrap_bio(other, one)]
    for _ in range(5):
        for side in sides:
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()


def believe(authority: Authority, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is among this system's authorities."""
    authorities = directory / "authorities.pem"
    authorities.write_text(authority.pem, "utf-8")
    monkeypatch.setenv("SSL_CERT_FILE", str(authorities))


def test_token_is_not_shown_to_whom_a_system_authority_vouches_for_unless_a_person_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A company's proxy that opens TLS: its authority is on every machine, and it relays the right /api/trust."""
    proxy = Authority.root("proxy", now=int(time.time()))
    believe(proxy, tmp_path, monkeypatch)
    with listening(tmp_path, proxy) as listener:
        with pytest.raises(UnreachableError, match=r"invitation was not sent.*--system-ca"):
            enrol_at(listener, tmp_path / "node")
        assert listener.posts == []


def test_a_persons_token_is_not_shown_to_whom_a_system_authority_vouches_for_unless_the_person_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Authority.root("proxy", now=int(time.time()))
    believe(proxy, tmp_path, monkeypatch)
    with listening(tmp_path, proxy) as listener:
        url, root = f"https://127.0.0.1:{listener.port}", listener.line.root
        me = {"name": "ada", "organisation": ORGANISATION}
        listener.coordinator.overrides |= {
            "/api/trust": lambda _: httpx.Response(200, json=listener.coordinator.trust),
            "/api/v1/me": lambda _: httpx.Response(200, json=me),
        }
        with pytest.raises(UnreachableError, match=r"token was not sent.*--system-ca"):
            log_in(url, root, "secret")
        assert not any("Authorization" in request.headers for request in listener.coordinator.requests)
        profile, person = log_in(url, root, "secret", system_ca=True)
        assert profile.system_ca
        assert person == me


def test_existing_certificate_of_a_public_authority_is_accepted_where_a_person_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = Authority.root("public", now=int(time.time()))
    with listening(tmp_path, public) as listener:
        with pytest.raises(UnreachableError):
            enrol_at(listener, tmp_path / "first", system_ca=True)
        believe(public, tmp_path, monkeypatch)
        home = enrol_at(listener, tmp_path / "node", system_ca=True).home
        assert home.config.system_ca
        with home.store() as store, ControlChannel(home, store) as channel:
            assert channel.updates(0).state == "active"


def test_authority_of_a_company_is_accepted_where_it_is_named(tmp_path: Path) -> None:
    company = Authority.root("company", now=int(time.time()))
    (tmp_path / "company.pem").write_text(company.pem, "utf-8")
    with listening(tmp_path, company) as listener:
        home = enrol_at(listener, tmp_path / "node", ca=str(tmp_path / "company.pem")).home
        assert not home.config.system_ca
        assert Path(home.config.ca).is_absolute()
        with home.store() as store, ControlChannel(home, store) as channel:
            assert channel.updates(0).state == "active"


def test_nobody_there_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    with listening(tmp_path) as listener:
        line = listener.line
    with pytest.raises(UnreachableError, match="cannot be reached"):
        enrol(line, tmp_path / "node")
    assert not (tmp_path / "node" / "node.toml").exists()


def test_proxy_is_used_and_named_when_it_is_not_there(tmp_path: Path) -> None:
    with listening(tmp_path) as listener:
        with pytest.raises(UnreachableError, match="proxy"):
            enrol_at(listener, tmp_path / "node", proxy="http://127.0.0.1:9")
        assert listener.peers == []
