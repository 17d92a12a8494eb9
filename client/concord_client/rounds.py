"""A message of a round at the node, before and after the work: steps 1 and 2 of the walk, and step 9.

    message ─► RoundGuard.check ─► Permit ─► Charge ─► Responder ─► signed, kept, logged ─► reply
                   └─ refused ◄──────────────┘: a decline that says why

A node acts on a message only if it already holds the plan, the manifest and its own approval, whatever the coordinator
says. What it answered it keeps: the same offer again gets the same bytes again, and nothing is trained twice.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Message

from concord_client import registry
from concord_client.cards import terms_of
from concord_client.consent import check_offer
from concord_client.evidence import alarms
from concord_client.exposition import Counts
from concord_client.home import NodeHome
from concord_client.ledger.admission import admit
from concord_client.ledger.ledger import PrivacyLedger
from concord_client.ledger.witness import check_witness, post_head
from concord_client.logs import about
from concord_client.masked_rounds import MaskedRounds
from concord_client.packing import pack, read_packed, unpack, write_packed
from concord_client.personal import keep_state
from concord_client.policy import Policy, note_policy
from concord_client.statistics_guard import Answer, StatisticsGuard, columns_of, selection_of
from concord_client.store import Dataset, NodeStore
from concord_client.training_process import Job, NodeStoppingError, Resources, Responder, TrainingFailedError
from concord_shared.documents import Agreement, Approval, DataTerms, Participant, Roster, RunManifest
from concord_shared.errors import (
    ArtefactError,
    BudgetRefusedError,
    ConcordError,
    ConsentRefusedError,
    DocumentRefusedError,
    TrainingDivergedError,
)
from concord_shared.masking.attempt import STAGES
from concord_shared.messages import Offer, answer, decline, read_offer, ring_blocks
from concord_shared.plan.schema import Plan
from concord_shared.signed_rounds import SIGNATURE, name_charge, sign_reply, verify_offer, verify_reply
from concord_shared.signing import read_public_text

__all__ = ["Permit", "RoundGuard", "RoundRefusedError", "Rounds"]

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


class RoundRefusedError(ConsentRefusedError):
    """The guard refuses a message.

    check: which of its checks, for the counts. may_pass: what it lacks may be on its way, over the other channel.
    """

    def __init__(self, check: str, reason: str, may_pass: bool = False) -> None:
        super().__init__(reason)
        self.check, self.may_pass = check, may_pass


@dataclass(frozen=True)
class Permit:
    """A message that may be acted on, with all that this rests on."""

    offer: Offer
    offer_id: str
    plan: Plan
    dataset: Dataset
    manifest: RunManifest
    agreement: Agreement
    approval: Approval
    policy: Policy
    marker: Path

    @property
    def until(self) -> float:
        return min(self.approval.not_after, self.agreement.terms.not_after, self.manifest.not_after)


@dataclass(frozen=True)
class Answered:
    """The newest answer of a run."""

    attempt: int
    position: tuple[int, int, int]
    offer_id: str
    question: str

    @classmethod
    def of(cls, store: NodeStore, run: str) -> "Answered | None":
        text = store.fact(f"answered/{run}")
        if text is None:
            return None
        attempt, position, offer_id, question = json.loads(text)
        return cls(attempt, tuple(position), offer_id, question)

    def write(self, store: NodeStore, run: str) -> None:
        store.set_fact(f"answered/{run}", json.dumps([self.attempt, self.position, self.offer_id, self.question]))


def position_of(offer: Offer) -> tuple[int, int, int]:
    """Where a request stands in its run: statistics 1, statistics 2, train 1, evaluate 1, train 2, …; its stage."""
    stage = STAGES.index(offer.stage) if offer.stage else 0
    if offer.kind == "statistics":
        return 0, offer.round_number, stage
    return offer.round_number, int(offer.kind == "evaluate"), stage


class RoundGuard:
    """Lets a message pass only after all of these checks, in this order:

    0  no log was rewritten, or the owner looked, or wants to be warned only
    1  signed by the coordinator that the roster names, and an offer of this version
    2  for this node; its round, kind and plan fit together
    3  its run has a manifest, now; the manifest names this node, this plan, known nodes, a member of the study
    4  its plan is held
    5  an agreement of both organisations covers study and dataset now, and is fit for a cohort of this size
    6  this node approved plan, study and this version of the dataset, and did not withdraw it
    7  the owner's policy, the terms of the agreement and those of the dataset's card allow the plan, now
    8  it is not older than what was answered
    9  the dataset is as it was registered
    10 exact statistics tell, with earlier ones, of no few rows
    """

    def __init__(self, home: NodeHome, store: NodeStore, clock: Callable[[], float] = time.time) -> None:
        self._home, self._store, self._clock = home, store, clock

    def check(self, message: Message) -> Permit:
        """Raises: RoundRefusedError: with a reason that a person can act on."""
        node, now = self._home.config.node, self._clock()
        self._check_evidence()
        roster = self._roster()
        offer = self._authentic(message, roster)
        manifest, participant = self._manifest(offer, roster, now)
        plan = self._plan(offer, manifest)
        agreement = self._agreement(offer, manifest, participant, now)
        permit = Permit(
            offer=offer,
            offer_id=hashlib.sha256(_signature(message)).hexdigest(),
            plan=plan,
            dataset=self._dataset(participant),
            manifest=manifest,
            agreement=agreement,
            approval=self._approval(participant, manifest, now),
            policy=self._policy(),
            marker=self._home.withdrawn_marker(manifest.study, plan.digest, participant.dataset),
        )
        self.check_again(permit)
        self._check_policy(permit, len(manifest.participants))
        self._check_order(permit)
        if offer.stage in ("", STAGES[0]):
            self._check_data(permit)
            self._check_statistics(permit)
        assert offer.node == node
        return permit

    def check_again(self, permit: Permit) -> None:
        """What may have changed while the work went on: before it begins, and before its result leaves."""
        approval = permit.approval
        current = self._store.current_approval(approval.study, approval.plan_digest, approval.dataset, self._clock())
        if permit.marker.exists() or current is None or current.sequence != approval.sequence:
            raise RoundRefusedError("approval", "approval withdrawn")
        if self._clock() >= permit.until:
            raise RoundRefusedError("approval", "approval, agreement or run has expired")

    def _check_evidence(self) -> None:
        found = alarms(self._store)
        if found and self._policy().evidence.on_fork == "stop":
            raise RoundRefusedError(
                "evidence", f"a log was rewritten ({found[0].whose}): this node's owner has to look"
            )

    def _roster(self) -> Roster:
        roster = self._store.roster()
        if roster is None:
            raise RoundRefusedError("unsigned", "this node holds no roster yet, so it cannot tell who signed")
        return roster

    def _authentic(self, message: Message, roster: Roster) -> Offer:
        """Checks 1 and 2's half: signature, form, receiver."""
        if not message.has_content():
            raise RoundRefusedError("malformed", "the message has no content")
        try:
            verify_offer(message, read_public_text(roster.coordinator_key))
        except DocumentRefusedError as error:
            raise RoundRefusedError("unsigned", str(error)) from error
        try:
            offer = read_offer(message)
        except ConsentRefusedError as error:
            raise RoundRefusedError("malformed", str(error)) from error
        if offer.node != self._home.config.node:
            raise RoundRefusedError(
                "foreign", f"the offer is for node {offer.node!r}, this is {self._home.config.node!r}"
            )
        return offer

    def _manifest(self, offer: Offer, roster: Roster, now: float) -> tuple[RunManifest, Participant]:
        manifest = self._store.manifest(offer.run)
        if manifest is None:
            raise RoundRefusedError("manifest", f"this node holds no manifest of run {offer.run[:80]!r}", True)
        if not manifest.not_before <= now < manifest.not_after:
            raise RoundRefusedError("manifest", f"run {offer.run} is outside the time that its manifest names")
        mine = [each for each in manifest.participants if each.node == self._home.config.node]
        if len(mine) != 1:
            raise RoundRefusedError("manifest", f"the manifest of run {offer.run} does not name this node once")
        known = {(row.name, row.organisation) for row in roster.nodes if row.state != "revoked"}
        named = [(each.node, each.organisation) for each in manifest.participants]
        strangers = sorted({name for name, organisation in named if (name, organisation) not in known})
        if strangers or len({name for name, _ in named}) != len(named):
            raise RoundRefusedError(
                "manifest", f"the manifest names nodes twice or unknown to the roster: {', '.join(strangers[:5])}", True
            )
        study = self._store.study(manifest.study)
        if study is None or manifest.organisation not in (study.organisation, *study.members):
            raise RoundRefusedError("manifest", f"{manifest.organisation} is no member of study {manifest.study}")
        return manifest, mine[0]

    def _plan(self, offer: Offer, manifest: RunManifest) -> Plan:
        plan = self._store.plan(manifest.plan_digest)
        if plan is None or plan.digest != manifest.plan_digest:
            raise RoundRefusedError("plan", f"this node holds no plan {manifest.plan_digest[:12]}")
        try:
            check_offer(offer, plan, self._home.config.node, own_models=False)
        except ConsentRefusedError as error:
            raise RoundRefusedError("plan", str(error)) from error
        return plan

    def _agreement(self, offer: Offer, manifest: RunManifest, participant: Participant, now: float) -> Agreement:
        dataset = f"{participant.node}/{participant.dataset}"
        agreement = self._store.admitting(manifest.study, dataset, now)
        if agreement is None:
            raise RoundRefusedError("agreement", f"no agreement lets study {manifest.study} use {dataset} now")
        named = len(manifest.participants)
        if offer.nodes_max > named:
            raise RoundRefusedError(
                "agreement", f"the offer speaks of {offer.nodes_max} nodes, the manifest names {named}"
            )
        if offer.nodes_max < agreement.terms.minimum_cohort:
            raise RoundRefusedError(
                "agreement", f"a cohort of {offer.nodes_max} is below the {agreement.terms.minimum_cohort} agreed"
            )
        return agreement

    def _approval(self, participant: Participant, manifest: RunManifest, now: float) -> Approval:
        approval = self._store.current_approval(manifest.study, manifest.plan_digest, participant.dataset, now)
        if approval is None:
            last = self._store.last_approval(manifest.study, manifest.plan_digest, participant.dataset)
            state = "was never decided here" if last is None else _word(last)
            raise RoundRefusedError(
                "approval", f"plan {manifest.plan_digest[:12]} on {participant.dataset} {state} for {manifest.study}"
            )
        if approval.dataset_version != participant.dataset_version:
            raise RoundRefusedError("approval", f"{participant.dataset} was approved in another version than the run's")
        return approval

    def _dataset(self, participant: Participant) -> Dataset:
        dataset = self._store.dataset(participant.dataset)
        if dataset is None or dataset.version != participant.dataset_version:
            raise RoundRefusedError("dataset", f"this node has no dataset {participant.dataset} of the run's version")
        return dataset

    def _policy(self) -> Policy:
        try:
            note_policy(self._home.policy_file, self._store)
            return Policy.load(self._home.policy_file)
        except ConcordError as error:
            log.error("the policy cannot be read: every round is refused", extra={"reason": str(error)})
            raise RoundRefusedError(
                "policy", "the owner's policy cannot be read; the node's own log says why"
            ) from error

    def _ceiling(self, dataset: str) -> DataTerms | None:
        try:
            return terms_of(self._store, dataset)
        except ConcordError as error:
            log.error("the terms of a dataset cannot be read: every round on it is refused", extra={"dataset": dataset})
            raise RoundRefusedError(
                "policy", "the terms of the dataset cannot be read; the node's own log says why"
            ) from error

    def _check_policy(self, permit: Permit, participants: int) -> None:
        study = self._store.study(permit.manifest.study)
        assert study is not None, "checked with the manifest"
        verdict = permit.policy.verdict(
            permit.plan,
            study,
            permit.agreement,
            participants,
            ceiling=self._ceiling(permit.dataset.name),
            starter=permit.manifest.organisation,
        )
        if not verdict.allowed:
            raise RoundRefusedError("policy", "; ".join(verdict.reasons))
        if permit.offer.nodes_max < permit.policy.minimum_cohort:
            raise RoundRefusedError(
                "policy",
                f"a cohort of {permit.offer.nodes_max} is below the {permit.policy.minimum_cohort} of the policy",
            )
        if not permit.policy.resources.works_at(datetime.fromtimestamp(self._clock(), UTC).astimezone()):
            hours = permit.policy.resources.working_hours
            raise RoundRefusedError("policy", f"outside of this node's working hours ({hours}, its own time)")

    def _check_order(self, permit: Permit) -> None:
        """An old offer is a replay; the newest one may come again, as it was, or in a newer attempt."""
        offer, last = permit.offer, Answered.of(self._store, permit.offer.run)
        if last is None or permit.offer_id == last.offer_id:
            return
        step = f"{offer.kind} round {offer.round_number}, attempt {offer.attempt}"
        position = position_of(offer)
        if (offer.attempt, position) == (last.attempt, last.position):
            raise RoundRefusedError("replayed", f"{step} was answered already, to another offer")
        if position[:2] == last.position[:2] and offer.question != last.question:
            raise RoundRefusedError("replayed", f"{step} asks about another model than an attempt before it")
        newer = offer.attempt > last.attempt  # another attempt begins its step, or a later one, from the first stage
        older = position[:2] < last.position[:2] if newer else position < last.position
        if offer.attempt < last.attempt or older:
            raise RoundRefusedError("replayed", f"{step} is older than what was answered")

    def _check_data(self, permit: Permit) -> None:
        try:
            registry.verify(self._store, permit.dataset, permit.policy.data.roots, self._clock())
        except ConcordError as error:
            log.error("the dataset is not as registered", extra={"reason": str(error), "dataset": permit.dataset.name})
            raise RoundRefusedError(
                "dataset", f"dataset {permit.dataset.name} changed since it was registered; its owner registers it anew"
            ) from error

    def _check_statistics(self, permit: Permit) -> None:
        """Once for all stages of a run: they are of the same rows."""
        if permit.offer.kind != "statistics" or permit.offer.round_number != 1:
            return
        try:
            minimum = permit.policy.privacy.minimum_count
            StatisticsGuard(self._store).check(permit.offer.run, permit.plan, permit.dataset.version, minimum)
        except ConsentRefusedError as error:
            raise RoundRefusedError("statistics", str(error)) from error


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


def _signature(message: Message) -> bytes:
    """Of a verified message; equal offers have equal signatures."""
    signature = message.content.config_records[SIGNATURE]["ed25519"]
    assert isinstance(signature, bytes)
    return signature


def _word(approval: Approval) -> str:
    return "has expired" if approval.decision == "approved" else f"was {approval.decision}"
