"""This node's answer to a preflight: could a run of this plan begin here?

    asked ──► within the owner's daily number? agreement, policy ──no──► answered, and no data were looked at
                │ yes
                ▼ the training process: data, contract, budget, then a dry round of two batches ──► answered, signed

Nothing of what is computed from rows leaves but times, sizes, names of the contract and coarse counts, so no budget is
charged. The dry round's model is a throw-away copy.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from concord_client.approvals import DAY_S, request_id
from concord_client.cards import terms_of
from concord_client.evidence import alarms
from concord_client.home import NodeHome
from concord_client.policy import Policy
from concord_client.store import NodeStore
from concord_client.training_job import NodeStoppingError
from concord_shared.documents import Agreement, DataTerms
from concord_shared.errors import ConcordError, ConsentRefusedError, DocumentRefusedError
from concord_shared.plan.schema import Plan
from concord_shared.preflight import (
    DIFFERENCES_MAX,
    NODE_CHECKS,
    Check,
    CheckName,
    Figures,
    PreflightReport,
    PreflightRequest,
    Status,
)
from concord_shared.signing import seal
from concord_shared.text import printable

__all__ = ["Examiner", "answer_preflights"]

log = logging.getLogger(__name__)

DATA_S, ROUND_S = 300.0, 180.0
"""How long the two parts of the work may take."""
NOT_REACHED = "not looked at: a check before it says no"
FAILED = {
    "data": "the work on this dataset failed, or took too long or too much memory",
    "round": "the dry round failed, or took too long or too much memory",
}
FAILED_NEXT = {
    "data": "try it there: concord-node check PLAN --data SPEC; then resources.memory_mb in policy.toml",
    "round": "try it there: concord-node try PLAN --dataset NAME; then resources.memory_mb, or a smaller batch",
}
EXAMINED: tuple[CheckName, ...] = ("data", "contract", "budget")
DRY: tuple[CheckName, ...] = ("device", "round", "memory")


class Examiner(Protocol):
    """A process that may read data; `TrainingProcess` is one."""

    def examine(
        self, part: str, home: Path, plan: Plan, dataset: str, deadline_s: float, may_go_on: Callable[[], None]
    ) -> Mapping[str, Any]:
        """Raises: ConcordError: there is no answer."""

    def rest(self) -> None: ...


@dataclass
class _Answer:
    checks: dict[CheckName, Check] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    figures: Figures = field(default_factory=Figures)

    def say(self, name: CheckName, status: Status, says: str, next: str = "") -> None:
        self.checks[name] = Check(name=name, status=status, says=_short(says), next=_short(next))

    def take(self, found: Mapping[str, Any]) -> None:
        for each in found["checks"]:
            self.say(each["name"], each["status"], each["says"], each["next"])
        self.differences += [_short(each) for each in found.get("differences", ())]
        self.figures = Figures(**found.get("figures", {}))

    def is_ok(self, *names: CheckName) -> bool:
        return all(name in self.checks and self.checks[name].status == "ok" for name in names)


def answer_preflights(
    home: NodeHome, store: NodeStore, examiner: Examiner, clock: Callable[[], float] = time.time
) -> list[PreflightReport]:
    """Answers and posts what was asked and has not expired. One that fails is asked again by the next call.

    Raises:
        UsageError: the policy cannot be read. ArtefactError: the home or its database fails.
    """
    answered = []
    for asked in store.preflights():
        now = clock()
        dataset, plan = asked.dataset_of(home.config.node), store.plan(asked.plan_digest)
        if asked.not_after <= now or dataset is None or plan is None:
            continue
        policy = Policy.load(home.policy_file)
        within = f"{asked.study}/"
        declined = store.happened("preflight:answer", within, DAY_S) >= policy.preflight.per_day
        found = _decline(policy) if declined else _look(home, store, policy, examiner, asked, plan, dataset, clock)
        report = _report(home, asked, dataset, found, clock())
        action = "preflight:decline" if declined else "preflight:answer"
        store.answer_preflight(asked, report, seal(report, home.identity_key()), action)
        answered.append(report)
    return answered


def _decline(policy: Policy) -> _Answer:
    answer = _Answer()
    answer.say(
        "policy",
        "no",
        f"this node answers {policy.preflight.per_day} preflights of a study in a day, and has",
        "wait a day, or raise preflight.per_day: concord-node policy edit",
    )
    return answer


def _look(
    home: NodeHome,
    store: NodeStore,
    policy: Policy,
    examiner: Examiner,
    asked: PreflightRequest,
    plan: Plan,
    dataset: str,
    clock: Callable[[], float],
) -> _Answer:
    answer = _Answer()
    agreement = store.admitting(asked.study, f"{home.config.node}/{dataset}", clock())
    ceiling = _ceiling(store, dataset)
    _judge(answer, store, policy, agreement, ceiling, asked, plan, dataset)
    if agreement is None or isinstance(ceiling, str) or not answer.is_ok("agreement", "policy"):
        return answer
    _approval(answer, store, policy, agreement, ceiling, asked, plan, dataset, clock())

    def may_go_on() -> None:
        if store.admitting(asked.study, f"{home.config.node}/{dataset}", clock()) is None:
            raise ConsentRefusedError("the agreement was withdrawn")

    def examine(part: str, deadline_s: float, names: Iterable[CheckName]) -> None:
        try:
            answer.take(examiner.examine(part, home.path, plan, dataset, deadline_s, may_go_on))
        except ConsentRefusedError:
            answer.say("agreement", "no", "the agreement was withdrawn meanwhile", "agree anew")
        except NodeStoppingError:
            raise
        except ConcordError as error:  # its words are for this node alone
            log.warning("a part of a preflight failed", extra={"part": part, "kind": type(error).__name__})
            for name in names:
                answer.say(name, "no", FAILED[part], FAILED_NEXT[part])

    examine("data", DATA_S, EXAMINED)
    if answer.is_ok("agreement", "data", "contract"):
        if reason := _no_dry_round(policy, answer, clock()):
            for name in DRY:
                answer.say(name, "unknown", *reason)
        else:
            busy = bool(store.fact("works"))
            examine("round", ROUND_S, DRY)
            if busy and answer.is_ok("round"):
                says = f"{answer.checks['round'].says}; measured while this node worked for a run, so it may be quicker"
                answer.say("round", "ok", says)
    examiner.rest()
    return answer


def _judge(
    answer: _Answer,
    store: NodeStore,
    policy: Policy,
    agreement: Agreement | None,
    ceiling: DataTerms | str | None,
    asked: PreflightRequest,
    plan: Plan,
    dataset: str,
) -> None:
    """The signed terms, and the owner's own rules."""
    own, study = policy.reasons(plan, asked.participants), store.study(asked.study)
    if agreement is None or study is None:
        answer.say("agreement", "no", "no agreement that is in force opens this dataset to the study", "agree anew")
    else:
        if isinstance(ceiling, str):
            answer.say("agreement", "no", ceiling, f"concord-node data describe {dataset}")
            return
        verdict = policy.verdict(
            plan, study, agreement, asked.participants, dataset, asked.organisation, ceiling, asked.organisation
        )
        if terms := [reason for reason in verdict.reasons if reason not in own]:
            answer.say("agreement", "no", "; ".join(terms), "offer other terms, or ask the study for another plan")
        else:
            answer.say("agreement", "ok", f"agreement {agreement.agreement} opens it")
    if own:
        answer.say("policy", "no", "; ".join(own), "concord-node policy edit, or ask the study for another plan")
    elif alarms(store) and policy.evidence.on_fork == "stop":
        answer.say("policy", "no", "a log was rewritten: this node takes part in nothing", "concord-node doctor")
    else:
        answer.say("policy", "ok", "this node's policy allows it")


