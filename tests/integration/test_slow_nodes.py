"""A node far slower than the others holds what nobody else has: with a clock in the plan its rows count."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Message

from concord_client.data import Split
from concord_client.devices import prepare_process
from concord_client.node import Node
from concord_local.federation import Federation
from concord_local.nodes import NodeHost
from concord_local.transports import InProcessTransport
from concord_server.checkpoints import RunStore
from concord_shared.plan import Plan
from federations import Relay, digits, driver, small_plan

SLOW = "node-5"
STEP_S, IN_TIME_S = 0.3, 2.5
PLAN = (
    "model={name='mlp', hidden=[32]}",
    "training={optimiser='sgd', learning_rate=0.1, batch_size=16, local_epochs=1, deterministic=false}",
    "rounds={count=20, quorum=4, grace_s=0.1}",
    "evaluation.every=20",
)


class Clock:
    """Of this federation: no time passes but where the slow node works."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += STEP_S


class Host(NodeHost):
    clock: Clock

    def _node(self, name: str) -> Node:
        node = super()._node(name)
        if name == SLOW:
            node.before_batch = self.clock.step
        return node


class InTime(Relay):
    """An answer that took too long has not come when the round ends."""

    def __init__(self, inner: InProcessTransport, clock: Clock) -> None:
        super().__init__(inner)
        self._clock = clock

    def send(self, messages: Iterable[Message]) -> None:
        super().send(sorted(messages, key=lambda message: message.metadata.dst_node_id))  # the slow one's last

    def receive(self, timeout_s: float) -> list[Message]:
        begun = self._clock.now
        replies = super().receive(timeout_s)
        return replies if self._clock.now - begun <= IN_TIME_S else []


def eights_and_nines_at_one_node() -> Federation:
    data = digits()
    rare = data.targets >= 8
    shares = [*np.array_split(np.flatnonzero(~rare), 4), np.flatnonzero(rare)]
    empty = np.empty(0, np.int64)
    rows = {
        f"node-{number}": {Split.TRAIN: own[::2], Split.VALIDATION: empty, Split.TEST: own[1::2]}
        for number, own in enumerate(shares, 1)
    }
    return Federation(data.inputs, data.targets, rows)


def recall_of_eights_and_nines(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, list[int]]:
    """And the steps that the slow node took in each round that its answer came in time for."""
    nodes, clock = eights_and_nines_at_one_node(), Clock()
    monkeypatch.setattr("concord_client.trainer.time", SimpleNamespace(monotonic=clock.monotonic))
    prepare_process(threads=1)
    host = Host(plan, nodes, out / "nodes", "cpu")
    host.clock = clock
    driver(plan, nodes, InTime(InProcessTransport(host), clock), out).run()
    records = RunStore(out).records()
    [confusion] = [np.array(r["metrics"]["confusion"]) for r in records if r["kind"] == "evaluate"]
    steps = [r["notes"][SLOW]["steps"] for r in records if SLOW in r.get("notes", {})]
    return float(np.diag(confusion)[8:].sum() / confusion[8:].sum()), steps


def test_a_slow_node_counts_where_the_plan_has_a_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its epoch is 12 steps, of which it has time for 4."""
    never = recall_of_eights_and_nines(small_plan(*PLAN), tmp_path / "without", monkeypatch)
    assert never == (0.0, [])
    timed = small_plan(*PLAN, "training.local_seconds=1.0", "strategy.name=fednova")
    recall, steps = recall_of_eights_and_nines(timed, tmp_path / "with", monkeypatch)
    print(f"\nrecall of what only the slow node has: 0 without a clock, {recall:.3f} with it")
    assert steps == [4] * 20
    assert recall > 0.5


def test_fednova_over_fedavg_where_one_node_takes_a_third_of_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wang et al. 2020: FedAvg counts a node by the steps it took, FedNova by its rows. A plan refuses this FedAvg."""
    nova = small_plan(*PLAN, "training.local_seconds=1.0", "strategy.name=fednova")
    average = nova.model_copy(update={"strategy": small_plan("strategy.name=fedavg").strategy})
    after = {}
    for plan in (nova, average):
        recall, steps = recall_of_eights_and_nines(plan, tmp_path / plan.strategy.name, monkeypatch)
        assert steps == [4] * 20
        after[plan.strategy.name] = recall
    print(f"\nrecall of what only the slow node has: {after}")
    assert after["fednova"] > after["fedavg"] + 0.1
