"""Approval + manifest make one reservation for the whole plan, before anything of the run happens here."""

from collections.abc import Iterator
from dataclasses import dataclass

from concord_client.ledger.books import Account, Books
from concord_client.ledger.costs import Cost, cost_of, unbounded_because
from concord_client.ledger.ledger import PrivacyLedger
from concord_client.ledger.words import Reservation
from concord_shared.documents import Approval, RunManifest
from concord_shared.errors import BudgetRefusedError, ConflictError, PlanError
from concord_shared.plan.schema import Plan

__all__ = ["Forecast", "admit", "cap_refusal", "forecast"]

NOBODY, NO_DIGEST = "forecast", "0" * 64


@dataclass(frozen=True)
class Forecast:
    """What a plan would cost one dataset. shares: of each budget that holds it, by how much its ε would rise.

    refusal: why it does not fit; empty where it does.
    """

    plan: Plan
    dataset: str
    cost: Cost | None
    shares: tuple[tuple[Account, float], ...]
    refusal: str

    def words(self) -> list[str]:
        """For whoever decides; a sentence each."""
        return list(self._words())

    def _words(self) -> Iterator[str]:
        if self.cost is None:
            yield f"This plan tells of dataset {self.dataset} without a bound (ε ∞): {unbounded_because(self.plan)}."
        elif not self.shares:
            yield (
                f"This plan costs ε {self.cost.epsilon:.3g} at δ {self.cost.delta:g}. Dataset {self.dataset} has no "
                "cap: costs are written down and never refused."
            )
        for account, cost in self.shares if self.cost else ():
            yield (
                f"This plan costs ε {cost:.3g} of {account.left:.3g} left in budget {account.group} "
                f"(ε {account.epsilon:g} at δ {account.delta:g})."
            )
        if self.cost is not None and self.plan.kind == "train":
            yield (
                "Not counted: measures over this node's test rows, which leave as exact sums, and how its owner chose "
                "what to approve."
            )
        if self.refusal:
            yield f"It does not fit: {self.refusal}"


def forecast(books: Books, plan: Plan, dataset: str, version: str, rows: int) -> Forecast:
    """On `rows` training rows. Changes nothing."""
    refusal, cost = "", None
    try:
        cost = cost_of(plan, rows)
        word = _reservation(NOBODY, NOBODY, plan, dataset, version, rows, cost)
        books.check(word)
    except (BudgetRefusedError, ConflictError, PlanError) as error:
        refusal = str(error)
    budgets = books.budgets_of(dataset, version)
    shares = tuple(
        (books.account(each), books.shown_cost(each, word) if cost is not None else float("inf")) for each in budgets
    )
    return Forecast(plan, dataset, cost, shares, refusal)


def cap_refusal(books: Books, plan: Plan, dataset: str, version: str) -> str:
    """Why a plan does not fit, as far as it can be said without reading the data; empty where nothing can."""
    because = unbounded_because(plan)
    return forecast(books, plan, dataset, version, 0).refusal if because else ""


def admit(ledger: PrivacyLedger, plan: Plan, manifest: RunManifest, approval: Approval) -> bool:
    """Reserves the whole plan's cost for a run; False if its reservation stands already.

    Raises:
        BudgetRefusedError: it does not fit, or the owner closed the run.
    """
    standing = ledger.books().standings.get(manifest.run)
    if standing is None:
        try:
            cost = cost_of(plan, approval.rows)
        except PlanError as error:
            raise BudgetRefusedError(str(error)) from error
        word = _reservation(
            manifest.run, manifest.study, plan, approval.dataset, approval.dataset_version, approval.rows, cost
        )
        return ledger.reserve(word)
    reserved = standing.word
    if standing.closed:
        raise BudgetRefusedError(f"the owner closed run {manifest.run}: nothing more of it is answered")
    if (reserved.plan_digest, reserved.dataset, reserved.dataset_version, reserved.rows) != (
        plan.digest,
        approval.dataset,
        approval.dataset_version,
        approval.rows,
    ):
        raise BudgetRefusedError(
            f"run {manifest.run} reserved for another plan, dataset or number of rows than approved"
        )
    return False


def _reservation(
    run: str, study: str, plan: Plan, dataset: str, version: str, rows: int, cost: Cost | None
) -> Reservation:
    from concord_shared.accounting import rounds_of

    return Reservation(
        run=run,
        study=study,
        plan_digest=plan.digest,
        dataset=dataset,
        dataset_version=version,
        rows=rows,
        rounds=rounds_of(plan),
        rdp=None if cost is None else cost.rdp,
        epsilon=None if cost is None else cost.epsilon,
        delta=None if cost is None else cost.delta,
    )
