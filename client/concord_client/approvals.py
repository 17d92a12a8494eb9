"""A node's word on a plan: what is asked, in plain words; and the decision of a person, or of a rule of the policy.

A decision is in the node's own database before anyone hears of it, and holds whether or not the coordinator can be
reached. A withdrawal is a file first: the training process looks for it before every batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from concord_client.cards import terms_of
from concord_client.home import NodeHome, person
from concord_client.ledger.admission import Forecast, admit, cap_refusal, forecast
from concord_client.ledger.books import Books
from concord_client.ledger.ledger import PrivacyLedger
from concord_client.policy import Policy, Verdict
from concord_client.registry import current_dataset, verify
from concord_client.statistics_guard import StatisticsGuard
from concord_client.store import Dataset, NodeStore, Request
from concord_shared.canonical import canonical_digest
from concord_shared.documents import Agreement, Approval, DataTerms, Decision, Study
from concord_shared.errors import (
    ArtefactError,
    BudgetRefusedError,
    ConcordError,
    ConflictError,
    ConsentRefusedError,
    DataError,
    DocumentRefusedError,
    UsageError,
)
from concord_shared.files import explain
from concord_shared.plan.schema import Plan
from concord_shared.signing import seal
from concord_shared.statistics import Batch

__all__ = [
    "Question",
    "approve",
    "count_rows",
    "decide_pending",
    "find_question",
    "finish_withdrawals",
    "forecast_of",
    "questions",
    "reject",
    "request_id",
    "reserve_run",
    "withdraw",
    "withdraw_dataset",
    "withdraw_for_agreement",
]

DAY_S = 24 * 3600
NO_HOLDS_S = 3660 * DAY_S
ID_LENGTH = 8
TRIES = 5
BY_POLICY = "policy"
NO_VERSION = "0" * 64
_About = tuple[str, str, str]
"""Study, plan digest, dataset: what a decision is about."""


@dataclass(frozen=True)
class Question:
    """One plan, asked for one study on one dataset; and what this node has said to it so far.

    id: short, of the three. requested_by: by their own signatures, under the agreement and any manifest of a run; what
    the coordinator says of it counts for nothing. agreement: that admits it now, or None. state: pending, approved,
    rejected, withdrawn or expired. missing: what keeps it from being approved, one line each.
    """

    id: str
    study: Study
    plan: Plan
    dataset: str
    requested_by: str
    received_at: int
    agreement: Agreement | None
    last: Approval | None
    state: str
    verdict: Verdict
    missing: tuple[str, ...]


def questions(home: NodeHome, store: NodeStore, policy: Policy, now: float) -> list[Question]:
    """Everything that was ever asked of a dataset that is registered here, newest first."""
    found, starters, books = [], _starters(store, now), _books(home)
    for request in store.requests():
        study, plan = store.study(request.study), store.plan(request.plan_digest)
        if study is None or plan is None:
            continue
        found += [
            _question(home, store, policy, books, request, study, plan, dataset, starters, now)
            for dataset in _datasets_of(home, store, study)
        ]
    return sorted(found, key=lambda question: (-question.received_at, question.id))


def find_question(home: NodeHome, store: NodeStore, policy: Policy, id: str, now: float) -> Question:
    """By its id, or the beginning of it. Raises: UsageError: none, or several."""
    every = questions(home, store, policy, now)
    found = [question for question in every if id and question.id.startswith(id.lower())]
    if len(found) == 1:
        return found[0]
    known = ", ".join(question.id for question in every) or "none"
    what = "several requests begin" if found else "no request begins"
    raise UsageError(f"{what} with {id!r}; there are: {known}. concord-node approvals list says which is which")


def approve(
    home: NodeHome, store: NodeStore, policy: Policy, question: Question, now: float, by: str = "", reason: str = ""
) -> Approval:
    """A yes, after these checks: an agreement admits it, its terms and the policy allow it, the data are those that
    were registered and fit the plan's contract.

    Raises:
        ConsentRefusedError: an agreement or the policy is against it.
        BudgetRefusedError: its whole cost does not fit into the dataset's budget.
        DataError: the data changed, cannot be read, or do not fit.
        ConflictError: someone else decided meanwhile.
    """
    agreement = question.agreement
    if question.missing or agreement is None:
        raise ConsentRefusedError("cannot be approved:\n  " + "\n  ".join(question.missing))
    dataset = current_dataset(store, question.dataset)
    rows, evaluation_rows = count_rows(store, dataset, question.plan, home.config.node, policy.data.roots)
    ahead = forecast_of(home, store, question, rows)
    if ahead.refusal:
        raise BudgetRefusedError(f"cannot be approved: {ahead.refusal}")
    not_after = min(int(now) + policy.approvals.days * DAY_S, agreement.terms.not_after)
    fields = {"dataset_version": dataset.version, "rows": rows, "evaluation_rows": evaluation_rows}
    approval = _decision(home, store, _about(question), "approved", question.last, now, by, reason)
    approval = approval.model_copy(update=fields | {"not_after": not_after})
    with suppress(FileNotFoundError):
        home.withdrawn_marker(
            *_about(question)
        ).unlink()  # first: if we die in between, the last word in the database is still the withdrawal
    if not store.put_approval(approval, seal(approval, home.identity_key())):
        raise ConflictError("someone decided on this meanwhile; look again: concord-node approvals list")
    with home.ledger() as ledger:
        for run in _live_runs(store, approval, now):
            reserve_run(store, ledger, run, now)
    return approval


def request_id(study: str, plan: Plan, dataset: str) -> str:
    """By which people name a question."""
    return canonical_digest([study, plan.digest, dataset])[:ID_LENGTH]


def forecast_of(home: NodeHome, store: NodeStore, question: Question, rows: int | None = None) -> Forecast:
    """What the plan costs this dataset's budget. rows: for training; counted in the data where not given.

    Raises:
        DataError: as `count_rows`.
    """
    dataset = current_dataset(store, question.dataset)
    if rows is None:
        roots = Policy.load(home.policy_file).data.roots
        rows, _ = count_rows(store, dataset, question.plan, home.config.node, roots)
    with home.ledger() as ledger:
        return forecast(ledger.books(), question.plan, dataset.name, dataset.version, rows)


def reserve_run(store: NodeStore, ledger: PrivacyLedger, run: str, now: float) -> None:
    """Where this node approved what a run's manifest names: sets its whole cost aside, or notes why that cannot be."""
    manifest = store.manifest(run)
    plan = store.plan(manifest.plan_digest) if manifest else None
    if manifest is None or plan is None:
        return
    for participant in manifest.participants:
        approval = store.current_approval(manifest.study, manifest.plan_digest, participant.dataset, now)
        if approval is None or approval.node != participant.node:
            continue
        try:
            admit(ledger, plan, manifest, approval)
        except BudgetRefusedError as error:
            store.refuse(now, "budget", run, f"it is not trained here: {error}", {"run": run})


