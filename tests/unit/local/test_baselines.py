"""What others are compared with must itself be trained well, or the comparison flatters."""

from pathlib import Path

import numpy as np
import pytest

from concord_client.data import RawData, Split, read_data
from concord_client.devices import choose_device
from concord_client.state import NodeStates
from concord_client.trainer import Workbench
from concord_local.baselines import compare_with_baselines, evaluate_nodes, train_centrally, train_well
from concord_local.federation import Federation
from concord_local.nodes import model_builder
from concord_shared.errors import TrainingDivergedError
from concord_shared.metrics import no_sums
from concord_shared.plan import Plan, load_plan
from federations import driver, transport
from helpers import LANGUAGE, plan_of


def made(*overrides: str) -> tuple[Plan, Workbench, Federation]:
    plan = load_plan("digits-cnn", ["rounds.count=4", *overrides]).plan
    federation = Federation.of(read_data("digits", plan), plan, "iid", 2)
    return plan, Workbench(plan, choose_device("cpu"), model_builder(plan)), federation


def accuracy(bench: Workbench, federation: Federation, model: object) -> float:
    sums = evaluate_nodes(bench, federation, model)  # type: ignore[arg-type]
    return float(sum(sums.values(), no_sums(bench.plan.data)).figures()["accuracy"])  # type: ignore[arg-type]


def test_a_rate_that_is_too_high_for_one_place_is_lowered() -> None:
    """At a rate of 0.2 with momentum kept throughout, the pooled model answers the same for every row."""
    _, bench, federation = made("training.learning_rate=0.2")
    rows = federation.all_rows()
    assert accuracy(bench, federation, train_centrally(bench, rows)) < 0.3
    assert accuracy(bench, federation, train_well(bench, rows)) > 0.9


def test_a_rate_that_learns_is_kept() -> None:
    _, bench, federation = made("training.learning_rate=0.01")
    rows = federation.all_rows()
    assert train_well(bench, rows).theta.tobytes() == train_centrally(bench, rows).theta.tobytes()


def test_diverging_at_every_rate_is_said() -> None:
    _, bench, federation = made("training.learning_rate=1e30", "training.momentum=0.0")
    with pytest.raises(TrainingDivergedError):
        train_well(bench, federation.all_rows())


def test_no_clock_ends_what_others_are_compared_with() -> None:
    overrides = ("training.deterministic=false", "strategy.name=fednova", "model.name=logistic-regression")
    found = []
    for limit in ("training.local_seconds=1e-9", "training.local_seconds=0.0"):
        _, bench, federation = made(*overrides, limit)
        found.append(train_centrally(bench, federation.all_rows()).theta)
    assert found[0].tobytes() == found[1].tobytes()


@pytest.mark.parametrize("strategy", ["name='fedavg'", "name='fedrep', head_epochs=2", "name='fedbn'", "name='ditto'"])
def test_a_language_model_is_compared_with_what_nodes_keep_of_their_own(strategy: str, tmp_path: Path) -> None:
    """And evaluating the pooled one on its way leaves no trace in it."""
    training = "training={optimiser='adam', learning_rate=0.01, batch_size=8}"
    plan = plan_of(LANGUAGE, f"strategy={{{strategy}}}", training, "rounds.count=4")
    texts = [(3 * "abcdefgh ")[start : start + 9] for start in np.random.default_rng(1).integers(0, 9, 80)]
    federation = Federation.of(RawData(np.array(texts), np.zeros(80, np.int64)), plan, "iid", 2)
    result = driver(plan, federation, transport("in-process", plan, federation, tmp_path), tmp_path / "run").run()
    states = NodeStates(tmp_path / "nodes")
    found = compare_with_baselines(
        plan, federation, result, lambda name: states.current(name, 4), "cpu", lambda record: None
    )
    assert found["all"]["federated"] == pytest.approx(result.metrics[found["headline"]])
    bench = Workbench(plan, choose_device("cpu"))
    pooled = evaluate_nodes(bench, federation, train_centrally(bench, federation.all_rows()))
    undisturbed = sum(pooled.values(), no_sums(plan.data)).figures()
    assert found["all"]["pooled"] == undisturbed[found["headline"]]
    assert [each["round"] for each in found["pooled_course"]] == [1, 2, 3, 4]


def test_rows_of_the_comparison_are_test_rows() -> None:
    _, bench, federation = made("training.learning_rate=0.01")
    sums = evaluate_nodes(bench, federation, train_centrally(bench, federation.all_rows()))
    assert {name: each.rows for name, each in sums.items()} == {
        name: len(federation.rows[name][Split.TEST]) for name in federation.names
    }
