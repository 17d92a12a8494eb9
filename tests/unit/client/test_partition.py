"""What of a model travels, what stays at its node, and what nobody trains."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import nn

from concord_client.data import NodeDataset, Split
from concord_client.home import NodeHome
from concord_client.inference import TrainedModel, evaluate_dataset
from concord_client.node import Node
from concord_client.personal import keep_state, read_kept
from concord_client.state import PERSONAL, NodeStates
from concord_client.trainer import Workbench
from concord_shared.errors import ArtefactError, ConsentRefusedError, DataError, UsageError
from concord_shared.fitting import fit_locally
from concord_shared.messages import model_record, offer_message
from concord_shared.models import build_model, is_personal, new_model, new_vector, partition_of
from concord_shared.plan import Plan
from concord_shared.preprocessing import unfitted
from concord_shared.strategies import strategy_for
from concord_shared.tensors import Float32Vector, Layout, model_digest
from helpers import IMAGES, TABLE, TOPICS, offer_of, plan_of

PLAIN = plan_of(TABLE, "training={learning_rate=0.1, batch_size=8}", "rounds.weight_cap=100", "rounds.count=3")
BATCH_NORM = plan_of(
    TABLE,
    "model={name='mlp', hidden=[4], norm='batch'}",
    "strategy.name=fedbn",
    "training={learning_rate=0.1, batch_size=8}",
    "rounds.count=3",
)
FEDREP = plan_of(
    TABLE, "model={name='mlp', hidden=[4]}", "strategy.name=fedrep", "training={batch_size=8}", "rounds.count=3"
)


class Declared(nn.Module):
    """A shared slope, a personal offset, and a frozen scale."""

    personal_parameters = ("offset",)

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.slope = nn.Linear(inputs, 2)
        self.offset = nn.Parameter(torch.randn(2))
        self.scale = nn.Parameter(torch.full((2,), 2.0), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.scale * self.slope(inputs) + self.offset


def declared(plan: Plan) -> nn.Module:
    return Declared(next(iter(build_model(plan).parameters())).shape[1])


def names(layout: Layout) -> list[str]:
    return [name for name, _ in layout.entries]


def node_of(plan: Plan, directory: Path, build: Callable[[Plan], nn.Module] = build_model, rows: int = 60) -> Node:
    rng = np.random.default_rng(5)
    inputs = np.stack([rng.uniform(20, 90, rows + 20), rng.integers(0, 3, rows + 20), rng.normal(size=rows + 20)], 1)
    split = {Split.TRAIN: np.arange(rows), Split.VALIDATION: np.arange(0), Split.TEST: np.arange(rows, rows + 20)}
    dataset = NodeDataset("alpha", inputs, (inputs[:, 0] > 50).astype(np.int64), split)
    bench = Workbench(plan, torch.device("cpu"), build)
    return Node(dataset, bench, strategy_for(plan), NodeStates(directory))


def ask(node: Node, theta: Float32Vector, **changes: Any) -> Message:
    plan, layout = node.bench.plan, node.bench.layout
    given = {
        "plan_digest": plan.digest,
        "layout_digest": layout.digest,
        "model_digest": model_digest(layout, theta),
        "preprocessing": json.dumps(fit_locally(plan, node.dataset.take(Split.TRAIN)[0]).document()),
    }
    return node.respond(offer_message(offer_of(**{**given, **changes}), model_record(theta, {}), 2, 1.0))


def correct(reply: Message) -> bytes:
    return bytes(reply.content.array_records["blocks"]["metrics"].data)


class TestPartition:
    def test_a_plain_model_is_shared_whole(self) -> None:
        found = partition_of(PLAIN, build_model(PLAIN))
        assert (found.personal.size, found.frozen) == (0, ())
        assert names(found.shared) == ["1.bias", "1.weight"]

    def test_a_model_says_what_is_personal_and_what_is_frozen(self) -> None:
        found = partition_of(PLAIN, declared(PLAIN))
        assert names(found.shared) == ["slope.bias", "slope.weight"]
        assert names(found.personal) == ["offset"]
        assert found.frozen == ("scale",)

    def test_fedbn_keeps_normalisation_layers_and_their_running_statistics(self) -> None:
        found = partition_of(BATCH_NORM, build_model(BATCH_NORM))
        assert names(found.personal) == ["2.bias", "2.running_mean", "2.running_var", "2.weight"]
        assert names(found.shared) == ["1.bias", "1.weight", "4.bias", "4.weight"]

    def test_without_fedbn_running_statistics_are_refused_with_the_way_out(self) -> None:
        with pytest.raises(UsageError, match=r"buffers 2\.running_mean, .*strategy\.name = \"fedbn\""):
            new_vector(plan_of(TABLE, "model={name='mlp', hidden=[4], norm='batch'}"))

    def test_fedbn_needs_a_layer_that_stays(self) -> None:
        with pytest.raises(UsageError, match="has no normalisation layer"):
            new_vector(plan_of(TABLE, "strategy.name=fedbn"))

    def test_fedbn_needs_a_layer_that_is_trained(self) -> None:
        whole = plan_of(TOPICS, "strategy.name=fedbn")
        assert partition_of(whole, build_model(whole)).personal.size
        with pytest.raises(UsageError, match="with adapters none is"):
            new_vector(plan_of(TOPICS, "strategy.name=fedbn", "model.lora={rank=2}"))

    def test_fedrep_keeps_the_last_layers(self) -> None:
        model = build_model(FEDREP)
        assert names(partition_of(FEDREP, model).personal) == ["3.bias", "3.weight"]
        with pytest.raises(UsageError, match="leaves nothing of model mlp to share"):
            partition_of(plan_of(TABLE, "model={name='mlp'}", "strategy={name='fedrep', head_layers=2}"), model)

    def test_figures_are_of_nodes_own_models_where_a_part_of_them_stays_or_all(self) -> None:
        ditto = plan_of(TABLE, "strategy.name=ditto")
        assert all(is_personal(plan) for plan in (FEDREP, BATCH_NORM, ditto))
        assert is_personal(PLAIN, declared)
        assert not is_personal(PLAIN)

    def test_constants_that_a_model_does_not_save_are_no_part_of_it(self) -> None:
        model = nn.Linear(2, 2)
        model.register_buffer("table", torch.arange(3), persistent=False)
        assert names(partition_of(PLAIN, model).shared) == ["bias", "weight"]

    def test_a_name_that_is_not_there_is_refused(self) -> None:
        model = nn.Linear(2, 2)
        model.personal_parameters = ("users",)  # type: ignore[assignment]
        with pytest.raises(UsageError, match="declares 'users' personal"):
            partition_of(PLAIN, model)

    def test_record_privacy_refuses_frozen_parameters(self) -> None:
        plan = plan_of(
            IMAGES, "model.name=mlp", "privacy={mode='plain', dp={unit='record', epsilon=5.0, delta=1e-5, clip=1.0}}"
        )
        model = build_model(plan)
        next(model.parameters()).requires_grad_(False)
        with pytest.raises(UsageError, match="cannot train a model with frozen parameters"):
            partition_of(plan, model)


class TestTraining:
    def test_frozen_parameters_are_the_same_everywhere_and_never_move(self, tmp_path: Path) -> None:
        node = node_of(PLAIN, tmp_path, declared)
        ask(node, new_vector(PLAIN, declared)[1])
        assert node.bench.model.scale.tolist() == [2.0, 2.0]

    def test_the_personal_part_begins_at_the_seeded_start_and_goes_on_where_its_round_was_applied(
        self, tmp_path: Path
    ) -> None:
        node, theta = node_of(PLAIN, tmp_path, declared), new_vector(PLAIN, declared)[1]
        start = new_model(PLAIN, declared).offset.detach().numpy()
        node.bench.load(theta)
        assert np.array_equal(node.bench.read_personal(), start)
        ask(node, theta, round_number=1)
        first = node.states.current("alpha", 1)[PERSONAL]
        assert np.abs(first - start).max() > 1e-3
        ask(node, theta, round_number=2, applied_round=1)
        second = node.states.current("alpha", 2)[PERSONAL]
        assert np.abs(second - first).max() > 1e-4

    def test_a_round_that_was_not_applied_leaves_no_trace_in_it(self, tmp_path: Path) -> None:
        node, theta = node_of(PLAIN, tmp_path, declared), new_vector(PLAIN, declared)[1]
        one, again = (
            ask(node, theta, round_number=number).content.array_records["blocks"]["delta"].data for number in (1, 1)
        )
        assert one == again

    def test_evaluates_with_its_own_part(self, tmp_path: Path) -> None:
        node, theta = node_of(PLAIN, tmp_path, declared), new_vector(PLAIN, declared)[1]
        before = correct(ask(node, theta, kind="evaluate", round_number=1))
        node.states.write_pending("alpha", 1, {PERSONAL: np.array([50.0, -50.0], np.float32)})
        assert correct(ask(node, theta, kind="evaluate", round_number=1)) == before
        assert correct(ask(node, theta, kind="evaluate", round_number=1, applied_round=1)) != before

    def test_an_older_offer_to_evaluate_drops_nothing(self, tmp_path: Path) -> None:
        node, theta = node_of(PLAIN, tmp_path, declared), new_vector(PLAIN, declared)[1]
        ask(node, theta, round_number=2)
        ask(node, theta, kind="evaluate", round_number=1, applied_round=1)
        assert PERSONAL in node.states.current("alpha", 2)

    def test_running_statistics_are_kept_and_nothing_of_them_is_sent(self, tmp_path: Path) -> None:
        node, (layout, theta) = node_of(BATCH_NORM, tmp_path), new_vector(BATCH_NORM)
        reply = ask(node, theta, round_number=1)
        assert reply.content.array_records["blocks"]["delta"].shape == (layout.size,)
        kept = node.bench.partition.personal.split(node.states.current("alpha", 1)[PERSONAL])
        assert np.abs(kept["2.running_mean"]).max() > 0.01

    def test_the_head_is_trained_first_and_then_the_body(self, tmp_path: Path) -> None:
        node, theta = node_of(FEDREP, tmp_path), new_vector(FEDREP)[1]
        notes = json.loads(str(ask(node, theta, round_number=1).content.config_records["notes"]["json"]))
        assert notes["steps"] == 16, "8 steps of one epoch each"
        head = node.states.current("alpha", 1)[PERSONAL]
        node.bench.load(theta)
        start = node.bench.read_personal()
        node.bench.train(node.bench.rows(*node._arrays(offer_for(node), Split.TRAIN)), 0.1, 0, part="shared")
        assert np.array_equal(node.bench.read_personal(), start)
        assert np.abs(head - start).max() > 1e-3

    def test_batch_norm_needs_two_rows(self, tmp_path: Path) -> None:
        node = node_of(BATCH_NORM, tmp_path, rows=1)
        with pytest.raises(DataError, match="at least 2 training rows"):
            ask(node, new_vector(BATCH_NORM)[1], round_number=1)

    def test_a_last_batch_of_one_row_is_left_out(self, tmp_path: Path) -> None:
        node = node_of(BATCH_NORM, tmp_path, rows=17)
        notes = ask(node, new_vector(BATCH_NORM)[1], round_number=1).content.config_records["notes"]
        assert json.loads(str(notes["json"]))["steps"] == 2


def offer_for(node: Node) -> Any:
    fitted = fit_locally(node.bench.plan, node.dataset.take(Split.TRAIN)[0])
    return offer_of(plan_digest=node.bench.plan.digest, preprocessing=json.dumps(fitted.document()))


class TestHostileCoordinator:
    @pytest.mark.parametrize("plan", [BATCH_NORM, FEDREP], ids=["fedbn", "fedrep"])
    def test_an_offer_that_asks_for_a_personal_parameter_is_refused(self, plan: Plan, tmp_path: Path) -> None:
        """It names the layout of the whole model, personal parameters in it, and sends such a model."""
        node = node_of(plan, tmp_path)
        whole = Layout(tuple(sorted(node.bench.layout.entries + node.bench.partition.personal.entries)))
        theta = np.zeros(whole.size, np.float32)
        offer = offer_of(
            plan_digest=plan.digest, layout_digest=whole.digest, model_digest=model_digest(whole, theta), round_number=1
        )
        with pytest.raises(ConsentRefusedError, match="no model of the plan's layout"):
            node.respond(offer_message(offer, model_record(theta, {}), 2, 1.0))
        assert node.states.current("alpha", 1) == {}

    def test_a_kept_part_of_another_model_is_named(self, tmp_path: Path) -> None:
        node = node_of(FEDREP, tmp_path)
        node.states.write_pending("alpha", 1, {PERSONAL: np.zeros(3, np.float32)})
        with pytest.raises(ArtefactError, match="of another model"):
            ask(node, new_vector(FEDREP)[1], round_number=2, applied_round=1)


class TestAfterTheRun:
    def test_a_part_of_a_model_is_kept_when_states_are_forgotten_and_a_control_variate_is_not(
        self, tmp_path: Path
    ) -> None:
        home = cast("NodeHome", SimpleNamespace(personal=tmp_path / "personal", states=tmp_path / "states"))
        for run, state in (("one", {PERSONAL: np.ones(2, np.float32)}), ("two", {"control": np.ones(2)})):
            states = NodeStates(home.states / run)
            states.write_pending("alpha", 3, state)
            states.current("alpha", 3)
            keep_state(home, run, home.states / run)
        assert read_kept(home, "one")[PERSONAL].tolist() == [1.0, 1.0]
        assert list(home.personal.iterdir()) == [home.personal / "one.safetensors"]
        assert read_kept(home, "three") == {}

    def test_predictions_use_the_part_that_was_kept_and_say_so(self, tmp_path: Path) -> None:
        node, theta = node_of(FEDREP, tmp_path), new_vector(FEDREP)[1]
        fitted = fit_locally(FEDREP, node.dataset.take(Split.TRAIN)[0])
        size = node.bench.partition.personal.size
        said = []
        for kept in ({}, {PERSONAL: np.linspace(-9, 9, size, dtype=np.float32)}):
            model = TrainedModel(FEDREP, theta, fitted, kept=kept)
            said.append(evaluate_dataset(model, node.dataset, "cpu"))
        assert "none of a node's own" in said[0]["personal"]
        assert "the start of the run stands in" in said[0]["personal"]
        assert "this node's own" in said[1]["personal"]
        assert said[0]["metrics"]["loss"] != said[1]["metrics"]["loss"]

    def test_with_ditto_the_shared_model_stands_in_for_a_whole_one(self, tmp_path: Path) -> None:
        plan = plan_of(TABLE, "strategy.name=ditto", "training={batch_size=8}")
        theta = new_vector(plan)[1] + np.float32(1)
        bench = TrainedModel(plan, theta, unfitted(plan)).bench("cpu")
        assert np.array_equal(bench.read(), theta)
        said = TrainedModel(plan, theta, unfitted(plan)).words(bench)["personal"]
        assert "none of a node's own" in said
        assert "the shared model stands in" in said