def reject(
    home: NodeHome, store: NodeStore, question: Question, now: float, by: str = "", reason: str = ""
) -> Approval:
    """A no. Raises: ConflictError: it is approved; that is withdrawn."""
    if question.state == "approved":
        raise ConflictError(
            f"{question.id} is approved: withdraw it with concord-node approvals withdraw {question.id}"
        )
    return _put(home, store, _about(question), "rejected", now, by, reason)


def withdraw(
    home: NodeHome, store: NodeStore, question: Question, now: float, by: str = "", reason: str = ""
) -> Approval:
    """Takes a yes back, effective before the next batch of work. Raises: ConflictError: there is no yes."""
    if question.last is None or question.last.decision != "approved":
        raise ConflictError(f"{question.id} is {question.state}; there is no approval to withdraw")
    return _withdraw(home, store, question.last, now, by, reason)


def withdraw_for_agreement(home: NodeHome, store: NodeStore, agreement: Agreement, now: float) -> list[Approval]:
    """Takes back what was approved under an agreement, where no other one carries it."""
    reason = f"agreement {agreement.agreement} was withdrawn by {agreement.owner}"
    gone = [
        approval
        for approval in _approved(store)
        if approval.study == agreement.study
        and f"{approval.node}/{approval.dataset}" in agreement.datasets
        and store.admitting(approval.study, f"{approval.node}/{approval.dataset}", now) is None
    ]
    return [_withdraw(home, store, approval, now, BY_POLICY, reason) for approval in gone]


def withdraw_dataset(home: NodeHome, store: NodeStore, dataset: str | None, now: float, reason: str) -> list[Approval]:
    """Takes back every approval on a dataset, or on all of them."""
    gone = [approval for approval in _approved(store) if dataset in (None, approval.dataset)]
    return [_withdraw(home, store, approval, now, "", reason) for approval in gone]


def finish_withdrawals(home: NodeHome, store: NodeStore, now: float) -> list[Approval]:
    """Completes withdrawals of which only the marker was written when the machine stopped."""
    unfinished = [
        each for each in _approved(store) if home.withdrawn_marker(each.study, each.plan_digest, each.dataset).exists()
    ]
    return [_withdraw(home, store, approval, now, "", "withdrawn") for approval in unfinished]


