import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from concord_client.data import NodeDataset, Split
from concord_client.node import Node
from concord_client.state import NodeStates
from concord_client.trainer import Workbench
from concord_server.replies import Expectation, accept_reply
from concord_shared.blocks import LANES, decode_means
from concord_shared.errors import ConcordError, ConsentRefusedError, DataError
from concord_shared.fitting import fit_locally, programme_of
from concord_shared.messages import Offer, model_record, offer_message
from concord_shared.metrics import metric_sums, metrics_block
from concord_shared.preprocessing import Fitted
from concord_shared.statistics import KNOWN_SCHEMA
from concord_shared.strategies import strategy_for
from concord_shared.tensors import model_digest
from concord_shared.transport import NodeEntry
from helpers import TABLE, offer_of, plan_of

PLAN = plan_of(TABLE, "training={learning_rate=0.1, batch_size=8}", "rounds.weight_cap=100")
ENTRY = NodeEntry("alpha", 2, 60, 20)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    rng = np.random.default_rng(5)
    inputs = np.stack([rng.uniform(20, 90, 80), rng.integers(0, 3, 80), rng.normal(size=80)], 1)
    rows = {Split.TRAIN: np.arange(60), Split.VALIDATION: np.arange(0), Split.TEST: np.arange(60, 80)}
    dataset = NodeDataset("alpha", inputs, (inputs[:, 0] > 50).astype(np.int64), rows)
    return Node(dataset, Workbench(PLAN, torch.device("cpu")), strategy_for(PLAN), NodeStates(tmp_path))


def fitted(node: Node) -> Fitted:
    return fit_locally(PLAN, node.dataset.take(Split.TRAIN)[0])


def theta_of(node: Node) -> np.ndarray:
    return np.linspace(-0.5, 0.5, node.bench.layout.size, dtype=np.float32)


def offer_to(node: Node, **changes: Any) -> Offer:
    layout = node.bench.layout
    given = {
        "plan_digest": PLAN.digest,
        "layout_digest": layout.digest,
        "model_digest": model_digest(layout, theta_of(node)),
        "preprocessing": json.dumps(fitted(node).document()),
    }
    return offer_of(**{**given, **changes})


def message_to(node: Node, offer: Offer, theta: np.ndarray | None = None, **extra: np.ndarray) -> Message:
    return offer_message(offer, model_record(theta_of(node) if theta is None else theta, extra), 2, 1.0)


class TestHonestNode:
    """What the node sends is what the coordinator's door accepts."""

    def test_trains_from_the_model_that_was_sent(self, node: Node) -> None:
        offer = offer_to(node)
        reply = node.respond(message_to(node, offer))
        blocks = (*node.strategy.blocks(PLAN, node.bench.layout), LANES)
        accepted = accept_reply(reply, Expectation(offer, ENTRY, blocks, 100, PLAN.data))
        delta = decode_means(blocks[:1], accepted, offer.nodes_max, PLAN.rounds.weight_cap)["delta"]
        assert theta_of(node) + delta == pytest.approx(node.bench.read(), abs=1e-5)
        assert np.abs(delta).max() > 1e-3
        assert json.loads(str(reply.content.config_records["notes"]["json"]))["rows"] == 60

    def test_the_same_offer_gives_the_same_bytes(self, node: Node) -> None:
        one, other = (node.respond(message_to(node, offer_to(node))) for _ in range(2))
        first, second = (reply.content.array_records["blocks"] for reply in (one, other))
        assert {name: first[name].data for name in first} == {name: second[name].data for name in second}

    def test_evaluates_its_test_rows(self, node: Node) -> None:
        offer = offer_to(node, kind="evaluate")
        blocks = (metrics_block(PLAN.data), LANES)
        accepted = accept_reply(
            node.respond(message_to(node, offer)), Expectation(offer, ENTRY, blocks, 100, PLAN.data)
        )
        assert metric_sums(PLAN.data, accepted["metrics"]).rows == 20

    def test_sums_its_training_rows(self, node: Node) -> None:
        offer = offer_to(node, kind="statistics", round_number=1, preprocessing="{}")
        blocks = (programme_of(PLAN).block(1), LANES)
        accepted = accept_reply(
            node.respond(offer_message(offer, None, 2, 1.0)),
            Expectation(offer, ENTRY, blocks, 100, PLAN.data, programme_of(PLAN)),
        )
        assert accepted["statistics"][0] == 60

    def test_the_second_stage_centres_on_the_means_of_the_offer(self, node: Node) -> None:
        found = {"age": {"mean": 50.0}, "dose": {"mean": 0.0}, "city": {}}
        known = json.dumps({"numbers": {"schema": KNOWN_SCHEMA, "columns": found}})
        offer = offer_to(node, kind="statistics", round_number=2, preprocessing=known)
        reply = node.respond(offer_message(offer, None, 2, 1.0))
        blocks = (programme_of(PLAN).block(2), LANES)
        expected = Expectation(offer, ENTRY, blocks, 100, PLAN.data, programme_of(PLAN))
        sums = accept_reply(reply, expected)["statistics"]
        ages = node.dataset.take(Split.TRAIN)[0][:, 0]
        assert sums[0] == 60
        assert sums[1] / 2**45 == pytest.approx((ages - 50).sum(), rel=1e-9)


