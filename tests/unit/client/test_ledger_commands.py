"""The privacy ledger as its owner meets it: commands, what approvals say of costs, what is refused beforehand."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from concord_client import approvals, control
from concord_client.doctor import Finding, examine
from concord_client.policy import Policy, Rule
from concord_client.registry import add_dataset
from concord_shared.errors import BudgetRefusedError, ConflictError, ConsentRefusedError, LedgerDamagedError, UsageError
from concord_shared.plan import Plan
from concord_shared.signing import seal
from unit.client.fake_coordinator import NOW, REQUESTER, Partner, partner_in, use_commands_at, write_table
from unit.client.node_cli import run, run_json

DP = {"mode": "plain", "dp": {"unit": "record", "epsilon": 0.8, "delta": 1e-5, "clip": 1.0}}


@pytest.fixture
def partner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Partner]:
    """Asked for a plan of ε 0.8; its commands reach the fake coordinator, at the fake coordinator's time."""
    made = partner_in(tmp_path)
    made.plan = made.plan.with_changes(privacy=DP)
    made.ask()
    use_commands_at(made, monkeypatch)
    yield made
    made.store.close()


def set_cap(epsilon: float, *words: str) -> Any:
    return run_json("ledger", "set-cap", "patients", "--epsilon", str(epsilon), "--yes", *words)


def asked(state: str = "pending") -> str:
    (request,) = [each for each in run_json("approvals", "list")["requests"] if each["state"] == state]
    return str(request["id"])


def manifest(partner: Partner, name: str = "run-1", plan: Plan | None = None) -> None:
    digest = (plan or partner.plan).digest
    partner.apply("manifest", seal(partner.manifest(run=name, plan_digest=digest), partner.key(REQUESTER)))


def runs(partner: Partner) -> dict[str, Any]:
    return {each["run"]: each for each in run_json("ledger", "show")["runs"]}


def finding(partner: Partner) -> Finding:
    return next(each for each in examine(partner.home, partner.store, with_device=False) if each.name == "ledger")


class TestCaps:
    def test_a_cap_is_set_shown_and_signed(self, partner: Partner) -> None:
        account = set_cap(3.0)
        assert (account["epsilon"], account["delta"], account["left"], account["spent"]) == (3.0, 1e-5, 3.0, 0.0)
        shown = run("ledger", "show", "--entries")
        assert "patients" in shown
        assert "cap by " in shown
        with partner.home.ledger() as ledger:
            assert ledger.entries()[-1].signature

    def test_raising_it_asks(self, partner: Partner) -> None:
        set_cap(3.0)
        with pytest.raises(UsageError, match="Raise budget patients from ε 3 to 5"):
            run("ledger", "set-cap", "patients", "--epsilon", "5")
        assert set_cap(5.0)["epsilon"] == 5.0

    def test_only_epsilon_can_be_changed_once_something_rests_on_it(self, partner: Partner) -> None:
        set_cap(8.0)
        before = set_cap(3.0, "--delta", "1e-6")
        run("approvals", "approve", asked(), "--yes")
        manifest(partner)
        with pytest.raises(ConflictError, match="Only its ε can be changed"):
            set_cap(3.0, "--delta", "1e-3")
        after = set_cap(0.1)
        assert (after["delta"], after["order"], after["left"]) == (1e-6, before["order"], 0), "nothing fits any more"

    @pytest.mark.parametrize("wrong", ["0", "-3", "nan", "inf"])
    def test_epsilon_is_a_number_above_zero(self, partner: Partner, wrong: str) -> None:
        with pytest.raises(UsageError, match="--epsilon above 0"):
            run("ledger", "set-cap", "patients", "--epsilon", wrong)

    @pytest.mark.parametrize("wrong", ["0", "1", "nan"])
    def test_delta_is_between_zero_and_one(self, partner: Partner, wrong: str) -> None:
        with pytest.raises(UsageError, match="--delta between 0 and 1"):
            run("ledger", "set-cap", "patients", "--epsilon", "3", "--delta", wrong)

    def test_a_dataset_that_is_not_registered(self, partner: Partner) -> None:
        with pytest.raises(UsageError, match="no dataset cohort is registered here; there are: patients"):
            run("ledger", "set-cap", "cohort", "--epsilon", "3")

    def test_datasets_that_share_records(self, partner: Partner, tmp_path: Path) -> None:
        add_dataset(partner.store, "cohort", f"csv:{write_table(tmp_path / 'cohort.csv', 40)}", NOW)
        words = ("--dataset", "patients", "--dataset", "cohort")
        account = run_json("ledger", "set-cap", "hospital", "--epsilon", "3", *words)
        assert account["datasets"] == ["patients", "cohort"]
        run("approvals", "approve", asked(), "--yes")
        manifest(partner)
        assert run_json("ledger", "show")["budgets"][0]["reserved"] > 0

    def test_the_same_rows_under_another_name_are_capped_too(self, partner: Partner, tmp_path: Path) -> None:
        set_cap(0.1)
        add_dataset(partner.store, "renamed", partner.store.dataset("patients").spec, NOW)  # type: ignore[union-attr]
        with pytest.raises(typer.Exit):
            run("ledger", "forecast", partner.plan.digest, "--dataset", "renamed")


