"""A coordinator that goes on for months: certificates end, disks fill, callers do not give up, proxies are set."""

import asyncio
import contextlib
import errno
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fleets import WORKER, Authority, Fleet, free_port, listen
from flwr.app import Message
from sqlmodel import select
from worlds import World, small_plan

from concord_client.fleet import FleetConnection
from concord_server import client, pki, status, supervisor, tls
from concord_server.audit.tables import AuditEvent
from concord_server.checkpoints import Checkpoint
from concord_server.client import Coordinator
from concord_server.database import utc_now
from concord_server.initialise import initialise
from concord_server.refusals import Refusals, actor_of
from concord_server.runs import service
from concord_server.runs.store import DatabaseStepStore
from concord_server.settings import Home
from concord_server.superlink import firewall
from concord_server.superlink.app import build_superlink, superlink_server
from concord_server.superlink.environment import quiet_flower
from concord_server.superlink.transport import FlowerTransport
from concord_server.tls import FreshContext, keep_fresh, server_context
from concord_server.worker.loop import Worker, superlink_link
from concord_shared.certificates import read_certificate
from concord_shared.errors import ArtefactError, UnavailableError, UnreachableError
from concord_shared.messages import answer, model_record, offer_message, read_offer
from concord_shared.signing import new_identity_key
from concord_shared.tensors import Layout, model_digest
from helpers import offer_of

PLAN = small_plan()


def until(what: str, test: Callable[[], Any], timeout_s: float = 15) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := test():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    path = tmp_path_factory.mktemp("longevity") / "c"
    initialise(path, {"federation": "hearts", "public_host": "localhost"}, "admin", "hospital-a")
    return Home.open(path)


# A SuperLink in this process


@dataclass
class Served:
    """address: host:port. state: Flower's. refused: who, path and reason of every refusal that was noted."""

    address: str
    state: Any
    refused: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        return list(self.state.object_store._directory.iterdir())


@contextlib.contextmanager
def served(
    folder: Path, port: int, nodes: dict[str, Any], files: tuple[Path, Path], ca: str, worker: str, **options: Any
) -> Iterator[Served]:
    noted: list[tuple[str, ...]] = []
    door, access = build_superlink(
        lambda: dict(nodes), worker, folder / "spool", lambda *each: noted.append(each), **options
    )
    access.start()
    server = superlink_server(door, "127.0.0.1", port, *files, ca, 2000, 500)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until("the SuperLink listens", lambda: server.started)
        yield Served(f"127.0.0.1:{port}", door._state, noted)
    finally:
        door.closing = server.should_exit = True
        thread.join(20)
        access.stop()


@contextlib.contextmanager
def fleet_served(folder: Path, **options: Any) -> Iterator[tuple[Fleet, Served]]:
    fleet = Fleet(folder)
    files = folder / "server.pem", folder / "server.key"
    with served(folder, fleet.port, fleet.nodes, files, fleet.authority.pem, WORKER, **options) as running:
        yield fleet, running


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def ask(transport: FlowerTransport, name: str, number: int = 1) -> None:
    """An offer of 800 kB, whose like there is not yet."""
    theta = np.full(200_000, number, np.float32)
    transport.send([offer_message(offer_of(node=name, round_number=number), model_record(theta, {}), 2, time.time())])


def reply_to(message: Message) -> Message:
    offer = read_offer(message)
    return answer(message, offer, {"delta": np.full(200_000, 1000 + offer.round_number, np.int32)}, {})


def received(transport: FlowerTransport, timeout_s: float = 20) -> Message:
    found: Message = until("a reply", lambda: transport.receive(0.2), timeout_s)[0]
    return found


# Certificates


