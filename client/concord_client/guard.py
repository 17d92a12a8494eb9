"""Whether a message of a round may be acted on at all: step 1 of the walk at the node, before any work.

A node acts on a message only if it already holds the plan, the manifest and its own approval, whatever the coordinator
says.
"""

import hashlib
import json
import logging
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
from concord_client.home import NodeHome
from concord_client.policy import Policy, note_policy
from concord_client.statistics_guard import StatisticsGuard
from concord_client.store import Dataset, NodeStore
from concord_shared.documents import Agreement, Approval, DataTerms, Participant, Roster, RunManifest
from concord_shared.errors import ConcordError, ConsentRefusedError, DocumentRefusedError
from concord_shared.masking.attempt import STAGES
from concord_shared.messages import Offer, read_offer
from concord_shared.plan.schema import Plan
from concord_shared.signed_rounds import SIGNATURE, verify_offer
from concord_shared.signing import read_public_text

__all__ = ["Answered", "Permit", "RoundGuard", "RoundRefusedError", "position_of"]

log = logging.getLogger(__name__)


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


def _word(approval: Approval) -> str:
    return "has expired" if approval.decision == "approved" else f"was {approval.decision}"


def _signature(message: Message) -> bytes:
    """Of a verified message; equal offers have equal signatures."""
    signature = message.content.config_records[SIGNATURE]["ed25519"]
    assert isinstance(signature, bytes)
    return signature
