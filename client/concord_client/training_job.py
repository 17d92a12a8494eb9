"""What the daemon hands to the process that trains, how it travels between the two, and what may stop it.

Between them is a pipe of frames: a JSON header and plain buffers.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flwr.app import Message

from concord_shared.errors import (
    ArtefactError,
    ConcordError,
    ConsentRefusedError,
    DataError,
    PlanError,
    TrainingDivergedError,
    UsageError,
)
from concord_shared.plan.schema import Plan, parse_plan_document

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = [
    "KINDS",
    "Frame",
    "Job",
    "NodeStoppingError",
    "Resources",
    "Responder",
    "TrainingFailedError",
    "receive",
    "send",
    "watch",
]


KINDS: dict[str, type[ConcordError]] = {
    kind.__name__: kind
    for kind in (ConsentRefusedError, TrainingDivergedError, DataError, ArtefactError, UsageError, PlanError)
}

Frame = tuple[dict[str, Any], Sequence[bytes]]


class TrainingFailedError(ConcordError):
    """There is no answer, and not because consent was refused. detail: for this node's own log, never sent."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


class NodeStoppingError(ConcordError):
    """The node is being stopped."""


@dataclass(frozen=True)
class Resources:
    """What the owner lends: threads None for torch's choice, memory_mb None for no limit. devices: several that train
    together, instead of `device`.
    """

    device: str = "auto"
    threads: int | None = None
    memory_mb: int | None = None
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What an answer is made from; the guard has checked all of it.

    spec, version: the registered dataset and its content hash. units, roots: as of a `Reading`. rows, evaluation_rows:
    as the approval says.
    states: the directory of this run's NodeState. marker: a file that exists once the approval is withdrawn.
    until: Unix time at which approval, agreement or manifest ends; no batch begins after it.
    """

    plan: Plan
    node: str
    spec: str
    version: str
    states: Path
    marker: Path
    until: float
    rows: int = 0
    evaluation_rows: int = 0
    resources: Resources = Resources()
    units: Mapping[str, str] = field(default_factory=dict)
    roots: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in ("node", "spec", "version", "until", "rows", "evaluation_rows")}
        paths = {"states": str(self.states), "marker": str(self.marker)}
        how = {"units": dict(self.units), "roots": list(self.roots)}
        return {**plain, **paths, **how, "plan": self.plan.document(), "resources": asdict(self.resources)}

    @classmethod
    def of(cls, document: dict[str, Any]) -> "Job":
        return cls(
            **{
                **document,
                "plan": parse_plan_document(document["plan"]),
                "states": Path(document["states"]),
                "marker": Path(document["marker"]),
                "resources": Resources(**{**document["resources"], "devices": tuple(document["resources"]["devices"])}),
                "roots": tuple(document["roots"]),
            }
        )


class Responder(Protocol):
    """Who answers a message that the guard let pass. Two implementations: training, and a load test's fixed update."""

    def respond(self, job: Job, message: Message, deadline_s: float) -> Message:
        """Raises: ConcordError: there is no answer, with the reason."""

    def rest(self) -> None:
        """Called between messages: gives back what has been idle for long."""

    def close(self) -> None:
        """Ends at once what is going on, from any thread."""


def watch(job: Job, parent: int | None = None) -> Callable[[], None]:
    """A check for before each batch: nothing withdrew or ended the approval, and the parent, the daemon, is there."""
    marker = os.fspath(job.marker)

    def may_go_on() -> None:
        try:
            os.stat(marker)  # noqa: PTH116 - a microsecond, once a batch
        except FileNotFoundError:
            pass
        else:
            raise ConsentRefusedError("approval withdrawn")
        if time.time() >= job.until:
            raise ConsentRefusedError("approval, agreement or run has expired")
        if parent is not None and os.getppid() != parent:
            raise ConsentRefusedError("the node was ended")

    return may_go_on


def send(connection: "Connection[Any, Any]", frame: Frame) -> None:
    header, buffers = frame
    connection.send_bytes(json.dumps({**header, "buffers": len(buffers)}).encode())
    for data in buffers:
        connection.send_bytes(data)


def receive(connection: "Connection[Any, Any]") -> Frame:
    header = json.loads(connection.recv_bytes())
    return header, [connection.recv_bytes() for _ in range(header.pop("buffers"))]
