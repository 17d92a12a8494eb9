"""The rules of the privacy ledger and its arithmetic, by hand-computed numbers and by any interleaving of words."""

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pydantic import ValidationError

from concord_client.ledger.books import Books
from concord_client.ledger.filter import choose_order, conversion, epsilon_of_sum, rdp_cap
from concord_client.ledger.words import Charge, Closing, Gap, Opened, Release
from concord_shared.accounting import ORDERS as ACCOUNTING_ORDERS
from concord_shared.accounting import epsilon_of, gaussian_rdp
from concord_shared.errors import BudgetRefusedError, ConflictError, UsageError
from ledgers import COST, ORDERS, VERSION, cap, reservation

ROOM = conversion(8.0, 1e-5) + 0.105
"""The ε of ten rounds and a half."""


def opened(*words: Any) -> Books:
    books = Books()
    for word in (Opened(node="node-1", orders=ORDERS), *words):
        books.add(word)
    return books


def left(books: Books) -> float:
    return books.account(books.budgets["patients"]).left


class TestFilter:
    @pytest.mark.parametrize("order", [2, 8, 32, 1024])
    @pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
    def test_conversion_is_that_of_the_accounting_at_one_order(self, order: int, delta: float) -> None:
        rdp = [50.0 if each == order else math.inf for each in ACCOUNTING_ORDERS]
        assert conversion(order, delta) + 50.0 == pytest.approx(epsilon_of(rdp, delta), rel=1e-12)

    @given(st.floats(1e-3, 100), st.floats(1e-12, 1e-2), st.sampled_from(ACCOUNTING_ORDERS))
    def test_what_the_cap_admits_never_exceeds_epsilon(self, epsilon: float, delta: float, order: int) -> None:
        room = rdp_cap(epsilon, delta, order)
        assume(room > 0)
        rdp = [float(room) if each == order else math.inf for each in ACCOUNTING_ORDERS]
        assert epsilon_of(rdp, delta) <= epsilon
        assert epsilon_of_sum(room, delta, order) <= epsilon

    @pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-6), (3.0, 1e-5), (10.0, 1e-5)])
    def test_the_order_is_the_one_that_holds_most_gaussian_noise(self, epsilon: float, delta: float) -> None:
        def rounds(order: float) -> float:
            return float(rdp_cap(epsilon, delta, order)) / gaussian_rdp(int(order), 10.0)

        chosen = choose_order(ACCOUNTING_ORDERS, epsilon, delta)
        assert rounds(chosen) == max(map(rounds, ACCOUNTING_ORDERS))
        least = min(
            range(1, 5000),
            key=lambda n: abs(epsilon_of([n * gaussian_rdp(o, 10.0) for o in ACCOUNTING_ORDERS], delta) - epsilon),
        )
        assert rounds(chosen) == pytest.approx(least, abs=1), "as many as the best order, taken afterwards, would hold"

    def test_a_cap_that_holds_nothing_is_refused(self) -> None:
        with pytest.raises(UsageError, match="too small"):
            choose_order(ORDERS, 0.01, 1e-12)


class TestNumbers:
    @pytest.mark.parametrize("wrong", [-1e-9, math.nan, math.inf, -math.inf])
    def test_no_cost_is_negative_nan_or_infinite(self, wrong: float) -> None:
        with pytest.raises(ValidationError):
            reservation(rdp=(0.1, wrong, 0.1))
        with pytest.raises(ValidationError):
            reservation(epsilon=wrong)

    @pytest.mark.parametrize("wrong", [0.0, -3.0, math.nan, math.inf])
    def test_no_cap_is_zero_negative_nan_or_infinite(self, wrong: float) -> None:
        with pytest.raises(ValidationError):
            cap(wrong)

    @pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
    def test_delta_is_between_zero_and_one(self, delta: float) -> None:
        with pytest.raises(ValidationError):
            cap(delta=delta)

    def test_a_cost_without_its_epsilon_is_none(self) -> None:
        with pytest.raises(ValidationError, match="go together"):
            reservation(epsilon=None)

    @pytest.mark.parametrize("rounds", [0, -1])
    def test_no_plan_has_less_than_a_round(self, rounds: int) -> None:
        with pytest.raises(ValidationError):
            reservation(rounds=rounds)

    def test_a_cost_of_other_orders_is_refused(self) -> None:
        with pytest.raises(ConflictError, match="3 orders, got 2"):
            opened().add(reservation(rdp=COST[:2]))


