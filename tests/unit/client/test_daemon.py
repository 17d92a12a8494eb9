"""The daemon with a coordinator that can vanish, lose replies and change its mind."""

import hashlib
import io
import json
import logging
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, generate_private_key
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fab_pb2 import Fab, GetFabResponse
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
)

from concord_client.approvals import questions, withdraw
from concord_client.control import ControlChannel
from concord_client.daemon import BackOff, Daemon, choose_responder
from concord_client.daemon_lock import claim_home, running_daemon
from concord_client.exposition import Counts, serve_metrics
from concord_client.fixed_update import FixedUpdate
from concord_client.fleet import ANSWER_BYTES_MAX, MESSAGE_BYTES_MIN, FleetConnection, message_bytes
from concord_client.home import NodeHome
from concord_client.ledger.witness import KIND
from concord_client.logs import JsonFormatter, about
from concord_client.policy import Policy
from concord_client.rounds import Rounds
from concord_client.store import NodeStore
from concord_client.sync import apply_updates
from concord_client.training_process import TrainingProcess
from concord_shared.certificates import read_certificate
from concord_shared.errors import (
    ArtefactError,
    DocumentRefusedError,
    NotAllowedError,
    UnreachableError,
    UsageError,
)
from concord_shared.flower_objects import take_apart
from concord_shared.protocol import Update, Updates
from concord_shared.signing import seal

from .fake_coordinator import DAY, NODE, SERVER_AUTH, Authority, FakeCoordinator, enrol_with, pem
from .rounds_kit import Scripted, Site, bytes_of_reply, copied, make_site
from .test_training_process import hang


@dataclass
class Coordinator:
    """What the fakes of both channels talk to."""

    messages: "queue.Queue[Message | Exception]" = field(default_factory=queue.Queue)
    replies: list[Message] = field(default_factory=list)
    delivered: list[str] = field(default_factory=list)
    state: str = "active"
    down: bool = False
    refuses: bool = False
    replies_lost: int = 0
    entered: int = 0
    left: int = 0
    asked: int = 0

    def check(self) -> None:
        if self.down:
            raise UnreachableError("412: the node is active already")
        if self.refuses:
            raise NotAllowedError("revoked")


class FakeFleet:
    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator, self._gone = coordinator, threading.Event()

    def __enter__(self) -> Self:
        self._coordinator.check()
        self._coordinator.entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._coordinator.left += not self._gone.is_set()
        self._gone.set()

    def receive(self, timeout_s: float) -> Message | None:
        deadline = time.monotonic() + min(timeout_s, 0.3)
        while time.monotonic() < deadline and not self._gone.is_set():
            self._coordinator.check()
            try:
                message = self._coordinator.messages.get(timeout=0.02)
            except queue.Empty:
                continue
            if isinstance(message, Exception):
                raise message
            return message
        return None

    def reply(self, message: Message) -> None:
        if self._coordinator.replies_lost:
            self._coordinator.replies_lost -= 1
            raise UnreachableError("the link broke")
        self._coordinator.replies.append(message)


class FakeChannel:
    def __init__(self, coordinator: Coordinator, store: NodeStore) -> None:
        self._coordinator, self._store = coordinator, store

    def updates(self, wait_s: int) -> Updates:
        time.sleep(min(wait_s, 0.05))
        self._coordinator.check()
        self._coordinator.asked += 1
        return Updates(updates=(), cursor=0, state=self._coordinator.state, now=0)  # type: ignore[arg-type]

    def ledger_witness(self) -> None:
        self._coordinator.check()

    def deliver(self) -> int:
        self._coordinator.check()
        for posted in self._store.outbox():
            if posted.kind != KIND:
                self._coordinator.delivered.append(posted.subject)
            self._store.delivered(posted.id)
        return len(self._coordinator.delivered)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr("concord_client.daemon.renew_if_due", lambda *_: False)
    monkeypatch.setattr(NodeHome, "tls_context", lambda _: None)
    made = make_site(tmp_path)
    yield made
    made.store.close()


@contextmanager
def running(site: Site, coordinator: Coordinator, responder: Any = None) -> Iterator[Daemon]:
    @contextmanager
    def channel(home: NodeHome, store: NodeStore) -> Iterator[Any]:
        yield FakeChannel(coordinator, store)

    daemon = Daemon(
        site.home,
        site.store,
        responder or Scripted(),
        fleet=lambda *_: FakeFleet(coordinator),
        channel=channel,  # type: ignore[arg-type]
        retry_s=0.02,
    )
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        yield daemon
    finally:
        daemon.stop()
        thread.join(10)
        assert not thread.is_alive()


