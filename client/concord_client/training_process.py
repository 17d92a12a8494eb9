"""The process that trains: it imports torch once, stays warm, and is killed and started anew when it hangs.

The daemon itself reads no data and imports no torch. It hands over what the round guard let pass, and gets an answer
or the reason why there is none. Between the two runs a pipe of JSON headers and plain buffers.

    daemon ──Job + message──► training process ──blocks, or a reason──► daemon
"""

import contextlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flwr.app import Message, Metadata

from concord_client.packing import pack, unpack
from concord_shared.errors import (
    ArtefactError,
    ConcordError,
    ConsentRefusedError,
    DataError,
    PlanError,
    TrainingDivergedError,
    UsageError,
)
from concord_shared.messages import with_metadata
from concord_shared.plan.schema import Plan, parse_plan_document

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from concord_client.data import NodeDataset, Reading
    from concord_client.node import Node
    from concord_client.trainer import Workbench

__all__ = [
    "Job",
    "NodeStoppingError",
    "Resources",
    "Responder",
    "TrainingFailedError",
    "TrainingProcess",
    "limit_memory",
]

log = logging.getLogger(__name__)

START_S = 180.0
"""A cold disk may take minutes to bring torch in."""
IDLE_S = 900.0
DECIDE_S = 3600.0
HELD_MAX = 2
"""Plans whose data and model the process keeps at hand."""
TRIES = 2
CLOSE_S = 1.0
WATCH_S = 0.5
"""Between two looks whether the work may go on, while it goes on."""
PATIENCE_S = 5.0
"""For a process that may not go on, to end its batch and say so."""