def _ceiling(store: NodeStore, dataset: str) -> DataTerms | str | None:
    """The terms of the dataset's card, or what is said where they cannot be read."""
    try:
        return terms_of(store, dataset)
    except DocumentRefusedError:
        return "the terms of the dataset cannot be read; the node's own log says why"


def _approval(
    answer: _Answer,
    store: NodeStore,
    policy: Policy,
    agreement: Agreement,
    ceiling: DataTerms | None,
    asked: PreflightRequest,
    plan: Plan,
    dataset: str,
    now: float,
) -> None:
    last, held = store.last_approval(asked.study, plan.digest, dataset), store.dataset(dataset)
    study, show = store.study(asked.study), f"concord-node approvals show {request_id(asked.study, plan, dataset)}"
    if last is not None and last.decision != "approved":
        answer.say("approval", "no", f"a person has {last.decision} it", f"look again: {show}")
    elif last is None or last.not_after <= now:
        automatic = (
            study is not None
            and policy.verdict(plan, study, agreement, None, dataset, agreement.requester, ceiling).automatic
        )
        if automatic:
            answer.say("approval", "ok", "a rule of this node's policy approves it")
        else:
            says = "a person has yet to decide" if last is None else "the approval has expired"
            answer.say("approval", "unknown", says, f"look and decide: {show}")
    elif held is None or held.version != last.dataset_version:
        answer.say("approval", "unknown", "the approval is for other content of this dataset", f"decide anew: {show}")
    else:
        answer.say("approval", "ok", "approved")


def _no_dry_round(policy: Policy, answer: _Answer, now: float) -> tuple[str, str] | None:
    """Why nothing is trained now, and what to do; None where it may be."""
    if not policy.preflight.dry_round and not answer.is_ok("approval"):
        return "this node trains nothing before it is approved", "decide first; then ask again"
    if not policy.resources.works_at(datetime.fromtimestamp(now, UTC).astimezone()):
        return "outside of this node's working hours", "ask again within them, or concord-node policy edit"
    return None


def _report(home: NodeHome, asked: PreflightRequest, dataset: str, found: _Answer, now: float) -> PreflightReport:
    for name in NODE_CHECKS:
        if name not in found.checks:
            found.say(name, "unknown", NOT_REACHED)
    listed = found.differences[:DIFFERENCES_MAX]
    try:
        return PreflightReport(
            preflight=asked.preflight,
            request_digest=asked.digest,
            node=home.config.node,
            organisation=home.config.organisation,
            dataset=dataset,
            checks=tuple(found.checks[name] for name in NODE_CHECKS),
            differences=tuple(listed),
            more=len(found.differences) - len(listed),
            figures=found.figures,
            issued_at=int(now),
        )
    except ValidationError as error:
        raise AssertionError("a report is made of what this module says") from error


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 300 else f"{text[:299]}…"
