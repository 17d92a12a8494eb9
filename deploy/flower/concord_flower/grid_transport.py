"""The engine's transport over Flower's public `Grid`: what a ServerApp has."""

import time
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from concord_shared.messages import with_metadata

__all__ = ["GridTransport"]

POLL_S = 0.02


class GridTransport:
    """Flower gives each request an id of its own; a reply leaves here as the answer to the request that came in."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._asked: dict[str, Message] = {}

    def send(self, messages: Iterable[Message]) -> None:
        requests = list(messages)
        ids = list(self._grid.push_messages([_to_flower(request) for request in requests]))
        if len(ids) != len(requests):
            raise RuntimeError(f"Flower took {len(ids)} of {len(requests)} messages; its own log says why")
        self._asked |= {name: _without_content(request) for name, request in zip(ids, requests, strict=True)}

    def receive(self, timeout_s: float) -> list[Message]:
        until = time.monotonic() + timeout_s
        while True:
            replies = list(self._grid.pull_messages(self._asked)) if self._asked else []
            left_s = until - time.monotonic()
            if replies or left_s <= 0:
                return [self._answer(reply) for reply in replies]
            time.sleep(min(POLL_S, left_s))

    def withdraw(self) -> None:
        """A Grid takes no message back: nodes still answer, and nobody listens."""
        self._asked.clear()

    def close(self) -> None:
        self.withdraw()

    def _answer(self, reply: Message) -> Message:
        request = self._asked.pop(reply.metadata.reply_to_message_id)
        if reply.has_error():
            return Message(reply.error, reply_to=request)
        return Message(reply.content, reply_to=request)


def _to_flower(request: Message) -> Message:
    about = request.metadata
    return Message(request.content, about.dst_node_id, about.message_type, ttl=about.ttl, group_id=about.group_id)


def _without_content(request: Message) -> Message:
    return with_metadata(RecordDict(), request.metadata)