class TestBudget:
    def test_ten_rounds_fit_and_the_eleventh_does_not(self) -> None:
        books = opened(cap(ROOM), reservation("a", 6), reservation("b", 4))
        with pytest.raises(BudgetRefusedError, match=r"ε 0\.01 of 0\.005 left in budget patients"):
            books.add(reservation("c", 1))

    def test_a_whole_plan_is_reserved_before_any_of_it_is_charged(self) -> None:
        books = opened(cap(ROOM), reservation("a", 6))
        with pytest.raises(BudgetRefusedError, match="this plan costs"):
            books.add(reservation("b", 5))

    def test_what_is_charged_is_spent_and_no_longer_reserved(self) -> None:
        books = opened(cap(ROOM), reservation("a", 6))
        before = left(books)
        for number in (1, 2, 3):
            books.add(Charge(run="a", round_number=number))
        account = books.account(books.budgets["patients"])
        assert account.spent == pytest.approx(conversion(8.0, 1e-5) + 0.03)
        assert account.reserved == pytest.approx(0.03)
        assert left(books) == before

    def test_a_release_gives_nothing_back(self) -> None:
        books = opened(cap(ROOM), reservation("a", 6), Charge(run="a", round_number=1))
        before = left(books)
        books.add(Release(run="a", round_number=1, sha256="c" * 64))
        assert left(books) == before

    def test_a_finished_run_gives_nothing_back_until_its_owner_closes_it(self) -> None:
        books = opened(cap(ROOM), reservation("a", 10), Charge(run="a", round_number=1))
        with pytest.raises(BudgetRefusedError):
            books.add(reservation("b", 9))
        books.add(Closing(run="a"))
        books.add(reservation("b", 9))
        with pytest.raises(BudgetRefusedError, match="closed"):
            books.add(Charge(run="a", round_number=2))

    def test_a_charge_without_a_reservation_is_refused(self) -> None:
        with pytest.raises(BudgetRefusedError, match="no reservation"):
            opened(cap(ROOM)).add(Charge(run="a", round_number=1))

    @pytest.mark.parametrize("number", [7, 1000])
    def test_a_round_that_was_not_reserved_is_refused(self, number: int) -> None:
        with pytest.raises(BudgetRefusedError, match="none of them"):
            opened(cap(ROOM), reservation("a", 6)).add(Charge(run="a", round_number=number))

    def test_no_release_without_its_charge(self) -> None:
        with pytest.raises(ConflictError, match="never charged"):
            opened(cap(ROOM), reservation("a")).add(Release(run="a", round_number=1, sha256="c" * 64))

    def test_a_lowered_cap_stops_rounds_that_are_reserved(self) -> None:
        books = opened(cap(ROOM), reservation("a", 10), Charge(run="a", round_number=1))
        books.add(cap(conversion(8.0, 1e-5) + 0.025))
        books.add(Charge(run="a", round_number=2))
        with pytest.raises(BudgetRefusedError, match="would spend more"):
            books.add(Charge(run="a", round_number=3))

    def test_a_run_reserves_once(self) -> None:
        with pytest.raises(ConflictError, match="already"):
            opened(reservation("a")).add(reservation("a", 1))

    def test_order_and_delta_stay_what_they_are_once_something_rests_on_them(self) -> None:
        opened(cap(ROOM)).add(cap(ROOM + 1, order=32.0))
        books = opened(cap(ROOM), reservation("a", 1))
        for change in ({"order": 32.0}, {"delta": 1e-4}):
            with pytest.raises(ConflictError, match="for good"):
                books.add(cap(ROOM, **change))


