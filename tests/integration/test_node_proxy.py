"""A node behind a company's proxy: enrolment and rounds go through it, to hosts whose names only the proxy knows."""

import contextlib
import ipaddress
import queue
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from fleets import Fleet, FleetMember
from test_node_enrolment import listening
from unit.client.fake_coordinator import NODE, ORGANISATION, TOKEN
from unit.client.rounds_kit import Scripted, Site, make_site
from unit.client.test_daemon import Coordinator, FakeChannel

from concord_client.control import ControlChannel
from concord_client.daemon import Daemon
from concord_client.doctor import _fleet
from concord_client.enrolment import enrol
from concord_client.fleet import FleetConnection
from concord_client.home import NodeHome
from concord_client.store import NodeStore
from concord_shared.certificates import root_fingerprint
from concord_shared.errors import UnreachableError
from concord_shared.messages import model_record, offer_message
from concord_shared.protocol import InvitationLine

CONTROL, ROUNDS = "control.concord.invalid", "rounds.concord.invalid"
"""No resolver knows these: who reaches them went through the proxy."""


class Proxy:
    """CONNECT for names that end in `.invalid`, which it finds on this machine; counts what it connected."""

    def __init__(self) -> None:
        self.connected: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(4096)
            method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
            host, port = target.rsplit(":", 1)
            if method != "CONNECT" or not host.endswith(".invalid"):
                client.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", int(port))) as server:
                self.connected[host] += 1
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server)
                back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.close()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    made.authority.issue("server", [x509.DNSName(ROUNDS), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made.start()
    yield made
    made.kill()


@pytest.fixture
def member(fleet: Fleet) -> FleetMember:
    fleet.forget()
    return fleet.member("node-1")


@pytest.fixture
def site(tmp_path: Path, fleet: Fleet, member: FleetMember, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A partner's home whose certificate, key and coordinator are those of the fleet."""
    made = make_site(tmp_path)
    monkeypatch.setattr("concord_client.daemon.renew_if_due", lambda *_: False)
    monkeypatch.setattr(NodeHome, "tls_context", lambda _: member.tls)
    monkeypatch.setattr(NodeHome, "flower_key", lambda _: member.flower)
    fleet.coordinator, member.identity = made.coordinator, made.home.identity_key()
    settings = {"superlink": f"{ROUNDS}:{fleet.port}"}
    made.home.write_config(made.home.config.model_copy(update=settings))
    yield made
    made.store.close()


@contextmanager
def running(site: Site) -> Iterator[Daemon]:
    @contextmanager
    def channel(home: NodeHome, store: NodeStore) -> Iterator[Any]:
        yield FakeChannel(Coordinator(messages=queue.Queue()), store)

    daemon = Daemon(site.home, site.store, Scripted(), channel=channel)  # type: ignore[arg-type]
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        yield daemon
    finally:
        daemon.stop()
        thread.join(10)


def test_enrolment_and_the_control_channel_go_through_the_proxy(tmp_path: Path, proxy: Proxy) -> None:
    with listening(tmp_path, host=x509.DNSName(CONTROL)) as listener:
        root = root_fingerprint(listener.coordinator.root.certificate)
        line = InvitationLine(CONTROL, listener.port, ORGANISATION, NODE, root, TOKEN)
        with pytest.raises(UnreachableError, match="cannot be reached"):
            enrol(line, tmp_path / "without")
        home = enrol(line, tmp_path / "node", proxy=proxy.url).home
        assert home.config.proxy == proxy.url
        before = proxy.connected[CONTROL]
        assert before
        with home.store() as store, ControlChannel(home, store) as channel:
            assert channel.updates(0).state == "active"
        assert proxy.connected[CONTROL] == before + 1


@pytest.mark.parametrize("named", ["node.toml", "HTTPS_PROXY"])
def test_a_round_goes_through_the_proxy(
    named: str, site: Site, fleet: Fleet, member: FleetMember, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon's own connection, a real SuperLink, and a reply that the coordinator verifies."""
    if named == "node.toml":
        site.home.write_config(site.home.config.model_copy(update={"proxy": proxy.url}))
    else:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")  # the test's own calls to the fleet
    assert _fleet(site.home).state == "ok", "the doctor goes the same way"
    seen = proxy.connected[ROUNDS]
    transport = fleet.transport([member])
    with running(site):
        transport.send(iter([offer_message(site.offer(), model_record(site.theta, {}), 2, time.time())]))
        replies, until = [], time.monotonic() + 20
        while not replies and time.monotonic() < until:
            replies = transport.receive(0.5)
    transport.close()
    assert len(replies) == 1
    assert not replies[0].has_error()
    assert proxy.connected[ROUNDS] > seen


@pytest.mark.parametrize("named", ["node.toml", "HTTPS_PROXY"])
def test_rounds_and_doctor_agree_where_there_is_no_way(
    named: str, site: Site, fleet: Fleet, member: FleetMember, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy of the settings that is not there is not gone around; that of the environment gives way to NO_PROXY."""
    given = ""
    if named == "node.toml":
        given = "http://127.0.0.1:9"
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    else:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", ROUNDS)
    site.home.write_config(site.home.config.model_copy(update={"proxy": given}))
    address = site.home.config.superlink
    with pytest.raises(UnreachableError), FleetConnection(address, member.tls, member.flower, given):
        pass
    assert _fleet(site.home).state == "fail"
    assert not proxy.connected


def test_a_proxy_of_an_unknown_kind_is_named_without_its_password(member: FleetMember) -> None:
    for url in ("ftp://ada:secret@proxy", "socks5://ada:secret@proxy:1"):
        with pytest.raises(UnreachableError, match=r"proxy of node\.toml cannot be used") as raised:
            FleetConnection(f"{ROUNDS}:1", member.tls, member.flower, url)
        assert "secret" not in str(raised.value)
