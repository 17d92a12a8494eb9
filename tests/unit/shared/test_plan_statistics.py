"""Plans of kind statistics: what they may ask for, and what is left out of them."""

import json

import pytest

from concord_shared.errors import PlanError
from concord_shared.plan import Plan, load_plan, parse_plan_document
from concord_shared.statistics import Programme
from helpers import IMAGES, TABLE, plan_of

DATA = TABLE[: TABLE.index("[preprocessing]")]
TEXT = "kind = 'statistics'\n" + DATA
MASKED = "privacy={mode='private'}"
HEART = "e4dc77dedc1eabfa8de9042a9d0278d0cb3f614de06a1efeb243397b0cc920be"


def plan(*overrides: str) -> Plan:
    return plan_of(TEXT, *overrides)


def test_it_trains_nothing_and_its_document_says_nothing_of_training() -> None:
    document = json.loads(plan().canonical)
    assert document.keys() == {"schema", "name", "kind", "seed", "data", "rounds", "privacy", "statistics"}
    assert parse_plan_document(plan().document()).digest == plan().digest
    assert plan().model.name == "none"


def test_a_plan_that_trains_has_the_digest_that_it_had_before_there_were_others() -> None:
    assert load_plan("heart-disease").plan.digest == HEART


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.name=mlp", r"\[model\] belongs to kind"),
        ("training.batch_size=4", r"\[training\] belongs to kind"),
        ("rounds.count=3", "statistics are asked for once"),
        ("statistics.bins=8", "coordinator would see those of each node"),
        ("statistics.quantiles=[0.5]", "coordinator would see those of each node"),
        ("statistics.of=['extremes']", "coordinator would see those of each node"),
        ("statistics.of=['moments','moments']", "names something twice"),
        ("statistics.of=['rows']", "expected"),
        ("statistics.bins=1", "always told"),
        ("statistics.resolution=1e-12", "statistics.resolution"),
        ("privacy={mode='robust'}", "one node can bend"),
        ("privacy={mode='plain', dp={unit='node', epsilon=1.0, delta=1e-6, clip=1.0}}", "hides records"),
        ("privacy={mode='plain', dp={unit='record', epsilon=1.0, delta=1e-6, clip=2.0}}", "clip = 1"),
    ],
)
def test_what_it_may_not_be_is_said(override: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(override)


def test_sites_are_not_covered_by_differential_privacy() -> None:
    dp = "privacy={mode='private', dp={unit='record', epsilon=1.0, delta=1e-6, clip=1.0}}"
    with pytest.raises(PlanError, match="does not cover sites"):
        plan(dp, "statistics.of=['sites']")


def test_numbers_without_a_range_and_images_of_floats_are_refused() -> None:
    with pytest.raises(PlanError, match="missing for: age"):
        plan_of(TEXT.replace("range = [0, 120]\n", ""))
    floats = IMAGES[: IMAGES.index("[model]")].replace("[data]", "[data]\ndtype = 'float32'")
    with pytest.raises(PlanError, match="uint8"):
        plan_of("kind = 'statistics'\n" + floats)


def test_the_section_belongs_to_its_kind_and_a_plan_that_trains_has_a_model() -> None:
    with pytest.raises(PlanError, match='belongs to kind = "statistics"'):
        plan_of(TABLE, "statistics={bins=4}")
    with pytest.raises(PlanError, match="names a model"):
        plan_of(TABLE.replace('"logistic-regression"', '"none"'))


def test_stages_follow_from_what_is_asked() -> None:
    assert Programme.of(plan("statistics.of=['classes']")).stages == 1
    assert Programme.of(plan()).stages == 2
    assert Programme.of(plan(MASKED, "statistics.quantiles=[0.5]", "statistics.resolution=1e-8")).stages == 3