class TestForecast:
    def test_without_a_cap_it_says_the_cost(self, partner: Partner) -> None:
        said = run("ledger", "forecast", partner.plan.digest, "--dataset", "patients")
        assert "costs ε 0.8" in said
        assert "has no cap" in said

    def test_with_a_cap_it_says_of_how_much(self, partner: Partner) -> None:
        set_cap(3.0)
        said = run("ledger", "forecast", partner.plan.digest, "--dataset", "patients")
        assert "of 3 left in budget patients (ε 3 at δ 1e-05)" in said
        value = run_json("ledger", "forecast", partner.plan.digest, "--dataset", "patients")
        assert value["fits"]
        assert (value["rows"], value["epsilon"]) == (16, pytest.approx(0.8, rel=0.01))
        assert run_json("ledger", "show")["runs"] == [], "nothing was reserved"

    def test_what_does_not_fit_is_exit_code_one(self, partner: Partner) -> None:
        set_cap(0.5)
        with pytest.raises(typer.Exit) as caught:
            run("ledger", "forecast", partner.plan.digest, "--dataset", "patients")
        assert caught.value.exit_code == 1

    def test_an_untouched_budget_takes_a_plan_of_exactly_its_epsilon(self, partner: Partner) -> None:
        set_cap(0.8)
        assert run_json("ledger", "forecast", partner.plan.digest, "--dataset", "patients")["fits"]


class TestApprovals:
    def test_the_text_says_what_the_plan_costs(self, partner: Partner) -> None:
        set_cap(3.0)
        assert "of 3 left in budget patients" in run("approvals", "show", asked())

    def test_an_unbounded_plan_is_said_to_be_that(self, partner: Partner) -> None:
        plain = partner.plan.with_changes(privacy={"mode": "plain"}, name="plain")
        partner.apply("plan", partner.request(plain))
        ids = {each["plan"]: each["id"] for each in run_json("approvals", "list")["requests"]}
        assert "without a bound (ε ∞): it has no differential privacy" in run("approvals", "show", ids["plain"])

    def test_what_does_not_fit_cannot_be_approved(self, partner: Partner) -> None:
        set_cap(0.5)
        id = asked()
        assert "It does not fit" in run("approvals", "show", id)
        with pytest.raises(BudgetRefusedError, match="this plan costs"):
            run("approvals", "approve", id, "--yes")
        assert partner.store.approvals() == []

    def test_an_unbounded_plan_under_a_cap_is_missing_something(self, partner: Partner) -> None:
        plain = partner.plan.with_changes(privacy={"mode": "plain"}, name="plain")
        partner.apply("plan", partner.request(plain))
        set_cap(3.0)
        found = {each["plan"]: each for each in run_json("approvals", "list")["requests"]}
        assert "no differential privacy" in found["plain"]["missing"][0]
        assert found[partner.plan.name]["missing"] == []
        with pytest.raises(ConsentRefusedError, match="no differential privacy"):
            run("approvals", "approve", found["plain"]["id"], "--yes")

    def test_a_rule_approves_only_what_fits(self, partner: Partner) -> None:
        set_cap(0.5)
        policy = Policy(approvals={"automatic": (Rule(study="heart"),)})  # type: ignore[arg-type]
        [(_, outcome)] = approvals.decide_pending(partner.home, partner.store, policy, NOW)
        assert isinstance(outcome, BudgetRefusedError)
        set_cap(3.0)
        [(_, outcome)] = approvals.decide_pending(partner.home, partner.store, policy, NOW)
        assert outcome.decision == "approved"  # type: ignore[union-attr]


