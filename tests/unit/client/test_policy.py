"""The owner's rules: what they allow, what needs no person, and how mistakes in them are named."""

import datetime
from pathlib import Path
from typing import Any

import pytest
from wheels import install

from concord_client.policy import DEFAULT, Policy, write_default
from concord_shared.documents import Agreement, Study, Terms
from concord_shared.errors import UsageError
from concord_shared.models.plugins import installed_plugins
from concord_shared.plan import Plan, parse_plan
from helpers import TOPICS, plan_of
from unit.client.fake_coordinator import TABLE_PLAN

PLAN = parse_plan(TABLE_PLAN, "tiny").plan
STUDY = Study(study="heart", title="", purpose="", organisation="charite", members=("charite",), issued_at=0)


def agreement(**terms: Any) -> Agreement:
    return Agreement(
        agreement="a",
        study="heart",
        study_digest=STUDY.digest,
        requester="charite",
        owner="acme",
        datasets=("acme-1/patients",),
        terms=Terms(**{"not_after": 10} | terms),
        issued_at=0,
    )


def plan(**sections: Any) -> Plan:
    document = PLAN.document()
    return PLAN.with_changes(**{name: document[name] | change for name, change in sections.items()})


def load(tmp_path: Path, text: str) -> Policy:
    file = tmp_path / "policy.toml"
    file.write_text(text, "utf-8")
    return Policy.load(file)


def test_default_file_says_what_the_code_does(tmp_path: Path) -> None:
    write_default(tmp_path / "policy.toml")
    assert Policy.load(tmp_path / "policy.toml") == Policy()
    (tmp_path / "policy.toml").write_text("rounds_max = 5\n", "utf-8")
    write_default(tmp_path / "policy.toml")
    assert Policy.load(tmp_path / "policy.toml").rounds_max == 5  # never replaced


def test_default_allows_a_usual_plan_and_approves_nothing_by_itself() -> None:
    verdict = Policy().verdict(PLAN, STUDY, agreement(), 3, "patients", "charite")
    assert verdict.allowed
    assert not verdict.automatic


@pytest.mark.parametrize(
    ("rules", "asked", "reason"),
    [
        ('models = ["mlp"]', PLAN, "model logistic-regression: the policy allows mlp"),
        ("kinds = []", PLAN, "kind train: the policy allows none"),
        ("rounds_max = 2", PLAN, "3 rounds: the policy allows 2"),
        ("local_epochs_max = 1", plan(training={"local_epochs": 2}), "2 local epochs: the policy allows 1"),
        (
            "local_steps_max = 10",
            plan(training={"local_epochs": 0, "local_steps": 11}),
            "11 local steps: the policy allows 10",
        ),
        ("deterministic = false", PLAN, "deterministic training"),
        ("minimum_cohort = 4", PLAN, "3 nodes in a round: the policy asks for at least 4"),
        ("minimum_cohort = 3", plan(rounds={"cohort": 2}), "2 nodes in a round: the policy asks for at least 3"),
    ],
)
def test_each_rule_refuses(tmp_path: Path, rules: str, asked: Plan, reason: str) -> None:
    verdict = load(tmp_path, rules).verdict(asked, STUDY, agreement(), 3)
    assert not verdict.allowed
    assert any(reason in each for each in verdict.reasons), verdict.reasons


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ({"models": ("mlp",)}, "the agreement allows mlp"),
        ({"rounds_max": 2}, "3 rounds: the agreement allows 2"),
        ({"minimum_cohort": 4}, "the agreement asks for at least 4"),
    ],
)
def test_each_term_refuses(terms: dict[str, Any], reason: str) -> None:
    verdict = Policy().verdict(PLAN, STUDY, agreement(**terms), 3)
    assert not verdict.allowed
    assert any(reason in each for each in verdict.reasons)


def test_cohort_is_not_judged_before_there_is_one() -> None:
    assert Policy(minimum_cohort=5).verdict(PLAN, STUDY, agreement()).allowed
    assert not Policy(minimum_cohort=5).verdict(plan(rounds={"cohort": 4}), STUDY, agreement()).allowed


RULE = """
[[approvals.automatic]]
study = "heart"
model = "logistic-regression"
"""


