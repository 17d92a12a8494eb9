"""SCAFFOLD: the coordinator's control stays the mean of the nodes' own, whoever is asked, stays away or is cut."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from concord_client.state import NodeStates
from concord_server.checkpoints import RunStore
from concord_shared.blocks import example_weight
from concord_shared.models import new_vector
from concord_shared.transport import Transport
from federations import NODES, Relay, driver, federation, small_plan, transport

SGD = ("training.optimiser=sgd", "training.momentum=0.0", "training.learning_rate=0.1")


class Away(Relay):
    """Of the first request and of the last one before the end, one node hears nothing."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self._requests = 0

    def send(self, messages: Iterable[Message]) -> None:
        self._requests += 1
        away = {1: 3, 5: 4}.get(self._requests)
        super().send(each for each in messages if each.metadata.dst_node_id != away)


@pytest.mark.parametrize(
    "overrides",
    [(), ("strategy.control_bound=0.5",), ("rounds.cohort=3",), ("rounds.weight_cap=200",)],
    ids=["all", "bound", "cohort", "cap"],
)
def test_the_control_is_the_mean_of_the_nodes_own(overrides: tuple[str, ...], tmp_path: Path) -> None:
    waits = ("rounds.count=4", "rounds.quorum=2", "rounds.grace_s=0.1")
    plan = small_plan(*SGD, "strategy.name=scaffold", *waits, *overrides)
    nodes = federation(plan, partition="dirichlet:0.5")
    driver(plan, nodes, Away(transport("in-process", plan, nodes, tmp_path)), tmp_path).run()

    layout, _ = new_vector(plan)
    ended = RunStore(tmp_path).load(plan.digest, layout)
    assert ended is not None
    assert len(ended.applied) > NODES - 2
    weights = {each.name: example_weight(each.rows, plan.rounds.weight_cap) for each in nodes.entries(plan)}
    assert len({*weights.values()}) > 1
    mean = np.zeros(layout.size)
    for name, last in ended.applied.items():
        own = NodeStates(tmp_path / "nodes").current(name, last)["control"]
        assert np.linalg.norm(own) > 0.1
        mean += weights[name] / sum(weights.values()) * own
    assert ended.state["control"] == pytest.approx(mean, abs=1e-5)


def test_the_control_travels_to_train_and_not_to_evaluate(tmp_path: Path) -> None:
    down = {}
    for name in ("scaffold", "fedavg"):
        plan = small_plan(*SGD, f"strategy.name={name}", "rounds.count=1")
        nodes = federation(plan)
        driver(plan, nodes, transport("in-process", plan, nodes, tmp_path / name), tmp_path / name).run()
        down[name] = {each["kind"]: each["bytes_down"] for each in RunStore(tmp_path / name).records()}
    size = new_vector(plan)[0].size
    more = {kind: (down["scaffold"][kind] - down["fedavg"][kind]) / NODES for kind in ("train", "evaluate")}
    assert 0 <= more["evaluate"] < 50
    assert 4 * size <= more["train"] < 4 * size + 200