class TestGroups:
    def test_datasets_that_share_records_share_a_budget(self) -> None:
        books = opened(cap(ROOM, datasets=("patients", "cohort")), reservation("a", 6))
        with pytest.raises(BudgetRefusedError):
            books.add(reservation("b", 6, dataset="cohort", dataset_version="d" * 64))

    def test_a_dataset_brings_what_it_spent_into_a_group(self) -> None:
        books = opened(reservation("a", 6, dataset="cohort"), Charge(run="a", round_number=1))
        books.add(cap(ROOM, datasets=("patients", "cohort")))
        assert left(books) == pytest.approx(0.105 - 0.06)

    def test_a_dataset_never_leaves(self) -> None:
        with pytest.raises(ConflictError, match="never leaves"):
            opened(cap(ROOM, datasets=("patients", "cohort"))).add(cap(ROOM))

    def test_a_cost_counts_in_every_budget_of_its_dataset(self) -> None:
        books = opened(cap(100.0, group="hospital"), cap(ROOM), reservation("a", 6))
        with pytest.raises(BudgetRefusedError, match="budget patients"):
            books.add(reservation("b", 6))
        hospital = books.budgets["hospital"]
        assert books.committed(hospital) == Fraction(COST[1]) * 6

    def test_the_same_content_under_another_name_is_no_way_around(self) -> None:
        books = opened(cap(ROOM), reservation("a", 10))
        with pytest.raises(BudgetRefusedError):
            books.add(reservation("b", 1, dataset="renamed"))
        books.add(reservation("c", 1, dataset="other", dataset_version="d" * 64))

    def test_new_content_under_the_same_name_goes_on_with_its_budget(self) -> None:
        books = opened(cap(ROOM), reservation("a", 10))
        with pytest.raises(BudgetRefusedError):
            books.add(reservation("b", 1, dataset_version="d" * 64))

    def test_what_content_was_charged_for_under_another_name_counts_when_it_is_found_out(self) -> None:
        books = opened(cap(ROOM), reservation("a", 8, dataset="renamed"))
        with pytest.raises(BudgetRefusedError):
            books.add(reservation("b", 3))
        books.add(reservation("c", 2))
        assert books.committed(books.budgets["patients"]) == Fraction(COST[1]) * 10


class TestUnbounded:
    def test_a_plan_without_differential_privacy_is_refused_under_a_cap(self) -> None:
        books = opened(cap(ROOM))
        with pytest.raises(BudgetRefusedError, match="no differential privacy"):
            books.add(reservation("a", rdp=None, epsilon=None, delta=None))

    def test_without_a_cap_it_is_written_down(self) -> None:
        books = opened(reservation("a", rdp=None, epsilon=None, delta=None), Charge(run="a", round_number=1))
        assert not books.standings["a"].is_bounded

    def test_a_cap_stops_it_in_the_middle_and_the_owner_is_told_what_left_before(self) -> None:
        books = opened(reservation("a", rdp=None, epsilon=None, delta=None), Charge(run="a", round_number=1))
        with pytest.raises(ConflictError, match="without a bound left before, in run a"):
            books.add(cap(ROOM))
        books.add(cap(ROOM, despite_unbounded=True))
        with pytest.raises(BudgetRefusedError, match="has a cap by now"):
            books.add(Charge(run="a", round_number=2))
        assert books.account(books.budgets["patients"]).runs_unbounded == ("a",)


