"""The side of the process that trains: it reads data, imports torch once, and answers until its pipe closes."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Metadata

from concord_client.packing import pack, unpack
from concord_client.training_job import KINDS, Frame, Job, receive, send, watch
from concord_shared.errors import ConcordError, ConsentRefusedError, TrainingDivergedError
from concord_shared.messages import with_metadata
from concord_shared.plan.schema import Plan, parse_plan_document

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from concord_client.data import NodeDataset, Reading
    from concord_client.node import Node
    from concord_client.trainer import Workbench

__all__ = ["Desk", "limit_memory", "read_dataset", "serve", "stream_dataset"]

HELD_MAX = 2
"""Plans whose data and model the process keeps at hand."""


def serve(connection: "Connection[Any, Any]", parent: int) -> None:
    """The life of a training process: answers requests until its pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which closes the pipe
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, by the first plan that uses cuBLAS
    desk = Desk(parent)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        send(connection, ({}, []))
        while True:
            request = receive(connection)
            try:
                answer = desk.answer(request)
            except ConcordError as error:
                answer = _failed(error, str(error))
            except Exception as error:  # one bad round must not end the node
                answer = _failed(error, _explain(error))
            del request
            send(connection, answer)


def _failed(error: Exception, reason: str) -> Frame:
    """Told as the nearest class that the daemon knows."""
    kind = next((each.__name__ for each in type(error).__mro__ if each.__name__ in KINDS), type(error).__name__)
    detail = "" if isinstance(error, (ConsentRefusedError, TrainingDivergedError)) else traceback.format_exc()
    return {"outcome": "failed", "kind": kind, "reason": reason, "detail": detail}, []


def _explain(error: Exception) -> str:
    from concord_client.devices import is_out_of_memory

    if is_out_of_memory(error):
        return "no memory left for it; raise memory_mb in policy.toml or use a smaller plan"
    return "unexpected; this node's own log has the details"


@dataclass
class _Held:
    """One plan on one dataset, ready to train; a Node for each run of it."""

    dataset: "NodeDataset"
    bench: "Workbench"
    nodes: dict[Path, "Node"] = field(default_factory=dict)


@dataclass
class Desk:
    """What the process keeps between requests. parent: the daemon's process, without which no work goes on. _note: what
    of the owner's limits does not hold here.
    """

    parent: int
    _note: str = ""
    _held: "OrderedDict[tuple[object, ...], _Held]" = field(default_factory=OrderedDict)

    def answer(self, request: Frame) -> Frame:
        header, buffers = request
        if header["do"] == "decide":
            return _decide(Path(header["home"]))
        if header["do"].startswith("examine-"):
            return _examine(header)
        return self._respond(Job.of(header["job"]), header, buffers)

    def _respond(self, job: Job, header: dict[str, Any], buffers: Sequence[bytes]) -> Frame:
        may_go_on = watch(job, self.parent)
        may_go_on()
        node = self._node(job)
        node.before_batch = may_go_on
        metadata = Metadata(0, "", 1, 2, "", "", time.time(), 1e6, header["type"])
        reply = node.respond(with_metadata(unpack(header["content"], buffers), metadata))
        may_go_on()
        content, arrays = pack(reply.content)
        return {"outcome": "done", "content": content, "note": self._note}, arrays

    def _node(self, job: Job) -> "Node":
        from concord_client.data import Reading
        from concord_client.devices import choose_device, prepare_process
        from concord_client.node import Node
        from concord_client.state import NodeStates
        from concord_client.trainer import Workbench, be_deterministic
        from concord_shared.strategies import strategy_for

        device, *_ = devices = [choose_device(each) for each in job.resources.devices or [job.resources.device]]
        prepare_process(1 if job.plan.training.deterministic else job.resources.threads)
        self._note = limit_memory(job.resources.memory_mb, device.type)
        be_deterministic(job.plan.training.deterministic)
        key = (
            job.plan.digest,
            job.spec,
            job.version,
            tuple(sorted(job.units.items())),
            job.roots,
            job.node,
            tuple(map(str, devices)),
        )
        if key not in self._held:
            while len(self._held) >= HELD_MAX:
                self._held.popitem(last=False)[1].bench.close()
            reading = Reading(job.units, job.roots, job.version)
            streams = job.plan.statistics is not None and job.plan.statistics.rows == "all"
            dataset = (
                stream_dataset(job.plan, job.node, job.spec, job.rows, reading)
                if streams
                else read_dataset(job.plan, job.node, job.spec, reading)
            )
            self._held[key] = _Held(dataset, Workbench(job.plan, device, devices=tuple(map(str, devices))))
        self._held.move_to_end(key)
        held = self._held[key]
        if job.states not in held.nodes:
            held.nodes = {job.states: Node(held.dataset, held.bench, strategy_for(job.plan), NodeStates(job.states))}
        return held.nodes[job.states]


