"""Faults on purpose: `dropout:0.2` loses a fifth of the answers, `slow:3` delays each by up to 3 seconds.

Which ones is a seeded function of round and node, so a drill can be repeated.
"""

import heapq
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Message

from concord_shared.errors import UsageError
from concord_shared.messages import decline
from concord_shared.seeds import derive_seed
from concord_shared.transport import NodeEntry, Transport

__all__ = ["Faults", "FaultyTransport"]


@dataclass(frozen=True)
class Faults:
    dropout: float
    slow_s: float
    seed: int

    @classmethod
    def parse(cls, text: str, seed: int) -> "Faults | None":
        """From `dropout:P,slow:SECONDS`, either or both; None for no text."""
        if not text:
            return None
        values = {"dropout": 0.0, "slow": 0.0}
        for part in text.split(","):
            name, _, number = part.partition(":")
            try:
                values[name], _ = float(number), values[name]
            except (KeyError, ValueError) as error:
                raise UsageError(f"--faults {text}: expected dropout:P, slow:SECONDS, or both with a comma") from error
        if not (0 <= values["dropout"] < 1 and 0 <= values["slow"] <= 3600):
            raise UsageError(f"--faults {text}: expected a dropout of 0 to below 1 and at most 3600 seconds")
        return cls(values["dropout"], values["slow"], seed)

    def of(self, message: Message, node: str) -> tuple[bool, float]:
        """Whether this answer is lost, and by how many seconds it is late. Statistics and evaluation are spared."""
        if message.metadata.message_type != "train":
            return False, 0.0
        chance = np.random.default_rng(derive_seed(self.seed, "faults", int(message.metadata.group_id), node))
        return bool(chance.random() < self.dropout), float(chance.random() * self.slow_s)


class FaultyTransport:
    """Another transport with faults: a lost answer arrives as an error, as when a connection breaks."""

    def __init__(self, inner: Transport, faults: Faults, nodes: Sequence[NodeEntry]) -> None:
        self._inner, self._faults = inner, faults
        self._names = {node.node_id: node.name for node in nodes}
        self._delays: dict[str, float] = {}
        self._late: list[tuple[float, int, Message]] = []
        self._lost: list[Message] = []
        self._count = 0

    def send(self, messages: Iterable[Message]) -> None:
        self._inner.send(message for message in messages if self._passes(message))

    def receive(self, timeout_s: float) -> list[Message]:
        replies, self._lost = self._lost, []
        if replies:
            return replies
        due_in = max(0.0, self._late[0][0] - time.monotonic()) if self._late else timeout_s
        for reply in self._inner.receive(min(timeout_s, due_in)):
            self._count += 1
            delay = self._delays.pop(reply.metadata.reply_to_message_id, 0.0)
            heapq.heappush(self._late, (time.monotonic() + delay, self._count, reply))
        while self._late and self._late[0][0] <= time.monotonic():
            replies.append(heapq.heappop(self._late)[2])
        return replies

    def withdraw(self) -> None:
        self._lost.clear()
        self._inner.withdraw()

    def close(self) -> None:
        self._inner.close()

    def _passes(self, message: Message) -> bool:
        lost, delay = self._faults.of(message, self._names[message.metadata.dst_node_id])
        if lost:
            self._lost.append(decline(message, "dropped out (simulated)"))
        elif delay:
            self._delays[message.metadata.message_id] = delay
        return not lost
