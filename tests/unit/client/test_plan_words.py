"""A plan in plain words: each can be said, with what leaves and what is not covered."""

import pytest

from concord_client.plan_words import describe_plan, plan_difference
from concord_shared.plan import load_plan, shipped_plans


@pytest.mark.parametrize("name", list(shipped_plans()))
def test_every_plan_can_be_said_in_words(name: str) -> None:
    plan = load_plan(name).plan
    words = " ".join(describe_plan(plan))
    assert plan.model.name in words or plan.kind == "statistics"
    assert str(plan.rounds.count) in words or plan.kind == "statistics"
    assert "Leaves this machine" in words
    assert ("Leaves once" in words) == (plan.kind == "train" and plan.needs_statistics)
    assert ("Trains no model" in words) == (plan.kind == "statistics")


@pytest.mark.parametrize(("unit", "mode"), [("record", "plain"), ("record", "private"), ("node", "private")])
def test_a_promise_of_differential_privacy_is_told_with_what_it_does_not_cover(unit: str, mode: str) -> None:
    dp = f"privacy={{mode='{mode}', dp={{unit='{unit}', epsilon=0.8, delta=1e-6, clip=10.0}}}}"
    words = " ".join(describe_plan(load_plan("digits-cnn", [dp]).plan))
    what = {"record": "one record more or less at a node", "node": "all data of one node, there or not"}[unit]
    assert f"Differential privacy: {what}" in words
    assert "ε = 0.8, but for a chance of δ = 1e-06" in words
    assert "Not covered: figures of evaluation" in words
    assert ("floating-point" in words) == (unit == "record")
    assert "can tell something about rows" not in words
    assert "repeated bit for bit" not in words


def test_noise_that_the_coordinator_adds_is_no_protection_from_it() -> None:
    dp = "privacy={mode='plain', dp={unit='node', epsilon=0.8, delta=1e-6, clip=10.0}}"
    words = " ".join(describe_plan(load_plan("digits-cnn", [dp]).plan))
    assert "not the coordinator, which sees each node's Update" in words


def test_a_robust_plan_says_who_sees_what() -> None:
    words = " ".join(describe_plan(load_plan("digits-cnn", ["privacy={mode='robust', attackers=3}"]).plan))
    assert "The coordinator sees this node's update by itself, in the clear" in words
    assert "3 nodes among them cannot steer the model" in words
    assert "a round needs at least 7 updates" in words
    assert "stand out in 3 rounds in a row is left out" in words
    assert "under masks" not in words


def test_beside_noise_that_hides_nodes_a_robust_plan_says_that_no_rule_steers() -> None:
    dp = "dp={unit='node', epsilon=5.0, delta=1e-5, clip=10.0}"
    robust = f"privacy={{mode='robust', rule='clipped-mean', quarantine_after=0, {dp}}}"
    words = " ".join(describe_plan(load_plan("digits-cnn", [robust]).plan))
    assert "which steers nothing here" in words
    assert "cannot steer" not in words


def test_difference_names_what_changed_and_nothing_else() -> None:
    plan = load_plan("heart-disease", ["rounds.count=3"]).plan
    document = plan.document()
    other = plan.with_changes(rounds=document["rounds"] | {"count": 50}, model={"name": "mlp", "hidden": [8]})
    assert plan_difference(plan, other) == [
        "model.name: logistic-regression → mlp",
        "rounds.count: 3 → 50",
        "model.hidden: nothing → [8]",
    ]
    assert plan_difference(plan, plan) == []
