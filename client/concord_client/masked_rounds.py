"""Masked steps at a node between machines: who takes part by the signed manifest, and the one attempt that goes on.

    keys      the training begins beside the exchange of keys
    masked    waits for it, and lets it leave under masks

Secrets and the plain Update are in this process's memory alone. What must outlive it is in the journal.
"""

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message

from concord_client.masked_step import Integers, MaskedStep, step_of
from concord_client.policy import Policy
from concord_client.store import NodeStore
from concord_shared.canonical import canonical_digest
from concord_shared.cohorts import cohort_of
from concord_shared.documents import RunManifest
from concord_shared.errors import ConsentRefusedError, MaskingRefusedError, UsageError
from concord_shared.masking.attempt import STAGES, MaskedAttempt
from concord_shared.masking.thresholds import thresholds_for
from concord_shared.messages import Offer, answer, ring_blocks
from concord_shared.plan.schema import Plan, Private
from concord_shared.signing import PrivateKey, public_text, read_public_text

__all__ = ["MaskedRounds", "StoreJournal"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreJournal:
    """In the node's database, on the disk before a call returns."""

    store: NodeStore

    def begin(self, attempt: MaskedAttempt) -> None:
        number, parties = attempt.offer.attempt, _parties_digest(attempt)
        last = self._read(attempt)
        if last is not None:
            if last["opened"]:
                raise MaskingRefusedError("replayed", "this node opened this step already; it never opens one twice")
            if number <= last["attempt"]:
                raise MaskingRefusedError("replayed", f"attempt {number} is not newer than {last['attempt']}")
            if parties != last["parties"]:
                raise MaskingRefusedError("places", "other nodes or thresholds than in an earlier attempt of this step")
        self._write(attempt, opened=False)

    def close(self, attempt: MaskedAttempt) -> None:
        self._write(attempt, opened=True)

    def _read(self, attempt: MaskedAttempt) -> dict[str, Any] | None:
        text = self.store.fact(_name_of(attempt))
        return None if text is None else json.loads(text)

    def _write(self, attempt: MaskedAttempt, opened: bool) -> None:
        entry = {"attempt": attempt.offer.attempt, "parties": _parties_digest(attempt), "opened": opened}
        self.store.set_fact(_name_of(attempt), json.dumps(entry))


def _name_of(attempt: MaskedAttempt) -> str:
    run, kind, number = step_of(attempt)
    return f"masked/{run}/{kind}/{number}"


def _parties_digest(attempt: MaskedAttempt) -> str:
    needed = attempt.thresholds
    return canonical_digest(
        [
            [[name, public_text(key)] for name, key in attempt.identities],
            [needed.nodes, needed.collusion, needed.opening, needed.survivors],
        ]
    )


@dataclass
class _Live:
    """The attempt that goes on in a run, and the Update that is being made for it."""

    step: MaskedStep
    update: "Future[Message]"
    made_for: tuple[object, ...]


@dataclass
class MaskedRounds:
    """store, identity: of this node."""

    store: NodeStore
    node: str
    identity: PrivateKey
    _live: dict[str, _Live] = field(default_factory=dict)
    _trainer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "update"))

    def answer(
        self,
        message: Message,
        offer: Offer,
        plan: Plan,
        manifest: RunManifest,
        policy: Policy,
        train: Callable[[], Message],
    ) -> Message:
        """The unsigned answer to one stage. train: makes the plain answer; called in a thread of its own.

        Raises:
            ConsentRefusedError: the stage breaks a rule of the protocol or of the owner's policy.
            ConcordError: the training failed.
        """
        if offer.stage == STAGES[0]:
            self._begin(offer, plan, manifest, policy, train)
        live = self._live.get(offer.run)
        if live is None or not _is_of(offer, live.step.attempt.offer):
            raise MaskingRefusedError("order", "this node holds no keys for this step (any more)")
        records, blocks = live.step.answer(offer.stage, message.content.config_records)
        return answer(message, offer, blocks, {}, records)

    def forget(self, run: str) -> None:
        self._live.pop(run, None)

    def _begin(
        self, offer: Offer, plan: Plan, manifest: RunManifest, policy: Policy, train: Callable[[], Message]
    ) -> None:
        attempt = self._attempt(offer, plan, manifest)
        policy.privacy.check(attempt.thresholds)
        made_for = (offer.kind, offer.round_number, offer.model_digest, offer.preprocessing, offer.nodes_max)
        before = self._live.get(offer.run)
        if before is not None and before.made_for == made_for and _is_sound(before.update):
            update = before.update  # another attempt of the same step: nothing is trained twice
        else:
            update = self._trainer.submit(train)
        step = MaskedStep(
            attempt,
            self.node,
            self.identity,
            StoreJournal(self.store),
            lambda: _blocks(update),
            pinned=frozenset(policy.privacy.pinned),
            minimum=policy.privacy.minimum_cohort,
        )
        self._live[offer.run] = _Live(step, update, made_for)

    def _attempt(self, offer: Offer, plan: Plan, manifest: RunManifest) -> MaskedAttempt:
        """From what this node holds: the offer adds nothing to who takes part, and to how many are needed."""
        roster, privacy = self.store.roster(), plan.privacy
        assert roster is not None, "the round guard checked it"
        assert isinstance(privacy, Private), "only its offers have stages"
        cohort = cohort_of(plan, (each.node for each in manifest.participants), offer.kind, offer.round_number)
        if self.node not in cohort or offer.nodes_max != len(cohort):
            raise MaskingRefusedError(
                "places", f"the offer speaks of {offer.nodes_max} nodes, the manifest's cohort are {', '.join(cohort)}"
            )
        keys = {row.name: row.identity_key for row in roster.nodes}
        try:
            needed = thresholds_for(len(cohort), privacy.collusion, privacy.minimum_cohort)
        except UsageError as error:
            raise ConsentRefusedError(str(error)) from error
        return MaskedAttempt(
            offer=offer,
            identities=tuple((name, read_public_text(keys[name])) for name in cohort),
            thresholds=needed,
            weight_cap=plan.rounds.weight_cap,
            manifest=manifest.digest,
        )


def _is_of(offer: Offer, first: Offer) -> bool:
    """Whether a later stage belongs to the step that its first stage began."""
    mine = {name: value for name, value in first.binding.items() if name != "stage"}
    return {name: value for name, value in offer.binding.items() if name != "stage"} == mine


def _is_sound(update: "Future[Message]") -> bool:
    return not update.done() or (update.exception() is None and not update.result().has_error())


def _blocks(update: "Future[Message]") -> Mapping[str, Integers]:
    reply = update.result()
    if reply.has_error():
        raise MaskingRefusedError("update", "there is no update to mask")
    return ring_blocks(reply)