def decide_pending(
    home: NodeHome, store: NodeStore, policy: Policy, now: float
) -> list[tuple[Question, Approval | ConcordError]]:
    """Approves what a rule of the policy approves; the rest waits for a person. Reads the data of each.

    Returns:
        For each that a rule fits: the approval, or why there is none.
    """
    decided: list[tuple[Question, Approval | ConcordError]] = []
    for question in questions(home, store, policy, now):
        if question.state not in ("pending", "expired") or question.missing or not question.verdict.automatic:
            continue
        try:
            decided.append(
                (question, approve(home, store, policy, question, now, BY_POLICY, "by a rule of the policy"))
            )
        except (ConsentRefusedError, DataError, ConflictError, UsageError) as error:
            decided.append((question, error))
    return decided


def count_rows(store: NodeStore, dataset: Dataset, plan: Plan, node: str, roots: Sequence[str] = ()) -> tuple[int, int]:
    """The rows for training and for evaluation of the plan's split, exactly as in a simulation with this node's name.

    Raises:
        DataError: the data changed since registration, or do not fit the plan's contract, or give no training rows.
    """
    import numpy as np

    from concord_client.data import NodeDataset, Split, read_batches, read_data
    from concord_client.data.dataset import split_for

    reading = verify(store, dataset, roots)
    guard = StatisticsGuard(store)
    if plan.statistics is not None and plan.statistics.rows == "all":
        counted: list[int] = []

        def batches() -> Iterator[Batch]:
            for data in read_batches(dataset.spec, plan, reading=reading):
                counted.append(len(data))
                yield data.inputs, data.targets

        guard.remember_rows(dataset.version, plan, batches())
        return sum(counted), 0
    data = read_data(dataset.spec, plan, reading=reading)
    splits = split_for(plan, data, np.arange(len(data)), node)
    if plan.needs_statistics:
        guard.remember_rows(dataset.version, plan, NodeDataset(node, data.inputs, data.targets, splits).batches())
    if not len(splits[Split.TRAIN]):
        raise DataError(f"dataset {dataset.name} has no training rows")
    held_out = Split.TEST if plan.evaluation.on == "test" else Split.VALIDATION
    return len(splits[Split.TRAIN]), len(splits[held_out])


def last_approved_plan(store: NodeStore, question: Question) -> Plan | None:
    """The plan of the same study and dataset that was last approved here, other than the one in question."""
    digests = [
        approval.plan_digest
        for approval in store.approvals()
        if (approval.study, approval.dataset, approval.decision) == (question.study.study, question.dataset, "approved")
        and approval.plan_digest != question.plan.digest
    ]
    return store.plan(digests[-1]) if digests else None


# Questions and decisions


def _question(
    home: NodeHome,
    store: NodeStore,
    policy: Policy,
    books: Books | str,
    request: Request,
    study: Study,
    plan: Plan,
    dataset: str,
    starters: Mapping[tuple[str, str], set[str]],
    now: float,
) -> Question:
    node = home.config.node
    agreement = store.admitting(study.study, f"{node}/{dataset}", now)
    last = store.last_approval(study.study, plan.digest, dataset)
    refusal = books if isinstance(books, str) else cap_refusal(books, plan, dataset, _version(store, dataset))
    signers = starters.get((study.study, plan.digest), set()) | ({agreement.requester} if agreement else set())
    ceiling = _ceiling(store, dataset)
    if isinstance(ceiling, str):
        missing: tuple[str, ...] = (ceiling,)
        verdict = Verdict(allowed=False, reasons=missing)
    elif agreement is None:
        missing = (f"no agreement that is in force opens dataset {dataset} to study {study.study}",)
        verdict = Verdict(allowed=False, reasons=missing)
    else:
        only = agreement.requester if signers == {agreement.requester} else ""  # of several, no rule is about all
        verdict = policy.verdict(plan, study, agreement, None, dataset, only, ceiling)
        missing = verdict.reasons
    if refusal:
        missing = (*missing, refusal)
    return Question(
        id=request_id(study.study, plan, dataset),
        study=study,
        plan=plan,
        dataset=dataset,
        requested_by=", ".join(sorted(signers)) or "nobody who signed",
        received_at=request.received_at,
        agreement=agreement,
        last=last,
        state=_state(last, now),
        verdict=verdict,
        missing=missing,
    )


