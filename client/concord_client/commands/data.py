"""`concord-node data`: the node's datasets. Nothing leaves but the card of one that is published."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concord_client.commands import cards
from concord_client.commands.common import Home, Yes, at_home, confirm, day, lines, send_posted, write
from concord_shared.commands import Json, new_app, show

if TYPE_CHECKING:
    from concord_client.store import Dataset

__all__ = ["register"]

data = new_app("data", "This node's datasets: they stay here, only the card of a published one leaves.")
Name = Annotated[str, typer.Argument(help="The dataset's name.")]


def register(app: typer.Typer) -> None:
    cards.register(data)
    app.add_typer(data)


@data.command("add", epilog="**Example**\n\n`concord-node data add patients csv:patients.csv --plan heart-disease`")
def add(
    name: Annotated[str, typer.Argument(help="A name of small letters, digits and hyphens.")],
    spec: Annotated[str, typer.Argument(help="csv:FILE, parquet:FILE, npz:FILE, idx:DIR, images:DIR.")],
    plan: Annotated[str, typer.Option(help="Check against this plan's data contract first.")] = "",
    title: Annotated[str, typer.Option(help="One line for its card.")] = "",
    description: Annotated[str, typer.Option(help="For its card.")] = "",
    licence: Annotated[str, typer.Option(help="For its card: an SPDX expression.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Register new content under a name that exists.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Publish its card as well.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Register a dataset at this node. Path, columns and content stay here unless its card is published."""
    from concord_client import registry
    from concord_client.sync import retry_refused

    with at_home(home) as (opened, store):
        before = store.dataset(name)
        dataset = registry.add_dataset(
            store, name, spec, time.time(), plan, title, description, licence, replaces=replace
        )
        if publish:
            registry.publish(opened, store, name, time.time())
        sent = send_posted(opened, store) if publish else ""
        retry_refused(opened, store, time.time())

    def text(_: dict[str, Any]) -> None:
        write(f"registered {name}: {dataset.rows} rows, version {dataset.version[:12]}")
        if publish:
            write(f"its card: {sent}")
        elif before is not None and before.published:
            write(f"its published card is of the earlier version: concord-node data publish {name}")

    show(_fields(dataset) | {"card": sent}, as_json, text)


@data.command("list", epilog="**Example**\n\n`concord-node data list --json`")
def show_list(home: Home = None, as_json: Json = False) -> None:
    """List the datasets that are registered here."""
    with at_home(home) as (_, store):
        datasets = store.datasets()

    def text(_: Any) -> None:
        rows = [("name", "rows", "kind", "version", "published", "where")]
        rows += [
            (each.name, str(each.rows), each.input, each.version[:12], "yes" if each.published else "no", each.spec)
            for each in datasets
        ]
        lines(rows)

    show({"datasets": [_fields(each) for each in datasets]}, as_json, text)


@data.command("show", epilog="**Example**\n\n`concord-node data show patients`")
def show_one(name: Name, home: Home = None, as_json: Json = False) -> None:
    """Show a dataset, its card, and whether its files are still those that were registered."""
    from concord_client import registry
    from concord_shared.errors import DataError

    with at_home(home) as (opened, store):
        dataset = registry.current_dataset(store, name)
        card = registry.card_of(opened, store, dataset, dataset.registered_at)
        try:
            registry.verify(store, dataset)
            state = "as registered"
        except DataError as error:
            state = str(error)
    result = _fields(dataset) | {"files": state, "card": card.model_dump(mode="json")}

    def text(_: Any) -> None:
        shown = {key: item for key, item in result.items() if key not in ("card", "columns")}
        write(*(f"{key}: {item}" for key, item in shown.items()), f"columns: {', '.join(dataset.columns) or 'unnamed'}")

    show(result, as_json, text)


@data.command("remove", epilog="**Example**\n\n`concord-node data remove patients --yes`")
def remove(name: Name, yes: Yes = False, home: Home = None, as_json: Json = False) -> None:
    """Forget a dataset, and withdraw its card and every approval on it. Its files are not touched."""
    from concord_client import registry
    from concord_client.approvals import withdraw_dataset
    from concord_client.cards import drop_choices

    with at_home(home) as (opened, store):
        registry.current_dataset(store, name)
        if not confirm(f"Forget dataset {name} and withdraw all approvals on it?", yes):
            return
        withdrawn = withdraw_dataset(opened, store, name, time.time(), f"dataset {name} was removed")
        registry.withdraw_card(opened, store, name, time.time())
        store.remove_dataset(name)
        drop_choices(store, name)
        sent = send_posted(opened, store)
    show(
        {"removed": name, "withdrawn": len(withdrawn), "withdrawals": sent},
        as_json,
        lambda _: write(f"removed {name}; approvals withdrawn: {len(withdrawn)}" + (f" ({sent})" if withdrawn else "")),
    )


def _fields(dataset: "Dataset") -> dict[str, Any]:
    return {
        "name": dataset.name,
        "version": dataset.version,
        "spec": dataset.spec,
        "title": dataset.title,
        "description": dataset.description,
        "rows": dataset.rows,
        "input": dataset.input,
        "columns": list(dataset.columns),
        "licence": dataset.licence,
        "registered_at": day(dataset.registered_at),
        "published": dataset.published,
    }