class TestReservations:
    def test_approval_then_manifest(self, partner: Partner) -> None:
        set_cap(3.0)
        run("approvals", "approve", asked(), "--yes")
        assert runs(partner) == {}
        manifest(partner)
        reserved = runs(partner)["run-1"]
        assert (reserved["rounds"], reserved["charged"], reserved["budgets"]) == (3, 0, ["patients"])

    def test_manifest_then_approval(self, partner: Partner) -> None:
        manifest(partner)
        assert runs(partner) == {}
        run("approvals", "approve", asked(), "--yes")
        assert runs(partner)["run-1"]["rounds"] == 3

    def test_a_manifest_that_does_not_fit_any_more_is_named_before_its_first_round(self, partner: Partner) -> None:
        set_cap(0.8)
        run("approvals", "approve", asked(), "--yes")
        manifest(partner)
        manifest(partner, "run-2")
        assert list(runs(partner)) == ["run-1"]
        assert "run-2: it is not trained here: this plan costs ε" in run("approvals", "list")

    def test_what_remains_is_free_again_when_its_owner_closes_it(self, partner: Partner) -> None:
        set_cap(3.0)
        run("approvals", "approve", asked(), "--yes")
        manifest(partner)
        before = run_json("ledger", "show")["budgets"][0]["left"]
        assert run_json("ledger", "close", "run-1", "--yes")["closed"]
        assert run_json("ledger", "show")["budgets"][0]["left"] == 3.0 > before
        with pytest.raises(ConflictError, match="closed already"):
            run("ledger", "close", "run-1", "--yes")

    def test_a_run_that_was_never_reserved_cannot_be_closed(self, partner: Partner) -> None:
        with pytest.raises(BudgetRefusedError, match="no reservation"):
            run("ledger", "close", "run-9", "--yes")


class TestCare:
    def test_verify_and_doctor_say_that_all_is_well(self, partner: Partner) -> None:
        set_cap(3.0)
        assert run_json("ledger", "verify")["entries"] == 2
        assert (finding(partner).state, finding(partner).said) == (
            "ok",
            "2 entries, as they were written; patients ε 3 of 3 left",
        )

    def test_a_rolled_back_ledger_fails_in_all_of_them_and_repair_goes_on(self, partner: Partner) -> None:
        kept = {file.name: file.read_bytes() for file in partner.home.path.glob("ledger.db*")}
        assert not kept
        set_cap(3.0)
        kept = {file.name: file.read_bytes() for file in partner.home.path.glob("ledger.db*")}
        set_cap(2.0)
        for name in ("ledger.db", "ledger.db-wal", "ledger.db-shm"):
            (partner.home.path / name).unlink(missing_ok=True)
        for name, content in kept.items():
            (partner.home.path / name).write_bytes(content)
        for command in (("show",), ("verify",), ("forecast", partner.plan.digest, "--dataset", "patients")):
            with pytest.raises(LedgerDamagedError, match="concord-node ledger repair"):
                run("ledger", *command)
        assert (finding(partner).state, "rolled back" in finding(partner).said) == ("fail", True)
        assert "rolled back" in run_json("approvals", "list")["requests"][0]["missing"][0]
        [account] = run_json("ledger", "repair", "--yes")["budgets"]
        assert (account["left"], account["entries_lost"]) == (pytest.approx(0, abs=1e-9), True)
        assert finding(partner).state == "warn"
        with pytest.raises(BudgetRefusedError):
            run("approvals", "approve", asked(), "--yes")

    def test_the_coordinator_is_told_where_the_ledger_stands(self, partner: Partner) -> None:
        set_cap(3.0)
        said = partner.coordinator.received["ledger-head"][-1]
        with control.ControlChannel(partner.home, partner.store) as channel:
            assert channel.ledger_witness() == type(seal(partner.study(), partner.key(REQUESTER))).model_validate(
                said, strict=False
            )

    def test_receipts_keep_every_entry_when_the_node_leaves(self, partner: Partner) -> None:
        set_cap(3.0)
        run("leave", "--yes")
        receipts = json.loads(partner.home.receipts.read_text())
        assert [each["word"]["kind"] for each in receipts["ledger"]] == ["opened", "cap"]
        assert not partner.home.ledger_file.exists()

    def test_trying_a_plan_costs_nothing(self, partner: Partner) -> None:
        set_cap(3.0)
        plain = partner.plan.with_changes(privacy={"mode": "plain"}, name="plain")
        partner.apply("plan", partner.request(plain))
        assert "ledger is charged nothing" in run("try", plain.digest, "--dataset", "patients", "--rounds", "1")
        assert run_json("ledger", "show")["budgets"][0]["left"] == 3.0
