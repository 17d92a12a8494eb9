"""`concord-node data`: the node's datasets. Nothing leaves but the card of one that is published."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concord_client.commands import cards
from concord_client.commands.common import SPECS, Home, Yes, at_home, confirm, day, lines, send_posted, write
from concord_shared.commands import Json, new_app, show
from concord_shared.errors import UsageError

if TYPE_CHECKING:
    from concord_client.data.image_survey import ImageSurvey
    from concord_client.schema import DatasetSchema
    from concord_client.store import Dataset

__all__ = ["register"]

data = new_app("data", "This node's datasets: they stay here, only the card of a published one leaves.")
EDIT = "concord-node data schema {name} --edit-with FILE"
Name = Annotated[str, typer.Argument(help="The dataset's name.")]


def register(app: typer.Typer) -> None:
    cards.register(data)
    app.add_typer(data)


@data.command(
    "add",
    epilog="**Examples**\n\n`concord-node data add patients csv:patients.csv`\n\n"
    "`concord-node data add patients sql:clinic.toml --plan heart-disease`",
)
def add(
    name: Annotated[str, typer.Argument(help="A name of small letters, digits and hyphens.")],
    spec: Annotated[str, typer.Argument(help=SPECS)],
    plan: Annotated[str, typer.Option(help="Check against this plan's data contract first.")] = "",
    title: Annotated[str, typer.Option(help="One line for its card.")] = "",
    description: Annotated[str, typer.Option(help="For its card.")] = "",
    licence: Annotated[str, typer.Option(help="For its card: an SPDX expression.")] = "",
    schema: Annotated[Path | None, typer.Option(help="What you say of the columns: a corrected schema file.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Register new content under a name that exists.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Publish its card as well.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Register a dataset at this node. Path, columns and content stay here unless its card is published.

    Of a table a schema is inferred: look at it, correct its file, and give it back with `data schema NAME --edit-with`.
    Of images you see sizes, classes and what cannot be read, and the data contract that they fit.
    """
    from concord_client import registry
    from concord_client.home import read_settings
    from concord_client.policy import Policy
    from concord_client.schema import DatasetSchema, check_correction, write_schema
    from concord_client.sync import retry_refused

    with at_home(home) as (opened, store):
        before = store.dataset(name)
        roots = Policy.load(opened.policy_file).data.roots
        inferred = registry.infer_schema(spec, roots, plan)
        stated = read_settings(schema, DatasetSchema) if schema else inferred
        if stated is not None and inferred is not None:
            check_correction(stated, inferred)
        images = registry.survey_images(spec, roots, plan)
        dataset = registry.add_dataset(
            *(store, name, spec, time.time(), plan, title, description, licence),
            replaces=replace,
            roots=roots,
            schema=stated,
        )
        if stated is not None:
            write_schema(opened.schema_file(name), name, stated)
        if publish:
            registry.publish(opened, store, name, time.time())
        sent = send_posted(opened, store) if publish else ""
        retry_refused(opened, store, time.time())

    def text(_: dict[str, Any]) -> None:
        write(f"registered {name}: {dataset.rows} rows, version {dataset.version[:12]}")
        if stated is not None:
            _show_schema(stated)
            write(f"correct it, above all the units: {opened.schema_file(name)}", f"then: {EDIT.format(name=name)}")
        if images is not None:
            _show_images(images, with_contract=not plan)
        if publish:
            write(f"its card: {sent}")
        elif before is not None and before.published:
            write(f"its published card is of the earlier version: concord-node data publish {name}")

    shown = {
        "schema": stated.model_dump(mode="json") if stated else None,
        "images": images.document() if images else None,
    }
    show(_fields(dataset) | shown | {"card": sent}, as_json, text)