def test_renewed_certificates_are_taken_up_and_no_connection_is_lost(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Server and worker have certificates of a few seconds, which end while both live."""
    monkeypatch.setattr(tls, "REFRESH_S", 0.1)
    authority = pki.Authority.open(home, utc_now())
    with monkeypatch.context() as short:
        short.setattr(pki, "SERVER_DAYS", 4 / 86_400)
        pki.issue_own(home, authority, utc_now())
    ends = read_certificate(home.server_certificate.read_text()).not_valid_after_utc
    files = home.server_certificate, home.server_key
    worker = "spiffe://hearts/coordinator/worker"
    with served(tmp_path, free_port(), {}, files, authority.client_ca, worker) as superlink:
        link = superlink_link(home)
        address = f"https://{superlink.address}"
        with httpx.Client(verify=link.tls, trust_env=False, base_url=address) as before:
            before.post("/rooms/nodes").raise_for_status()
            assert pki.renew_own(home, utc_now())
            until("the first certificates have ended", lambda: utc_now() > ends)
            time.sleep(1)
            before.post("/rooms/nodes").raise_for_status()
            with httpx.Client(verify=link.tls, trust_env=False, base_url=address) as after:
                after.post("/rooms/nodes").raise_for_status()
            pki.renew_membership(home, home.root_key, utc_now())
            time.sleep(0.5)
            before.post("/rooms/nodes").raise_for_status()
            with httpx.Client(verify=link.tls, trust_env=False, base_url=address) as after:
                after.post("/rooms/nodes").raise_for_status()
    assert not superlink.refused


def test_a_key_that_does_not_fit_yet_leaves_the_certificate_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tls, "REFRESH_S", 0.02)
    authority, name = Authority(tmp_path), [x509.DNSName("here")]
    certificate, key, _ = authority.issue("one", name)
    context, first = server_context(certificate, key, authority.pem, "optional"), _der(certificate)
    other, other_key, _ = authority.issue("other", name)

    async def renew() -> None:
        following = asyncio.create_task(keep_fresh(context, certificate, key))
        await asyncio.sleep(0.1)
        other.replace(certificate)
        await asyncio.sleep(0.2)
        assert "cannot be renewed" in caplog.text
        assert _shown(context, authority.client_context()) == first
        other_key.replace(key)
        await asyncio.sleep(0.2)
        assert _shown(context, authority.client_context()) == _der(certificate) != first
        following.cancel()

    asyncio.run(renew())


def _der(certificate: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.read_text())


def _shown(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes | None:
    """The certificate that a new handshake shows."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = server.wrap_bio(up, down, server_side=True), client.wrap_bio(down, up, server_hostname="here")
    for _ in range(4):
        for end in reversed(ends):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[1].getpeercert(binary_form=True)


# Disks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """With a run that `tester` holds; the worker tidies ten times a second, and a megabyte may lie there."""
    made = World(tmp_path_factory.mktemp("world") / "c", tidy_s=0.1, checkpoint_quota_mb=1)
    made.ready()
    made.queued(PLAN, "long")
    assert made.lease("tester") == "long"
    yield made
    made.close()


def held_in(folder: Path) -> float:
    """Bytes; more than any quota where a file was taken away while they were counted."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except FileNotFoundError:
        return float("inf")


def test_a_run_that_goes_on_keeps_within_the_quota(world: World) -> None:
    """Checkpoints of 400 kB, written as a run writes them; the last is there and whole whenever somebody looks."""
    home, size = world.coordinator.home, 100_000
    layout = Layout((("w", (size,)),))
    with home.database().reading() as session:
        view = service.load_run(session, "long")
    store = DatabaseStepStore(home.database(), home.path, view, "tester", new_identity_key())
    worker = Worker(home, None)  # type: ignore[arg-type]
    thread = threading.Thread(target=worker.run)
    thread.start()
    folder = home.runs / "long"
    try:
        for number in range(1, 13):
            theta = np.full(size, number, np.float32)
            store.append({"kind": "train", "round": number, "of": 12, "survivors": ["ward-a"], "seconds": 0.1})
            store.save(Checkpoint("p", theta, model_digest(layout, theta), {}, "long", 1, number, ("train", number)))
            until("the quota holds", lambda: held_in(folder) <= 1 << 20)
            assert (folder / f"round-{number}.safetensors").exists()
    finally:
        worker.stop()
        thread.join(20)
    with home.database().reading() as session:
        view = service.load_run(session, "long")
    resumed = DatabaseStepStore(home.database(), home.path, view, "tester", new_identity_key()).load("p", layout)
    assert resumed is not None
    assert resumed.version == 12


def test_metrics_tell_what_became_of_rounds(world: World) -> None:
    home = world.coordinator.home
    before = _samples(world)
    record = {"kind": "train", "round": 90, "of": 99, "survivors": ["ward-a", "ward-b"], "failures": {"ward-c": "no"}}
    with home.database().session() as session:
        service.save_step(session, "long", "tester", record, None)
        service.save_step(session, "long", "tester", record | {"aborted": "quorum", "silent": ["ward-c"]}, None)
    after = _samples(world)
    change = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    rounds, replies = (
        'concord_rounds_total{{kind="train",outcome="{}"}}',
        'concord_replies_total{{kind="train",outcome="{}"}}',
    )
    assert change[rounds.format("settled")] == change[rounds.format("abandoned")] == 1
    assert (change[replies.format("counted")], change[replies.format("failed")]) == (4, 2)
    assert change[replies.format("silent")] == 1
    assert change['concord_audit_events{action="run:step"}'] == 2
    assert (after['concord_runs{state="running"}'], after['concord_runs{state="waiting"}']) == (1, 0)
    again = _samples(world)
    assert again[rounds.format("settled")] == after[rounds.format("settled")]


def _samples(world: World) -> dict[str, float]:
    lines = world.coordinator.admin.get("/metrics").text.splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines) if name.startswith("concord")
    }


class FullDisk:
    """Writing to the spool leaves a part and fails, as long as `full` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, self.failures = False, 0
        whole = Path.write_bytes

        def write(path: Path, content: bytes) -> int:
            if not self.full or path.parent.name != "spool":
                return whole(path, content)
            whole(path, content[:1000])
            self.failures += 1
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write)


