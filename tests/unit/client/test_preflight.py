"""Whom a node answers, how often, and what it looks at first; a hostile coordinator and a hostile member."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preflights import Here
from typer.testing import CliRunner

from concord_client.cli import app
from concord_client.contract import UNKNOWN, WORDS, coarse, sentences
from concord_client.data.contract import Code, Difference
from concord_client.data.frames import NOT_UTF8
from concord_client.ledger.words import Cap
from concord_client.preflight import answer_preflights
from concord_client.sync import REFUSALS_AUDITED_MAX
from concord_shared.accounting import ORDERS
from concord_shared.errors import ConsentRefusedError
from concord_shared.plan import Plan
from concord_shared.preflight import NODE_CHECKS, PreflightReport, PreflightRequest
from concord_shared.signing import new_identity_key, seal
from helpers import TABLE, plan_of

from .fake_coordinator import NODE, NOW, ORGANISATION, REQUESTER, Partner, partner_in

PATIENTS = f"{NODE}/patients"


@pytest.fixture
def partner(tmp_path: Path) -> Iterator[Partner]:
    made = partner_in(tmp_path)
    made.ask()
    yield made
    made.store.close()


@pytest.fixture
def examiner() -> Here:
    return Here()


def asking(partner: Partner, **changes: Any) -> PreflightRequest:
    fields = {
        "preflight": "first",
        "study": "heart",
        "plan_digest": partner.plan.digest,
        "organisation": REQUESTER,
        "datasets": (PATIENTS, "charite-1/theirs"),
        "participants": 2,
        "issued_at": NOW,
        "not_after": NOW + 60,
    }
    return PreflightRequest(**fields | changes)


def ask(partner: Partner, examiner: Here, now: float = NOW, **changes: Any) -> dict[str, str]:
    """The statuses of the answer to one question."""
    request = asking(partner, **changes)
    assert partner.apply("preflight", seal(request, partner.key(request.organisation)), int(now)).refused == []
    (report,) = answer_preflights(partner.home, partner.store, examiner, lambda: now)
    return statuses(report)


def statuses(report: PreflightReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def policy(partner: Partner, old: str, new: str) -> None:
    text = partner.home.policy_file.read_text("utf-8")
    assert old in text
    partner.home.policy_file.write_text(text.replace(old, new), "utf-8")


class TestWhoIsAnswered:
    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"study": "lungs"}, "not a member of a study lungs"),
            ({"plan_digest": "0" * 64}, "was not asked for"),
            ({"datasets": ("charite-1/theirs",)}, "does not name one dataset"),
            ({"datasets": (PATIENTS, f"{NODE}/others")}, "does not name one dataset"),
            ({"datasets": (f"{NODE}/others",)}, "no agreement in force opens dataset others"),
            ({"not_after": NOW}, "expired"),
            ({"not_after": NOW + 7200}, "holds for longer"),
            ({"issued_at": NOW + 3000, "not_after": NOW + 3060}, "of the future"),
        ],
    )
    def test_another_question_than_an_agreement_admits_is_refused_and_audited(
        self, partner: Partner, examiner: Here, changes: dict[str, Any], reason: str
    ) -> None:
        request = asking(partner, **changes)
        assert reason in partner.refused("preflight", seal(request, partner.key(REQUESTER)))
        assert answer_preflights(partner.home, partner.store, examiner, lambda: NOW) == []
        assert partner.store.outbox() == []
        entry, _ = partner.store.log_entries()[-1]
        assert (entry.action, entry.subject) == ("preflight:refuse", "first")
        assert reason in entry.detail["reason"]

    def test_a_question_that_no_member_signed_is_refused(self, partner: Partner) -> None:
        request = asking(partner)
        assert partner.refused("preflight", seal(request))
        assert partner.refused("preflight", seal(request, partner.coordinator.coordinator_key))
        assert partner.refused("preflight", seal(request, new_identity_key()))
        forged = request.model_copy(update={"organisation": ORGANISATION})
        assert partner.refused("preflight", seal(forged, partner.key(REQUESTER)))

    def test_a_withdrawn_agreement_admits_no_question(self, partner: Partner, examiner: Here) -> None:
        from concord_shared.documents import Withdrawal

        assert ask(partner, examiner)["agreement"] == "ok"
        gone = Withdrawal(agreement="heart-acme", organisation=ORGANISATION, issued_at=NOW)
        assert partner.apply("withdrawal", seal(gone, partner.key(ORGANISATION))).refused == []
        again = seal(asking(partner, preflight="second"), partner.key(REQUESTER))
        assert "no agreement" in partner.refused("preflight", again)

    def test_an_old_question_sent_again_gets_no_second_answer(self, partner: Partner, examiner: Here) -> None:
        ask(partner, examiner)
        signed = seal(asking(partner), partner.key(REQUESTER))
        for now in (NOW + 1, NOW + 59):
            assert partner.apply("preflight", signed, now).refused == []
            assert answer_preflights(partner.home, partner.store, examiner, lambda: now) == []  # noqa: B023
        assert "expired" in partner.refused("preflight", signed, NOW + 61)
        assert partner.store.preflights("answered") == []  # forgotten, and refused all the same
        assert len(partner.store.outbox()) == 1

    def test_a_taken_id_is_not_another_question(self, partner: Partner, examiner: Here) -> None:
        ask(partner, examiner)
        other = seal(asking(partner, participants=9), partner.key(REQUESTER))
        assert "another question" in partner.refused("preflight", other)

    def test_what_has_expired_while_the_node_slept_is_not_looked_at(self, partner: Partner, examiner: Here) -> None:
        assert partner.apply("preflight", seal(asking(partner), partner.key(REQUESTER))).refused == []
        assert answer_preflights(partner.home, partner.store, examiner, lambda: NOW + 61) == []
        assert examiner.asked == []

    def test_refusals_do_not_fill_the_log(self, partner: Partner) -> None:
        for number in range(REFUSALS_AUDITED_MAX + 5):
            partner.refused(
                "preflight", seal(asking(partner, preflight=f"p-{number}", study="lungs"), partner.key(REQUESTER))
            )
        assert partner.store.happened("preflight:refuse", "", 3600) == REFUSALS_AUDITED_MAX


class TestHowOften:
    def test_an_owner_is_no_free_oracle(self, partner: Partner, examiner: Here) -> None:
        policy(partner, "per_day = 20", "per_day = 2")
        for number in range(2):
            assert ask(partner, examiner, preflight=f"p-{number}")["contract"] == "ok"
        looked = len(examiner.asked)
        found = ask(partner, examiner, preflight="p-3")
        assert found["policy"] == "no"
        assert {status for name, status in found.items() if name != "policy"} == {"unknown"}
        assert len(examiner.asked) == looked
        partner.store._clock = lambda: time.time() + 86_401
        assert ask(partner, examiner, preflight="p-4")["contract"] == "ok"

    def test_none_where_the_owner_says_so(self, partner: Partner, examiner: Here) -> None:
        policy(partner, "per_day = 20", "per_day = 0")
        assert ask(partner, examiner)["policy"] == "no"
        assert examiner.asked == []


class TestWhatIsLookedAt:
    def test_the_owners_rules_come_before_the_data(self, partner: Partner, examiner: Here) -> None:
        policy(partner, "models = []", 'models = ["seed-cnn"]')
        found = ask(partner, examiner)
        assert (found["policy"], found["agreement"], found["contract"]) == ("no", "ok", "unknown")
        assert examiner.asked == []

    @pytest.mark.parametrize("terms", ['{"terms": {"who": ["somebody"]}}', '{"terms": {"from": "a later version"}}'])
    def test_the_terms_of_the_card_come_before_the_data(self, partner: Partner, examiner: Here, terms: str) -> None:
        partner.store.set_fact("card/patients", terms)
        assert ask(partner, examiner)["agreement"] == "no"
        assert examiner.asked == []

    def test_nothing_is_trained_before_approval_where_the_owner_says_so(self, partner: Partner, examiner: Here) -> None:
        policy(partner, "dry_round = true", "dry_round = false")
        found = ask(partner, examiner)
        assert (found["contract"], found["budget"], found["round"]) == ("ok", "ok", "unknown")
        assert examiner.asked == ["data"]

    def test_nothing_is_trained_outside_of_working_hours(
        self, partner: Partner, examiner: Here, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TZ", "UTC")
        time.tzset()
        policy(partner, 'working_hours = ""', 'working_hours = "03:00-03:01"')
        found = ask(partner, examiner)
        assert (found["contract"], found["round"]) == ("ok", "unknown")

    def test_a_rule_of_the_policy_is_a_yes(self, partner: Partner, examiner: Here) -> None:
        text = partner.home.policy_file.read_text("utf-8")
        partner.home.policy_file.write_text(f'{text}\n[[approvals.automatic]]\nstudy = "heart"\n', "utf-8")
        assert ask(partner, examiner)["approval"] == "ok"

    def test_a_plan_that_costs_too_much_is_no_and_what_is_left_is_not_told(
        self, partner: Partner, examiner: Here
    ) -> None:
        with partner.home.ledger() as ledger:
            ledger.set_cap(Cap(group="patients", datasets=("patients",), epsilon=0.7, delta=1e-5, order=max(ORDERS)))
        assert ask(partner, examiner)["budget"] == "no"
        (posted,) = partner.store.outbox()
        assert b"0.7" not in posted.envelope.bytes

    def test_a_removed_dataset_is_no(self, partner: Partner, examiner: Here) -> None:
        partner.store.remove_dataset("patients")
        found = ask(partner, examiner)
        assert (found["data"], found["contract"]) == ("no", "unknown")

    def test_an_agreement_that_ends_meanwhile_ends_the_work(self, partner: Partner, examiner: Here) -> None:
        examiner.fails["round"] = ConsentRefusedError("the agreement was withdrawn")
        found = ask(partner, examiner)
        assert (found["agreement"], found["contract"], found["round"]) == ("no", "ok", "unknown")

    def test_nothing_is_charged_and_no_state_is_left(self, partner: Partner, examiner: Here) -> None:
        def files() -> set[str]:
            return {str(path) for path in partner.home.path.rglob("*")}

        with partner.home.ledger() as ledger:
            before, entries = files(), ledger.books().standings
        assert ask(partner, examiner)["round"] == "ok"
        with partner.home.ledger() as ledger:
            assert ledger.books().standings == entries
        assert {path for path in files() - before if not path.endswith(("-wal", "-shm"))} == set()

    def test_who_dies_while_it_looks_answers_when_it_is_back(self, partner: Partner, examiner: Here) -> None:
        examiner.fails["data"] = KeyboardInterrupt()  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            ask(partner, examiner)
        assert partner.store.outbox() == []
        examiner.fails.clear()
        (report,) = answer_preflights(partner.home, partner.store, examiner, lambda: NOW + 1)
        assert statuses(report)["contract"] == "ok"
        assert tuple(statuses(report)) == NODE_CHECKS
        assert len(partner.store.outbox()) == 1


def test_the_owner_sees_who_asked_and_what_was_answered(
    partner: Partner, examiner: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["preflights", "--home", str(partner.home.path)]
    assert "nobody has asked" in CliRunner().invoke(app, command).stdout
    ask(partner, examiner)
    partner.refused("preflight", seal(asking(partner, preflight="second", study="lungs"), partner.key(REQUESTER)))
    shown = CliRunner().invoke(app, command).stdout.splitlines()
    assert [shown[1].split()[index] for index in (1, 2, 5)] == ["heart/first", REQUESTER, "answered"]
    assert "approval unknown" in shown[1]
    assert "refused" in shown[2]
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["preflights"]
    assert found[0]["checks"]["contract"] == "ok"
    assert found[0]["plan"] == partner.plan.digest


# Words


@pytest.fixture(scope="module")
def table() -> Plan:
    return plan_of(TABLE)


NAMES = st.sampled_from(["column age", "column city", "target ill", "images", "data"]) | st.text(max_size=40)


@given(code=st.sampled_from(get_args(Code)), name=NAMES, what=st.text(), count=st.integers(0, 10**9))
def test_whatever_an_adapter_says_only_our_words_and_the_contracts_names_pass(
    table: Plan, code: Code, name: str, what: str, count: int
) -> None:
    (told,) = sentences([Difference(code, name, what, count)], table)
    subject, _, words = told.partition(": ")
    assert subject in (
        "column age",
        "column city",
        "column dose",
        "column ill",
        "target ill",
        "images",
        "column split",
        "data",
    )
    numbers = r"(about \d0*|fewer than 10)"
    patterns = [re.escape(each).replace(r"\{count\}", numbers).replace(r"\{unit\}", ".*") for each in WORDS.values()]
    assert any(re.fullmatch(pattern, words) for pattern in [*patterns, re.escape(UNKNOWN), re.escape(NOT_UTF8)])


@given(st.integers(0, 10**9))
def test_coarse_is_above_and_not_far(count: int) -> None:
    assert max(count, 10) <= coarse(count) <= max(10, count * 1.9)
