"""`concord-node approvals`: what is asked of this node, and a person's answer."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concord_client.commands.common import Home, Yes, at_home, confirm, day, lines, send_posted, write
from concord_shared.commands import Json, new_app, show
from concord_shared.text import printable

if TYPE_CHECKING:
    from concord_client.approvals import Question
    from concord_client.home import NodeHome
    from concord_client.store import NodeStore
    from concord_shared.documents import Approval

__all__ = ["register"]

approvals = new_app("approvals", "Plans that others ask this node to run, and what you say to each.")
Id = Annotated[str, typer.Argument(metavar="ID", help="The request's id, or the beginning of it.")]
Reason = Annotated[str, typer.Option(help="In your words; the others read it.")]


def register(app: typer.Typer) -> None:
    app.add_typer(approvals)


@approvals.command("list", epilog="**Example**\n\n`concord-node approvals list --pending`")
def show_list(
    pending: Annotated[bool, typer.Option("--pending", help="Only what waits for you.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """List what is asked, newest first; and what arrived and was refused."""
    with at_home(home) as (opened, store):
        asked = _questions(opened, store)
        refused = store.refused()
    shown = [each for each in asked if not pending or each.state in ("pending", "expired")]

    def text(_: Any) -> None:
        if not shown:
            write("nothing waits" if pending else "nothing was asked")
        else:
            rows = [("id", "state", "study", "plan", "dataset", "asked by", "since")]
            rows += [
                (e.id, e.state, e.study.study, e.plan.name, e.dataset, e.requested_by, day(e.received_at))
                for e in shown
            ]
            lines(rows)
        if refused:
            write("", "arrived and was refused:")
            write(*(printable(f"  {day(each.at)}  {each.kind} {each.subject}: {each.reason}") for each in refused))

    notes = [
        {"at": day(each.at), "kind": each.kind, "subject": each.subject, "reason": each.reason} for each in refused
    ]
    show({"requests": [_summary(each) for each in shown], "refused": notes}, as_json, text)


@approvals.command("show", epilog="**Example**\n\n`concord-node approvals show 4f2a`")
def show_one(id: Id, home: Home = None, as_json: Json = False) -> None:
    """Show one request: who asks what, for which purpose, and what would leave this machine."""
    with at_home(home) as (opened, store):
        question = _find(opened, store, id)
        detail = _detail(opened, store, question)
    show(_summary(question) | detail, as_json, lambda _: _write_question(question, detail))


@approvals.command("approve", epilog="**Example**\n\n`concord-node approvals approve 4f2a`")
def approve(id: Id, reason: Reason = "", yes: Yes = False, home: Home = None, as_json: Json = False) -> None:
    """Say yes, after reading the data and comparing agreement, policy and the plan's contract."""
    from concord_client import approvals as decisions
    from concord_client.policy import Policy

    with at_home(home) as (opened, store):
        question = _find(opened, store, id)
        if not yes:
            _write_question(question, _detail(opened, store, question))
        if question.missing or not confirm("Approve this plan?", yes):
            if question.missing:
                decisions.approve(opened, store, Policy.load(opened.policy_file), question, time.time())
            return
        rules = Policy.load(opened.policy_file)
        approval = decisions.approve(opened, store, rules, question, time.time(), reason=reason)
        _told(approval, question, send_posted(opened, store), as_json)


@approvals.command("reject", epilog="**Example**\n\n`concord-node approvals reject 4f2a --reason 'not our purpose'`")
def reject(id: Id, reason: Reason = "", yes: Yes = False, home: Home = None, as_json: Json = False) -> None:
    """Say no."""
    from concord_client import approvals as decisions

    with at_home(home) as (opened, store):
        question = _find(opened, store, id)
        if confirm(f"Reject plan {question.plan.name} of study {question.study.study}?", yes):
            approval = decisions.reject(opened, store, question, time.time(), reason=reason)
            _told(approval, question, send_posted(opened, store), as_json)


@approvals.command("withdraw", epilog="**Example**\n\n`concord-node approvals withdraw 4f2a`")
def withdraw(id: Id, reason: Reason = "", home: Home = None, as_json: Json = False) -> None:
    """Take a yes back, at once: before the next batch of work, whether or not the coordinator can be reached."""
    from concord_client import approvals as decisions

    with at_home(home) as (opened, store):
        question = _find(opened, store, id)
        approval = decisions.withdraw(opened, store, question, time.time(), reason=reason)
        _told(approval, question, send_posted(opened, store), as_json)


