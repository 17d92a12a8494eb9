"""A message of a round at the node, before and after the work: steps 1 and 2 of the walk, and step 9.

    message ─► RoundGuard.check ─► Permit ─► Charge ─► Responder ─► signed, kept, logged ─► reply
                   └─ refused ◄──────────────┘: a decline that says why

What may be acted on, the guard says. What was answered is kept: the same offer again gets the same bytes again, and
nothing is trained twice.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Message

from concord_client import registry
from concord_client.exposition import Counts
from concord_client.guard import Answered, Permit, RoundGuard, RoundRefusedError, position_of
from concord_client.home import NodeHome
from concord_client.ledger.admission import admit
from concord_client.ledger.ledger import PrivacyLedger
from concord_client.ledger.witness import check_witness, post_head
from concord_client.logs import about
from concord_client.masked_rounds import MaskedRounds
from concord_client.packing import pack, read_packed, unpack, write_packed
from concord_client.personal import keep_state
from concord_client.policy import Policy
from concord_client.statistics_guard import Answer, StatisticsGuard, columns_of, selection_of
from concord_client.store import NodeStore
from concord_client.training_job import Job, NodeStoppingError, Resources, Responder, TrainingFailedError
from concord_shared.errors import (
    ArtefactError,
    BudgetRefusedError,
    ConcordError,
    ConsentRefusedError,
    DocumentRefusedError,
    TrainingDivergedError,
)
from concord_shared.masking.attempt import STAGES
from concord_shared.messages import Offer, answer, decline, ring_blocks
from concord_shared.signed_rounds import name_charge, sign_reply, verify_reply

__all__ = ["NO_ROOM", "Rounds", "what_to_say"]

log = logging.getLogger(__name__)

ENDED = ("succeeded", "failed", "stopped")
"""States of a run after which no offer follows."""
REASON_MAX = 480
PAUSE_S, PAUSE_S_MAX = 0.1, 8.0
NO_ROOM = (
    "this node's privacy budget has no room for it (for a plan without privacy.dp, or whose noise the coordinator "
    "adds, never), or its owner closed the run; the node's own log says which"
)
LOST = "the update of this round was sent and is no longer kept; its noise is never drawn twice"


@dataclass
class Rounds:
    """Answers messages of rounds: check, work, sign, keep, log.

    lacking: called while something may still be on its way over the control channel; True to stop waiting for it.
    """

    home: NodeHome
    store: NodeStore
    responder: Responder
    counts: Counts
    clock: Callable[[], float] = time.time
    lacking: Callable[[float], bool] = lambda pause_s: True

    def __post_init__(self) -> None:
        self._guard = RoundGuard(self.home, self.store, self.clock)
        self._identity = self.home.identity_key()
        self._masked = MaskedRounds(self.store, self.home.config.node, self._identity)
        self._ledger: PrivacyLedger | None = None

    def answer(self, message: Message) -> Message:
        """The reply that leaves: signed blocks, or a decline that says why there are none.

        Raises:
            NodeStoppingError: the node is being stopped.
        """
        subject = "an unreadable message"
        try:
            subject = message.metadata.message_type
            permit = self._check(message)
            subject = permit.offer.message_id
            with about(run=permit.offer.run, round=permit.offer.round_number, step=permit.offer.kind):
                return self._answer(message, permit)
        except NodeStoppingError:
            raise
        except ConcordError as error:
            return self._decline(message, subject, error)
        except Exception as error:  # the outermost loop of a node: one bad message must not end it
            log.exception("a round failed")
            return self._decline(message, subject, error)

    def _check(self, message: Message) -> Permit:
        """An offer may overtake its manifest, which comes over the other channel: then it waits a little."""
        pause_s = PAUSE_S
        while True:
            try:
                return self._guard.check(message)
            except RoundRefusedError as error:
                if not error.may_pass or pause_s > PAUSE_S_MAX or self.lacking(pause_s):
                    raise
                pause_s *= 2

    def tidy(self) -> None:
        """Forgets states and kept replies of runs that are over."""
        now = self.clock()
        for directory in self.home.states.iterdir():
            if not directory.is_dir():
                continue
            stored, manifest = self.store.get("run", directory.name), self.store.manifest(directory.name)
            ended = stored is not None and stored.body.get("state") in ENDED
            if ended or manifest is None or now >= manifest.not_after:
                self._masked.forget(directory.name)
                keep_state(self.home, directory.name, directory)
                shutil.rmtree(directory, ignore_errors=True)

    def _answer(self, message: Message, permit: Permit) -> Message:
        kept = self._kept(message, permit)
        if kept is not None:
            log.info("the same answer again")
            self.counts.repeated.inc()
            return kept
        offer, begun = permit.offer, time.perf_counter()
        ledger = self._open_ledger()
        self._charge(ledger, permit)
        reply = self._work(message, permit)
        self._guard.check_again(permit)
        if _shows_update(permit) and (charge := ledger.charge_of(offer.run, offer.round_number)):
            name_charge(reply, charge)
        digest = sign_reply(reply, self._identity)
        header, buffers = pack(reply.content)
        size = len(json.dumps(header)) + sum(map(len, buffers))
        header |= {"offer": permit.offer_id, "bytes": size, "sha256": digest, "update": _update_of(permit)}
        write_packed(self._file(offer.run), header, buffers)
        self._note(permit, digest)
        seconds = time.perf_counter() - begun
        self._leaves("reply", offer.message_id, size, digest)
        self.counts.rounds.labels(offer.kind).inc()
        self.counts.training.inc(seconds)
        log.info("answered", extra={"bytes": size, "seconds": round(seconds, 3)})
        return reply

    def _note(self, permit: Permit, digest: str) -> None:
        """Before an answer leaves: that it does, and where it stands in its run."""
        offer = permit.offer
        if _shows_update(permit):
            self._open_ledger().release(offer.run, offer.round_number, digest)
        self.store.answered(offer.run, offer.kind, offer.round_number, offer.attempt)
        Answered(offer.attempt, position_of(offer), permit.offer_id, offer.question).write(self.store, offer.run)
        if offer.kind == "statistics" and not offer.stage:
            self._note_statistics(permit, ())

    def _open_ledger(self) -> PrivacyLedger:
        """The privacy ledger, kept open; looked for anew after a failure, for its owner may have mended it."""
        try:
            if self._ledger is None:
                self._ledger = self.home.ledger()
            check_witness(self.store, self._ledger)
            return self._ledger
        except ArtefactError as error:
            if self._ledger is not None:
                self._ledger.close()
            self._ledger = None
            log.error("the privacy ledger cannot be used: every round is refused", extra={"reason": str(error)})
            raise RoundRefusedError(
                "ledger", "this node's privacy ledger cannot be used; its own log says why, and what to do"
            ) from error

    def _charge(self, ledger: PrivacyLedger, permit: Permit) -> None:
        """Step 2 of the walk: the whole plan is reserved, and this round of training is spent, durably, before it.

        Raises: BudgetRefusedError: the owner's budget does not hold it.
        """
        admit(ledger, permit.plan, permit.manifest, permit.approval)
        if _spends(permit) and ledger.charge(permit.offer.run, permit.offer.round_number):
            post_head(self.home, self.store, ledger.head, self.clock())

    def _work(self, message: Message, permit: Permit) -> Message:
        def train() -> Message:
            return self.responder.respond(self._job(permit), message, permit.plan.rounds.deadline_s)

        if not permit.offer.stage:
            return self._drawn(message, permit) or train()
        self._check_undrawn(permit)
        return self._masked.answer(
            message,
            permit.offer,
            permit.plan,
            permit.manifest,
            permit.policy,
            train,
            lambda survivors: self._agree(permit, survivors),
        )

    def _agree(self, permit: Permit, survivors: tuple[str, ...]) -> None:
        """Before a sum over these survivors can be opened.

        Raises:
            ConsentRefusedError: it is of statistics, and with an earlier sum would tell of a few nodes.
        """
        if permit.offer.kind == "statistics":
            minimum = permit.policy.privacy.minimum_cohort
            StatisticsGuard(self.store).check_cohort(permit.offer.run, permit.plan, survivors, minimum)
            self._note_statistics(permit, survivors)

    def _note_statistics(self, permit: Permit, cohort: tuple[str, ...]) -> None:
        if permit.plan.noise != "none" or permit.offer.round_number != 1:
            return
        StatisticsGuard(self.store).note(
            Answer(
                run=permit.offer.run,
                plan_digest=permit.plan.digest,
                study=permit.manifest.study,
                dataset=permit.dataset.name,
                version=permit.dataset.version,
                selection=selection_of(permit.plan),
                at=int(self.clock()),
                columns=columns_of(permit.plan),
                cohort=cohort,
            )
        )

    def _job(self, permit: Permit) -> Job:
        return Job(
            plan=permit.plan,
            node=permit.offer.node,
            spec=permit.dataset.spec,
            version=permit.dataset.version,
            units=registry.reading_of(permit.dataset).units,
            roots=permit.policy.data.roots,
            states=self.home.states / permit.offer.run,
            marker=permit.marker,
            until=permit.until,
            rows=permit.approval.rows,
            evaluation_rows=permit.approval.evaluation_rows,
            resources=resources_of(permit.policy),
        )

    def _kept(self, message: Message, permit: Permit) -> Message | None:
        """The reply to this very offer, if it was answered before and is whole."""
        found = read_packed(self._file(permit.offer.run), lambda header: header.get("offer") == permit.offer_id)
        if found is None:
            return None
        header, buffers = found
        reply = Message(unpack(header, buffers), reply_to=message)
        try:
            verify_reply(reply, self._identity.public_key())
        except DocumentRefusedError:
            log.warning("a kept answer was damaged; the work is done again")
            return None
        last = Answered.of(self.store, permit.offer.run)
        if last is None or last.offer_id != permit.offer_id:  # who kept it died before it could leave
            self._note(permit, header["sha256"])
        self._leaves("reply", permit.offer.message_id, header["bytes"], header["sha256"])
        return reply

    def _drawn(self, message: Message, permit: Permit) -> Message | None:
        """The Update of this round, where an attempt before brought it and its noise is not to be drawn again: two
        draws over one training would cost the privacy of two rounds.

        Raises:
            RoundRefusedError: it was sent, and is no longer here to be sent again.
        """
        offer, wanted = permit.offer, _update_of(permit)
        last = Answered.of(self.store, offer.run)
        sent = last is not None and (last.position, last.question) == (position_of(offer), offer.question)
        if not wanted or not (sent or self._was_released(offer)):
            return None
        found = read_packed(self._file(offer.run), lambda header: bool(header.get("update") == wanted))
        try:
            if found is None:
                raise DocumentRefusedError("there is none")
            before = Message(unpack(*found), reply_to=message)
            verify_reply(before, self._identity.public_key())
        except DocumentRefusedError as error:
            raise RoundRefusedError("replayed", LOST) from error
        log.info("the same update, for another attempt")
        notes = json.loads(str(before.content.config_records["notes"]["json"]))
        return answer(message, offer, ring_blocks(before), notes)

    def _check_undrawn(self, permit: Permit) -> None:
        """Under masks too DP-SGD's noise is drawn once: it has to hide records from those who open two attempts, as
        more colluders than the plan reckons with could.

        Raises:
            RoundRefusedError: an Update of this round was sent, and is no longer here to be masked again.
        """
        offer = permit.offer
        begins = _spends(permit) and offer.stage == STAGES[0] and permit.plan.noise in ("dp-sgd", "tallies")
        if begins and not self._masked.holds(offer) and self._was_released(offer):
            raise RoundRefusedError("replayed", LOST)

    def _was_released(self, offer: Offer) -> bool:
        """The ledger knows it too, whatever became of the node's database."""
        standing = self._open_ledger().books().standings.get(offer.run)
        return standing is not None and offer.round_number in standing.released

    def _decline(self, message: Message, subject: str, error: Exception) -> Message:
        reason = what_to_say(error)[:REASON_MAX]
        check = getattr(error, "check", type(error).__name__)
        detail = getattr(error, "detail", "") or str(error)
        log.warning("declined", extra={"subject": subject, "check": check, "reason": reason, "detail": detail})
        self.counts.refused.labels(check).inc()
        sha256 = hashlib.sha256(reason.encode()).hexdigest()
        self._leaves("decline", subject, len(reason.encode()), sha256, check=check, reason=reason)
        return decline(message, reason)

    def _leaves(self, kind: str, subject: str, size: int, sha256: str, **detail: str) -> None:
        """Logged before it leaves."""
        self.store.log_egress(self.clock(), self.home.config.superlink, kind, subject, size, sha256, **detail)
        self.counts.bytes_out.inc(size)

    def _file(self, run: str) -> Path:
        return self.home.states / run / "reply"


