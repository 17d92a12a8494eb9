from typing import Any

import pytest

from concord_client.consent import check_offer
from concord_shared.errors import ConsentRefusedError
from concord_shared.plan import Plan
from helpers import IMAGES, TABLE, offer_of, plan_of

PLAN = plan_of(IMAGES, "rounds.count=5")
OWN = plan_of(IMAGES, f"model={{name='own', source='m.py:f', sha256='{'0' * 64}'}}")
FITTED = plan_of(TABLE, "rounds.count=5")


def check(plan: Plan = PLAN, own_models: bool = False, **changes: Any) -> None:
    check_offer(offer_of(**{"plan_digest": plan.digest, **changes}), plan, "alpha", own_models)


def refused(words: str, **given: Any) -> None:
    with pytest.raises(ConsentRefusedError, match=words):
        check(**given)


@pytest.mark.parametrize("round_number", [1, 5])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_accepts_every_round_of_the_plan(kind: str, round_number: int) -> None:
    check(kind=kind, round_number=round_number)


def test_accepts_both_stages_of_statistics() -> None:
    for stage in (1, 2):
        check(FITTED, kind="statistics", round_number=stage)


def test_refuses_an_offer_for_another_node() -> None:
    refused("the offer is for node 'beta', this is 'alpha'", node="beta")


def test_refuses_another_plan() -> None:
    refused("asks for plan bbbbbbbbbbbb, this node holds", plan_digest="b" * 64)


def test_refuses_a_plan_that_differs_in_one_default() -> None:
    refused("asks for plan", plan_digest=plan_of(IMAGES, "rounds.count=5", "rounds.weight_cap=1001").digest)


@pytest.mark.parametrize("round_number", [0, 6])
def test_refuses_a_train_round_that_the_plan_does_not_have(round_number: int) -> None:
    refused(f"no train round {round_number}", round_number=round_number)


@pytest.mark.parametrize("stage", [0, 3])
def test_refuses_a_stage_of_statistics_that_there_is_not(stage: int) -> None:
    refused(f"no statistics round {stage}", plan=FITTED, kind="statistics", round_number=stage)


def test_refuses_an_evaluation_after_the_last_round() -> None:
    refused("no evaluate round 6", kind="evaluate", round_number=6)


@pytest.mark.parametrize("nodes_max", [0, 100_001])
def test_refuses_a_cohort_that_the_ring_cannot_sum(nodes_max: int) -> None:
    refused("outside 1…100000", nodes_max=nodes_max)


def test_refuses_no_rows() -> None:
    refused("cohort", rows_max=0)


def test_refuses_code_that_is_not_installed() -> None:
    refused("a node runs only models that it has installed", plan=OWN)
    check(OWN, own_models=True)


@pytest.mark.parametrize("scope", ["none", "per-node"])
def test_refuses_statistics_that_the_plan_does_not_ask_for(scope: str) -> None:
    plan = plan_of(TABLE, f"preprocessing={{scope='{scope}'}}")
    refused("statistics", plan=plan, kind="statistics", round_number=1)


def test_refuses_an_evaluation_with_training_that_the_plan_does_not_ask_for() -> None:
    refused("evaluat", evaluate_incoming=True)


def test_refuses_an_evaluation_that_the_plan_does_not_schedule() -> None:
    plan = plan_of(IMAGES, "rounds.count=5", "evaluation.every=0")
    refused("evaluat", plan=plan, kind="evaluate", round_number=2)
