"""The entries of a ledger, added up. Pure: `check` holds every rule, `add` is `check` and then the change.

A sum is exact (fractions of the very numbers in the entries), so no order of additions and no rounding can hide a cost.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction

from concord_client.ledger.filter import epsilon_of_sum, rdp_cap
from concord_client.ledger.words import Cap, Charge, Closing, Gap, Opened, Release, Reservation, Word
from concord_shared.errors import BudgetRefusedError, ConflictError

__all__ = ["Account", "Books", "Budget", "Standing"]

NOTHING = 1e-9
"""Of ε, for people: less than this is none."""


@dataclass
class Standing:
    """One run's reservation, and what became of it. charged, released: numbers of rounds.

    whole: a budget holds it by the plan's own (ε, δ), which is about all of its rounds: none is ever free again.
    """

    word: Reservation
    charged: set[int] = field(default_factory=set)
    released: set[int] = field(default_factory=set)
    closed: bool = False
    whole: bool = False

    @property
    def is_bounded(self) -> bool:
        return self.word.rdp is not None

    @property
    def open_rounds(self) -> int:
        return 0 if self.closed and not self.whole else self.word.rounds - len(self.charged)

    def rdp(self, index: int) -> Fraction:
        return Fraction(self.word.rdp[index]) if self.word.rdp is not None else Fraction(0)


@dataclass
class Budget:
    """A cap as it stands. lost: RDP that counts as spent because entries are missing."""

    word: Cap
    lost: Fraction = Fraction(0)

    @property
    def cap(self) -> Fraction:
        return rdp_cap(self.word.epsilon, self.word.delta, self.word.order)


@dataclass(frozen=True)
class Account:
    """How a budget stands, for people: ε at the budget's δ and order. runs_unbounded: of what left before the cap."""

    group: str
    datasets: tuple[str, ...]
    epsilon: float
    delta: float
    order: float
    spent: float
    reserved: float
    left: float
    entries_lost: bool
    runs_unbounded: tuple[str, ...]