class TestWholePlans:
    """An untouched budget takes one plan by its own (ε, δ), which is less than its rounds add up to."""

    def test_it_is_all_that_the_budget_ever_holds(self) -> None:
        books = opened(cap(ROOM), reservation("a", 20, epsilon=ROOM, delta=1e-5))
        for number in range(1, 21):
            books.add(Charge(run="a", round_number=number))
        account = books.account(books.budgets["patients"])
        assert (account.spent, account.left) == (ROOM, 0)
        with pytest.raises(BudgetRefusedError):
            books.add(reservation("b", 1, epsilon=1e-9))

    @pytest.mark.parametrize("wrong", [{"epsilon": ROOM * 1.01}, {"delta": 2e-5}])
    def test_not_above_the_cap(self, wrong: dict[str, float]) -> None:
        with pytest.raises(BudgetRefusedError):
            opened(cap(ROOM)).add(reservation("a", 20, **{"epsilon": ROOM, **wrong}))

    def test_not_beside_another_plan(self) -> None:
        books = opened(cap(ROOM), reservation("a", 1))
        with pytest.raises(BudgetRefusedError):
            books.add(reservation("b", 20, epsilon=ROOM))
        books.add(Charge(run="a", round_number=1))
        books.add(Closing(run="a"))
        with pytest.raises(BudgetRefusedError):
            books.add(reservation("b", 20, epsilon=ROOM))

    def test_closing_it_frees_nothing(self) -> None:
        """Its figure is about the whole: with other plans after a part of it, it would say nothing."""
        books = opened(cap(ROOM), reservation("a", 20, epsilon=ROOM), Charge(run="a", round_number=1))
        books.add(Closing(run="a"))
        with pytest.raises(BudgetRefusedError):
            books.add(reservation("b", 1))


class TestGap:
    def test_what_was_left_counts_as_spent(self) -> None:
        books = opened(cap(ROOM), reservation("a", 3), Charge(run="a", round_number=1))
        books.add(Gap(known_sequence=9, known_hash="c" * 64))
        assert left(books) == pytest.approx(0, abs=1e-12)
        with pytest.raises(BudgetRefusedError):
            books.add(reservation("b", 1))
        books.add(cap(ROOM + 0.05))
        books.add(reservation("b", 4))


RUNS = st.sampled_from(["a", "b", "c", "d"])


class Interleavings(RuleBasedStateMachine):
    """Whatever is said in whatever order: what was ever charged under a cap, counted independently, stays within it."""

    def __init__(self) -> None:
        super().__init__()
        self.books = opened(cap(ROOM, versions=(VERSION,)))
        self.rounds: dict[str, int] = {}
        self.charged: set[tuple[str, int]] = set()
        self.most = 10

    def say(self, word: Any) -> bool:
        try:
            self.books.add(word)
        except (BudgetRefusedError, ConflictError):
            return False
        return True

    @rule(run=RUNS, rounds=st.integers(1, 12), dataset=st.sampled_from(["patients", "other"]))
    def reserve(self, run: str, rounds: int, dataset: str) -> None:
        """Both names are of the same content."""
        if self.say(reservation(run, rounds, dataset=dataset)):
            self.rounds[run] = rounds

    @rule(run=RUNS, number=st.integers(1, 12))
    def charge(self, run: str, number: int) -> None:
        if self.say(Charge(run=run, round_number=number)):
            assert number <= self.rounds[run]
            assert (run, number) not in self.charged
            self.charged.add((run, number))

    @rule(run=RUNS, number=st.integers(1, 12))
    def release(self, run: str, number: int) -> None:
        if self.say(Release(run=run, round_number=number, sha256="c" * 64)):
            assert (run, number) in self.charged

    @rule(run=RUNS)
    def close(self, run: str) -> None:
        self.say(Closing(run=run))

    @rule(rounds=st.integers(1, 14))
    def change_cap(self, rounds: int) -> None:
        """Lowered or raised by its owner."""
        if self.say(cap(conversion(8.0, 1e-5) + COST[1] * (rounds + 0.5), versions=(VERSION,))):
            self.most = max(self.most, rounds)

    @invariant()
    def never_more_than_the_largest_cap(self) -> None:
        assert len(self.charged) <= self.most
        assert self.books.spent(self.books.budgets["patients"]) == Fraction(COST[1]) * len(self.charged)


TestInterleavings = Interleavings.TestCase