class TestRefuses:
    def refused(self, node: Node, message: Message, words: str) -> None:
        with pytest.raises(ConsentRefusedError, match=words):
            node.respond(message)

    def test_a_model_that_is_not_the_offers(self, node: Node) -> None:
        other = theta_of(node)
        other[0] += 1
        self.refused(node, message_to(node, offer_to(node), other), "not the one that the offer names")

    @pytest.mark.parametrize("shape", [(1,), (11,), (2, 5)])
    def test_a_model_of_another_shape(self, node: Node, shape: tuple[int, ...]) -> None:
        self.refused(node, message_to(node, offer_to(node), np.zeros(shape, np.float32)), "does not fit")

    def test_a_model_of_another_precision(self, node: Node) -> None:
        self.refused(node, message_to(node, offer_to(node), theta_of(node).astype(np.float64)), "does not fit")

    def test_another_layout(self, node: Node) -> None:
        self.refused(node, message_to(node, offer_to(node, layout_digest="k" * 64)), "no model of the plan's layout")

    def test_no_model(self, node: Node) -> None:
        self.refused(node, offer_message(offer_to(node), None, 2, 1.0), "no model")

    def test_tensors_that_the_strategy_does_not_declare(self, node: Node) -> None:
        self.refused(node, message_to(node, offer_to(node), extra=np.zeros(3)), "does not declare")

    def test_another_plan(self, node: Node) -> None:
        self.refused(node, message_to(node, offer_to(node, plan_digest="q" * 64)), "asks for plan")

    def test_statistics_of_fewer_rows_than_it_has(self, node: Node) -> None:
        offer = offer_to(node, kind="statistics", round_number=1, rows_max=32)
        self.refused(node, offer_message(offer, None, 2, 1.0), "sums at most 32 rows, this node alone has 60")

    def test_training_without_rows(self, node: Node) -> None:
        node.dataset = replace(node.dataset, rows={**node.dataset.rows, Split.TRAIN: np.arange(0)})
        offer = offer_of(
            plan_digest=PLAN.digest,
            layout_digest=node.bench.layout.digest,
            model_digest=model_digest(node.bench.layout, theta_of(node)),
        )
        with pytest.raises(DataError, match="no training rows"):
            node.respond(message_to(node, offer))

    def test_preprocessing_for_another_contract(self, node: Node) -> None:
        document = fitted(node).document()
        document["contract"]["columns"] = document["contract"]["columns"][::-1]
        with pytest.raises(ConsentRefusedError):
            node.respond(message_to(node, offer_to(node, preprocessing=json.dumps(document))))

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"means": 3}', "null"])
    def test_preprocessing_that_is_none(self, node: Node, text: str) -> None:
        offer = offer_to(node, kind="statistics", round_number=2, preprocessing=text)
        with pytest.raises(ConcordError):
            node.respond(offer_message(offer, None, 2, 1.0))