def _questions(opened: "NodeHome", store: "NodeStore") -> "list[Question]":
    from concord_client.approvals import finish_withdrawals, questions
    from concord_client.policy import Policy

    finish_withdrawals(opened, store, time.time())
    return questions(opened, store, Policy.load(opened.policy_file), time.time())


def _find(opened: "NodeHome", store: "NodeStore", id: str) -> "Question":
    from concord_client.approvals import find_question
    from concord_client.policy import Policy

    return find_question(opened, store, Policy.load(opened.policy_file), id, time.time())


def _summary(question: "Question") -> dict[str, Any]:
    return {
        "id": question.id,
        "state": question.state,
        "study": question.study.study,
        "title": question.study.title,
        "purpose": question.study.purpose,
        "organisation": question.study.organisation,
        "plan": question.plan.name,
        "plan_digest": question.plan.digest,
        "dataset": question.dataset,
        "requested_by": question.requested_by,
        "received_at": day(question.received_at),
        "missing": list(question.missing),
    }


def _detail(home: "NodeHome", store: "NodeStore", question: "Question") -> dict[str, Any]:
    from concord_client.approvals import last_approved_plan
    from concord_client.plan_words import describe_plan, plan_difference

    before = last_approved_plan(store, question)
    terms = question.agreement.terms if question.agreement else None
    return {
        "words": describe_plan(question.plan),
        "privacy": _privacy(home, store, question),
        "agreement": question.agreement.agreement if question.agreement else None,
        "terms": terms.model_dump(mode="json") if terms else None,
        "compared_with": before.digest if before else None,
        "difference": plan_difference(before, question.plan) if before else [],
        "decided_by": question.last.decided_by if question.last else None,
        "reason": question.last.reason if question.last else None,
        "not_after": day(question.last.not_after) if question.last and question.state == "approved" else None,
    }


def _privacy(home: "NodeHome", store: "NodeStore", question: "Question") -> list[str]:
    """What the plan costs the dataset's budget. Reads the data: the cost depends on their number."""
    from concord_client.approvals import forecast_of
    from concord_shared.errors import ConcordError

    try:
        return forecast_of(home, store, question).words()
    except ConcordError as error:
        return [f"What this plan costs is not known: {error}"]


def _write_question(question: "Question", detail: dict[str, Any]) -> None:
    study, terms = question.study, detail["terms"]
    write(
        f"{question.id}  {question.state}",
        printable(f"asked by   {question.requested_by}, {day(question.received_at)}"),
        printable(f"study      {study.study} of {study.organisation}: {study.title}"),
        printable(f"members    {', '.join(dict.fromkeys([study.organisation, *study.members]))}"),
        *(printable(f"purpose    {row}") for row in study.purpose.splitlines() or [""]),
        f"dataset    {question.dataset}",
        printable(f"plan       {question.plan.name}, digest {question.plan.digest[:16]}"),
    )
    if terms:
        ends = day(terms["not_after"])
        allowed = ", ".join(terms["models"]) or "any model"
        write(
            f"agreement  {detail['agreement']}, until {ends}: {allowed}, at most {terms['rounds_max']} rounds, "
            f"at least {terms['minimum_cohort']} nodes"
        )
        for what, words in (("data for", terms.get("purposes")), ("model for", terms.get("outputs"))):
            if words is not None:
                write(f"{what.ljust(11)}{', '.join(words) or 'nothing'}")
        write(*(printable(f"terms      {row}") for row in terms["use"].splitlines()))
    write("", *(printable(f"- {row}") for row in (*detail["words"], *detail["privacy"])))
    if detail["compared_with"]:
        write("", f"Compared with plan {detail['compared_with'][:16]}, the last one approved for this study:")
        write(*(printable(f"  {row}") for row in detail["difference"]))
    if question.missing:
        write("", "Cannot be approved:", *(printable(f"  {row}") for row in question.missing))
    write("")


def _told(approval: "Approval", question: "Question", sent: str, as_json: bool) -> None:
    rows = f"; rows: {approval.rows} to train, {approval.evaluation_rows} to evaluate" if approval.rows else ""
    until = f", until {day(approval.not_after)}" if approval.decision == "approved" else ""
    show(
        approval.model_dump(mode="json") | {"id": question.id, "delivery": sent},
        as_json,
        lambda _: write(f"{question.id} {approval.decision}{until}{rows}", f"the decision: {sent}"),
    )
