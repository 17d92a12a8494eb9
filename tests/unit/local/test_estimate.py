"""What an estimate counts on, against what a round does: batches and bytes, and no clock."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message

from concord_client.data import RawData
from concord_client.dry_round import Probe, probe
from concord_client.trainer import Workbench
from concord_client.trial import Trial
from concord_local.estimate import _bytes, estimate
from concord_local.federation import Federation
from concord_shared.errors import UsageError
from concord_shared.messages import bytes_of, read_offer
from concord_shared.models import new_vector
from concord_shared.plan import Plan
from concord_shared.strategies import strategy_for
from concord_shared.transport import Transport
from federations import driver, transport
from helpers import IMAGES, RANKING, RATINGS, plan_of

CPU = torch.device("cpu")
ITEMS = 20
STRATEGIES = ("name='fedavg'", "name='ditto'", "name='fedrep', head_epochs=3", "name='scaffold'")
WORK = {"epochs": "training={batch_size=8, local_epochs=2}", "steps": "training={batch_size=8, local_steps=11}"}


def images(strategy: str, work: str) -> Plan:
    return plan_of(IMAGES, "model={name='mlp', hidden=[5]}", f"strategy={{{strategy}}}", WORK[work], "rounds.count=2")


def recommender(text: str) -> Plan:
    names = ", ".join(f'"{number}"' for number in range(ITEMS))
    text = text.replace('items = ["a", "b", "c"]', f"items = [{names}]")
    return plan_of(text, "training.batch_size=16", "rounds.count=2")


PLANS = {f"{strategy} {work}": images(strategy, work) for strategy in STRATEGIES for work in WORK}
PLANS |= {"ratings": recommender(RATINGS), "ranking": recommender(RANKING)}


def federation(plan: Plan) -> Federation:
    """Two nodes, of 75 rows each. Each of 15 users has 10 of all items."""
    chance = np.random.default_rng(1)
    if plan.data.input == "ratings":
        inputs = np.array([(user, item) for user in range(15) for item in chance.permutation(ITEMS)[:10]], np.float64)
        targets = np.ones(150) if plan.data.task == "ranking" else chance.uniform(0, 4, 150)
    else:
        inputs, targets = chance.integers(0, 256, (150, 1, 8, 8)).astype(np.uint8), chance.integers(0, 3, 150)
    return Federation.of(RawData(inputs, targets), plan, "iid", 2)


def probed(plan: Plan, nodes: Federation) -> Probe:
    return probe(plan, nodes.dataset("node-1"), CPU)


@pytest.mark.parametrize("name", PLANS)
def test_batches_are_those_that_a_round_takes(name: str) -> None:
    plan, batches = PLANS[name], list[None]()
    nodes, strategy, bench = federation(plan), strategy_for(plan), Workbench(plan, CPU)
    trial = Trial(nodes.dataset("node-1"), bench)
    turn = trial.turn(1, new_vector(plan)[1], {}, lambda: batches.append(None))
    strategy.local(trial.work(turn, strategy.init(plan, bench.layout), {}))
    expected = probed(plan, nodes).work(plan, len(trial.train_rows))
    assert sum(each for _, each in expected) == len(batches) > 0


class Weighing:
    """Another transport; adds up bytes, of all and of arrays, by the kind of step and the direction."""

    def __init__(self, inner: Transport) -> None:
        self._inner, self._kinds = inner, dict[str, str]()
        self.bytes, self.arrays = Counter[tuple[str, str]](), Counter[tuple[str, str]]()

    def send(self, messages: Iterable[Message]) -> None:
        listed = list(messages)
        for message in listed:
            self._kinds[message.metadata.message_id] = read_offer(message).kind
            self._weigh(message, message.metadata.message_id, "down")
        self._inner.send(listed)

    def receive(self, timeout_s: float) -> list[Message]:
        replies = self._inner.receive(timeout_s)
        for reply in replies:
            self._weigh(reply, reply.metadata.reply_to_message_id, "up")
        return replies

    def _weigh(self, message: Message, request: str, direction: str) -> None:
        records = message.content.array_records.values()
        step = self._kinds[request], direction
        self.bytes[step] += bytes_of(message)
        self.arrays[step] += sum(len(each.data) for record in records for each in record.values())

    def withdraw(self) -> None:
        self._inner.withdraw()

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("incoming", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_bytes_are_those_that_are_sent(name: str, incoming: bool, tmp_path: Path) -> None:
    plan = PLANS[name].with_changes(evaluation={"every": 1, "incoming": incoming})
    nodes = federation(plan)
    weighing = Weighing(transport("in-process", plan, nodes, tmp_path))
    driver(plan, nodes, weighing, tmp_path / "run").run()
    found = probed(plan, nodes)
    train, evaluate = _bytes(plan, found, 2, 2)
    expected = {
        ("train", "down"): train.down,
        ("train", "up"): train.up,
        ("evaluate", "down"): evaluate.down,
        ("evaluate", "up"): evaluate.up,
    }
    said = {"down": found.request_bytes, "up": found.answer_bytes}
    arrays = {(kind, way): count - said[way] for (kind, way), count in expected.items()}
    assert {step: sent / 4 for step, sent in weighing.arrays.items()} == arrays, "of two rounds and two nodes"
    assert {step: sent / 4 for step, sent in weighing.bytes.items()} == pytest.approx(expected, abs=150)


def test_an_evaluation_fits_users_to_training_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    met = list[int]()
    monkeypatch.setattr("concord_client.tasks.Recommending.meet", lambda task, rows: met.append(len(rows)))
    plan = PLANS["ratings"]
    found = probed(plan, federation(plan))
    assert met == [plan.training.batch_size, found.train_rows], "before warming up, and before an evaluation"


@pytest.mark.parametrize(("name", "batches"), [("name='fedavg' epochs", 3), ("ranking", 1)])
def test_an_evaluation_is_cut_as_its_task_says(name: str, batches: int) -> None:
    plan = PLANS[name]
    found = probed(plan, federation(plan))
    taken = found.evaluation_s(600) - found.evaluating_once_s
    assert taken == pytest.approx(batches * found.evaluating_s)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [(["rounds.cohort=1000000"], "more nodes than there are"), (["simulate.side_by_side=10"], "side_by_side")],
)
def test_what_a_simulation_refuses_is_refused(overrides: list[str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        estimate("digits-cnn", overrides=[*overrides, "strategy.name=fedprox"])
