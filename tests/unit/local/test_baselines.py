"""What others are compared with must itself be trained well, or the comparison flatters."""

import pytest

from concord_client.data import Split, read_data
from concord_client.devices import choose_device
from concord_client.trainer import Workbench
from concord_local.baselines import evaluate_nodes, train_centrally, train_well
from concord_local.federation import Federation
from concord_local.nodes import model_builder
from concord_shared.errors import TrainingDivergedError
from concord_shared.metrics import no_sums
from concord_shared.plan import Plan, load_plan


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


def test_rows_of_the_comparison_are_test_rows() -> None:
    _, bench, federation = made("training.learning_rate=0.01")
    sums = evaluate_nodes(bench, federation, train_centrally(bench, federation.all_rows()))
    assert {name: each.rows for name, each in sums.items()} == {
        name: len(federation.rows[name][Split.TEST]) for name in federation.names
    }
