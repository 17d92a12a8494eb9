"""Two transports for nodes on this machine: in this process, and in worker processes that share one copy of
all data.

The pipes between this process and its own workers carry Python objects: both ends are the same program of
the same person. Nothing that another party sent is ever read this way.
"""

import contextlib
import logging
import mmap
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Message, RecordDict

from concord_client.devices import spread_device
from concord_local.attacks import Attack
from concord_local.federation import Federation
from concord_local.nodes import NodeHost
from concord_shared.errors import ConcordError, RunFailedError, UsageError
from concord_shared.messages import decline, with_metadata
from concord_shared.plan.schema import Plan, parse_plan_document
from concord_shared.strategies import Strategy

__all__ = ["InProcessTransport", "WorkerTransport", "start_fork_server", "worker_context"]

log = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Requests at a worker at a time: the next one waits at its door while it works."""
RESTARTS_MAX = 10


class InProcessTransport:
    """Answers in this process, one request when asked for a reply."""

    def __init__(self, host: NodeHost) -> None:
        self._host = host
        self._waiting: deque[Message] = deque()

    def send(self, messages: Iterable[Message]) -> None:
        self._waiting.extend(messages)

    def receive(self, timeout_s: float) -> list[Message]:
        if self._waiting:
            return [self._host.respond(self._waiting.popleft())]
        time.sleep(timeout_s)
        return []

    def withdraw(self) -> None:
        self._waiting.clear()

    def close(self) -> None:
        self.withdraw()


@dataclass(frozen=True)
class WorkerTask:
    """What a worker process needs to begin."""

    plan: dict[str, Any]
    directory: Path
    states: Path
    device: str
    strategy: Strategy | None
    attack: Attack | None


@dataclass(frozen=True)
class SharedRecord:
    """An `ArrayRecord` in a file that workers map. arrays: name, dtype, shape, stype, offset, bytes."""

    path: Path
    arrays: tuple[tuple[str, str, tuple[int, ...], str, int, int], ...]


Request = tuple[Message, SharedRecord | None]


@dataclass
class _Worker:
    process: Any
    connection: "Connection[Any, Any]"
    busy: "deque[Request]" = field(default_factory=deque)


class WorkerTransport:
    """Worker processes, one training thread each; a free worker takes the next request, whatever the node.

    A model is written once to a file that all workers map; so are the data (`Federation.share`). A worker that dies
    is replaced and its requests are asked again, once; after a second death their nodes appear as failed.
    """

    def __init__(
        self,
        plan: Plan,
        federation: Federation,
        workers: int,
        states: Path,
        device: str = "auto",
        strategy: Strategy | None = None,
        attack: Attack | None = None,
    ) -> None:
        assert federation.directory is not None, "workers need a shared federation"
        self._directory = federation.directory
        self._task = WorkerTask(plan.document(), self._directory, states, device, strategy, attack)
        self._context = worker_context()
        self._waiting: deque[Request] = deque()
        self._retried: set[str] = set()
        self._lost: list[Message] = []
        self._published = 0
        self._restarts = 0
        self._workers = [self._start(place) for place in range(workers)]
        for worker in self._workers:
            self._await_ready(worker)

    @property
    def process_ids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def send(self, messages: Iterable[Message]) -> None:
        shared: dict[int, SharedRecord] = {}
        for message in messages:
            record = message.content.array_records.get("model")
            if record is not None and id(record) not in shared:
                self._drop_old_models()
                shared[id(record)] = self._publish(record)
            self._waiting.append((message, None if record is None else shared[id(record)]))
            self._feed()

    def receive(self, timeout_s: float) -> list[Message]:
        if not self._lost:
            by_connection = {worker.connection: worker for worker in self._workers}
            for ready in wait(list(by_connection), timeout_s):
                self._read(by_connection[ready])  # type: ignore[index]
        replies, self._lost = self._lost, []
        self._feed()
        return replies

    def withdraw(self) -> None:
        self._waiting.clear()

    def close(self) -> None:
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(2)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []

    def _start(self, place: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        task = replace(self._task, device=spread_device(self._task.device, place))
        process = self._context.Process(target=_serve, args=(theirs, task), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _await_ready(self, worker: _Worker) -> None:
        try:
            problem = worker.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            worker.process.join(2)
            self.close()
            raise RunFailedError(
                f"a worker process ended while starting, with code {worker.process.exitcode}. In a script, call "
                'simulate below `if __name__ == "__main__":`, because workers import the script'
            ) from error
        if problem:
            self.close()
            raise UsageError(problem)

    def _feed(self) -> None:
        for depth in range(IN_FLIGHT):
            for worker in self._workers:
                if self._waiting and len(worker.busy) <= depth:
                    message, shared = self._waiting.popleft()
                    try:
                        worker.connection.send((_without_model(message), shared))
                    except (BrokenPipeError, ConnectionResetError):
                        self._waiting.appendleft((message, shared))
                        self._replace(worker)
                        return
                    worker.busy.append((message, shared))

    def _read(self, worker: _Worker) -> None:
        try:
            reply = worker.connection.recv()
        except (EOFError, ConnectionResetError, OSError):
            self._replace(worker)
            return
        worker.busy.popleft()
        self._lost.append(reply)

    def _replace(self, worker: _Worker) -> None:
        worker.process.join(2)
        log.warning("a worker process ended with code %s", worker.process.exitcode)
        self._restarts += 1
        if self._restarts > RESTARTS_MAX:
            raise RunFailedError(
                f"worker processes died {self._restarts} times, the last with code {worker.process.exitcode}; if the "
                "machine is short of memory, use fewer --workers"
            )
        for message, shared in reversed(worker.busy):
            if message.metadata.message_id in self._retried:
                self._lost.append(decline(message, "the worker process died, twice"))
            else:
                self._retried.add(message.metadata.message_id)
                self._waiting.appendleft((message, shared))
        worker.connection.close()
        place = self._workers.index(worker)
        self._workers[place] = replacement = self._start(place)
        self._await_ready(replacement)

    def _publish(self, record: ArrayRecord) -> SharedRecord:
        self._published += 1
        path = self._directory / f"model-{self._published}.bin"
        arrays, offset = [], 0
        with path.open("wb") as file:
            for name, array in record.items():
                arrays.append((name, array.dtype, tuple(array.shape), array.stype, offset, len(array.data)))
                offset += file.write(array.data)
                offset += file.write(bytes(-offset % 64))  # tensors start at multiples of 64 bytes
        return SharedRecord(path, tuple(arrays))

    def _drop_old_models(self) -> None:
        """Removes published models that no waiting request names; a worker that maps one keeps its pages."""
        waiting = {shared.path for _, shared in self._waiting if shared is not None}
        in_flight = any(worker.busy for worker in self._workers)
        for path in self._directory.glob("model-*.bin"):
            if path not in waiting and not in_flight:
                path.unlink()


def worker_context() -> Any:
    """Workers fork from a small server process that has imported torch and nothing else of ours has run in."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    return multiprocessing.get_context(method)