_KINDS: dict[str, type[ConcordError]] = {
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


# The daemon's side


@dataclass
class _Child:
    process: Any
    connection: "Connection[Any, Any]"
    ready: bool = False


@dataclass
class TrainingProcess:
    """At most one child process; answers one request at a time.

    idle_s: after this time without a request `rest` ends the child. target: what the child runs; a test's own.
    patience_s: see PATIENCE_S.
    """

    idle_s: float = IDLE_S
    start_s: float = START_S
    patience_s: float = PATIENCE_S
    target: Callable[["Connection[Any, Any]", int], None] | None = None
    clock: Callable[[], float] = time.monotonic
    _child: _Child | None = None
    _used_at: float = 0.0
    _noted: str = ""
    _closed: threading.Event = field(default_factory=threading.Event)
    _busy: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pid(self) -> int | None:
        """Of the child, while there is one."""
        child = self._child
        return None if child is None else child.process.pid

    def respond(self, job: Job, message: Message, deadline_s: float) -> Message:
        """The answer, unsigned.

        Raises:
            ConsentRefusedError, TrainingDivergedError, DataError: as the node's own code says; the first also where the
                approval ended and the process hangs, which is ended then.
            TrainingFailedError: it hung, died twice, or failed unexpectedly.
            NodeStoppingError: `close` was called.
        """
        metadata = message.metadata
        header, buffers = pack(message.content)
        request = {"do": "respond", "job": job.document(), "type": metadata.message_type, "content": header}
        answer, arrays = self._ask((request, buffers), deadline_s, watch(job))
        if answer["note"] != self._noted:
            self._noted = answer["note"]
            log.warning(self._noted or "the owner's limits hold again")
        return Message(unpack(answer["content"], arrays), reply_to=message)

    def decide(self, home: Path, deadline_s: float = DECIDE_S) -> list[tuple[str, str]]:
        """Lets the policy's rules decide what waits: reads the data of each plan that a rule fits.

        Returns:
            For each its id, and what was decided or why nothing was.
        """
        answer, _ = self._ask(({"do": "decide", "home": str(home)}, []), deadline_s)
        return [(str(question), str(outcome)) for question, outcome in answer["decided"]]

    def examine(
        self, part: str, home: Path, plan: Plan, dataset: str, deadline_s: float, may_go_on: Callable[[], None]
    ) -> dict[str, Any]:
        """One part of a preflight, "data" or "round": what of it may leave this node.

        Raises:
            ConsentRefusedError: it may not go on. TrainingFailedError: it hung, died twice, or failed unexpectedly.
        """
        request = {"do": f"examine-{part}", "home": str(home), "plan": plan.document(), "dataset": dataset}
        answer, _ = self._ask((request, []), deadline_s, may_go_on)
        found: dict[str, Any] = answer["found"]
        return found

    def rest(self) -> None:
        if self._child is not None and self.clock() - self._used_at > self.idle_s and self._busy.acquire(False):
            try:
                log.info("the training process was idle and is ended")
                self._end()
            finally:
                self._busy.release()

    def close(self) -> None:
        self._closed.set()
        while not self._busy.acquire(timeout=0.05):
            if (child := self._child) is not None:
                with contextlib.suppress(ValueError):  # it was ended meanwhile
                    child.process.kill()  # who waits for its answer sees the pipe close
        try:
            self._end()
        finally:
            self._busy.release()

    def _ask(self, request: Frame, deadline_s: float, may_go_on: Callable[[], None] = lambda: None) -> Frame:
        with self._busy:
            deadline = self.clock() + deadline_s
            for _ in range(TRIES):
                try:
                    return self._read(self._exchange(request, deadline, may_go_on))
                except (EOFError, BrokenPipeError, ConnectionError, OSError):
                    code = self._end()
                    if self._closed.wait(0.2):
                        raise NodeStoppingError("the node is being stopped") from None
                    log.warning("the training process died", extra={"exit_code": code})
            raise TrainingFailedError(
                f"the training process died twice (exit code {code}). If it was killed for memory, lower the plan's "
                "batch size or give it more in policy.toml",
            )

    def _exchange(self, request: Frame, deadline: float, may_go_on: Callable[[], None]) -> Frame:
        if self._closed.is_set():
            raise NodeStoppingError("the node is being stopped")
        if self._child is None:
            self._child = self._start()
        child = self._child
        if not child.ready:
            self._await(child, max(deadline, self.clock() + self.start_s), "to start", may_go_on)
            _receive(child.connection)
            child.ready = True
        _send(child.connection, request)
        self._await(child, deadline, "to answer", may_go_on)
        self._used_at = self.clock()
        return _receive(child.connection)

    def _await(self, child: _Child, deadline: float, what: str, may_go_on: Callable[[], None]) -> None:
        """Returns when something can be read; ends a child that takes too long, or hangs where it may not go on."""
        begun = self.clock()
        refused: ConsentRefusedError | None = None
        while not child.connection.poll(max(0.0, min(WATCH_S, deadline - self.clock()))):
            if refused is None and (refused := _refusal(may_go_on)) is not None:
                deadline = min(deadline, self.clock() + self.patience_s)
            if self.clock() >= deadline:
                self._end()
                raise refused or TrainingFailedError(
                    f"the training process took longer than {deadline - begun:.0f} s {what}, and was ended"
                )

    def _read(self, answer: Frame) -> Frame:
        header = answer[0]
        if header["outcome"] == "done":
            return answer
        if header["kind"] in _KINDS:
            raise _KINDS[header["kind"]](header["reason"])
        self._end()  # whatever it was, the next request finds a process without its traces
        raise TrainingFailedError(f"{header['kind']}: {header['reason']}", header["detail"])

    def _start(self) -> _Child:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=self.target or serve, args=(theirs, os.getpid()), daemon=True, name="concord-training"
        )
        with _environment(OPENBLAS_NUM_THREADS="1"):  # NumPy's; torch is told for each job
            process.start()
        theirs.close()
        log.info("a training process was started", extra={"pid": process.pid})
        return _Child(process, ours)

    def _end(self) -> int | None:
        child, self._child = self._child, None
        if child is None:
            return None
        child.connection.close()
        child.process.join(CLOSE_S if child.ready else 0)
        if child.process.is_alive():
            child.process.kill()
            child.process.join()
        code: int | None = child.process.exitcode
        child.process.close()
        return code


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """What a process that is started here inherits."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _refusal(may_go_on: Callable[[], None]) -> ConsentRefusedError | None:
    try:
        may_go_on()
    except ConsentRefusedError as error:
        return error
    except OSError:  # what cannot be looked for counts as withdrawn
        return ConsentRefusedError("approval withdrawn")
    return None


def _send(connection: "Connection[Any, Any]", frame: Frame) -> None:
    header, buffers = frame
    connection.send_bytes(json.dumps({**header, "buffers": len(buffers)}).encode())
    for data in buffers:
        connection.send_bytes(data)


def _receive(connection: "Connection[Any, Any]") -> Frame:
    header = json.loads(connection.recv_bytes())
    return header, [connection.recv_bytes() for _ in range(header.pop("buffers"))]


# The child's side


def serve(connection: "Connection[Any, Any]", parent: int) -> None:
    """The life of a training process: answers requests until its pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which closes the pipe
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, by the first plan that uses cuBLAS
    desk = Desk(parent)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _send(connection, ({}, []))
        while True:
            request = _receive(connection)
            try:
                answer = desk.answer(request)
            except ConcordError as error:
                answer = _failed(error, str(error))
            except Exception as error:  # one bad round must not end the node
                answer = _failed(error, _explain(error))
            del request
            _send(connection, answer)


def _failed(error: Exception, reason: str) -> Frame:
    """Told as the nearest class that the daemon knows."""
    kind = next((each.__name__ for each in type(error).__mro__ if each.__name__ in _KINDS), type(error).__name__)
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
