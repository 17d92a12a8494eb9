"""`concord-node up`: what runs at a partner day and night. Connections go out only; data are read by another process.

    control    long poll: updates are verified and stored; the certificate is renewed
    courier    decisions and cards go out; rules of the policy decide what waits
    preflight  whether a plan could run here is looked at, and answered
    rounds     offers come in, replies go out
    evidence   heads of both logs and receipts, after rounds and from time to time

Each of the five lives by itself: with the coordinator away each tries again, with longer and longer pauses, for as
long as it takes. What the owner decides with the commands holds at once, because all share the home.
"""

import contextlib
import json
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import Message

from concord_client.approvals import finish_withdrawals, questions
from concord_client.control import ControlChannel
from concord_client.enrolment import overdue, renew_if_due
from concord_client.evidence import exchange
from concord_client.exposition import Counts
from concord_client.fixed_update import ENVIRONMENT, FixedUpdate
from concord_client.fleet import MESSAGE_BYTES_MIN, FleetConnection, message_bytes
from concord_client.home import NodeHome
from concord_client.ledger.witness import note_witness
from concord_client.logs import about
from concord_client.policy import Policy
from concord_client.preflight import answer_preflights
from concord_client.rounds import Rounds
from concord_client.store import NodeStore
from concord_client.sync import apply_updates
from concord_client.training_job import Job, NodeStoppingError, Responder
from concord_client.training_process import TrainingProcess
from concord_shared import __version__
from concord_shared.errors import (
    ConcordError,
    DocumentRefusedError,
    LogForkedError,
    NotAllowedError,
    NotFoundError,
    UnreachableError,
    UsageError,
)
from concord_shared.protocol import WAIT_S_MAX

__all__ = ["BackOff", "Daemon", "choose_responder"]

log = logging.getLogger(__name__)

RETRY_S, RETRY_S_MAX = 0.5, 60.0
REFUSED_S_MAX = 300.0
"""Between tries of a node that the coordinator does not admit."""
LISTEN_S = 20.0
COURIER_S = 1.0
EVIDENCE_S, EVIDENCE_S_MAX = 2.0, 60.0
"""Between two exchanges: while this node's log grows, and while nothing happens."""
TIDY_S = 600.0
NOTE_S = 10.0
"""Between two notes of a contact in the database."""
STOP_S = 3.0
MIN_POLL_S = 0.2