def _ceiling(store: NodeStore, dataset: str) -> DataTerms | str | None:
    """The terms of a dataset's card, or why they cannot be read: then nothing is approved."""
    try:
        return terms_of(store, dataset)
    except DocumentRefusedError as error:
        return str(error)


def _books(home: NodeHome) -> Books | str:
    """The privacy ledger's, or why it cannot be used: then nothing is approved."""
    try:
        with home.ledger() as ledger:
            return ledger.books()
    except ArtefactError as error:
        return str(error)


def _version(store: NodeStore, dataset: str) -> str:
    held = store.dataset(dataset)
    return held.version if held is not None else NO_VERSION


def _starters(store: NodeStore, now: float) -> dict[tuple[str, str], set[str]]:
    """By study and plan: who signed a manifest, of a run that may still go on."""
    found: dict[tuple[str, str], set[str]] = {}
    for stored in store.all("manifest"):
        manifest = store.manifest(stored.id)
        if manifest is not None and now < manifest.not_after:
            found.setdefault((manifest.study, manifest.plan_digest), set()).add(manifest.organisation)
    return found


def _live_runs(store: NodeStore, approval: Approval, now: float) -> list[str]:
    """Of a plan and study that were approved: those that may still begin or go on."""
    manifests = [store.manifest(stored.id) for stored in store.all("manifest")]
    return [
        each.run
        for each in manifests
        if each is not None
        and (each.study, each.plan_digest) == (approval.study, approval.plan_digest)
        and now < each.not_after
    ]


def _state(last: Approval | None, now: float) -> str:
    if last is None:
        return "pending"
    return "expired" if last.decision == "approved" and last.not_after <= now else last.decision


def _datasets_of(home: NodeHome, store: NodeStore, study: Study) -> list[str]:
    """This node's registered datasets that an agreement of the study names, in force or not."""
    agreements = [store.agreement(stored.id) for stored in store.all("agreement")]
    named = {name for each in agreements if each is not None and each.study == study.study for name in each.datasets}
    return [dataset.name for dataset in store.datasets() if f"{home.config.node}/{dataset.name}" in named]


def _approved(store: NodeStore) -> list[Approval]:
    """Of each plan, dataset and study the last decision, where it is a yes."""
    last = {(each.study, each.plan_digest, each.dataset): each for each in store.approvals()}
    return [approval for approval in last.values() if approval.decision == "approved"]


def _about(question: Question) -> _About:
    return question.study.study, question.plan.digest, question.dataset


def _decision(
    home: NodeHome,
    store: NodeStore,
    about: _About,
    decision: Decision,
    last: Approval | None,
    now: float,
    by: str,
    reason: str,
) -> Approval:
    """The next decision about one plan; a no holds until a person says otherwise.

    It is numbered by the time, so that a node that lost its database and enrolled anew is heard again.
    """
    study, plan_digest, dataset = about
    known = store.dataset(dataset) or last
    assert known is not None, "what was never registered was never asked for"
    return Approval(
        node=home.config.node,
        organisation=home.config.organisation,
        dataset=dataset,
        dataset_version=known.version if isinstance(known, Dataset) else known.dataset_version,
        study=study,
        plan_digest=plan_digest,
        decision=decision,
        reason=reason,
        decided_by=by or person(),
        sequence=max(int(now), last.sequence + 1 if last else 1),
        issued_at=int(now),
        not_after=int(now) + NO_HOLDS_S,
    )


def _withdraw(home: NodeHome, store: NodeStore, approval: Approval, now: float, by: str, reason: str) -> Approval:
    """The marker first: from now on nothing is done under this approval, whatever happens next."""
    marker = home.withdrawn_marker(approval.study, approval.plan_digest, approval.dataset)
    try:
        marker.touch(mode=0o600)
        about = approval.study, approval.plan_digest, approval.dataset
        withdrawn = _put(home, store, about, "withdrawn", now, by, reason)
        marker.touch(mode=0o600)  # an approval that was given in between took it away
    except OSError as error:
        raise ArtefactError(f"cannot write {marker}: {explain(error)}. Nothing was withdrawn") from error
    return withdrawn


def _put(
    home: NodeHome, store: NodeStore, about: _About, decision: Decision, now: float, by: str, reason: str
) -> Approval:
    """A no or a withdrawal: it wins over whatever another process decides at the same moment."""
    for _ in range(TRIES):
        approval = _decision(home, store, about, decision, store.last_approval(*about), now, by, reason)
        if store.put_approval(approval, seal(approval, home.identity_key())):
            return approval
    raise ArtefactError("the node's database was changed by another process each time; try again")