def test_rule_approves_what_fits_all_that_it_names(tmp_path: Path) -> None:
    policy = load(tmp_path, RULE)
    assert policy.verdict(PLAN, STUDY, agreement(), None, "patients", "charite").automatic
    other = STUDY.model_copy(update={"study": "lungs"})
    assert not policy.verdict(PLAN, other, agreement(), None, "patients", "charite").automatic


@pytest.mark.parametrize("extra", ['dataset = "others"', 'requester = "evil"'])
def test_rule_does_not_approve_what_differs_in_one(tmp_path: Path, extra: str) -> None:
    assert not load(tmp_path, RULE + extra).verdict(PLAN, STUDY, agreement(), None, "patients", "charite").automatic


def test_rule_never_approves_what_is_not_allowed(tmp_path: Path) -> None:
    verdict = load(tmp_path, "rounds_max = 1\n" + RULE).verdict(PLAN, STUDY, agreement(), None, "patients", "charite")
    assert not verdict.automatic


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("round_max = 5", "round_max: unknown key. Did you mean rounds_max"),
        ("[resources]\nthread = 2", "resources.thread: unknown key. Did you mean threads"),
        ("[[approvals.automatic]]\ndatset = 'x'", "Did you mean dataset"),
        ("[[approvals.automatic]]", "names at least one"),
        ("rounds_max = 0", "rounds_max"),
        ('rounds_max = "5"', "rounds_max"),
        ("[resources]\nworking_hours = 'at night'", "HH:MM"),
        ("[resources]\ndevice = 'gpu'", "resources.device"),
        ("rounds_max = ", "not valid TOML"),
    ],
)
def test_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"policy\.toml") as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


def test_working_hours_go_over_midnight() -> None:
    night = load_hours("22:00-06:00")
    assert [night.works_at(at(hour)) for hour in (21, 22, 23, 0, 5, 6)] == [False, True, True, True, True, False]
    office = load_hours("09:00-17:00")
    assert [office.works_at(at(hour)) for hour in (8, 9, 16, 17)] == [False, True, True, False]
    assert load_hours("").works_at(at(3))


def load_hours(hours: str) -> Any:
    return Policy.model_validate({"resources": {"working_hours": hours}}).resources


def at(hour: int) -> datetime.datetime:
    return datetime.datetime(2030, 1, 1, hour, tzinfo=datetime.UTC)


def test_pretrained_weights_are_allowed_by_name_and_hash_and_only_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONCORD_PRETRAINED", str(tmp_path / "store"))
    digest = "a" * 64
    model = {"name": "pretrained-encoder", "package": "tiny", "sha256": digest, "parameters": 600}
    asked = plan_of(TOPICS).with_changes(
        model=model, preprocessing={"tokens": {"length": 8, "pretrained": digest}}, training={"deterministic": False}
    )
    assert f'pretrained = {{"tiny" = "{digest}"}}' in Policy().reasons(asked)[0]
    other = load(tmp_path, f'pretrained = {{"tiny" = "{"0" * 64}"}}\n')
    assert "do not name it" in other.reasons(asked)[0]
    [reason] = load(tmp_path, f'pretrained = {{"tiny" = "{digest}"}}\n').reasons(asked)
    assert "is not on this machine" in reason


def test_default_text_has_a_comment_for_each_kind_of_rule() -> None:
    assert DEFAULT.count("#") >= 12


def test_a_wheel_is_allowed_by_name_and_hash_and_only_as_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = install(tmp_path)
    digest = next(each.sha256 for each in installed_plugins() if each.package == "their-models")
    model = {"name": "plugin", "package": "their-models", "model": "small-net", "sha256": digest, "parameters": 600}
    asked = PLAN.with_changes(model=model)
    allowed = load(tmp_path, f'plugins = {{"their-models" = "{digest}"}}\n')
    assert allowed.reasons(asked) == ()
    assert "do not name it" in Policy().reasons(asked)[0]
    other = load(tmp_path, f'plugins = {{"their-models" = "{"0" * 64}"}}\n')
    assert "allows other code than the plan names" in other.reasons(asked)[0]
    file.write_text("import os\n")
    assert "is other code" in allowed.reasons(asked)[0]
