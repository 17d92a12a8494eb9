"""`concord-node ledger`: how much this node's datasets may still tell, and what they have told."""

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concord_client.commands.common import Home, Yes, at_home, confirm, day, lines, send_posted, write
from concord_shared.commands import Json, new_app, show
from concord_shared.errors import UsageError
from concord_shared.text import printable

if TYPE_CHECKING:
    from concord_client.home import NodeHome
    from concord_client.ledger.admission import Forecast
    from concord_client.ledger.books import Books, Standing
    from concord_client.ledger.words import Entry
    from concord_client.store import NodeStore

__all__ = ["register"]

DELTA = 1e-5
ledger = new_app("ledger", "This node's privacy budgets: what its datasets may still tell, and what they have told.")


def register(app: typer.Typer) -> None:
    app.add_typer(ledger)


@ledger.command("show", epilog="**Example**\n\n`concord-node ledger show --entries`")
def show_ledger(
    entries: Annotated[bool, typer.Option("--entries", help="Every entry, oldest first.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show each budget, spent and left; and what each run reserved and was charged."""
    with at_home(home) as (opened, _), opened.ledger() as held:
        books, head = held.books(), held.head
        listed = held.entries() if entries else []
    value: dict[str, Any] = {
        "budgets": [vars(books.account(budget)) for budget in books.budgets.values()],
        "runs": [_run(books, standing) for standing in books.standings.values()],
        "head": vars(head),
    }
    if entries:
        value["entries"] = [_entry(each) for each in listed]
    show(value, as_json, _show)


@ledger.command("set-cap", epilog="**Example**\n\n`concord-node ledger set-cap patients --epsilon 3 --delta 1e-5`")
def set_cap(
    budget: Annotated[str, typer.Argument(help="The budget's name: a dataset, or a name for several.")],
    epsilon: Annotated[float, typer.Option(help="How much its datasets may tell, together and for good.")],
    delta: Annotated[
        float | None,
        typer.Option(help="Well below one in the number of records; 1e-5 by default. Fixed once something is spent."),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A dataset that shares records with the others; repeatable."),
    ] = None,
    despite_unbounded: Annotated[
        bool, typer.Option("--despite-unbounded", help="From now on, though something without a bound left before.")
    ] = False,
    yes: Yes = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Set a budget's cap, or change its ε. Datasets that share records belong into one budget; none ever leaves it."""
    from concord_client.ledger.words import Cap

    with at_home(home) as (opened, store), opened.ledger() as held:
        books = held.books()
        before = books.budgets[budget].word if budget in books.budgets else None
        names = tuple(dict.fromkeys([*(before.datasets if before else ()), *(dataset or ([] if before else [budget]))]))
        versions = _versions(store, names, before.datasets if before else ())
        given = delta if delta is not None else before.delta if before else DELTA
        if not 0 < epsilon < 1e6 or not 0 < given < 1:
            raise UsageError(f"expected --epsilon above 0 and --delta between 0 and 1, got {epsilon:g} and {given:g}")
        word = Cap(
            group=budget,
            datasets=names,
            versions=tuple(dict.fromkeys([*(before.versions if before else ()), *versions])),
            epsilon=epsilon,
            delta=given,
            order=_order(books, budget, epsilon, given),
            despite_unbounded=despite_unbounded,
        )
        if before is not None and epsilon > before.epsilon:
            question = f"Raise budget {budget} from ε {before.epsilon:g} to {epsilon:g}? What was told stays told."
            if not confirm(question, yes):
                return
        held.set_cap(word)
        account = held.books().account(held.books().budgets[budget])
        _told(opened, store)
    show(vars(account), as_json, lambda _: _show_accounts([vars(account)]))


@ledger.command("forecast", epilog="**Example**\n\n`concord-node ledger forecast heart-disease --dataset patients`")
def forecast(
    plan: Annotated[
        str, typer.Argument(help="A plan's TOML file, a shipped plan's name, or the digest of one that was asked for.")
    ],
    dataset: Annotated[str, typer.Option(metavar="NAME", help="A dataset that is registered here.")],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Say what a plan would cost a dataset, and whether it fits. Changes nothing; exit code 1 where it does not."""
    from concord_client.approvals import count_rows
    from concord_client.commands.trial import find_plan
    from concord_client.ledger.admission import forecast as foresee
    from concord_client.policy import Policy
    from concord_client.registry import current_dataset

    with at_home(home) as (opened, store), opened.ledger() as held:
        chosen, _ = find_plan(store, plan)
        registered = current_dataset(store, dataset)
        roots = Policy.load(opened.policy_file).data.roots
        rows, _ = count_rows(store, registered, chosen, opened.config.node, roots)
        ahead = foresee(held.books(), chosen, dataset, registered.version, rows)
    show(_forecast(ahead, rows), as_json, lambda _: write(*(printable(row) for row in ahead.words())))
    if ahead.refusal:
        raise typer.Exit(1)


@ledger.command("verify", epilog="**Example**\n\n`concord-node ledger verify`")
def verify(home: Home = None, as_json: Json = False) -> None:
    """Read every entry: chain, signatures, rules, and that nothing was rolled back. Exit code 1 where one is wrong."""
    from concord_client.ledger.witness import check_witness, witnessed

    with at_home(home) as (opened, store), opened.ledger() as held:
        head = held.verify()
        check_witness(store, held)
        told = witnessed(store).sequence
    value = {"entries": head.sequence, "hash": head.hash, "witnessed": told}
    show(
        value,
        as_json,
        lambda _: write(f"{head.sequence} entries, as they were written; the last one: {head.hash}", _witness(told)),
    )


@ledger.command("close", epilog="**Example**\n\n`concord-node ledger close run-7 --reason 'it failed'`")
def close(
    run: Annotated[str, typer.Argument(help="The run's id.")],
    reason: Annotated[str, typer.Option(help="In your words.")] = "",
    yes: Yes = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Close a run's reservation: no round of it follows here, and what it was never charged is free again."""
    with at_home(home) as (opened, store), opened.ledger() as held:
        said = store.get("run", run)
        state = str(said.body["state"]) if said else "unknown"
        ended = state in ("succeeded", "failed", "stopped")
        warning = "" if ended else f" As far as this node knows it goes on (state: {state}): it ends here then."
        if not confirm(f"Close run {run}?{warning}", yes):
            return
        held.close_run(run, reason)
        standing = held.books().standings[run]
        value = _run(held.books(), standing)
        _told(opened, store)
    show(value, as_json, lambda _: write(f"run {run} is closed; charged rounds: {len(standing.charged)}"))


@ledger.command("repair", epilog="**Example**\n\n`concord-node ledger repair`")
def repair(yes: Yes = False, home: Home = None, as_json: Json = False) -> None:
    """Go on after entries were lost, as when a backup was restored: every budget counts as spent.

    First try to find the newer ledger.db: with it nothing is lost, and this command is not needed. Afterwards, set-cap
    says by how much you are ready to exceed the earlier caps. An altered entry cannot be repaired.
    """
    from concord_client.ledger.witness import witnessed

    with at_home(home) as (opened, store), opened.ledger(repairing=True) as held:
        known = max(held.noted(), witnessed(store), key=lambda mark: mark.sequence)
        if not confirm(
            f"Entries after {held.head.sequence} are lost (known: {known.sequence}). Count every budget as spent?", yes
        ):
            return
        held.repair(known)
        accounts = [held.books().account(budget) for budget in held.books().budgets.values()]
        _told(opened, store)
    show(
        {"repaired_after": known.sequence, "budgets": [vars(each) for each in accounts]},
        as_json,
        lambda _: _show({"budgets": [vars(each) for each in accounts], "runs": []}),
    )


def _versions(store: "NodeStore", names: tuple[str, ...], known: tuple[str, ...]) -> list[str]:
    """The content of the budget's datasets as registered. Raises: UsageError: a new one is not registered here."""
    found = [store.dataset(name) for name in names]
    missing = [name for name, held in zip(names, found, strict=True) if held is None and name not in known]
    if missing:
        registered = ", ".join(each.name for each in store.datasets()) or "none"
        raise UsageError(
            f"no dataset {', '.join(missing)} is registered here; there are: {registered}. A budget of another name "
            "says whose it is with --dataset NAME"
        )
    return [held.version for held in found if held is not None]


def _order(books: "Books", budget: str, epsilon: float, delta: float) -> float:
    """The best one for this cap, until something rests on an earlier one."""
    from concord_client.ledger.filter import choose_order

    before = books.budgets.get(budget)
    if before is not None and not books.is_untouched(before):
        return before.word.order
    assert books.opened is not None
    return choose_order(books.opened.orders, epsilon, delta)


def _told(home: "NodeHome", store: "NodeStore") -> None:
    """The coordinator is told where the ledger stands, if it can be reached; else a running node tells it later."""
    from concord_client.ledger.witness import post_head

    with home.ledger() as held:
        post_head(home, store, held.head, time.time())
    send_posted(home, store)


# Words


def _run(books: "Books", standing: "Standing") -> dict[str, Any]:
    word = standing.word
    return {
        "run": word.run,
        "study": word.study,
        "plan_digest": word.plan_digest,
        "dataset": word.dataset,
        "rows": word.rows,
        "rounds": word.rounds,
        "charged": len(standing.charged),
        "released": len(standing.released),
        "closed": standing.closed,
        "bounded": standing.is_bounded,
        "epsilon": word.epsilon,
        "delta": word.delta,
        "budgets": [each.word.group for each in books.budgets_of(word.dataset, word.dataset_version)],
    }


def _entry(entry: "Entry") -> dict[str, Any]:
    word = entry.word.model_dump(mode="json", exclude={"rdp", "orders", "kind"})
    return {"sequence": entry.sequence, "at": day(entry.at), "kind": entry.word.kind, "by": entry.by, "says": word}


def _forecast(ahead: "Forecast", rows: int) -> dict[str, Any]:
    return {
        "plan": ahead.plan.name,
        "plan_digest": ahead.plan.digest,
        "dataset": ahead.dataset,
        "rows": rows,
        "epsilon": ahead.cost.epsilon if ahead.cost else None,
        "delta": ahead.cost.delta if ahead.cost else None,
        "budgets": [vars(account) | {"cost": cost if ahead.cost else None} for account, cost in ahead.shares],
        "fits": not ahead.refusal,
        "refusal": ahead.refusal,
    }


def _witness(told: int) -> str:
    return f"the coordinator was told of entry {told}" if told else "the coordinator was told of none of them"


def _show(value: dict[str, Any]) -> None:
    if value["budgets"]:
        _show_accounts(value["budgets"])
    else:
        write("no cap is set: plans are written down, none is refused. concord-node ledger set-cap DATASET --epsilon E")
    if value["runs"]:
        rows = [("run", "dataset", "charged", "left", "ε of the plan", "state")]
        rows += [
            (
                run["run"],
                run["dataset"],
                f"{run['charged']} of {run['rounds']}",
                run["released"],
                f"{run['epsilon']:.3g}" if run["bounded"] else "∞",
                "closed" if run["closed"] else "open" if run["charged"] < run["rounds"] else "used",
            )
            for run in value["runs"]
        ]
        write("", "runs (rounds charged; answers that left):")
        lines(rows)
    for each in value.get("entries", []):
        says = ", ".join(f"{name} {item}" for name, item in each["says"].items() if item not in ("", None))
        by = f" by {each['by']}" if each["by"] else ""
        write(printable(f"{each['sequence']:>5}  {each['at']}  {each['kind']}{by}: {says}"))


def _show_accounts(accounts: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("budget", "datasets", "ε spent", "reserved", "left", "of", "δ"):
        table.add_column(heading, justify="left" if heading in ("budget", "datasets") else "right")
    for each in accounts:
        figures = (f"{each[name]:.4g}" for name in ("spent", "reserved", "left", "epsilon"))
        table.add_row(each["group"], ", ".join(each["datasets"]), *figures, f"{each['delta']:g}")
    Console(file=sys.stdout, highlight=False).print(table)
    for each in accounts:
        if each["entries_lost"]:
            write(f"{each['group']}: entries of the ledger were lost, so what was left then counts as spent")
        if each["runs_unbounded"]:
            runs = ", ".join(each["runs_unbounded"])
            write(f"{each['group']}: ε ∞ before the cap: without a bound, rounds of run {runs} told of its records")