def test_a_full_disk_delays_a_reply_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk(monkeypatch)

    def respond(message: Message) -> Message:
        disk.full = disk.failures == 0
        return reply_to(message)

    with fleet_served(tmp_path) as (fleet, superlink):
        member = fleet.member("node-1")
        listen(fleet, member, respond, stop)
        transport = fleet.transport([member])
        ask(transport, "node-1")
        until("a reply finds the disk full", lambda: transport.receive(0.1) or disk.failures)
        assert not any(file.stat().st_size == 1000 for file in superlink.files)
        disk.full = False
        assert not received(transport).has_error()
        transport.close()
        stop.set()
    assert [each.levelno for each in caplog.records if "no room for messages" in each.message] == [logging.ERROR]


def test_a_full_spool_refuses_clearly_and_goes_on_when_there_is_room(
    tmp_path: Path, stop: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    with fleet_served(tmp_path, spool_bytes_max=1_000_000) as (fleet, superlink):
        idle, busy = fleet.member("node-1"), fleet.member("node-2")
        first, second = fleet.transport([idle]), fleet.transport([busy])
        with FleetConnection(fleet.address, idle.tls, idle.flower) as connection:
            ask(first, "node-1", 1)
            until("an offer waits for its node", lambda: superlink.files)
            listen(fleet, busy, reply_to, stop)
            until("the other node is there", lambda: superlink.state and _online(superlink) == 2)
            ask(second, "node-2", 2)
            assert second.receive(1.0) == []
            assert "507" in second._last_failure
            assert "disk is full" in second._last_failure
            assert "spool_quota_mb" in second._last_failure
            assert sum(file.stat().st_size for file in superlink.files) <= 1_000_000
            assert connection.receive(5) is not None
            assert not received(second).has_error()
        first.close()
        second.close()
        stop.set()
    assert [each.levelno for each in caplog.records if "no room for messages" in each.message] == [logging.ERROR]


def _online(superlink: Served) -> int:
    return len(superlink.state.get_node_info(statuses=["online"]))


def test_what_a_killed_worker_left_leaves_the_spool(tmp_path: Path) -> None:
    with fleet_served(tmp_path) as (fleet, superlink):
        member = fleet.member("node-1")
        killed = fleet.transport([member])
        with FleetConnection(fleet.address, member.tls, member.flower):
            ask(killed, "node-1")
            until("its offer waits", lambda: superlink.files)
            for record in superlink.state.task_token_store.values():
                record.active_until = record.active_until.fromtimestamp(0, record.active_until.tzinfo)
            successor = fleet.transport([member])
            successor._enter()
            until("nothing waits any more", lambda: not superlink.files)
        killed._http.close()
        successor.close()


def test_a_full_disk_does_not_end_the_supervisor(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A child dies while the state of the processes cannot be written; it is started again, and the state follows."""
    ending, full, whole = supervisor._Ending(), threading.Event(), supervisor.write_atomically

    def write(path: Path, content: str) -> None:
        if full.is_set():
            raise ArtefactError(f"cannot write {path}: the disk is full")
        whole(path, content)

    sleeping = supervisor._Child("control", [sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ))
    monkeypatch.setattr(supervisor, "write_atomically", write)
    monkeypatch.setattr(supervisor, "start_logging", lambda *_: None)
    monkeypatch.setattr(supervisor, "AGAIN_S", 0.2)
    monkeypatch.setattr(supervisor, "_told_to_end", lambda: contextlib.nullcontext(ending))
    monkeypatch.setattr(supervisor, "_choose_ports", lambda _: {"control": 1, "superlink": 2})
    monkeypatch.setattr(supervisor, "_end_with_parent", lambda: None)
    monkeypatch.setattr(supervisor, "_child", lambda *_: sleeping)
    umask = os.umask(0o077)
    thread = threading.Thread(target=supervisor.supervise, args=(home.path, ["control"]))
    thread.start()
    try:
        until("the state is written", home.up_file.exists)
        full.set()
        assert sleeping.process is not None
        sleeping.process.kill()
        until("the child is started again", lambda: sleeping.restarts == 1)
        time.sleep(0.3)
        assert thread.is_alive()
        assert json.loads(home.up_file.read_text())["restarts"] == {"control": 0}
        full.clear()
        until("the state follows", lambda: json.loads(home.up_file.read_text())["restarts"] == {"control": 1})
    finally:
        ending.is_set = True
        thread.join(20)
        os.umask(umask)
    assert "cannot be written" in caplog.text


# Callers who do not give up


def test_a_revoked_node_fills_neither_the_time_nor_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firewall, "REFUSALS_PER_MINUTE", 5)
    with fleet_served(tmp_path) as (fleet, superlink):
        revoked, honest = fleet.member("node-1"), fleet.member("node-2")
        del fleet.nodes[revoked.row.spiffe]
        with httpx.Client(verify=revoked.tls, trust_env=False) as http:
            url = f"https://{fleet.address}/v1/fleet/pull-messages"
            until("it is refused", lambda: http.post(url).status_code == 403)
            answers = [http.post(url) for _ in range(10)]
        assert answers[-1].status_code == 429
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert len([each for each in superlink.refused if each[0] == revoked.row.spiffe]) <= 6
        with FleetConnection(fleet.address, honest.tls, honest.flower) as connection:
            assert connection.receive(0.1) is None


def test_refusals_are_written_at_once_and_then_counted() -> None:
    now, written = [0.0], list[tuple[Any, ...]]()
    refusals = Refusals(lambda *each: written.append(each), clock=lambda: now[0])
    for number in range(100):
        refusals.note("a", f"/{number}", "revoked")
    refusals.note("b", "/", "revoked")
    assert written == [("a", "/0", "revoked", 1), ("b", "/", "revoked", 1)]
    now[0] = 59.0
    refusals.flush()
    assert len(written) == 2
    now[0] = 60.0
    refusals.flush()
    assert written[2:] == [("a", "/99", "revoked", 99)]
    now[0] = 121.0
    refusals.flush()
    refusals.note("a", "/again", "revoked")  # after a quiet minute
    assert written[3:] == [("a", "/again", "revoked", 1)]
    refusals.note("a", "/last", "revoked")
    refusals.stop()
    assert written[4:] == [("a", "/last", "revoked", 1)]


def test_refusals_that_cannot_be_written_are_counted_in_later() -> None:
    now, written, full = [0.0], list[int](), [True]

    def write(who: str, path: str, reason: str, times: int) -> None:
        if full[0]:
            raise UnavailableError("the database is full")
        written.append(times)

    refusals = Refusals(write, clock=lambda: now[0])
    refusals.note("a", "/", "revoked")
    refusals.note("a", "/", "revoked")
    full[0], now[0] = False, 60.0
    refusals.flush()
    assert written == [2]


def test_actors_are_those_of_the_audit_log() -> None:
    worker = "spiffe://hearts/coordinator/worker"
    assert actor_of("spiffe://hearts/hospital-a/ward-1", worker) == "node:ward-1"
    assert actor_of("10.0.0.1", worker) == "address:10.0.0.1"
    assert actor_of(worker, worker) == "coordinator"


def test_the_audit_log_tells_of_refused_calls_by_node_and_with_their_number(home: Home, tmp_path: Path) -> None:
    """The SuperLink's own process, and a node that nobody admitted."""
    key = ec.generate_private_key(ec.SECP256R1())
    authority = pki.Authority.open(home, utc_now())
    chain, file = tmp_path / "ward.pem", tmp_path / "ward.key"
    chain.write_text(authority.node("hospital-a", "ward-9", key.public_key(), 1, utc_now()).chain)
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = FreshContext(home.root_certificate, chain, file)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "concord_server.superlink", str(home.path)],
        env=os.environ | {"CONCORD_SUPERLINK_PORT": str(port)},
    )

    def events() -> list[AuditEvent]:
        with home.database().reading() as session:
            return list(session.exec(select(AuditEvent).where(AuditEvent.actor == "node:ward-9")))

    try:
        with httpx.Client(verify=context, trust_env=False, base_url=f"https://127.0.0.1:{port}") as http:
            until("it listens", lambda: _post(http) is not None, 60)
            for _ in range(30):
                assert http.post("/v1/fleet/pull-messages").status_code == 403
        [first] = events()
        assert (first.action, first.subject) == ("superlink:call-refused", "/v1/fleet/pull-messages")
        assert first.detail == {"reason": "not an active node of this federation", "times": 1}
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        assert [each.detail["times"] for each in events()] == [1, 30]
    finally:
        process.kill()
        process.wait()


