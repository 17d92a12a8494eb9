"""Approvals: what binds, what refuses, and that the last word is the owner's."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_client import approvals
from concord_client.approvals import Question
from concord_client.data import Split, read_data
from concord_client.policy import Policy, Rule
from concord_client.registry import add_dataset
from concord_shared.documents import Approval, Terms
from concord_shared.errors import ConflictError, ConsentRefusedError, DataError, UsageError
from concord_shared.plan import Plan
from concord_shared.signing import open_envelope, seal
from unit.client.fake_coordinator import DAY, NODE, NOW, REQUESTER, Partner, partner_in, write_table


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Partner:
    made = partner_in(tmp_path_factory.mktemp("partner"))
    made.ask()
    return made


@pytest.fixture
def partner(tmp_path: Path) -> Iterator[Partner]:
    made = partner_in(tmp_path)
    made.ask()
    yield made
    made.store.close()


def questions(partner: Partner, policy: Policy | None = None, now: int = NOW) -> list[Question]:
    return approvals.questions(partner.home, partner.store, policy or Policy(), now)


def question(partner: Partner, policy: Policy | None = None, now: int = NOW) -> Question:
    found = questions(partner, policy, now)
    assert len(found) == 1
    return found[0]


def approve(partner: Partner, policy: Policy | None = None, now: int = NOW, **options: Any) -> Approval:
    rules = policy or Policy()
    return approvals.approve(partner.home, partner.store, rules, question(partner, rules, now), now, **options)


def current(partner: Partner, now: int = NOW) -> Approval | None:
    return partner.store.current_approval("heart", partner.plan.digest, "patients", now)


def marker(partner: Partner) -> Path:
    return partner.home.withdrawn_marker("heart", partner.plan.digest, "patients")


def test_nothing_is_approved_by_itself(partner: Partner) -> None:
    assert question(partner).state == "pending"
    assert approvals.decide_pending(partner.home, partner.store, Policy(), NOW) == []
    assert current(partner) is None
    assert [each.dataset for each in partner.store.pending(NODE, NOW)] == ["patients"]


def test_approval_binds_node_plan_dataset_and_study(partner: Partner) -> None:
    approval = approve(partner, by="ada", reason="good")
    dataset = partner.store.dataset("patients")
    assert dataset is not None
    assert (approval.node, approval.study, approval.plan_digest) == (NODE, "heart", partner.plan.digest)
    assert (approval.dataset, approval.dataset_version) == ("patients", dataset.version)
    assert (approval.decided_by, approval.reason, approval.sequence) == ("ada", "good", NOW)
    assert current(partner) == approval
    assert question(partner).state == "approved"
    assert partner.store.pending(NODE, NOW) == []


def test_approval_is_signed_and_waits_to_be_sent(partner: Partner) -> None:
    approval = approve(partner)
    posted = partner.store.outbox()[-1]
    assert open_envelope(posted.envelope, Approval, [partner.home.identity_key().public_key()]) == approval


def test_rows_are_those_of_a_simulation_with_this_node(partner: Partner) -> None:
    """The same split as deploy/concord_local gives a node of this name that has these rows."""
    from concord_local.federation import Federation

    dataset = partner.store.dataset("patients")
    assert dataset is not None
    data = read_data(dataset.spec, partner.plan)
    approval = approve(partner)
    dealt = Federation.of(data, partner.plan, "iid", 1)
    only = dealt.rows[dealt.names[0]]
    sizes = {split: len(only[split]) for split in Split}
    assert (approval.rows, approval.evaluation_rows) == (sizes[Split.TRAIN], sizes[Split.TEST]) == (16, 4)


def test_split_depends_on_the_position_of_rows_and_the_name_of_the_node(partner: Partner) -> None:
    """So a node with its own file splits as a simulated node with the same rows in a larger one."""
    from concord_client.data.dataset import assign_splits

    dataset = partner.store.dataset("patients")
    assert dataset is not None
    data = read_data(dataset.spec, partner.plan)
    own = assign_splits(data, np.arange(20), NODE, 3, 0.0)
    dealt = assign_splits(data, np.arange(100, 120), NODE, 3, 0.0)
    assert all(np.array_equal(own[split] + 100, dealt[split]) for split in Split)


def test_approval_expires_after_the_days_of_the_policy(partner: Partner) -> None:
    approve(partner)
    assert current(partner, NOW + 30 * DAY - 1) is not None
    assert current(partner, NOW + 30 * DAY) is None
    assert question(partner, now=NOW + 30 * DAY).state == "expired"
    assert [each.dataset for each in partner.store.pending(NODE, NOW + 30 * DAY)] == ["patients"]
    assert approve(partner, now=NOW + 30 * DAY).sequence == NOW + 30 * DAY


def test_approval_ends_with_its_agreement_at_the_latest(partner: Partner) -> None:
    policy = Policy.model_validate({"approvals": {"days": 1000}})
    assert approve(partner, policy).not_after == NOW + 100 * DAY


def test_approval_refuses_without_an_agreement(tmp_path: Path) -> None:
    partner = partner_in(tmp_path)
    partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    partner.apply("plan", partner.request())
    assert questions(partner) == []
    assert partner.store.pending(NODE, NOW) == []
    partner.store.close()


def test_approval_refuses_when_the_agreement_is_over(partner: Partner) -> None:
    late = NOW + 100 * DAY
    assert "no agreement that is in force" in question(partner, now=late).missing[0]
    with pytest.raises(ConsentRefusedError, match="no agreement that is in force"):
        approve(partner, now=late)


@pytest.mark.parametrize(
    ("terms", "reason"),
    [({"rounds_max": 1}, "3 rounds"), ({"models": ("mlp",)}, "allows mlp")],
)
def test_approval_refuses_a_plan_outside_of_the_terms(tmp_path: Path, terms: dict[str, Any], reason: str) -> None:
    partner = partner_in(tmp_path)
    partner.apply("study", seal(partner.study(), partner.key(REQUESTER)))
    narrow = partner.agreement(terms=Terms(**{"not_after": NOW + DAY} | terms))
    partner.apply("agreement", partner.agreed(narrow))
    partner.apply("plan", partner.request())
    with pytest.raises(ConsentRefusedError, match=reason):
        approve(partner)
    assert current(partner) is None
    partner.store.close()


def test_approval_refuses_a_plan_outside_of_the_policy(partner: Partner) -> None:
    with pytest.raises(ConsentRefusedError, match="the policy allows 2"):
        approve(partner, Policy(rounds_max=2))
    assert partner.store.approvals() == []


def test_approval_refuses_data_that_changed(partner: Partner) -> None:
    dataset = partner.store.dataset("patients")
    assert dataset is not None
    file = Path(dataset.spec.partition(":")[2])
    file.write_text(file.read_text("utf-8").replace("20,50", "21,50"), "utf-8")
    with pytest.raises(DataError, match="changed since registration"):
        approve(partner)
    assert partner.store.approvals() == []


def test_approval_refuses_data_that_break_the_contract(partner: Partner) -> None:
    document = partner.plan.document()
    columns = [document["data"]["columns"][0] | {"range": [0, 30]}, document["data"]["columns"][1]]
    narrow = partner.plan.with_changes(data=document["data"] | {"columns": columns})
    partner.apply("plan", partner.request(narrow))
    asked = next(each for each in questions(partner) if each.plan == narrow)
    with pytest.raises(DataError, match="outside the range"):
        approvals.approve(partner.home, partner.store, Policy(), asked, NOW)
    assert partner.store.approvals() == []


def test_withdrawal_is_effective_at_once_and_without_anyone(partner: Partner) -> None:
    approve(partner)
    withdrawn = approvals.withdraw(partner.home, partner.store, question(partner), NOW + 5, reason="no more")
    assert marker(partner).exists()
    assert current(partner) is None
    assert (withdrawn.decision, withdrawn.sequence, withdrawn.reason) == ("withdrawn", NOW + 5, "no more")
    assert [each.kind for each in partner.store.outbox()] == ["approval", "approval"]
    assert question(partner).state == "withdrawn"


def test_withdrawal_that_was_cut_off_after_its_marker_is_finished(partner: Partner) -> None:
    approve(partner)
    marker(partner).touch()  # and then the machine stopped
    assert len(approvals.finish_withdrawals(partner.home, partner.store, NOW)) == 1
    assert current(partner) is None
    assert approvals.finish_withdrawals(partner.home, partner.store, NOW) == []


def test_approval_after_a_withdrawal_takes_its_marker_away(partner: Partner) -> None:
    approve(partner)
    approvals.withdraw(partner.home, partner.store, question(partner), NOW)
    again = approve(partner)
    assert again.sequence == NOW + 2
    assert not marker(partner).exists()
    assert current(partner) == again


def test_withdrawal_that_fails_to_write_its_marker_says_so(partner: Partner) -> None:
    approve(partner)
    shutil.rmtree(partner.home.withdrawn)
    with pytest.raises(Exception, match="Nothing was withdrawn"):
        approvals.withdraw(partner.home, partner.store, question(partner), NOW)


def test_withdrawal_wins_over_an_approval_at_the_same_moment(partner: Partner) -> None:
    approve(partner)
    asked = question(partner, now=NOW + 30 * DAY)  # expired: the policy would approve it again
    approvals.withdraw(partner.home, partner.store, asked, NOW + 30 * DAY)
    with pytest.raises(ConflictError, match="someone decided"):
        approvals.approve(partner.home, partner.store, Policy(), asked, NOW + 30 * DAY)
    assert current(partner) is None


def test_rejection_and_what_cannot_be_withdrawn(partner: Partner) -> None:
    with pytest.raises(ConflictError, match="no approval to withdraw"):
        approvals.withdraw(partner.home, partner.store, question(partner), NOW)
    rejected = approvals.reject(partner.home, partner.store, question(partner), NOW, reason="not our purpose")
    assert (rejected.decision, rejected.rows) == ("rejected", 0)
    assert partner.store.pending(NODE, NOW) == []
    approve(partner)
    with pytest.raises(ConflictError, match="withdraw it"):
        approvals.reject(partner.home, partner.store, question(partner), NOW)


def test_rule_approves_and_a_person_can_still_withdraw(partner: Partner) -> None:
    policy = Policy.model_validate({"approvals": {"automatic": (Rule(study="heart", dataset="patients"),)}})
    ((_, decided),) = approvals.decide_pending(partner.home, partner.store, policy, NOW)
    assert isinstance(decided, Approval)
    assert decided.decided_by == "policy"
    approvals.withdraw(partner.home, partner.store, question(partner), NOW)
    assert approvals.decide_pending(partner.home, partner.store, policy, NOW) == []  # a person's word stays


def test_rule_leaves_what_does_not_fit_the_data_to_a_person(partner: Partner) -> None:
    dataset = partner.store.dataset("patients")
    assert dataset is not None
    Path(dataset.spec.partition(":")[2]).unlink()
    policy = Policy.model_validate({"approvals": {"automatic": (Rule(study="heart"),)}})
    ((_, error),) = approvals.decide_pending(partner.home, partner.store, policy, NOW)
    assert isinstance(error, DataError)
    assert question(partner).state == "pending"


def test_new_content_of_a_dataset_needs_a_new_approval(partner: Partner, tmp_path: Path) -> None:
    old = approve(partner)
    table = write_table(tmp_path / "more.csv", 30)
    new = add_dataset(partner.store, "patients", f"csv:{table}", NOW, replaces=True)
    assert old.dataset_version != new.version  # a manifest names one of them, the guard compares
    assert approve(partner).dataset_version == new.version


def test_removed_dataset_takes_its_approvals_with_it(partner: Partner) -> None:
    approve(partner)
    assert len(approvals.withdraw_dataset(partner.home, partner.store, "patients", NOW, "removed")) == 1
    assert marker(partner).exists()
    assert current(partner) is None


def test_question_is_found_by_the_beginning_of_its_id(template: Partner) -> None:
    asked = question(template)
    found = approvals.find_question(template.home, template.store, Policy(), asked.id[:3], NOW)
    assert found.id == asked.id
    for wrong in ("zzz", ""):
        with pytest.raises(UsageError, match=asked.id):
            approvals.find_question(template.home, template.store, Policy(), wrong, NOW)


def test_difference_is_to_the_last_approved_plan_of_the_study(partner: Partner) -> None:
    approve(partner)
    longer: Plan = partner.plan.with_changes(rounds=partner.plan.document()["rounds"] | {"count": 9})
    partner.apply("plan", partner.request(longer))
    asked = next(each for each in questions(partner) if each.plan == longer)
    before = approvals.last_approved_plan(partner.store, asked)
    assert before == partner.plan