@data.command(
    "schema",
    epilog="**Examples**\n\n`concord-node data schema patients`\n\n"
    "`concord-node data schema patients --edit-with patients.toml`",
)
def schema(
    name: Name,
    edit_with: Annotated[Path | None, typer.Option(help="The schema file, corrected.")] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show what this node knows of a table's columns, or say it: units, above all. None of it leaves."""
    from concord_client import registry
    from concord_client.home import read_settings
    from concord_client.schema import DatasetSchema, write_schema

    with at_home(home) as (opened, store):
        dataset = registry.current_dataset(store, name)
        file = opened.schema_file(name)
        if edit_with is not None:
            stated = read_settings(edit_with, DatasetSchema)
            registry.correct_schema(store, name, stated)
            write_schema(file, name, stated)
        elif dataset.schema is None:
            raise UsageError(f"dataset {name} has no schema: it is no table, or was registered before there were any")
        else:
            stated = read_settings(file, DatasetSchema) if file.is_file() else dataset.schema

    def text(_: Any) -> None:
        _show_schema(stated)
        if edit_with is None:
            write(f"its file: {file}", f"to correct it: {EDIT.format(name=name)}")

    show({"dataset": name, "schema": stated.model_dump(mode="json")}, as_json, text)


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
    from concord_client.policy import Policy
    from concord_shared.errors import DataError

    with at_home(home) as (opened, store):
        dataset = registry.current_dataset(store, name)
        card = registry.card_of(opened, store, dataset, dataset.registered_at)
        try:
            registry.verify(store, dataset, Policy.load(opened.policy_file).data.roots)
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
        opened.schema_file(name).unlink(missing_ok=True)
        drop_choices(store, name)
        sent = send_posted(opened, store)
    show(
        {"removed": name, "withdrawn": len(withdrawn), "withdrawals": sent},
        as_json,
        lambda _: write(f"removed {name}; approvals withdrawn: {len(withdrawn)}" + (f" ({sent})" if withdrawn else "")),
    )


def _show_schema(schema: "DatasetSchema") -> None:
    rows = [("column", "kind", "unit", "missing", "range or categories, as found")]
    for column in schema.columns:
        found = "" if column.range is None else "{:g} to {:g}".format(*column.range)
        if column.categories:
            more = f" and {len(column.categories) - 8} more" if len(column.categories) > 8 else ""
            found = ", ".join(each[:30] for each in column.categories[:8]) + more
        mark = " (target?)" if column.name == schema.target else ""
        unit = column.unit or ("unknown" if column.kind == "number" else "")
        rows.append((column.name + mark, column.kind, unit, str(column.missing), found))
    lines(rows)


def _show_images(images: "ImageSurvey", with_contract: bool) -> None:
    shapes = [f"{shape}: {count}" for shape, count in images.shapes.items()]
    classes = [f"{name}: {count}" for name, count in images.classes.items()]
    for title, parts in (("sizes", shapes), ("classes", classes)):
        more = f" and {len(parts) - 20} more" if len(parts) > 20 else ""
        write(f"{title}: {', '.join(parts[:20])}{more}")
    if images.unreadable:
        write(f"{images.unreadable} files cannot be read: truncated, damaged or no images")
    if len(images.shapes) > 1:
        write("a plan's contract has one size: bring the images to it first")
    if with_contract and images.contract:
        write("a contract that they fit, for a plan:", "", images.contract)


@data.command("suspects", epilog="**Example**\n\n`concord-node data suspects patients --plan heart-disease`")
def suspects(
    name: Name,
    plan: Annotated[str, typer.Option(help="A plan that learns the label: a file, a shipped plan, a digest.")],
    most: Annotated[int, typer.Option(min=1, help="Show at most so many, the surest first.")] = 50,
    passes: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of the plan's work for each model.")] = 10,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Find rows whose label a model of the other rows confidently disagrees with. For you alone: nothing leaves."""
    from concord_client import registry
    from concord_client.commands.trial import find_plan
    from concord_client.data import read_data
    from concord_client.policy import Policy
    from concord_client.suspects import find_suspects

    with at_home(home) as (opened, store):
        dataset = registry.current_dataset(store, name)
        reading = registry.verify(store, dataset, Policy.load(opened.policy_file).data.roots)
        chosen, _ = find_plan(store, plan)
    rows = read_data(dataset.spec, chosen, reading=reading)
    found = find_suspects(chosen, rows, passes, device)

    def text(_: Any) -> None:
        shown = [(str(each.row), each.label, each.likely, f"{each.probability:.2f}") for each in found[:most]]
        lines([("row", "label", "seems", "probability"), *shown])
        write(
            "",
            f"{len(found)} of {len(rows)} rows look mislabelled. A rare row looks so too: look before you change one.",
        )

    show({"rows": len(rows), "suspects": [each.document() for each in found]}, as_json, text)


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