def _post(http: httpx.Client) -> httpx.Response | None:
    try:
        return http.post("/v1/fleet/pull-messages")
    except httpx.TransportError:
        return None


# Proxies


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What HTTPS_PROXY names; says who was asked for, and hangs up."""
    asked: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    asked.append(connection.recv(1000).decode("latin-1").partition("\r\n")[0])

    thread = threading.Thread(target=serve)
    thread.start()
    for name in ("NO_PROXY", "no_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{listener.getsockname()[1]}")
    yield asked
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def test_the_worker_reaches_its_superlink_without_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fleet_served(tmp_path) as (fleet, _):
        member = fleet.member("node-1")
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        transport = fleet.transport([member])
        assert transport._enter().run_id  # a room over our own client, and its heartbeat over Flower's
        transport.close()


def test_status_asks_no_proxy_and_people_do(home: Home, proxy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ATTEMPTS", 1)
    port = free_port()
    assert status._health(home, port)["status"] == "unreachable"
    assert proxy == []
    with pytest.raises(UnreachableError), Coordinator(f"https://fl.example.org:{port}") as coordinator:
        coordinator.get("/api/health")
    assert proxy == [f"CONNECT fl.example.org:{port} HTTP/1.1"]


def test_flower_finds_no_proxy_in_the_coordinators_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that it cannot use (SOCKS) would end every run."""
    monkeypatch.setattr(os, "environ", {"ALL_PROXY": "socks5://proxy:1080", "https_proxy": "http://proxy", "HOME": "/"})
    quiet_flower(tmp_path)
    assert not [name for name in os.environ if "proxy" in name.lower()]
