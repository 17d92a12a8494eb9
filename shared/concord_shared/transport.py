"""The one seam between the round engine and wherever the nodes are.

In process, in worker processes on one machine, over Flower between machines: the engine cannot tell. One
conformance test class runs over every implementation.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message

__all__ = ["NodeEntry", "Transport"]


@dataclass(frozen=True)
class NodeEntry:
    """A node as the coordinator knows it.

    rows: its registered training rows, the most it may claim as weight; evaluation_rows: the most it may
    evaluate on.
    """

    name: str
    node_id: int
    rows: int
    evaluation_rows: int


class Transport(Protocol):
    """Carries request messages to nodes and brings replies as they arrive."""

    def send(self, messages: Iterable[Message]) -> None:
        """Takes requests; each names its node by `metadata.dst_node_id`. Returns before they are answered.

        The messages of one call may share one `ArrayRecord`; it is carried once.
        """

    def receive(self, timeout_s: float) -> list[Message]:
        """Replies that have arrived, waiting at most `timeout_s` for the first; empty when there is none.

        A node that cannot answer appears as a message with an error, where the transport can know.
        """

    def withdraw(self) -> None:
        """Drops requests that no node has begun to answer: their step is over."""

    def close(self) -> None:
        """Ends everything that this transport started. Idempotent."""
