"""Many small nodes at once in one process: their local training as one batched computation over a stack of models.

Each node answers in a thread of its own, with all its checks, and meets the others where it trains. What it gets there
is what it would have trained alone, but for rounding: its own rows, in its own order, with its own optimiser's state.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.dropout import _DropoutNd

from concord_client.batches import Rows
from concord_client.node import Node
from concord_client.trainer import Workbench, finite, new_optimiser
from concord_local.nodes import NodeHost
from concord_local.transports import InProcessTransport
from concord_shared.errors import UsageError
from concord_shared.metrics import MetricSums
from concord_shared.models.registry import example_inputs
from concord_shared.strategies.base import Adjust
from concord_shared.tensors import Float32Vector

__all__ = [
    "SideBySideHost",
    "SideBySideTransport",
    "check_side_by_side",
    "train_side_by_side",
    "why_not_side_by_side",
]


def why_not_side_by_side(bench: Workbench) -> str:
    """Why this plan's nodes cannot be trained as one computation; "" where they can."""
    plan = bench.plan
    training = plan.training
    if plan.data.task not in ("classification", "regression") or plan.data.input == "ratings":
        return f"data.task = {plan.data.task!r} with input = {plan.data.input!r}"
    if plan.data.input == "text":
        return 'data.input = "text", whose attention PyTorch would work out one node after the other'
    if plan.strategy.name not in ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fednova"):
        return f"strategy {plan.strategy.name}, which changes gradients or keeps models of nodes"
    if plan.noise == "dp-sgd":
        return 'privacy.dp.unit = "record"'
    if bench.partition.personal.size:
        return "a model with parameters that stay at their node"
    if bench._batch_norm:
        return "a model with BatchNorm, which compares the rows of a batch"
    if getattr(plan.model, "stochastic_depth", False):
        return "model.stochastic_depth, whose draws would be others"
    if any(isinstance(module, _DropoutNd) and module.p for module in bench.model.modules()):
        return "a model with dropout, whose draws would be others"
    if training.local_seconds or training.micro_batch or training.recompute_activations or training.precision != "fp32":
        return "training.local_seconds, micro_batch, recompute_activations, or a precision other than fp32"
    return ""


@dataclass
class _Job:
    """One node's training: from start `(d,)` to the result, with the number of its steps. place: in the stack; threads
    come in any order, and bits may depend on it.
    """

    rows: Rows
    learning_rate: float
    seed: int
    start: Float32Vector
    place: int = 0
    result: Float32Vector | None = None
    steps: int = 0