class Fleet(Protocol):
    """What the daemon needs of a `FleetConnection`."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def receive(self, timeout_s: float) -> Message | None: ...
    def reply(self, message: Message) -> None: ...


FleetMaker = Callable[[str, ssl.SSLContext, EllipticCurvePrivateKey, str, Callable[[], int]], Fleet]
ChannelMaker = Callable[[NodeHome, NodeStore], AbstractContextManager[ControlChannel]]


@dataclass
class BackOff:
    """Pauses that double, each drawn between half and all of it, so that nodes do not return all at once."""

    first_s: float = RETRY_S
    most_s: float = RETRY_S_MAX
    _tries: int = 0

    def reset(self) -> None:
        self._tries = 0

    def next(self, most_s: float | None = None) -> float:
        whole: float = min(most_s or self.most_s, self.first_s * 2.0 ** min(self._tries, 30))
        self._tries += 1
        return whole * random.uniform(0.5, 1)  # noqa: S311 - spreads load, hides nothing


def choose_responder() -> Responder:
    """Training; or where a load test asked for it, a fixed update.

    Raises:
        UsageError: the variable holds no whole number.
    """
    wanted = os.environ.get(ENVIRONMENT, "")
    if not wanted:
        return TrainingProcess()
    if not wanted.isdecimal():
        raise UsageError(f"{ENVIRONMENT}={wanted}: expected a whole number, the coordinate of the fixed update")
    return FixedUpdate(int(wanted))


@dataclass
class _Telling:
    """The responder, and for people which run it works on, since when and until when at the latest."""

    inner: Responder
    store: NodeStore
    clock: Callable[[], float]

    def respond(self, job: Job, message: Message, deadline_s: float) -> Message:
        since = int(self.clock())
        works = {"run": job.states.name, "plan": job.plan.name, "since": since, "until": since + int(deadline_s)}
        self.store.set_fact("works", json.dumps(works))
        try:
            return self.inner.respond(job, message, deadline_s)
        finally:
            self.store.set_fact("works", "")

    def rest(self) -> None:
        self.inner.rest()

    def close(self) -> None:
        self.inner.close()


@dataclass
class Daemon:
    """One node at work, from `run` until `stop`."""

    home: NodeHome
    store: NodeStore
    responder: Responder
    counts: Counts = field(default_factory=Counts)
    fleet: FleetMaker = FleetConnection
    channel: ChannelMaker = ControlChannel
    helper: TrainingProcess = field(default_factory=lambda: TrainingProcess(idle_s=0.0))
    examiner: TrainingProcess = field(default_factory=lambda: TrainingProcess(idle_s=0.0))
    clock: Callable[[], float] = time.time
    retry_s: float = RETRY_S

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._changed = threading.Event()
        self._renewed = threading.Event()
        self._hurry = threading.Event()
        self._asked = threading.Event()
        self._preflights = threading.Event()
        self._connection: Fleet | None = None
        self._noted: dict[str, float] = {}
        told = _Telling(self.responder, self.store, self.clock)
        self._rounds = Rounds(self.home, self.store, told, self.counts, self.clock, self._lacking)

    def run(self) -> None:
        """Works until `stop`; returns a few seconds after it at the latest."""
        for approval in finish_withdrawals(self.home, self.store, self.clock()):
            log.warning("a withdrawal was completed", extra={"plan": approval.plan_digest, "study": approval.study})
        self.store.set_fact("daemon", json.dumps({"since": int(self.clock()), "version": __version__}))
        self.store.set_fact("works", "")  # of one that was killed
        config = self.home.config
        log.info("up", extra={"federation": config.federation, "node": config.node, "coordinator": config.url})
        self._changed.set()
        self._preflights.set()
        threads = [
            threading.Thread(target=self._live, args=(name, work), name=name, daemon=True)
            for name, work in (
                ("control", self._follow),
                ("courier", self._deliver),
                ("preflight", self._examine),
                ("rounds", self._listen),
                ("evidence", self._exchange),
            )
        ]
        for thread in threads:
            thread.start()
        self._stop.wait()
        self._end(threads)
        log.info("down")

    def stop(self) -> None:
        """Ends the daemon; from any thread, or a signal's handler."""
        self._stop.set()

    def _end(self, threads: list[threading.Thread]) -> None:
        """Stops training, says goodbye to the fleet, and waits a little for what is being written."""
        self._hurry.set()
        self._changed.set()
        self.responder.close()
        self.helper.close()
        self.examiner.close()
        deadline = time.monotonic() + STOP_S
        if (connection := self._connection) is not None:
            goodbye = threading.Thread(target=connection.__exit__, args=(None, None, None), daemon=True)
            goodbye.start()
            goodbye.join(STOP_S)
        for thread in threads:
            thread.join(max(0.1, deadline - time.monotonic()))

    # One thread's life

    def _live(self, name: str, work: Callable[[BackOff], None]) -> None:
        """Does the work again and again; no failure of one thread ends it, or another one."""
        back_off, most_s = BackOff(self.retry_s), RETRY_S_MAX
        with about(node=self.home.config.node):
            while not self._stop.is_set():
                try:
                    work(back_off)
                    continue
                except NodeStoppingError:
                    return
                except NotAllowedError as error:
                    most_s = REFUSED_S_MAX
                    if name == "control":
                        self.store.set_fact("state", "refused")
                    self._lost(name, "the coordinator does not admit this node", error)
                except UnreachableError as error:
                    most_s = RETRY_S_MAX
                    self._lost(name, "the coordinator cannot be reached; trying again", error)
                except ConcordError as error:
                    self._lost(name, "this node cannot go on; trying again", error)
                except Exception:  # the outermost loop of a thread
                    if self._stop.is_set():
                        return
                    log.exception("unexpected; trying again", extra={"channel": name})
                self._pause(name, back_off.next(most_s))

    def _pause(self, name: str, seconds: float) -> None:
        if name != "control":
            self._stop.wait(seconds)
        elif self._hurry.wait(seconds):
            self._hurry.clear()

    def _lost(self, name: str, what: str, error: ConcordError) -> None:
        if self._stop.is_set():
            return
        self.counts.lost.labels(name).inc()
        if name == "control":
            self._asked.set()  # rounds may come over the other channel; a word that never came binds nobody
        log.warning(what, extra={"channel": name, "reason": str(error)})
        with contextlib.suppress(ConcordError):  # a home without a certificate has said so
            if name == "control" and (advice := overdue(self.home, self.clock())):
                log.error(advice)

    def _contact(self, channel: str) -> None:
        now = self.clock()
        self.counts.contact.labels(channel).set(now)
        if now - self._noted.get(channel, 0.0) >= NOTE_S:
            self._noted[channel] = now
            self.store.set_fact(f"contact/{channel}", str(int(now)))

    @property
    def _is_active(self) -> bool:
        return self.store.fact("state") == "active"

    # Control: what the coordinator has to say

    def _follow(self, back_off: BackOff) -> None:
        with self.channel(self.home, self.store) as channel:
            self._ask_witness(channel)
            wait_s = 0
            while not self._stop.is_set():
                begun, before = time.monotonic(), self.store.fact("state")
                updates = channel.updates(wait_s)
                applied = apply_updates(self.home, self.store, updates, self.clock())
                self._contact("control")
                back_off.reset()
                for kind, subject in applied.accepted:
                    log.info("received", extra={"kind": kind, "subject": subject})
                for kind, subject, reason in applied.refused:
                    log.warning("not believed", extra={"kind": kind, "subject": subject, "reason": reason})
                if applied.accepted or before != updates.state:
                    self._changed.set()
                    self._preflights.set()
                if renew_if_due(self.home, channel, self.clock()):
                    log.info("a new certificate")
                    self._renewed.set()
                    return
                wait_s = 0 if updates.updates else WAIT_S_MAX
                if time.monotonic() - begun < MIN_POLL_S:  # a coordinator that does not let us wait
                    self._stop.wait(MIN_POLL_S)

    def _ask_witness(self, channel: ControlChannel) -> None:
        """Where this node's privacy ledger once stood, in case a backup was restored. An older one cannot say."""
        try:
            if (head := channel.ledger_witness()) is not None:
                note_witness(self.home, self.store, head)
        except (NotFoundError, DocumentRefusedError) as error:
            log.info("no word about this node's ledger", extra={"reason": str(error)})
        self._asked.set()

    # Courier: what this node has to say

    def _deliver(self, back_off: BackOff) -> None:
        while not self._stop.is_set():
            if self._changed.is_set():
                self._changed.clear()
                self._decide()
            if self.store.outbox():
                with self.channel(self.home, self.store) as channel:
                    taken = channel.deliver()
                log.info("delivered", extra={"documents": taken})
                back_off.reset()
            self._changed.wait(COURIER_S)

    def _decide(self) -> None:
        """Where a rule of the policy fits something that waits, lets it decide: in a process that may read data."""
        policy = Policy.load(self.home.policy_file)
        if not policy.approvals.automatic:
            return
        waiting = questions(self.home, self.store, policy, self.clock())
        if any(each.state in ("pending", "expired") and each.verdict.automatic for each in waiting):
            for question, outcome in self.helper.decide(self.home.path):
                log.info("a rule decided", extra={"request": question, "outcome": outcome})
            self.helper.rest()

    # Preflights: whether a plan could run here

    def _examine(self, back_off: BackOff) -> None:
        """A suspended node answers nothing; what was asked meanwhile waits until it expires."""
        while not self._stop.is_set():
            if self._is_active and self._preflights.is_set():
                self._preflights.clear()
                try:
                    answered = answer_preflights(self.home, self.store, self.examiner, self.clock)
                except ConcordError:
                    self._preflights.set()  # to be tried again
                    raise
                for report in answered:
                    log.info("a preflight was answered", extra={"preflight": report.preflight, "go": report.go})
                    self._changed.set()
                back_off.reset()
            self._stop.wait(COURIER_S)

    # Evidence

    def _exchange(self, back_off: BackOff) -> None:
        """Until the certificate is another one."""
        shown = self.home.certificate_pem()
        with self.channel(self.home, self.store) as channel:
            while not self._stop.is_set() and self.home.certificate_pem() == shown:
                if self.store.fact("state") in ("active", "suspended"):
                    self._exchange_once(channel)
                    back_off.reset()
                self._wait_for_entries()

    def _exchange_once(self, channel: ControlChannel) -> None:
        try:
            exchange(self.home, self.store, channel, self.clock())
        except LogForkedError as error:
            log.error("a log was rewritten", extra={"reason": str(error)})
            self.counts.forks.inc()

    def _wait_for_entries(self) -> None:
        """A little; longer where nothing happens."""
        size, until = self.store.log_size(), time.monotonic() + EVIDENCE_S_MAX
        self._stop.wait(EVIDENCE_S)
        while time.monotonic() < until and not self._stop.is_set() and self.store.log_size() == size:
            self._stop.wait(EVIDENCE_S)

    # Rounds

    def _listen(self, back_off: BackOff) -> None:
        if not (self._is_active and self._asked.is_set()):
            self._stop.wait(COURIER_S if self._asked.is_set() else MIN_POLL_S)
            return
        self._renewed.clear()
        config, tls, key = self.home.config, self.home.tls_context(), self.home.flower_key()
        address = config.superlink
        with self.fleet(address, tls, key, config.proxy, self._message_bytes_max) as connection:
            self._connection = connection
            try:
                log.info("listening for rounds", extra={"fleet": address})
                self._converse(connection, address, back_off)
            finally:
                self._connection = None

    def _converse(self, connection: Fleet, address: str, back_off: BackOff) -> None:
        """Until the connection must be made anew: another address or certificate, or this node is not active."""
        tidied = 0.0
        while not (self._stop.is_set() or self._renewed.is_set()):
            if not self._is_active or self.home.config.superlink != address:
                return
            try:
                message = connection.receive(LISTEN_S)
            except DocumentRefusedError as error:
                log.warning("a message cannot be read", extra={"reason": str(error)})
                self.counts.refused.labels("malformed").inc()
                self._stop.wait(MIN_POLL_S)
                continue
            self._contact("rounds")
            back_off.reset()
            if message is not None:
                connection.reply(self._rounds.answer(message))
                continue
            self.responder.rest()
            if time.monotonic() - tidied > TIDY_S:
                self._rounds.tidy()
                tidied = time.monotonic()

    def _message_bytes_max(self) -> int:
        """What the largest plan needs that was ever approved here; any other one is declined, whatever it carries."""
        return max(map(message_bytes, self.store.approved_plans()), default=MESSAGE_BYTES_MIN)

    def _lacking(self, pause_s: float) -> bool:
        """A message waits for something of the control channel; True once the node stops."""
        self._hurry.set()  # where control is between two tries
        return self._stop.wait(pause_s)