def start_fork_server() -> None:
    """Begins to import what workers need, in parallel with this process; call it as early as possible."""
    context = worker_context()
    if context.get_start_method() == "forkserver":
        from multiprocessing import forkserver

        context.set_forkserver_preload(["concord_local.transports", "concord_client.trainer"])
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # for the workers' numpy too: one process a core, one thread each
        with _without_interrupts():
            forkserver.ensure_running()
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """What is started here inherits a blocked SIGINT: Ctrl-C is for the parent, which closes the pipes."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: "Connection[Any, Any]", task: WorkerTask) -> None:
    """A worker's life: answers requests until its pipe closes."""
    from concord_client.devices import prepare_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes the pipe
    prepare_process(threads=1)
    plan = parse_plan_document(task.plan)
    try:
        host = NodeHost(plan, Federation.map(task.directory), task.states, task.device, task.strategy, task.attack)
        host.warm_up()
        connection.send(None)
    except ConcordError as error:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(str(error))
        return
    except OSError:
        if connection.poll():  # the parent ended while this was still starting, and took its files away
            return
        raise
    held: tuple[Path, ArrayRecord] | None = None
    while True:
        try:
            message, shared = connection.recv()
        except (EOFError, ConnectionResetError):  # reset where an answer was not read any more
            return
        if shared is not None:
            if held is None or held[0] != shared.path:
                held = (shared.path, _map(shared))
            message.content["model"] = held[1]
        try:
            connection.send(host.respond(message))
        except (BrokenPipeError, ConnectionResetError):
            return


def _map(shared: SharedRecord) -> ArrayRecord:
    """The published record, its bytes mapped: all workers read the same pages."""
    with shared.path.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    record = ArrayRecord({name: Array(dtype, shape, stype, b"") for name, dtype, shape, stype, _, _ in shared.arrays})
    for name, _, _, _, offset, size in shared.arrays:
        record[name].data = view[offset : offset + size]  # type: ignore[assignment] # a view, not a copy
    return record


def _without_model(message: Message) -> Message:
    content = RecordDict({name: record for name, record in message.content.items() if name != "model"})
    return with_metadata(content, message.metadata)