@dataclass
class Books:
    """budgets by group, standings by run; in the order of their entries."""

    opened: Opened | None = None
    budgets: dict[str, Budget] = field(default_factory=dict)
    standings: dict[str, Standing] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    _versions: dict[str, set[str]] = field(default_factory=dict)
    _sums: dict[str, list[Fraction]] = field(default_factory=dict)
    """Of a budget [spent, committed]: kept, so that a long ledger is read in time that grows with its length."""

    # What a new entry must keep

    def check(self, word: Word) -> None:
        """Raises:
        BudgetRefusedError: it would spend more than the owner allows, or what is not reserved.
        ConflictError: it does not fit what stands here already.
        """
        if (self.opened is None) != isinstance(word, Opened):
            raise ConflictError("a ledger begins with the entry `opened`, and has it once")
        match word:
            case Cap():
                self._check_cap(word)
            case Reservation():
                self._check_reservation(word)
            case Charge():
                self._check_charge(word)
            case Release():
                if word.round_number not in self._standing(word.run).charged:
                    raise ConflictError(f"round {word.round_number} of run {word.run} was never charged")
                if word.round_number in self._standing(word.run).released:
                    raise ConflictError(f"round {word.round_number} of run {word.run} is marked as released already")
            case Closing():
                if self._standing(word.run).closed:
                    raise ConflictError(f"run {word.run} is closed already")

    def add(self, word: Word) -> None:
        """Raises: as `check`; nothing changes then."""
        self.check(word)
        match word:
            case Opened():
                self.opened = word
            case Cap():
                before = self.budgets.get(word.group)
                self.budgets[word.group] = Budget(word, before.lost if before else Fraction(0))
                self._sums.clear()
            case Reservation():
                self._add_reservation(word)
            case Charge():
                self._add_charge(self.standings[word.run], word.round_number)
            case Release():
                self.standings[word.run].released.add(word.round_number)
            case Closing():
                self.standings[word.run].closed = True
                self._sums.clear()
            case Gap():
                self.gaps.append(word)
                for budget in self.budgets.values():
                    budget.lost += max(Fraction(0), budget.cap - self.committed(budget))
                self._sums.clear()

    def _add_reservation(self, word: Reservation) -> None:
        self.standings[word.run] = standing = Standing(word)
        known = self._versions.setdefault(word.dataset, set())
        if word.dataset_version not in known:
            known.add(word.dataset_version)
            self._sums.clear()  # what the same content was charged for under another name counts from now on
        for budget in self.budgets_of(word.dataset, word.dataset_version):
            if budget.word.group in self._sums:
                self._sums[budget.word.group][1] += self._cost(budget, word)
            standing.whole |= not self.committed(budget) <= budget.cap

    def _add_charge(self, standing: Standing, round_number: int) -> None:
        standing.charged.add(round_number)
        for budget in self.budgets_of(standing.word.dataset, standing.word.dataset_version):
            if budget.word.group in self._sums:
                self._sums[budget.word.group][0] += standing.rdp(self.index_of(budget))
            standing.whole |= not self.spent(budget) <= budget.cap

    def _check_cap(self, word: Cap) -> None:
        assert self.opened is not None, "checked before"
        if word.order not in self.opened.orders:
            raise ConflictError(f"order {word.order:g} is none of this ledger's")
        before = self.budgets.get(word.group)
        if before is None and rdp_cap(word.epsilon, word.delta, word.order) <= 0:
            raise ConflictError(f"ε {word.epsilon:g} at δ {word.delta:g} leaves nothing at order {word.order:g}")
        if before is not None:
            as_before = (before.word.delta, before.word.order) == (word.delta, word.order)
            if not as_before and not self.is_untouched(before):
                raise ConflictError(
                    f"budget {word.group} counts at δ {before.word.delta:g} and order {before.word.order:g} for good: "
                    "what was promised rests on them. Only its ε can be changed"
                )
            gone = sorted({*before.word.datasets} - {*word.datasets})
            if gone or not {*before.word.versions} <= {*word.versions}:
                raise ConflictError(f"a dataset never leaves its budget; missing: {', '.join(gone) or 'a version'}")
        unbounded = self._unbounded(word)
        if unbounded and not word.despite_unbounded and (before is None or not before.word.despite_unbounded):
            raise ConflictError(
                f"something without a bound left before, in run {', '.join(unbounded)}: no cap takes that back. A cap "
                "from now on is set with --despite-unbounded; `ledger show` goes on to name these runs"
            )

    def _check_reservation(self, word: Reservation) -> None:
        assert self.opened is not None, "checked before"
        if word.run in self.standings:
            raise ConflictError(f"run {word.run} has its reservation already")
        if word.rdp is not None and len(word.rdp) != len(self.opened.orders):
            raise ConflictError(f"expected a cost at {len(self.opened.orders)} orders, got {len(word.rdp)}")
        for budget in self.budgets_of(word.dataset, word.dataset_version):
            if word.rdp is None:
                raise BudgetRefusedError(
                    f"plan {word.plan_digest[:12]} has no differential privacy of this node's own, and budget "
                    f"{budget.word.group} caps dataset {word.dataset} at ε {budget.word.epsilon:g}. Ask for a plan "
                    "with privacy.dp, whose noise the nodes add"
                )
            fits = self.committed(budget, word) + self._cost(budget, word) <= budget.cap
            if not fits and not self._holds_whole(budget, word):
                raise BudgetRefusedError(
                    f"this plan costs ε {self.shown_cost(budget, word):.4g} of {self.account(budget).left:.4g} left in "
                    f"budget {budget.word.group} (ε {budget.word.epsilon:g} at δ {budget.word.delta:g}) of dataset "
                    f"{word.dataset}"
                )

    def _check_charge(self, word: Charge) -> None:
        standing = self._standing(word.run)
        if not 1 <= word.round_number <= standing.word.rounds:
            raise BudgetRefusedError(
                f"run {word.run} reserved {standing.word.rounds} rounds, round {word.round_number} is none of them"
            )
        if word.round_number in standing.charged:
            raise ConflictError(f"round {word.round_number} of run {word.run} is charged already")
        if standing.closed:
            raise BudgetRefusedError(f"the owner closed run {word.run}: no more of its rounds are charged")
        for budget in self.budgets_of(standing.word.dataset, standing.word.dataset_version):
            if not standing.is_bounded:
                raise BudgetRefusedError(
                    f"run {word.run} has no differential privacy, and budget {budget.word.group} has a cap by now"
                )
            fits = self.spent(budget) + standing.rdp(self.index_of(budget)) <= budget.cap
            if not fits and not self._holds_whole(budget, standing.word):
                raise BudgetRefusedError(
                    f"round {word.round_number} of run {word.run} would spend more than the ε {budget.word.epsilon:g} "
                    f"of budget {budget.word.group}"
                )

    def _holds_whole(self, budget: Budget, word: Reservation) -> bool:
        """Whether a budget that nothing else draws on takes this plan by its own (ε, δ).

        Then the plan is all that ever leaves under the budget. It was chosen before anything left, so the tight figure
        of a plan that is fixed beforehand holds; with anything beside it, only the sums at the budget's order do.
        """
        others = (
            each for each in self._standings_of(budget.word, word) if each.word.run != word.run and each.is_bounded
        )
        alone = budget.lost == 0 and not any(each.charged or each.open_rounds for each in others)
        if not alone or word.epsilon is None or word.delta is None:
            return False
        return word.epsilon <= budget.word.epsilon and word.delta <= budget.word.delta

    # Sums

    def budgets_of(self, dataset: str, version: str) -> list[Budget]:
        """A cost counts in every budget that holds its dataset: by name, or by content, under whatever name."""
        return [
            each
            for each in self.budgets.values()
            if dataset in each.word.datasets or version in self._versions_of(each.word)
        ]

    def index_of(self, budget: Budget) -> int:
        assert self.opened is not None, "a ledger with a budget is opened"
        return self.opened.orders.index(budget.word.order)

    def spent(self, budget: Budget, with_: Reservation | None = None) -> Fraction:
        """What was charged, and what counts as lost: RDP at the budget's order. with_: as if it stood here too."""
        return self._sums_of(budget, with_)[0]

    def committed(self, budget: Budget, with_: Reservation | None = None) -> Fraction:
        """`spent`, and what open reservations may still charge."""
        return self._sums_of(budget, with_)[1]

    def is_untouched(self, budget: Budget) -> bool:
        """Nothing was ever told under it, and nothing is about to be: then nothing rests on its order yet."""
        return self.committed(budget) == 0

    def _sums_of(self, budget: Budget, with_: Reservation | None) -> list[Fraction]:
        known = self._versions_of(budget.word)
        if with_ is not None and with_.dataset in budget.word.datasets and with_.dataset_version not in known:
            return self._add_up(budget, with_)
        if budget.word.group not in self._sums:
            self._sums[budget.word.group] = self._add_up(budget)
        return self._sums[budget.word.group]

    def _add_up(self, budget: Budget, with_: Reservation | None = None) -> list[Fraction]:
        index, spent, reserved = self.index_of(budget), budget.lost, Fraction(0)
        for each in self._standings_of(budget.word, with_):
            spent += len(each.charged) * each.rdp(index)
            reserved += each.open_rounds * each.rdp(index)
        return [spent, spent + reserved]

    def account(self, budget: Budget) -> Account:
        word = budget.word

        bounded = [each for each in self._standings_of(budget.word) if each.is_bounded]
        alone = len(bounded) == 1 and bounded[0].whole
        own = bounded[0].word.epsilon if alone and bounded[0].word.epsilon is not None else math.inf

        def shown(total: Fraction) -> float:
            return min(epsilon_of_sum(total, word.delta, word.order), own)

        spent, committed = self.spent(budget), self.committed(budget)
        return Account(
            group=word.group,
            datasets=word.datasets,
            epsilon=word.epsilon,
            delta=word.delta,
            order=word.order,
            spent=shown(spent),
            reserved=shown(committed) - shown(spent),
            left=left if (left := word.epsilon - shown(committed)) > NOTHING else 0.0,
            entries_lost=budget.lost > 0,
            runs_unbounded=tuple(self._unbounded(budget.word)),
        )

    def shown_cost(self, budget: Budget, word: Reservation) -> float:
        """By how much the budget's ε would rise; or the plan's own ε, where the budget takes it by that."""
        cap, before, after = (
            budget.word,
            self.committed(budget),
            self.committed(budget, word) + self._cost(budget, word),
        )
        if word.epsilon is not None and not after <= budget.cap and self._holds_whole(budget, word):
            return word.epsilon
        return epsilon_of_sum(after, cap.delta, cap.order) - epsilon_of_sum(before, cap.delta, cap.order)

    def _cost(self, budget: Budget, word: Reservation) -> Fraction:
        return Standing(word).rdp(self.index_of(budget)) * word.rounds

    def _standings_of(self, cap: Cap, with_: Reservation | None = None) -> list[Standing]:
        versions = self._versions_of(cap)
        if with_ is not None and with_.dataset in cap.datasets:
            versions = {*versions, with_.dataset_version}
        return [
            each
            for each in self.standings.values()
            if each.word.dataset in cap.datasets or each.word.dataset_version in versions
        ]

    def _versions_of(self, cap: Cap) -> set[str]:
        """The content that a budget's datasets are known to have had."""
        return {*cap.versions}.union(*(self._versions.get(dataset, ()) for dataset in cap.datasets))

    def _unbounded(self, cap: Cap) -> list[str]:
        return [each.word.run for each in self._standings_of(cap) if not each.is_bounded and each.charged]

    def _standing(self, run: str) -> Standing:
        standing = self.standings.get(run)
        if standing is None:
            raise BudgetRefusedError(f"run {run} has no reservation in this node's privacy ledger")
        return standing
