"""Masked steps at a node between machines: who takes part by the signed manifest, and the one attempt that goes on.

    keys      the training begins beside the exchange of keys
    masked    waits for it, and lets it leave under masks

Secrets and the plain Update are in this process's memory alone. What must outlive it is in the journal.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from flwr.app import Message

from concord_client.masked_step import Integers, Journal, MaskedStep
from concord_client.policy import Policy
from concord_client.store import NodeStore
from concord_shared.cohorts import cohort_of
from concord_shared.documents import RunManifest
from concord_shared.errors import ConsentRefusedError, MaskingRefusedError, UsageError
from concord_shared.masking.attempt import STAGES, MaskedAttempt
from concord_shared.masking.thresholds import thresholds_of
from concord_shared.messages import Offer, answer, ring_blocks
from concord_shared.plan.privacy import Private
from concord_shared.plan.schema import Plan
from concord_shared.signing import PrivateKey, fingerprint, read_public_text

__all__ = ["MaskedRounds", "trust_peer"]

Agree = Callable[[tuple[str, ...]], None]


@dataclass
class _Live:
    """The attempt that goes on in a run, and the Update that is being made for it."""

    step: MaskedStep
    made_for: tuple[object, ...]
    update: "Future[Message] | None" = None

    def blocks(self) -> Mapping[str, Integers]:
        assert self.update is not None, "the training began with the first stage"
        reply = self.update.result()
        if reply.has_error():
            raise MaskingRefusedError("update", "there is no update to mask")
        return ring_blocks(reply)


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
        agree: Agree = lambda survivors: None,
    ) -> Message:
        """The unsigned answer to one stage. train: makes the plain answer; called in a thread of its own. agree: as in
        `MaskedStep`.

        Raises:
            ConsentRefusedError: the stage breaks a rule of the protocol or of the owner's policy.
            ConcordError: the training failed.
        """
        before = self._live.get(offer.run)
        live = self._begin(offer, plan, manifest, policy, agree) if offer.stage == STAGES[0] else before
        if live is None or not _is_of(offer, live.step.attempt.offer):
            raise MaskingRefusedError("order", "this node holds no keys for this step (any more)")
        records, blocks = live.step.answer(offer.stage, message.content.config_records)
        if live is not before:  # the journal let the attempt begin: only now is anything trained
            live.update = self._reused(before, live.made_for) or self._submit(before, train)
            self._live[offer.run] = live
        return answer(message, offer, blocks, {}, records)

    def holds(self, offer: Offer) -> bool:
        """Whether the Update of this step is here, or being made: another attempt masks it again."""
        return self._reused(self._live.get(offer.run), (offer.kind, offer.round_number)) is not None

    def forget(self, run: str) -> None:
        self._live.pop(run, None)

    def _begin(self, offer: Offer, plan: Plan, manifest: RunManifest, policy: Policy, agree: Agree) -> _Live:
        attempt = self._attempt(offer, plan, manifest)
        policy.privacy.check(attempt.thresholds)
        step = MaskedStep(
            attempt,
            self.node,
            self.identity,
            Journal(self.store),
            lambda: live.blocks(),
            pinned=self._known(attempt, policy),
            minimum=policy.privacy.minimum_cohort,
            agree=agree,
        )
        live = _Live(step, (offer.kind, offer.round_number))
        return live

    def _reused(self, before: _Live | None, made_for: tuple[object, ...]) -> "Future[Message] | None":
        """Of an earlier attempt of the step, which the journal holds to the same model: nothing is trained twice."""
        update = None if before is None or before.made_for != made_for else before.update
        if update is None or (update.done() and (update.exception() is not None or update.result().has_error())):
            return None
        return update

    def _submit(self, before: _Live | None, train: Callable[[], Message]) -> "Future[Message]":
        """At most one waits for the one that is being made."""
        if before is not None and before.update is not None:
            before.update.cancel()
        return self._trainer.submit(train)

    def _known(self, attempt: MaskedAttempt, policy: Policy) -> frozenset[str] | None:
        """The peers that the owner pinned, by name or by name and key; whose key is another than before, refused.

        A peer's key is remembered when it is first met in a masked step: from then on, who signs rosters cannot put
        another key in its place.
        """
        for name, key in attempt.identities:
            met, now = self.store.fact(_peer(name)), fingerprint(key)
            if met is None:
                self.store.set_fact(_peer(name), now)
            elif met != now:
                raise MaskingRefusedError(
                    "keys",
                    f"the identity key of {name} changed to {now}. When its own people confirm it: "
                    f"concord-node trust-node {name} {now}",
                )
        keys = {name: fingerprint(key) for name, key in attempt.identities}
        if not policy.privacy.pinned:
            return None
        pins = [pin.partition(":") for pin in policy.privacy.pinned]
        return frozenset(name for name, _, print_of in pins if name in keys and print_of in ("", keys[name]))

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
            needed = thresholds_of(privacy, len(cohort))
        except UsageError as error:
            raise ConsentRefusedError(str(error)) from error
        return MaskedAttempt(
            offer=offer,
            identities=tuple((name, read_public_text(keys[name])) for name in cohort),
            thresholds=needed,
            weight_cap=plan.rounds.weight_cap,
            manifest=manifest.digest,
        )


def trust_peer(store: NodeStore, node: str, given: str) -> None:
    """A person confirms the key that the roster has for another node, by its fingerprint.

    Raises:
        UsageError: the roster has no such node, or another key for it.
    """
    roster = store.roster()
    listed = next((row.identity_key for row in roster.nodes if row.name == node), None) if roster else None
    if listed is None:
        raise UsageError(f"the roster has no node {node}")
    known = fingerprint(read_public_text(listed))
    if known != "".join(given.split()).lower():
        raise UsageError(
            f"the roster has key {known} for {node}, you gave another. Nothing was changed: ask that node's people for "
            "the fingerprint of theirs"
        )
    store.set_fact(_peer(node), known)


def _peer(node: str) -> str:
    return f"peer/{node}"


def _is_of(offer: Offer, first: Offer) -> bool:
    """Whether a later stage belongs to the step that its first stage began."""
    return replace(offer, stage="").binding == replace(first, stage="").binding