def _decide(path: Path) -> Frame:
    from concord_client.approvals import decide_pending
    from concord_client.home import NodeHome
    from concord_client.policy import Policy

    home = NodeHome.open(path)
    with home.store() as store:
        decided = decide_pending(home, store, Policy.load(home.policy_file), time.time())
    outcomes = [
        (question.id, str(made) if isinstance(made, ConcordError) else made.decision) for question, made in decided
    ]
    return {"outcome": "done", "decided": outcomes}, []


def _examine(header: dict[str, Any]) -> Frame:
    from concord_client.dry_round import examine_data, examine_round
    from concord_client.home import NodeHome
    from concord_client.policy import Policy

    home, plan = NodeHome.open(Path(header["home"])), parse_plan_document(header["plan"])
    policy = Policy.load(home.policy_file)
    if header["do"] == "examine-data":
        limit_memory(policy.resources.memory_mb or None, "cpu")
        return {"outcome": "done", "found": examine_data(home, plan, header["dataset"], policy)}, []
    return {"outcome": "done", "found": examine_round(home, plan, header["dataset"], policy)}, []


def read_dataset(plan: Plan, node: str, spec: str, reading: "Reading | None" = None) -> "NodeDataset":
    """The rows of `spec`, split exactly as a simulation splits those of a node of this name.

    Raises:
        DataError: they cannot be read, or break the plan's contract.
    """
    import numpy as np

    from concord_client.data import NodeDataset, read_data
    from concord_client.data.dataset import split_for

    data = read_data(spec, plan, reading=reading)
    return NodeDataset(node, data.inputs, data.targets, split_for(plan, data, np.arange(len(data)), node))


def stream_dataset(plan: Plan, node: str, spec: str, rows: int, reading: "Reading | None" = None) -> "NodeDataset":
    """All rows of `spec`, to be looked at in order: memory holds a batch of them. rows: how many there are."""
    import numpy as np

    from concord_client.data import NodeDataset, Split, read_batches

    def batches() -> Iterator[Any]:
        for data in read_batches(spec, plan, reading=reading):
            yield data.inputs, data.targets

    indices = {split: np.broadcast_to(np.int64(0), (rows if split == Split.TRAIN else 0,)) for split in Split}
    nothing = np.zeros((0, 0))
    return NodeDataset(node, nothing, nothing, indices, batches)


def limit_memory(memory_mb: int | None, device: str) -> str:
    """Private memory of this process, where the system can limit it. Not with an accelerator: its driver maps far more
    than it uses. Returns why a wanted limit does not hold; nothing where it does.
    """
    holds = sys.platform == "linux" and device == "cpu"
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = hard if memory_mb is None or not holds else memory_mb << 20
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    if memory_mb is None or holds:
        return ""
    return (
        f"resources.memory_mb = {memory_mb} in policy.toml is not enforced: it holds for work on the CPU under Linux, "
        f"this is {device} under {sys.platform}. Limit the service itself where it matters"
    )