def _update_of(permit: Permit) -> str:
    """What every attempt at a noised Update has in common; "" where another attempt may train again."""
    offer = permit.offer
    if permit.plan.noise == "none" or not _spends(permit) or offer.stage:
        return ""
    return f"{offer.round_number} {offer.question}"


def _spends(permit: Permit) -> bool:
    """Whether a step is what its plan is for, and so charged: a round of training, or a stage of statistics."""
    return permit.offer.kind == permit.plan.kind


def _shows_update(permit: Permit) -> bool:
    """Whether the answer carries what the rows made: the plain one, or the masked one."""
    return _spends(permit) and permit.offer.stage in ("", "masked")


def what_to_say(error: Exception) -> str:
    """What the coordinator hears. Only texts that cannot name a path or a value of a row leave the node, and no figure
    of a budget: it tells of other runs, which may be another's business.
    """
    if isinstance(error, BudgetRefusedError):
        return f"{type(error).__name__}: {NO_ROOM}"
    if isinstance(error, (ConsentRefusedError, TrainingDivergedError, TrainingFailedError)):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, ConcordError):
        return f"{type(error).__name__}: this node's data or settings do not allow it; its own log has the details"
    return f"unexpected {type(error).__name__}; the node's own log has the details"


def resources_of(policy: Policy) -> Resources:
    lent = policy.resources
    return Resources(lent.device, lent.threads or None, lent.memory_mb or None, lent.devices)
