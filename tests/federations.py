"""What tests of whole runs need: a small plan, a federation over digits, a driver over any transport."""

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from concord_client.data import RawData, read_data
from concord_client.devices import prepare_process
from concord_local.federation import Federation
from concord_local.nodes import NodeHost
from concord_local.transports import InProcessTransport, WorkerTransport, start_fork_server
from concord_server.checkpoints import RunStore
from concord_server.driver import Driver, RunResult
from concord_shared.models import new_vector
from concord_shared.plan import Plan, load_plan
from concord_shared.strategies import Strategy, strategy_for
from concord_shared.transport import Transport

NODES = 5
SMALL = ("model.name=logistic-regression", "rounds.count=3", "training.local_epochs=1", "training.batch_size=32")


def small_plan(*overrides: str) -> Plan:
    """Digits with a 650-parameter model: a round in milliseconds."""
    return load_plan("digits-cnn", [*SMALL, *overrides]).plan


@lru_cache(maxsize=1)
def digits() -> RawData:
    return read_data("digits", small_plan())


def federation(plan: Plan, nodes: int = NODES, partition: str = "iid") -> Federation:
    return Federation.of(digits(), plan, partition, nodes)


def transport(
    kind: str, plan: Plan, nodes: Federation, directory: Path, strategy: Strategy | None = None, workers: int = 2
) -> InProcessTransport | WorkerTransport:
    """`kind` is "in-process" or "workers"."""
    states = directory / "nodes"
    if kind == "in-process":
        prepare_process(threads=1)
        return InProcessTransport(NodeHost(plan, nodes, states, "cpu", strategy))
    start_fork_server()
    nodes = nodes.share(directory / "shared")
    return WorkerTransport(plan, nodes, workers, states, "cpu", strategy)


def driver(
    plan: Plan,
    nodes: Federation,
    carried: Transport,
    directory: Path,
    strategy: Strategy | None = None,
    observer: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> Driver:
    layout, start = new_vector(plan)
    directory.mkdir(parents=True, exist_ok=True)
    chosen, entries = strategy or strategy_for(plan), nodes.entries(plan)
    return Driver(plan, chosen, layout, start, entries, carried, RunStore(directory), observer)


def run(
    plan: Plan,
    directory: Path,
    kind: str = "in-process",
    wrap: Callable[[Transport], Transport] = lambda inner: inner,
    strategy: Strategy | None = None,
    workers: int = 2,
) -> tuple[RunResult, list[dict[str, Any]]]:
    """A whole run; its result and the lines of metrics.jsonl."""
    nodes = federation(plan)
    inner = transport(kind, plan, nodes, directory, strategy, workers)
    try:
        result = driver(plan, nodes, wrap(inner), directory, strategy).run()
    finally:
        inner.close()
    return result, RunStore(directory).records()


class Relay:
    """A transport around another one; subclasses change what passes."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner

    def send(self, messages: Iterable[Message]) -> None:
        self.inner.send(messages)

    def receive(self, timeout_s: float) -> list[Message]:
        return self.inner.receive(timeout_s)

    def withdraw(self) -> None:
        self.inner.withdraw()

    def close(self) -> None:
        self.inner.close()


class Shuffled(Relay):
    """Collects every answer of a step and hands them over in another order."""

    def __init__(self, inner: Transport, seed: int) -> None:
        super().__init__(inner)
        self._chance = np.random.default_rng(seed)
        self._asked, self._held = 0, list[Message]()

    def send(self, messages: Iterable[Message]) -> None:
        listed = list(messages)
        self._asked += len(listed)
        self.inner.send(listed)

    def receive(self, timeout_s: float) -> list[Message]:
        while len(self._held) < self._asked:
            self._held += self.inner.receive(timeout_s)
        order = self._chance.permutation(self._asked)
        replies, self._asked, self._held = [self._held[i] for i in order], 0, []
        return replies
