"""`concord-node try`: what a plan would do here, before anyone says yes to it."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concord_client.commands.common import Home, at_home, home_path, lines, write
from concord_shared.commands import Json, show
from concord_shared.errors import UsageError

if TYPE_CHECKING:
    from concord_client.data import Reading
    from concord_client.policy import Resources
    from concord_client.store import NodeStore
    from concord_shared.plan.schema import Plan

__all__ = ["find_plan", "register"]

ALONE = "node-1"
"""The name of a node that is not enrolled yet: of the first one in a simulation."""


def register(app: typer.Typer) -> None:
    app.command("try", epilog="**Example**\n\n`concord-node try heart-disease --data csv:patients.csv`")(try_)


def try_(
    plan: Annotated[
        str, typer.Argument(help="A plan's TOML file, a shipped plan's name, or the digest of one that was asked for.")
    ],
    data: Annotated[str, typer.Option(metavar="SPEC", help="csv:FILE, npz:FILE, idx:DIR, …; or use --dataset.")] = "",
    dataset: Annotated[str, typer.Option(metavar="NAME", help="A dataset that is registered here.")] = "",
    rounds: Annotated[int, typer.Option(min=0, help="Only so many rounds; 0: as many as the plan has.")] = 0,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Train a plan on this node's own data alone. Nothing is sent; the figures are for your eyes.

    Works without an enrolment, with --data.
    """
    from concord_client.trial import try_plan

    if bool(data) == bool(dataset):
        raise UsageError("name the data: --data SPEC, or --dataset NAME for one that is registered here")
    chosen, spec, node, resources, reading = _resolve(plan, data, dataset, home)
    result = try_plan(
        chosen,
        spec,
        node,
        resources.device,
        resources.threads or None,
        rounds or None,
        observer=lambda record: None if as_json else _progress(record, chosen),
        reading=reading,
    )
    show(result, as_json, _show)


def _resolve(plan: str, data: str, dataset: str, home: Path | None) -> tuple["Plan", str, str, "Resources", "Reading"]:
    """Plan, data, the node's name, what its owner lends, how data are read; with or without an enrolled home."""
    from concord_client.data import Reading, resolve_spec
    from concord_client.policy import Resources
    from concord_shared.plan import load_plan

    if not (home_path(home) / "node.toml").is_file():
        if dataset:
            raise UsageError(f"--dataset {dataset}: this node is not enrolled, so nothing is registered; use --data")
        loaded = load_plan(plan)
        return loaded.plan, resolve_spec(data, loaded.simulate.data), ALONE, Resources(), Reading()
    from concord_client.policy import Policy
    from concord_client.registry import current_dataset, verify

    with at_home(home) as (opened, store):
        chosen, default = find_plan(store, plan)
        policy = Policy.load(opened.policy_file)
        if dataset:
            registered = current_dataset(store, dataset)
            spec, reading = registered.spec, verify(store, registered, policy.data.roots)
        else:
            spec, reading = resolve_spec(data, default), Reading(roots=policy.data.roots)
        return chosen, spec, opened.config.node, policy.resources, reading


def find_plan(store: "NodeStore", plan: str) -> tuple["Plan", str]:
    """One that was asked for, by its digest, or one of a file; and where its data are in a simulation."""
    from concord_shared.plan import load_plan

    held = [stored.id for stored in store.all("plan") if len(plan) >= 6 and stored.id.startswith(plan.lower())]
    if len(held) == 1:
        chosen = store.plan(held[0])
        assert chosen is not None
        return chosen, ""
    loaded = load_plan(plan)
    return loaded.plan, loaded.simulate.data


def _progress(record: Mapping[str, Any], plan: "Plan") -> None:
    from concord_shared.metrics import headline

    figure = headline(plan.data)
    value = record["metrics"].get(figure)
    sys.stderr.write(
        f"round {record['round']} of {plan.rounds.count}: {figure} {_number(value)} on own test rows, "
        f"{record['seconds']:.2f} s\n"
    )


def _show(result: dict[str, Any]) -> None:
    figures = {
        key: value for key, value in result["metrics"].items() if isinstance(value, float | int) and key != "rows"
    }
    estimate = result["estimate"]
    rows = result["rows"]
    lines(
        [
            ("plan", f"{result['plan']} ({result['plan_digest'][:12]})"),
            ("node", f"{result['node']}: {rows['train']} training rows, {rows['test']} test rows"),
            ("device", f"{result['device']} ({result['device_name']}), {result['precision']}"),
            *((key, _number(value)) for key, value in figures.items()),
            ("time a round", f"{result['seconds_per_round']:.2f} s"),
            (f"{estimate['rounds']} rounds", f"about {estimate['seconds']:.0f} s of work here"),
        ]
    )
    write(
        "",
        "These are this node's figures alone, on its own test rows. What the federation will reach is not known before",
        "it ran: others' data may help or not. A round of a federation takes as long as its slowest node, and the way.",
        "Nothing was sent. The privacy ledger is charged nothing for it: keep these figures to yourself.",
    )
    if not result["complete"]:
        write(f"Only {len(result['rounds'])} of {estimate['rounds']} rounds were tried.")


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}"
