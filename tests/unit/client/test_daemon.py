"""The daemon with a coordinator that can vanish, lose replies and change its mind."""

import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
from flwr.app import Message

from concord_client.daemon import BackOff, Daemon, choose_responder
from concord_client.daemon_lock import claim_home, running_daemon
from concord_client.exposition import Counts, serve_metrics
from concord_client.fixed_update import FixedUpdate
from concord_client.home import NodeHome
from concord_client.logs import JsonFormatter, about
from concord_client.store import NodeStore
from concord_client.training_process import TrainingProcess
from concord_shared.errors import (
    ArtefactError,
    DocumentRefusedError,
    NotAllowedError,
    UnreachableError,
    UsageError,
)
from concord_shared.protocol import Updates

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

    def deliver(self) -> int:
        self._coordinator.check()
        for posted in self._store.outbox():
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
