"""Attacks on a real coordinator: each is refused, stands in its audit log, and changes nothing.

The coordinator is the product's own processes, the nodes live in this process and answer without training. What an
attack may not change is compared before and after, as the database and the SuperLink tell it.
"""

import base64
import contextlib
import datetime
import json
import os
import signal
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Message
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from concord_client.daemon import Daemon
from concord_client.fixed_update import FixedUpdate
from concord_client.fleet import FleetConnection
from concord_client.home import NodeHome
from concord_local.deployment import Deployment, Partner
from concord_server.client import Coordinator, Profile
from concord_server.settings import Home
from concord_server.superlink.access import REFRESH_S
from concord_shared.protocol import PROTOCOL, PROTOCOL_HEADER
from deployments import NODES, begin, deployed, follow, plan_of

CHANGES = {"last_seen_at", "delivered"}
"""Of a node's row, by its own polling."""
TABLES = ("node", "roster_version", "run", "round", "model_version", "approval", '"release"', "agreement", "plan")
REFUSED = "superlink:call-refused"
LATER_S = 900.0
TWO = ("model.name=2nn", "rounds.count=2", "rounds.quorum=2", "evaluation.every=0")
Captured = tuple[str, dict[str, str], bytes]
"""Path, headers and body of a request."""


@dataclass
class Inside:
    """A node of this process: honest, but for what a test has it send.

    sent: the requests of its last reply, as they went over the line. replies: what it answered, in order.
    """

    home: NodeHome
    sent: list[Captured] = field(default_factory=list)
    replies: list[Message] = field(default_factory=list)
    instead: Callable[[Message], Message] = lambda reply: reply
    after: Callable[[], object] = lambda: None
    thread: threading.Thread | None = None
    asked: Message | None = None
    client: httpx.Client | None = None

    def __post_init__(self) -> None:
        self.name, self.spiffe = self.home.config.node, self.home.config.spiffe
        self.address = self.home.config.superlink
        self.key = public_key_to_bytes(self.home.flower_key().public_key())

    def listen(self) -> None:
        self.store = self.home.store()
        self.daemon = Daemon(self.home, self.store, FixedUpdate(NODES.index(self.name)), fleet=self._connect)
        self.thread = threading.Thread(target=self.daemon.run)
        self.thread.start()

    def end(self) -> None:
        if self.thread is not None:
            self.daemon.stop()
            self.thread.join()
            self.store.close()
            self.thread = None
        if self.client is not None:
            self.client.close()
            self.client = None

    def forget(self) -> None:
        """For the next test."""
        self.instead, self.after = lambda reply: reply, lambda: None

    def _connect(self, *given: Any, **named: Any) -> FleetConnection:
        connection = _Line(*given, **named)
        connection.node = self
        return connection

    # Attacks

    def headers(self, age_s: float = 0.0) -> dict[str, str]:
        """Flower's second factor, as this node signed it some time ago."""
        signed_at = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age_s)).isoformat()
        return {
            "flwr-public-key": base64.b64encode(self.key).decode(),
            "flwr-timestamp": signed_at,
            "flwr-signature": base64.b64encode(sign_message(self.home.flower_key(), signed_at.encode())).decode(),
        }

    def post(self, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> httpx.Response:
        """To the SuperLink, with this node's certificate."""
        return self.ask("POST", path, body, headers)

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> httpx.Response:
        given = self.headers() if headers is None else headers
        return self._http().request(method, f"https://{self.address}{path}", content=body, headers=given)

    def control(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """To the control listener, with this node's certificate."""
        url = f"{self.home.config.url}{path}"
        return self._http().request(method, url, json=body, headers={PROTOCOL_HEADER: str(PROTOCOL)})

    def _http(self) -> httpx.Client:
        self.client = self.client or httpx.Client(verify=self.home.tls_context())
        return self.client


class _Line(FleetConnection):
    """A node's connection, of which everything that belongs to a reply is captured."""

    node: Inside

    def receive(self, timeout_s: float) -> Message | None:
        message = super().receive(timeout_s)
        if message is not None:
            self.node.asked = message
        return message

    def reply(self, message: Message) -> None:
        self.node.replies.append(message)
        message = self.node.instead(message)
        tap.sent = self.node.sent = []
        super().reply(message)
        del tap.sent
        self.node.after()


tap = threading.local()
"""Where a thread that sends a reply notes the requests of it."""


@pytest.fixture(scope="module")
def tapped() -> Iterator[None]:
    """The line to the SuperLink, as somebody with the keys of TLS would see it."""
    send = httpx.Client.send

    def noting(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        if hasattr(tap, "sent"):
            tap.sent.append((request.url.path, dict(request.headers), request.read()))
        return send(client, request, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx.Client, "send", noting)
        yield


@dataclass
class Target:
    """The federation that is attacked, and somebody who audits it.

    nodes: three at work. guest: an active node that takes part in nothing. revoked: one whose keys were stolen.
    refused: how often the SuperLink has refused whom: it writes down each caller's first refusal of a minute at once,
    and counts the others; so each attack has its own caller, and the counts are compared at the end.
    """

    deployment: Deployment
    nodes: dict[str, Inside]
    guest: Inside
    revoked: Inside
    auditor: Coordinator
    refused: Counter[str] = field(default_factory=Counter)
    honest: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.home = Home.open(self.deployment.coordinator_home)
        self.worker = ssl.create_default_context(cafile=str(self.home.root_certificate))
        self.worker.load_cert_chain(self.home.worker_certificate, self.home.worker_key)
        self.address = f"127.0.0.1:{self.deployment.ports['superlink']}"

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {"fleet": self.fleet()}
        with contextlib.closing(sqlite3.connect(f"file:{self.home.database_file}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            for table in TABLES:
                rows = [dict(row) for row in database.execute(f"SELECT * FROM {table} ORDER BY 1, 2")]
                found[table] = [{key: row[key] for key in row.keys() - CHANGES} for row in rows]
        assert all(found[table] for table in ("fleet", "node", "roster_version", "approval", "run", "round"))
        return found

    def fleet(self) -> Any:
        """The SuperLink's own list of nodes."""
        with httpx.Client(verify=self.worker) as client:
            return client.post(f"https://{self.address}/rooms/nodes").json()["nodes"]

    def audited(self, after: int = 0, **query: Any) -> list[dict[str, Any]]:
        """Events after that number, the oldest first."""
        events = self.auditor.pages("/api/v1/audit", limit=200, **query)
        return sorted((each for each in events if each["id"] > after), key=lambda each: int(each["id"]))

    @contextlib.contextmanager
    def unchanged(self, *expected: tuple[str, str, str]) -> Iterator[None]:
        """The block changes nothing, and these (actor, action, subject), no others, stand in the audit log; but for
        counts of callers who were refused before.
        """
        self.settle()
        before, last, known = self.state(), self.audited()[-1]["id"], {*self.refused}
        yield
        noted = [(each["actor"], each["action"], each["subject"]) for each in self.audited(last)]
        assert [each for each in noted if each[1] != REFUSED or each[0] not in known] == list(expected)
        assert self.state() == before

    def settle(self) -> None:
        """Waits for what honest nodes have still to send, such as their ledgers' newest heads after a run."""
        until = time.monotonic() + 20
        while any(node.store.outbox() for node in self.nodes.values()):
            assert time.monotonic() < until
            time.sleep(0.05)

    def expect_refusal(self, answer: httpx.Response, caller: Inside, reason: str) -> None:
        """By the SuperLink, which counts it."""
        assert (answer.status_code, reason in answer.text) == (403, True), answer.text
        self.refused[f"node:{caller.name}"] += 1

    def run(self, name: str, *overrides: str) -> dict[str, Any]:
        """A run to its end: its report, with its records of training in order."""
        records: list[dict[str, Any]] = []
        run = begin(self.deployment, plan_of(*TWO, f"name='{name}'", *overrides))
        report = follow(self.deployment, run, records.append)
        assert report["state"] == "succeeded", report
        return {**report, "train": [each for each in records if each["kind"] == "train"]}


@pytest.fixture(scope="module")
def attacked(tapped: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    nodes: dict[str, Inside] = {}

    def listen(_: Deployment, partner: Partner) -> None:
        time.sleep(REFRESH_S + 0.2)  # until then the SuperLink may refuse it, and count that
        nodes[partner.name] = Inside(NodeHome.open(partner.home))
        nodes[partner.name].listen()

    try:
        with deployed(tmp_path_factory.mktemp("attacked"), listen) as running:
            others = running.each(
                lambda name: running.enrol(name, running.organisations["research"]), ["guest", "ward"]
            )  # type: ignore[arg-type]
            for partner in others:
                del running.partners[partner.name]
            running.admin.post("/api/v1/nodes/ward/revoke", {"reason": "its machine was stolen"})
            running.admin.post("/api/v1/people", {"name": "eve", "roles": [{"role": "auditor"}]})
            token = running.admin.post("/api/v1/tokens", {"person": "eve", "title": "audit"})["token"]
            guest, revoked = (Inside(NodeHome.open(partner.home)) for partner in others)
            target = Target(running, nodes, guest, revoked, running.connect(token))
            target.honest = target.run("attacked")
            until = time.monotonic() + 20
            while target.fleet().keys() != {*NODES, "guest"}:
                assert time.monotonic() < until
                time.sleep(0.1)
            yield target
            running.each(Inside.end, [*nodes.values(), guest, revoked])  # type: ignore[list-item]
    finally:
        for node in nodes.values():
            node.end()


@pytest.fixture
def target(attacked: Target) -> Iterator[Target]:
    yield attacked
    for node in attacked.nodes.values():
        node.forget()


def test_a_caller_with_only_the_ca_certificate(target: Target) -> None:
    """The SuperLink's TLS wants a certificate of a node: the handshake fails, so no code of ours hears of the caller
    and the audit log cannot either. The control listener, where people come without certificates, answers 401.
    """
    stranger = ssl.create_default_context(cafile=str(target.home.root_certificate))
    before = target.state()
    with httpx.Client(verify=stranger) as client:
        for path in ("/v1/fleet/activate-node", "/rooms/open", "/health"):
            with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                client.post(f"https://{target.address}{path}")
    assert no_certificate(target).status_code == 401
    assert target.state() == before


def test_a_revoked_nodes_key(target: Target) -> None:
    ward = target.revoked
    with target.unchanged(
        ("node:ward", REFUSED, "/v1/fleet/activate-node"), ("address:127.0.0.1", "node:connect-refused", ward.spiffe)
    ):
        answer = ward.post("/v1/fleet/activate-node", activation_of(ward))
        target.expect_refusal(answer, ward, "not an active node")
        assert ward.control("GET", "/api/node/updates").status_code == 401
    assert target.audited(action="node:connect-refused")[-1]["detail"] == {"reason": "revoked"}


def test_another_nodes_key(target: Target) -> None:
    """A node with its own certificate and another's Flower key; with both its own, in another's name."""
    thief, victim = target.nodes["node-2"], target.nodes["node-1"]
    name = Node(node_id=target.fleet()["node-1"]["node_id"])
    reply = PushMessagesRequest(node=Node(node_id=target.fleet()["node-2"]["node_id"]))
    reply.messages_list.add().metadata.src_node_id = name.node_id
    with target.unchanged(("node:node-2", REFUSED, "/v1/fleet/activate-node")):
        stolen = thief.post("/v1/fleet/activate-node", activation_of(victim), victim.headers())
        target.expect_refusal(stolen, thief, "the Flower key is another node's")
        for path, body in (
            ("deactivate-node", DeactivateNodeRequest(node_id=name.node_id).SerializeToString()),
            ("pull-messages", PullMessagesRequest(node=name).SerializeToString()),
            ("push-messages", reply.SerializeToString()),
        ):
            target.expect_refusal(thief.post(f"/v1/fleet/{path}", body), thief, "in another node's name")


def test_another_nodes_word_on_the_control_channel(target: Target) -> None:
    """An approval that node-1 signed, once more: from itself it changes nothing, from another node it is refused."""
    document = approval_of(target, "node-1")
    with target.unchanged(("node:node-2", "node:send-refused", "/api/node/approvals")):
        assert target.nodes["node-1"].control("POST", "/api/node/approvals", document).status_code == 204
        answer = foreign_approval(target)
        assert (answer.status_code, answer.json()["code"]) == (400, "document-refused")


def test_control_and_runtime_paths_and_the_docs(target: Target) -> None:
    """By a node in good standing, with both of its keys."""
    guest = target.guest
    paths = (
        "/docs", "/openapi.json", "/redoc", "/", "/v1/control/start-run", "/v1/control/register-node",
        "/v1/runtime/acquire-task", "/v1/runtime/push-messages", "/v1/runtime/pull-messages",
        "/v1/fleet/../runtime/pull-messages", "/rooms/open", "/rooms/nodes",
    )  # fmt: skip
    with target.unchanged(("node:guest", REFUSED, "/docs")):
        for path in paths:
            for method in ("GET", "POST"):
                target.expect_refusal(guest.ask(method, path), guest, "a node has no business here")


def test_activation_in_another_nodes_name(target: Target) -> None:
    guest, victim = target.guest, target.nodes["node-1"]
    assert guest.post("/v1/fleet/activate-node", activation_of(guest)).status_code == 200
    try:
        with target.unchanged():
            answer = guest.post("/v1/fleet/activate-node", activation_of(victim))
            target.expect_refusal(answer, guest, "in another node's name")
    finally:
        name = DeactivateNodeRequest(node_id=target.fleet()["guest"]["node_id"])
        guest.post("/v1/fleet/deactivate-node", name.SerializeToString())


def test_a_captured_request_from_another_node_and_later(target: Target) -> None:
    """All that node-1 sent for its last reply. What it signed for Flower holds on its own line, for five minutes."""
    victim, other = target.nodes["node-1"], target.nodes["node-3"]
    captured = list(victim.sent)
    assert captured[0][0] == "/v1/fleet/push-messages"
    with target.unchanged(("node:node-3", REFUSED, captured[0][0]), ("node:node-1", REFUSED, captured[0][0])):
        for path, headers, body in captured:
            target.expect_refusal(other.post(path, body, headers), other, "the Flower key is another node's")
        for path, headers, body in captured:  # as it would have been signed then
            answer = victim.post(path, body, headers | victim.headers(LATER_S))
            target.expect_refusal(answer, victim, "s from the coordinator's; set it")


def test_a_captured_request_at_once_from_the_same_node(target: Target) -> None:
    """It cannot be told from a node that sends again what it thinks lost: it counts once, and the model is the same.
    When its run is over, there is nobody whom it would reach.
    """
    node, statuses = target.nodes["node-1"], list[int]()

    def again() -> None:
        statuses.extend(node.post(path, body, headers).status_code for path, headers, body in node.sent)

    node.after = again
    report = target.run("attacked")
    target.refused["node:node-1"] += statuses.count(403)  # the last ones, where the run was over by then
    assert statuses.count(200) >= 10
    assert report["summary"]["model_digest"] == target.honest["summary"]["model_digest"]
    for each in report["train"]:
        assert (each["survivors"], each["failures"]) == (NODES, {})
    with target.unchanged():
        path, headers, body = node.sent[0]
        assert node.post(path, body, headers).status_code == 410


def test_a_captured_reply_of_another_run_or_round(target: Target) -> None:
    """Validly signed by the node itself: what it answers is in what it signed. The others go on without it."""
    report = old_replies(target)
    for record, field_ in zip(report["train"], ("run", "round_number"), strict=True):
        assert record["survivors"] == ["node-2", "node-3"]
        assert field_ in record["failures"]["node-1"], record["failures"]


def test_a_captured_reply_of_another_node(target: Target) -> None:
    """Its signature is another's. The others go on without whoever sent it."""
    thief, victim = target.nodes["node-2"], target.nodes["node-1"]
    thief.instead = lambda reply: Message(victim.replies[-1].content, reply_to=thief.asked)
    report = target.run("attacked")
    refused = target.audited(action="reply:send-refused", subject=report["id"])
    assert {(each["actor"], each["detail"]["reason"]) for each in refused} == {
        ("node:node-2", "the signature of the reply is wrong")
    }
    assert all(each["survivors"] == ["node-1", "node-3"] for each in report["train"])


@pytest.mark.parametrize("away", [False, True], ids=["listens", "is-away"])
def test_stop_of_a_run_that_waits_for_a_silent_node(away: bool, target: Target, tmp_path: Path) -> None:
    node, research = target.nodes["node-3"], target.deployment.organisations["research"]
    held, asked = threading.Event(), threading.Event()

    def hold(reply: Message) -> Message:
        asked.set()
        held.wait(60)
        return reply

    if away:
        node.end()
    else:
        node.instead = hold
    run = begin(target.deployment, plan_of(*TWO, "name='attacked'"))
    try:
        assert away or asked.wait(30)
        until = time.monotonic() + 30
        while research.api.get(f"/api/v1/runs/{run}")["state"] != "running":
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(2)  # the others have answered
        begun = time.monotonic()
        concord(tmp_path, target, "run", "stop", run)
        stopped = time.monotonic()
        while research.api.get(f"/api/v1/runs/{run}")["state"] == "running":
            time.sleep(0.05)
        assert time.monotonic() - stopped < 2, f"the command itself took {stopped - begun:.1f} s"
        report = research.api.get(f"/api/v1/runs/{run}")
        assert (report["state"], report["reason"]) == ("stopped", "stopped by research-lead")
    finally:
        held.set()
        if away:
            node.listen()


def old_replies(target: Target) -> dict[str, Any]:
    """A run in which node-1 answers each round with what it answered before."""
    node = target.nodes["node-1"]
    kept = [node.replies[0]]

    def instead(reply: Message) -> Message:
        kept.append(reply)
        return Message(kept[-2].content, reply_to=node.asked)

    node.instead = instead
    return target.run("attacked")


def foreign_approval(target: Target) -> httpx.Response:
    return target.nodes["node-2"].control("POST", "/api/node/approvals", approval_of(target, "node-1"))


def no_certificate(target: Target) -> httpx.Response:
    stranger = ssl.create_default_context(cafile=str(target.home.root_certificate))
    with httpx.Client(verify=stranger, headers={PROTOCOL_HEADER: str(PROTOCOL)}) as client:
        return client.get(f"{target.deployment.url}/api/node/updates")


@pytest.mark.parametrize(
    ("attack", "noted"),
    [
        (no_certificate, ("address:127.0.0.1", "node:connect-refused")),
        (foreign_approval, ("node:node-2", "node:send-refused")),
        (old_replies, ("node:node-1", "reply:send-refused")),
    ],
)
def test_what_is_refused_is_audited(attack: Callable[[Target], Any], noted: tuple[str, str], target: Target) -> None:
    """The first time at once; within a minute more of the same are counted, and written then."""
    attack(target)
    assert noted in [(each["actor"], each["action"]) for each in target.audited()]


def concord(folder: Path, target: Target, *arguments: str) -> None:
    """As the researcher would type it."""
    api = target.deployment.organisations["research"].api
    token = api._http.headers["Authorization"].removeprefix("Bearer ")
    profile = folder / "profile.json"
    profile.write_text(json.dumps(asdict(Profile(api.url, token, target.deployment.root_pem))))
    environment = {**os.environ, "CONCORD_PROFILE": str(profile)}
    subprocess.run([sys.executable, "-m", "concord_local", *arguments], env=environment, check=True, timeout=60,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def test_zz_every_refusal_is_counted(target: Target) -> None:
    """Last of all: a SuperLink that is told to end writes what it has counted, and begins again."""
    assert target.refused.total() > 40
    os.kill(target.deployment.pids()["superlink"], signal.SIGTERM)
    until, found = time.monotonic() + 20, Counter[str]()
    while found != target.refused and time.monotonic() < until:
        time.sleep(0.2)
        found = Counter()
        for each in target.audited(action=REFUSED):
            found[each["actor"]] += each["detail"]["times"]
    assert found == target.refused


def activation_of(node: Inside) -> bytes:
    return bytes(ActivateNodeRequest(public_key=node.key, heartbeat_interval=30).SerializeToString())


def approval_of(target: Target, node: str) -> Any:
    """The last that it signed, as the coordinator keeps it."""
    with contextlib.closing(sqlite3.connect(f"file:{target.home.database_file}?mode=ro", uri=True)) as database:
        query = "SELECT envelope FROM approval WHERE node = ? ORDER BY sequence DESC LIMIT 1"
        return json.loads(database.execute(query, (node,)).fetchone()[0])
