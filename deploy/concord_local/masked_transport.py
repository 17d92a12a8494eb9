"""Masked steps in a simulation: a transport around another, whose nodes mask what they send as in a real federation.

Training goes to the transport within, as in plain mode. Keys, shares and masks are made here, one `MaskedStep` for each
node: between machines each node's daemon does that.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from concord_client.masked_step import Integers, Journal, MaskedStep
from concord_shared.cohorts import cohort_of
from concord_shared.errors import ConcordError, MaskingRefusedError
from concord_shared.masking.attempt import STAGES, MaskedAttempt, Signers
from concord_shared.masking.thresholds import thresholds_of
from concord_shared.messages import Offer, answer, decline, read_offer, ring_blocks
from concord_shared.metrics import Figures, metric_sums
from concord_shared.plan.privacy import Private
from concord_shared.plan.schema import Plan
from concord_shared.transport import NodeEntry, Transport

__all__ = ["SimulatedNodes"]


class SimulatedNodes:
    """Implements `Transport`. The nodes' identity keys live as long as this object.

    own: each node's figures of the last evaluation, which in a real federation only its owner knows.
    """

    def __init__(self, inner: Transport, plan: Plan, nodes: Sequence[NodeEntry]) -> None:
        self._inner, self._plan = inner, plan
        self._names = {node.node_id: node.name for node in nodes}
        self._keys = {node.name: Ed25519PrivateKey.generate() for node in nodes}
        self.signers = Signers({name: key.public_key() for name, key in self._keys.items()})
        self._journals = {name: Journal() for name in self._keys}
        self._steps: dict[str, MaskedStep] = {}
        self._updates: dict[str, Message] = {}
        self._waiting: dict[str, Message] = {}
        self._replies: list[Message] = []
        self.own: dict[str, Figures] = {}

    def send(self, messages: Iterable[Message]) -> None:
        self._inner.send(self._to_train(messages))

    def receive(self, timeout_s: float) -> list[Message]:
        if not self._replies:
            for reply in self._inner.receive(timeout_s):
                self._take(self._names[reply.metadata.src_node_id], reply)
        replies, self._replies = self._replies, []
        return replies

    def withdraw(self) -> None:
        self._inner.withdraw()
        for kept in (self._steps, self._updates, self._waiting, self._replies):
            kept.clear()

    def close(self) -> None:
        self.withdraw()
        self._inner.close()

    def _to_train(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Answers what the node's daemon would; what the first stage asks to train goes on to the transport within."""
        for message in messages:
            name = self._names[message.metadata.dst_node_id]
            offer = read_offer(message)
            if offer.stage == STAGES[0]:
                self._steps[name] = self._begin(name, offer)
                self._updates.pop(name, None)
                yield message
            if offer.stage == "masked" and name not in self._updates:
                self._waiting[name] = message
            else:
                self._answer(name, offer, message)

    def _begin(self, name: str, offer: Offer) -> MaskedStep:
        privacy, cohort = self._plan.privacy, cohort_of(self._plan, self._keys, offer.kind, offer.round_number)
        assert isinstance(privacy, Private)
        attempt = MaskedAttempt(
            offer=offer,
            identities=tuple((peer, self._keys[peer].public_key()) for peer in cohort),
            thresholds=thresholds_of(privacy, len(cohort)),
            weight_cap=self._plan.rounds.weight_cap,
        )
        return MaskedStep(attempt, name, self._keys[name], self._journals[name], lambda: self._update_of(name, offer))

    def _answer(self, name: str, offer: Offer, message: Message) -> None:
        try:
            if name not in self._steps:
                raise MaskingRefusedError("order", "this node takes no part in the step")
            records, blocks = self._steps[name].answer(offer.stage, message.content.config_records)
            reply = answer(message, offer, blocks, {}, records)
        except ConcordError as error:
            reply = decline(message, f"{type(error).__name__}: {error}")
        self._replies.append(reply)

    def _take(self, name: str, reply: Message) -> None:
        self._updates[name] = reply
        message = self._waiting.pop(name, None)
        if message is not None:
            self._answer(name, read_offer(message), message)

    def _update_of(self, name: str, offer: Offer) -> Mapping[str, Integers]:
        reply = self._updates.pop(name)
        if reply.has_error():
            raise MaskingRefusedError("update", reply.error.reason or "no update")
        blocks = ring_blocks(reply)
        if offer.kind == "evaluate":
            figures = metric_sums(self._plan.data, blocks["metrics"]).figures()
            self.own[name] = {key: value for key, value in figures.items() if key != "confusion"}
        return blocks