def train_side_by_side(bench: Workbench, jobs: Sequence[_Job]) -> None:
    """Fills in each job's result and steps. All have one learning rate, as nodes of one round do.

    A job whose rows are used up leaves the stack, so that the others go on without it.
    """
    training, layout = bench.plan.training, bench.layout
    names = [name for name, _ in layout.entries]
    views = [layout.split(job.start) for job in jobs]
    stack = {
        name: nn.Parameter(torch.stack([torch.tensor(view[name]) for view in views]).to(bench.device)) for name in names
    }
    fixed = {name: tensor for name, tensor in bench.model.named_parameters() if name not in stack}
    fixed |= dict(bench.model.named_buffers())
    optimiser = new_optimiser(training, list(stack.values()), jobs[0].learning_rate)
    living = [(job, bench.batches(job.rows, job.seed)) for job in jobs]

    def loss(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        outputs = functional_call(bench.model, {**fixed, **parameters}, (inputs,))
        return (bench.task.loss(outputs, targets, "none") * weights).sum()

    gradient: Callable[..., dict[str, Tensor]] = vmap(grad(loss))
    bench.model.train()
    while True:
        batches = [next(each, None) for _, each in living]
        if None in batches:
            finished = {place: job for place, (job, _) in enumerate(living) if batches[place] is None}
            _leave(optimiser, stack, bench, finished)
            living = [pair for place, pair in enumerate(living) if place not in finished]
        if not living:
            return
        there = [batch for batch in batches if batch is not None]
        found = gradient({name: each.detach() for name, each in stack.items()}, *_padded(there))
        if training.gradient_clip:
            _clip(found, training.gradient_clip)
        for name, parameter in stack.items():
            parameter.grad = found[name].contiguous()  # a fused step pairs the two by their places in memory
        optimiser.step()
        for job, _ in living:
            job.steps += 1


def _padded(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs `(k, b, …)`, targets and weights `(k, b)`: a mean over each node's own rows, nothing of what pads them."""
    longest = max(len(targets) for _, targets in batches)
    weights = batches[0][0].new_zeros(len(batches), longest, dtype=torch.float32)
    for row, (_, targets) in zip(weights, batches, strict=True):
        row[: len(targets)] = 1 / len(targets)

    def padded(tensors: Sequence[Tensor]) -> Tensor:
        if all(len(each) == longest for each in tensors):
            return torch.stack(list(tensors))
        out = tensors[0].new_zeros(len(tensors), longest, *tensors[0].shape[1:])
        for place, each in enumerate(tensors):
            out[place, : len(each)] = each
        return out

    return padded([inputs for inputs, _ in batches]), padded([targets for _, targets in batches]), weights


def _clip(gradients: dict[str, Tensor], most: float) -> None:
    """Each node's gradient to a norm of at most that, as `clip_grad_norm_` does."""
    squares = torch.stack([each.flatten(1).square().sum(1) for each in gradients.values()])
    factors = (most / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1.0)
    for each in gradients.values():
        each.mul_(factors.view(-1, *[1] * (each.dim() - 1)))


def _leave(
    optimiser: torch.optim.Optimizer,
    stack: dict[str, nn.Parameter],
    bench: Workbench,
    finished: dict[int, _Job],
) -> None:
    """Takes finished jobs out of the stack, by their places in it, each with its result."""
    for place, job in finished.items():
        own = {name: each.detach()[place].cpu().numpy() for name, each in stack.items()}
        job.result = bench.layout.join(own)
    count = len(next(iter(stack.values())))
    kept = torch.tensor([place for place in range(count) if place not in finished], dtype=torch.int64)
    kept = kept.to(bench.device)
    for parameter in stack.values():
        parameter.grad = None
        parameter.data = parameter.data.index_select(0, kept)
        state = optimiser.state[parameter]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[key] = value.index_select(0, kept)


def check_side_by_side(bench: Workbench) -> None:
    """Takes one step of two nodes where nothing speaks against it: what a model does inside is not told beforehand.

    Raises:
        UsageError: the plan's nodes cannot be trained as one computation.
    """
    if why := why_not_side_by_side(bench):
        raise UsageError(f"simulate.side_by_side: nodes cannot be trained as one computation with {why}; leave it out")
    rows = bench.rows(example_inputs(bench.plan, 2), np.zeros(2, np.int64))
    rate = bench.plan.training.learning_rate
    try:
        train_side_by_side(bench, [_Job(rows, rate, 0, bench.read()) for _ in range(2)])
    except RuntimeError as error:
        raise UsageError(f"simulate.side_by_side: this model cannot be trained so: {error}; leave it out") from error


@dataclass
class _Table:
    """Where threads of one group meet: when all that still answer wait for training, it is done for them at once."""

    bench: Workbench
    answering: int
    _waiting: list[_Job] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _error: BaseException | None = None

    def train(self, job: _Job) -> None:
        with self._changed:
            self._waiting.append(job)
            self._begin_if_all_wait()
            self._changed.wait_for(lambda: job.result is not None or self._error is not None)
            if self._error is not None:
                raise self._error

    def fail(self, error: BaseException) -> None:
        """Nobody waits any longer."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def leave(self) -> None:
        with self._changed:
            self.answering -= 1
            self._begin_if_all_wait()

    def _begin_if_all_wait(self) -> None:
        if not self._waiting or len(self._waiting) < self.answering:
            return
        jobs, self._waiting = sorted(self._waiting, key=lambda job: job.place), []
        try:
            train_side_by_side(self.bench, jobs)
        except BaseException as error:
            self._error = error
        self._changed.notify_all()


class _Seat(Workbench):
    """A node's place at the bench that all share: what it loads and reads is its own."""

    def __init__(self, bench: Workbench, busy: threading.Lock) -> None:
        self.__dict__.update(bench.__dict__)
        self._busy = busy
        self._theta: Float32Vector = bench._fresh[:0]
        self.table: _Table | None = None
        self.place = 0

    def load(self, theta: Float32Vector, personal: Float32Vector | None = None) -> None:
        self._theta = theta

    def forget(self) -> None:
        """A seat between two messages holds no model."""
        self._theta = self._fresh[:0]

    def _read(self, layout: Any) -> Float32Vector:
        return finite(self._theta if layout is self.layout else self._fresh)

    def train(
        self, rows: Rows, learning_rate: float, seed: int, adjust: Adjust | None = None, *rest: Any, **more: Any
    ) -> int:
        """What more there is, the plans that `why_not_side_by_side` lets through have not."""
        assert adjust is None
        assert self.table is not None
        job = _Job(rows, learning_rate, seed, self._theta, self.place)
        self.table.train(job)
        assert job.result is not None
        self._theta = job.result
        return job.steps

    def evaluate(
        self, rows: Rows, before_batch: Callable[[], None] | None = None, known: Rows | None = None
    ) -> MetricSums:
        with self._busy:
            Workbench.load(self, self._theta)
            return Workbench.evaluate(self, rows, before_batch, known)


@dataclass
class SideBySideHost(NodeHost):
    """As `NodeHost`, for several messages at once, of a plan that `check_side_by_side` lets through."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._busy = threading.Lock()
        self._seats: dict[str, _Seat] = {}

    def _node(self, name: str) -> Node:
        seat = self._seats[name] = _Seat(self._bench, self._busy)
        node = super()._node(name)
        node.bench = seat
        return node

    def respond_to_all(self, messages: Sequence[Message]) -> list[Message]:
        """An answer to each, in their order."""
        table = _Table(self._bench, len(messages))

        def one(message: Message) -> Message:
            try:
                return self.respond(message)
            finally:
                table.leave()

        for place, message in enumerate(messages):
            seat = self._seat(message)
            seat.table, seat.place = table, place
        with ThreadPoolExecutor(len(messages)) as pool:
            try:
                return list(pool.map(one, messages))
            except BaseException as error:
                table.fail(error)
                raise
            finally:
                for message in messages:
                    self._seat(message).forget()

    def _seat(self, message: Message) -> _Seat:
        """Makes the node that the message is for, so that threads only find it."""
        self._app_of(message.metadata.dst_node_id)
        return self._seats[self.federation.names[message.metadata.dst_node_id - 2]]


class SideBySideTransport(InProcessTransport):
    """As `InProcessTransport`, as many requests at once as there are places."""

    def __init__(self, host: SideBySideHost, places: int) -> None:
        super().__init__(host)
        self._beside, self._places = host, places

    def receive(self, timeout_s: float) -> list[Message]:
        if not self._waiting:
            return super().receive(timeout_s)
        group = dict[int, Message]()  # a node that is asked twice has one place
        while self._waiting and len(group) < self._places and self._waiting[0].metadata.dst_node_id not in group:
            message = self._waiting.popleft()
            group[message.metadata.dst_node_id] = message
        return self._beside.respond_to_all(list(group.values()))