def until(fact: Callable[[], object], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class TestRounds:
    def test_it_answers_and_says_goodbye(self, site: Site) -> None:
        coordinator = Coordinator()
        with running(site, coordinator):
            coordinator.messages.put(site.message())
            until(lambda: coordinator.replies)
            assert not coordinator.replies[0].has_error()
        assert (coordinator.entered, coordinator.left) == (1, 1)
        assert site.store.fact("contact/rounds") is not None

    def test_it_survives_a_vanished_coordinator(self, site: Site) -> None:
        coordinator = Coordinator()
        with running(site, coordinator) as daemon:
            until(lambda: coordinator.entered == 1)
            coordinator.down = True
            until(lambda: (daemon.counts.registry.get_sample_value(*lost("rounds")) or 0) > 3)
            until(lambda: daemon.counts.registry.get_sample_value(*lost("control")))
            coordinator.down = False
            coordinator.messages.put(site.message())
            until(lambda: coordinator.replies)
            assert coordinator.entered == 2

    def test_it_starts_while_the_coordinator_is_away(self, site: Site) -> None:
        coordinator = Coordinator(down=True)
        with running(site, coordinator):
            time.sleep(0.3)
            assert coordinator.entered == 0
            coordinator.down = False
            coordinator.messages.put(site.message())
            until(lambda: coordinator.replies)

    def test_a_reply_that_is_lost_on_the_way_is_sent_again(self, site: Site) -> None:
        coordinator, responder, message = Coordinator(replies_lost=1), Scripted(), site.message()
        with running(site, coordinator, responder):
            coordinator.messages.put(message)
            until(lambda: coordinator.entered == 2)
            coordinator.messages.put(copied(message))
            until(lambda: coordinator.replies)
        assert len(responder.jobs) == 1
        assert len({each.sha256 for each in site.store.egress()}) == 1
        assert bytes_of_reply(coordinator.replies[0])[1]

    def test_a_message_that_cannot_be_read_ends_nothing(self, site: Site) -> None:
        coordinator = Coordinator()
        with running(site, coordinator):
            coordinator.messages.put(DocumentRefusedError("a part of a message is missing"))
            coordinator.messages.put(site.message())
            until(lambda: coordinator.replies)
        assert coordinator.entered == 1

    def test_an_unexpected_fault_ends_nothing(self, site: Site) -> None:
        coordinator = Coordinator()
        with running(site, coordinator):
            coordinator.messages.put(RuntimeError("a bug"))
            coordinator.messages.put(site.message())
            until(lambda: coordinator.replies)

    def test_only_an_active_node_listens(self, site: Site) -> None:
        coordinator = Coordinator(state="enrolled")
        site.store.set_fact("state", "enrolled")
        with running(site, coordinator):
            until(lambda: coordinator.asked > 3)
            assert coordinator.entered == 0
            coordinator.state = "active"
            until(lambda: coordinator.entered == 1)
            coordinator.state = "suspended"
            until(lambda: coordinator.left == 1)

    def test_a_node_that_is_not_admitted_asks_rarely_and_lives(self, site: Site) -> None:
        coordinator = Coordinator(refuses=True)
        with running(site, coordinator):
            time.sleep(0.5)
            assert coordinator.asked == 0
            coordinator.refuses = False
            until(lambda: coordinator.asked, 30)


class TestWork:
    """One training that hangs: the node hears its owner all the same."""

    def test_status_says_which_run_it_works_on_and_a_withdrawal_ends_it(self, site: Site) -> None:
        """The plan has minutes, the process never answers; what is asked next is answered at once."""
        assert site.plan.rounds.deadline_s >= 60
        coordinator, process = Coordinator(), TrainingProcess(target=hang, patience_s=0.3)
        with running(site, coordinator, process):
            begun = time.time()
            coordinator.messages.put(site.message())
            until(lambda: process.pid)
            works = json.loads(site.store.fact("works") or "null")
            assert (works["run"], works["plan"]) == ("run-1", site.plan.name)
            assert works["until"] - works["since"] == site.plan.rounds.deadline_s
            assert begun - 2 < works["since"] <= time.time()
            withdraw_by_hand(site)
            until(lambda: len(coordinator.delivered) == 2)
            until(lambda: coordinator.replies, 10)
            assert "approval withdrawn" in coordinator.replies[0].error.reason
            until(lambda: site.store.fact("works") == "")
            coordinator.messages.put(site.message(attempt=2))
            until(lambda: len(coordinator.replies) == 2)

    def test_what_the_owner_and_the_coordinator_say_gets_through_meanwhile(self, site: Site) -> None:
        coordinator, process = Coordinator(), TrainingProcess(target=hang, patience_s=600)
        with running(site, coordinator, process):
            coordinator.messages.put(site.message())
            until(lambda: process.pid)
            asked = coordinator.asked
            withdraw_by_hand(site)
            until(lambda: len(coordinator.delivered) == 2)
            until(lambda: coordinator.asked > asked + 3)
            assert not coordinator.replies
            begun = time.monotonic()
        assert time.monotonic() - begun < 5

    def test_what_a_killed_node_worked_on_is_forgotten(self, site: Site) -> None:
        site.store.set_fact("works", json.dumps({"run": "run-0"}))
        with running(site, Coordinator()):
            until(lambda: site.store.fact("works") == "")


def withdraw_by_hand(site: Site) -> None:
    policy, now = Policy.load(site.home.policy_file), time.time()
    request = {"study": "digits-2026", "plan_digest": site.plan.digest, "requested_by": "hospital-b", "received_at": 1}
    site.store.put("request", f"digits-2026/{site.plan.digest}", request)
    [question] = questions(site.home, site.store, policy, now)
    withdraw(site.home, site.store, question, now, "ada")


class TestTheLedgersWitness:
    def test_no_round_is_taken_before_the_coordinator_was_asked_where_the_ledger_stood(self, site: Site) -> None:
        coordinator, order = Coordinator(), []

        class Slow(FakeChannel):
            def ledger_witness(self) -> None:
                time.sleep(0.3)
                order.append("asked")

        @contextmanager
        def channel(home: NodeHome, store: NodeStore) -> Iterator[Any]:
            yield Slow(coordinator, store)

        def fleet(*_: Any) -> FakeFleet:
            order.append("listens")
            return FakeFleet(coordinator)

        daemon = Daemon(site.home, site.store, Scripted(), fleet=fleet, channel=channel, retry_s=0.02)  # type: ignore[arg-type]
        thread = threading.Thread(target=daemon.run)
        thread.start()
        try:
            until(lambda: "listens" in order)
        finally:
            daemon.stop()
            thread.join(10)
        assert order[:2] == ["asked", "listens"]


class TestWayToTheFleet:
    def test_proxy_and_bound_are_those_of_settings_and_approvals(self, site: Site) -> None:
        given: list[Any] = []

        def fleet(*arguments: Any) -> FakeFleet:
            given.append(arguments)
            return FakeFleet(Coordinator())

        site.home.write_config(site.home.config.model_copy(update={"proxy": "http://proxy:3128"}))
        daemon = Daemon(site.home, site.store, Scripted(), fleet=fleet)
        daemon._asked.set()  # as the thread of the control channel would
        thread = threading.Thread(target=daemon._live, args=("rounds", daemon._listen))
        thread.start()
        until(lambda: given)
        daemon.stop()
        thread.join(10)
        address, _, _, proxy, bytes_max = given[0]
        assert (address, proxy) == ("127.0.0.1:2", "http://proxy:3128")
        assert bytes_max() == MESSAGE_BYTES_MIN + site.theta.nbytes

    def test_only_what_was_ever_approved_raises_the_bound(self, site: Site) -> None:
        from concord_shared.plan.schema import parse_plan_document

        model = {"name": "mlp", "hidden": [65536, 4096]}
        large = parse_plan_document(site.plan.document() | {"name": "large", "model": model})
        site.store.put("plan", large.digest, large.document())
        daemon = Daemon(site.home, site.store, Scripted())
        before = daemon._message_bytes_max()
        assert before < message_bytes(large)
        site.approve(plan_digest=large.digest)
        assert daemon._message_bytes_max() == message_bytes(large) > 4 * 65536 * 4096
        site.approve(plan_digest=large.digest, decision="withdrawn")
        assert daemon._message_bytes_max() == message_bytes(large), "it still gets its decline"


@dataclass
class Returning:
    """A node that was away, and its coordinator, which went on: in real time, so that TLS believes the certificates."""

    path: Path
    days: float

    def __post_init__(self) -> None:
        now = int(time.time())
        then = now - int(self.days * DAY)
        self.coordinator = FakeCoordinator(now=then, root=Authority.root(now=then))
        self.home = enrol_with(self.coordinator, self.path / "node").home
        self.coordinator.now = now
        self.shown: list[x509.Certificate] = []

    def renew_membership(self) -> None:
        """By the root key; with it a new roster, and what tells nodes of both."""
        given = self.coordinator
        given.membership, given.version = given.root.authority(now=given.now), 2
        roster = seal(given.roster(), given.membership.key).model_dump(mode="json")
        given.updates = [
            Update(sequence=1, kind="roster", body=roster),
            Update(sequence=2, kind="trust", body=given.trust),
        ]

    def daemon(self, store: NodeStore) -> Daemon:
        def fleet(address: str, tls: ssl.SSLContext, *_: Any) -> FakeFleet:
            self.shown.append(self._certificate_of(tls))
            return FakeFleet(Coordinator())

        def channel(home: NodeHome, store: NodeStore) -> ControlChannel:
            return ControlChannel(home, store, transport=self.coordinator.transport())

        return Daemon(self.home, store, Scripted(), fleet=fleet, channel=channel, retry_s=0.02)

    def _certificate_of(self, client: ssl.SSLContext) -> x509.Certificate:
        """What a server sees of a connection under this context."""
        key = generate_private_key(SECP256R1())
        membership, now = self.coordinator.membership, self.coordinator.now
        leaf = membership.issue("server", key.public_key(), usage=SERVER_AUTH, now=now)
        file = self.path / "server.pem"
        plain = serialization.NoEncryption()
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        file.write_bytes(pem(leaf).encode() + membership.pem.encode() + private)
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(file)
        server.load_verify_locations(cadata=self.coordinator.root.pem)
        server.verify_mode = ssl.CERT_REQUIRED
        client.check_hostname = False
        one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
        sides = [server.wrap_bio(one, other, server_side=True), client.wrap_bio(other, one)]
        for _ in range(5):
            for side in sides:
                with suppress(ssl.SSLWantReadError):
                    side.do_handshake()
        return x509.load_der_x509_certificate(sides[0].getpeercert(binary_form=True) or b"")


@contextmanager
def at_work(daemon: Daemon) -> Iterator[None]:
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        yield
    finally:
        daemon.stop()
        thread.join(10)
        assert not thread.is_alive()


class TestReturn:
    """Of a node that was away: what it finds has been renewed without it."""

    def test_after_days_it_takes_the_new_keys_renews_and_listens_anew_with_its_new_certificate(
        self, tmp_path: Path
    ) -> None:
        """25 of its certificate's 30 days are over, and the membership key that it knew was replaced meanwhile."""
        node = Returning(tmp_path, 25)
        node.renew_membership()
        old = read_certificate(node.home.certificate_pem())
        answer = node.coordinator.handle

        def renewed(request: httpx.Request) -> httpx.Response:
            until(lambda: node.shown)  # it listens first, with the old certificate
            del node.coordinator.overrides["/api/node/renew"]
            return answer(request)

        node.coordinator.overrides["/api/node/renew"] = renewed
        with node.home.store() as store:
            store.set_fact("state", "active")
            with at_work(node.daemon(store)):
                until(lambda: len(node.shown) > 1)
            roster = store.roster()
            assert roster is not None
            assert roster.version == 2
            assert not store.refused()
        assert node.shown[0].serial_number == old.serial_number
        new = read_certificate(node.home.certificate_pem())
        assert node.shown[1].serial_number == new.serial_number != old.serial_number
        assert node.home.membership_pem() == node.coordinator.membership.pem

    def test_after_its_certificate_it_is_told_what_to_do_and_that_works(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """TLS refuses an ended certificate before anything is said; so the node itself must know why."""
        node = Returning(tmp_path, 40)
        node.renew_membership()

        def refused(_: httpx.Request) -> httpx.Response:
            raise httpx.ReadError("[SSL] sslv3 alert certificate expired")

        node.coordinator.overrides["/api/node/updates"] = refused
        identity = node.home.key_file("identity").read_bytes()
        with node.home.store() as store, at_work(node.daemon(store)):
            until(lambda: "concord-node enrol INVITATION" in caplog.text)
        for word in (f"concord node revoke {NODE}", f"concord invite {NODE} --organisation acme", "this same home"):
            assert word in caplog.text
        del node.coordinator.overrides["/api/node/updates"]
        node.coordinator.token_used = False  # another invitation, which the test need not tell from the first
        home = enrol_with(node.coordinator, node.home.path).home
        assert home.key_file("identity").read_bytes() == identity
        with home.store() as store:
            updates = Updates(updates=tuple(node.coordinator.updates), cursor=2, state="active", now=int(time.time()))
            assert not apply_updates(home, store, updates, time.time()).refused
            with at_work(node.daemon(store)):
                until(lambda: node.shown)
        assert node.shown[-1].not_valid_after_utc.timestamp() > time.time()


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DOES = ("exec", "import", "marshal.", "pickle.", "ctypes.", "subprocess.", "socket.connect", "shutil.", "tempfile.")
SYSTEM = {f"os.{name}" for name in ("mkdir", "rename", "remove", "link", "symlink", "chmod", "system", "exec", "fork")}
_watched: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event == "open" and (set(str(arguments[1] or "")) & set("wax+") or int(arguments[2] or 0) & WRITES):
        _watched.append(f"open {arguments[0]} to write")
    elif event.startswith(DOES) or event in SYSTEM or event.startswith(("os.posix_spawn", "os.spawn")):
        _watched.append(f"{event} {arguments[:1]}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """What any thread of this process runs, loads, starts or writes meanwhile."""
    global _watched
    if not getattr(_hook, "added", False):
        sys.addaudithook(_hook)
        _hook.added = True  # type: ignore[attr-defined] # there is no way to take one back
    _watched = seen = []
    try:
        yield seen
    finally:
        _watched = None


@dataclass
class HostileFleet:
    """Speaks Flower's fleet protocol as it likes. objects: by the id under which they are offered."""

    tree: ObjectTree
    objects: dict[str, bytes]
    bare: Any
    asked: list[str] = field(default_factory=list)
    replies: list[Any] = field(default_factory=list)
    overrides: dict[str, Callable[[], httpx.Response]] = field(default_factory=dict)

    def handle(self, request: httpx.Request) -> httpx.Response:
        what = request.url.path.rsplit("/", 1)[-1]
        self.asked.append(f"{request.url.host} {what}")
        if what in self.overrides:
            return self.overrides[what]()
        match what:
            case "activate-node":
                return sent(ActivateNodeResponse(node_id=7))
            case "pull-messages":
                return sent(PullMessagesResponse(messages_list=[self.bare], message_object_trees=[self.tree]))
            case "pull-object":
                wanted = PullObjectRequest.FromString(request.content).object_id
                content = self.objects.get(wanted)
                there = content is not None
                return sent(PullObjectResponse(object_found=there, object_available=there, object_content=content))
            case "confirm-message-received":
                return sent(ConfirmMessageReceivedResponse())
            case "push-messages":
                self.replies += PushMessagesRequest.FromString(request.content).messages_list
                return sent(PushMessagesResponse())
            case "deactivate-node":
                return sent(DeactivateNodeResponse())
        return sent(GetFabResponse(fab=Fab(hash_str="0" * 64, content=BUNDLE)))

    def connection(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> FleetConnection:
        def client(*_: Any) -> httpx.Client:
            return httpx.Client(transport=httpx.MockTransport(self.handle))

        monkeypatch.setattr("concord_client.fleet.new_client", client)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return FleetConnection("fleet.invalid:1", context, generate_private_key(SECP384R1()), **options)


def sent(answer: Any) -> httpx.Response:
    return httpx.Response(200, stream=httpx.ByteStream(answer.SerializeToString()))


def offered(message: Message) -> HostileFleet:
    """A message as Flower carries it."""
    [tree], contents = take_apart([message])
    return HostileFleet(tree, dict(contents(set(_ids(tree)))), message_to_proto(remove_content_from_message(message)))


def _ids(tree: ObjectTree) -> Iterator[str]:
    yield tree.object_id
    for child in tree.children:
        yield from _ids(child)


def flower_object(kind: str, body: bytes, *children: str) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\x00" + body


def bundle() -> bytes:
    """A Flower app: code that leaves a mark wherever it is run, and a name that leaves its folder."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("pyproject.toml", '[tool.flwr.app.components]\nclientapp = "evil:app"\n')
        archive.writestr("evil.py", "open('evil-was-here', 'w')")
        archive.writestr("../../escaped.py", "open('evil-was-here', 'w')")
    return packed.getvalue()


BUNDLE = bundle()


def with_object(fleet: HostileFleet, content: bytes, id: str = "") -> HostileFleet:
    """One more part, that the message's tree names."""
    id = id or hashlib.sha256(content).hexdigest()
    fleet.objects[id] = content
    fleet.tree.children.append(ObjectTree(object_id=id))
    return fleet


def rooted_in(fleet: HostileFleet, content: bytes) -> HostileFleet:
    """A message that is something else."""
    id = hashlib.sha256(content).hexdigest()
    fleet.objects[id] = content
    return replace(fleet, tree=ObjectTree(object_id=id, children=fleet.tree.children))


def deep(fleet: HostileFleet) -> HostileFleet:
    tree = fleet.tree
    for _ in range(50):
        tree = ObjectTree(object_id="d" * 64, children=[tree])
    return replace(fleet, tree=tree)


def wide(fleet: HostileFleet) -> HostileFleet:
    children = [ObjectTree(object_id=f"{number:064x}") for number in range(100_002)]
    return replace(fleet, tree=ObjectTree(object_id="e" * 64, children=children))


PICKLE = b"cposix\nsystem\n(S'touch evil-was-here'\ntR."
TREES: dict[str, Callable[[HostileFleet], HostileFleet]] = {
    "an app as the message": lambda fleet: rooted_in(fleet, BUNDLE),
    "an app under a name of its own kind": lambda fleet: rooted_in(fleet, flower_object("Fab", BUNDLE)),
    "a pickle as the message": lambda fleet: rooted_in(fleet, flower_object("CustomDataClass", PICKLE)),
    "a class by its path": lambda fleet: rooted_in(fleet, flower_object("os.system", b"touch evil-was-here")),
    "a record as the message": lambda fleet: rooted_in(fleet, flower_object("RecordDict", b"{}")),
    "a name that is a path": lambda fleet: with_object(fleet, BUNDLE, "../../../../evil-was-here"),
    "a part that is not there": lambda fleet: replace(fleet, objects={}),
    "too deep": deep,
    "too wide": wide,
}


class TestHostileFleet:
    """Who runs the fleet offers what it likes: nothing of it is run, unpacked or written."""

    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        for name in ("HOME", "FLWR_HOME", "TMPDIR"):
            monkeypatch.setenv(name, str(tmp_path / "empty"))
        yield
        assert list((tmp_path / "empty").iterdir()) == []

    def test_an_app_beside_an_offer_is_neither_asked_for_nor_opened(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Flower's own node would fetch, unpack and run it for the first message of a run."""
        rounds = Rounds(site.home, site.store, Scripted(), Counts())
        warm = offered(site.message())
        with warm.connection(monkeypatch) as connection:
            assert connection.receive(0) is not None  # what is imported once, is now
        fleet = with_object(offered(site.message(key=site.organisation)), BUNDLE)
        with fleet.connection(monkeypatch) as connection, watched() as seen:
            message = connection.receive(0)
            assert message is not None
            assert message.content.config_records["offer"]["run"] == "run-1"
            assert seen == []
            connection.reply(rounds.answer(message))
        assert "signature" in fleet.replies[0].error.reason
        assert {each.split(" ")[0] for each in fleet.asked} == {"fleet.invalid"}
        known = {"activate-node", "pull-messages", "pull-object", "confirm-message-received", "push-messages"}
        assert {each.split(" ")[1] for each in fleet.asked} == known | {"deactivate-node"}

    @pytest.mark.parametrize("case", TREES)
    def test_a_tree_of_anything_else_is_dropped(self, case: str, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        with offered(site.message()).connection(monkeypatch) as connection:
            assert connection.receive(0) is not None
        fleet = TREES[case](offered(site.message()))
        with fleet.connection(monkeypatch) as connection, watched() as seen:
            with pytest.raises(DocumentRefusedError):
                connection.receive(0)
            assert seen == []

    def test_a_message_is_read_up_to_its_bound_and_no_further(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fleet = offered(site.message())
        for number in range(40):
            with_object(fleet, flower_object("ArrayChunk", bytes([number]) * (1 << 20)))
        with fleet.connection(monkeypatch, bytes_max=lambda: 4 << 20) as connection:
            with pytest.raises(DocumentRefusedError, match="larger than the 4194304 bytes"):
                connection.receive(0)
            assert sum("pull-object" in each for each in fleet.asked) < 20

    def test_an_answer_without_an_end_is_cut_off(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        given = 0

        class Endless(httpx.SyncByteStream):
            def __iter__(self) -> Iterator[bytes]:
                nonlocal given
                while True:
                    given += 1 << 20
                    yield bytes(1 << 20)

        fleet = offered(site.message())
        fleet.overrides["pull-messages"] = lambda: httpx.Response(200, stream=Endless())
        with fleet.connection(monkeypatch) as connection:
            with pytest.raises(DocumentRefusedError, match="larger than"):
                connection.receive(0)
            assert given <= ANSWER_BYTES_MAX + (2 << 20)
            packed = httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(b"\x1f\x8b"))
            fleet.overrides["pull-messages"] = lambda: packed
            with pytest.raises(DocumentRefusedError, match="packed"):
                connection.receive(0)

    def test_a_redirect_leads_nowhere(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        fleet = offered(site.message())
        headers = {"Location": "https://inside.hospital.invalid/v1/fleet/pull-messages"}
        fleet.overrides["pull-messages"] = lambda: httpx.Response(307, headers=headers, stream=httpx.ByteStream(b""))
        with fleet.connection(monkeypatch) as connection, pytest.raises(UnreachableError, match="307"):
            connection.receive(0)
        assert {each.split(" ")[0] for each in fleet.asked} == {"fleet.invalid"}

    def test_a_word_of_another_version_of_flower_does_not_end_the_node(
        self, site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Flower's own node ends its process at this answer."""
        from flwr.supercore.error import ApiErrorCode, FlowerError

        word = json.dumps(FlowerError(ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE, "").to_json("go away")).encode()
        ended: list[Any] = []
        monkeypatch.setattr(
            "flwr.supercore.interceptors.http.runtime_version.flwr_exit", lambda *given: ended.append(given)
        )
        fleet = offered(site.message())
        fleet.overrides["pull-messages"] = lambda: httpx.Response(400, stream=httpx.ByteStream(word))
        with fleet.connection(monkeypatch) as connection, pytest.raises(UnreachableError, match="400"):
            connection.receive(0)
        assert not ended


def lost(channel: str) -> tuple[str, dict[str, str]]:
    return "concord_node_connections_lost_total", {"channel": channel}


class TestStop:
    def test_a_node_in_the_middle_of_training_stops_within_seconds(self, site: Site) -> None:
        coordinator, process = Coordinator(), TrainingProcess(target=hang)
        with running(site, coordinator, process) as daemon:
            coordinator.messages.put(site.message())
            until(lambda: process.pid)
            begun = time.monotonic()
            daemon.stop()
            until(lambda: process.pid is None, 5)
        assert time.monotonic() - begun < 5
        assert not coordinator.replies, "it is asked again when it is back"

    @pytest.mark.skipif(os.name != "posix", reason="skipped: needs signals")
    def test_sigterm_ends_the_process_within_five_seconds(self, tmp_path: Path) -> None:
        """The home of the kit has no certificate: the daemon says so, keeps trying, and stops when told."""
        site = make_site(tmp_path)
        site.store.close()
        code = f"""
from pathlib import Path
from concord_client.commands.up import up
up(home=Path({str(site.home.path)!r}), metrics_port=0, log_level="info")
"""
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        try:
            log = process.stderr
            assert log is not None
            assert json.loads(log.readline())["message"] == "up"
            assert running_daemon(site.home) == process.pid
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            rest = log.read()
            assert process.wait(10) == 0
            assert time.monotonic() - begun < 5
            assert "down" in rest
            assert running_daemon(site.home) is None
            assert (site.home.logs / "node.log").exists()
        finally:
            process.kill()
            process.communicate()


class TestCourier:
    def test_what_the_owner_decides_is_delivered(self, site: Site) -> None:
        coordinator = Coordinator()
        with running(site, coordinator):
            until(lambda: not site.store.outbox())
            site.approve()
            until(lambda: len(coordinator.delivered) == 2)

    def test_what_cannot_be_delivered_now_is_kept(self, site: Site) -> None:
        coordinator = Coordinator(down=True)
        with running(site, coordinator):
            time.sleep(0.2)
            assert site.store.outbox()
            coordinator.down = False
            until(lambda: not site.store.outbox())

    def test_a_rule_of_the_policy_decides_in_another_process(self, site: Site) -> None:
        from concord_shared.plan.schema import parse_plan_document

        plan = parse_plan_document(site.plan.document() | {"name": "another"})
        site.store.put("plan", plan.digest, plan.document())
        request = {"study": "digits-2026", "plan_digest": plan.digest, "requested_by": "hospital-b", "received_at": 1}
        site.store.put("request", f"digits-2026/{plan.digest}", request)
        text = site.home.policy_file.read_text("utf-8")
        site.home.policy_file.write_text(f'{text}\n[[approvals.automatic]]\nstudy = "digits-2026"\n')
        with running(site, Coordinator()):
            until(lambda: site.store.last_approval("digits-2026", plan.digest, "digits"), 60)
        approval = site.store.last_approval("digits-2026", plan.digest, "digits")
        assert approval is not None
        assert (approval.decision, approval.decided_by) == ("approved", "policy")
        assert approval.rows + approval.evaluation_rows == 599

    def test_a_withdrawal_that_was_interrupted_is_completed_first(self, site: Site) -> None:
        site.job().marker.touch()
        with running(site, Coordinator()):
            until(lambda: site.store.current_approval("digits-2026", site.plan.digest, "digits", 0) is None)


class TestOneDaemon:
    def test_a_second_one_is_refused(self, site: Site) -> None:
        with claim_home(site.home):
            assert running_daemon(site.home) == os.getpid()
            with pytest.raises(ArtefactError, match="another concord-node up"), claim_home(site.home):
                pass
        assert running_daemon(site.home) is None

    def test_what_a_killed_one_left_is_not_believed(self, site: Site) -> None:
        site.home.daemon_pid.write_text("1")
        assert running_daemon(site.home) is None
        with claim_home(site.home):
            assert running_daemon(site.home) == os.getpid()


class TestBackOff:
    def test_pauses_double_up_to_a_most_and_are_spread(self) -> None:
        back_off = BackOff(1.0, 60.0)
        pauses = [back_off.next() for _ in range(10)]
        for tries, pause in enumerate(pauses):
            whole = min(60.0, 2.0**tries)
            assert whole / 2 <= pause <= whole
        assert len(set(pauses)) == 10
        assert sum(pauses) > 60, "a node that is still registered is let in after a minute at most"
        back_off.reset()
        assert back_off.next() <= 1.0

    def test_days_of_absence_do_not_overflow(self) -> None:
        back_off = BackOff()
        assert all(back_off.next() <= 60 for _ in range(100_000))


class TestResponder:
    def test_training_unless_a_load_test_says_otherwise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("CONCORD_NODE_FIXED_UPDATE", raising=False)
        assert isinstance(choose_responder(), TrainingProcess)
        monkeypatch.setenv("CONCORD_NODE_FIXED_UPDATE", "7")
        assert choose_responder() == FixedUpdate(7)
        monkeypatch.setenv("CONCORD_NODE_FIXED_UPDATE", "yes")
        with pytest.raises(UsageError, match="whole number"):
            choose_responder()


class TestObservation:
    def test_metrics_are_served_on_this_machine_only(self) -> None:
        counts = Counts()
        counts.rounds.labels("train").inc(3)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        close = serve_metrics(port, counts.registry)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                assert 'concord_node_rounds_answered_total{kind="train"} 3.0' in answer.read().decode()
            with pytest.raises(UsageError, match="cannot serve metrics"):
                serve_metrics(port, counts.registry)
        finally:
            close()

    def test_a_line_of_the_log_is_one_json_object_with_its_subject(self) -> None:
        with about(run="run-1", round=2):
            record = logging.makeLogRecord({"name": "x", "msg": "answered", "levelname": "INFO", "bytes": 7})
            line = json.loads(JsonFormatter().format(record))
        assert (line["message"], line["run"], line["round"], line["bytes"]) == ("answered", "run-1", 2, 7)
