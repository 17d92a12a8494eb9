"""The process that trains: it imports torch once, stays warm, and is killed and started anew when it hangs.

The daemon itself reads no data and imports no torch. It hands over what the round guard let pass, and gets an answer
or the reason why there is none.

    daemon ──Job + message──► training process ──blocks, or a reason──► daemon
"""

import contextlib
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Message

from concord_client.packing import pack, unpack
from concord_client.training_desk import serve
from concord_client.training_job import KINDS, Frame, Job, NodeStoppingError, TrainingFailedError, receive, send, watch
from concord_shared.errors import ConsentRefusedError
from concord_shared.plan.schema import Plan

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["TrainingProcess"]

log = logging.getLogger(__name__)

START_S = 180.0
"""A cold disk may take minutes to bring torch in."""
IDLE_S = 900.0
DECIDE_S = 3600.0
TRIES = 2
CLOSE_S = 1.0
WATCH_S = 0.5
"""Between two looks whether the work may go on, while it goes on."""
PATIENCE_S = 5.0
"""For a process that may not go on, to end its batch and say so."""


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
            receive(child.connection)
            child.ready = True
        send(child.connection, request)
        self._await(child, deadline, "to answer", may_go_on)
        self._used_at = self.clock()
        return receive(child.connection)

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
        if header["kind"] in KINDS:
            raise KINDS[header["kind"]](header["reason"])
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
