"""`concord-node data describe | publish | card`: what others may know of a dataset, and do with it."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from concord_client.commands.common import Home, Yes, at_home, confirm, lines, send_posted, write
from concord_shared.commands import Json, show

if TYPE_CHECKING:
    from concord_client.cards import CardChoices
    from concord_client.data import Reading
    from concord_client.store import Dataset
    from concord_shared.documents import CardColumn, DatasetCard
    from concord_shared.plan.schema import Plan

__all__ = ["register"]

Name = Annotated[str, typer.Argument(help="The dataset's name.")]
Words = list[str] | None
TERMS = "purpose=WORD, who=ORGANISATION, until=YYYY-MM-DD, minimum-cohort=N, epsilon=X, output=release|commercial|none"
COLUMNS_SHOWN_MAX = 50


def register(data: typer.Typer) -> None:
    data.command(
        "describe",
        epilog="**Examples**\n\n`concord-node data describe patients --plan heart-disease --quality --rows about`\n\n"
        "`concord-node data describe patients --licence LicenseRef-hospital-a --keyword cardiology --language en`\n\n"
        "`concord-node data describe patients --term purpose=research --term minimum-cohort=3 --term output=release`",
    )(describe)
    data.command(
        "publish",
        epilog="**Examples**\n\n`concord-node data publish patients --preview`\n\n`concord-node data publish patients`",
    )(publish)
    data.command("card", epilog="**Example**\n\n`concord-node data card patients --croissant > patients.json`")(card)


def describe(
    name: Name,
    title: Annotated[str | None, typer.Option(help="One line.")] = None,
    description: Annotated[str | None, typer.Option(help="What the data are, for people.")] = None,
    licence: Annotated[str | None, typer.Option(metavar="SPDX", help="An SPDX expression, or LicenseRef-NAME.")] = None,
    keywords: Annotated[Words, typer.Option("--keyword", help="Replaces those of before; repeatable.")] = None,
    languages: Annotated[
        Words, typer.Option("--language", metavar="TAG", help="As in en, zh-Hans; repeatable.")
    ] = None,
    rows: Annotated[str | None, typer.Option(metavar="exact|about", help="Tell the number of rows so.")] = None,
    minimum: Annotated[
        int | None, typer.Option("--minimum-count", min=2, help="Tell no number of fewer rows than these. Default 10.")
    ] = None,
    columns: Annotated[str | None, typer.Option(metavar="all|none", help="Tell the names of columns.")] = None,
    hidden: Annotated[Words, typer.Option("--hide", metavar="COLUMN", help="Leave out; repeatable.")] = None,
    plan: Annotated[
        str, typer.Option(help="Describe columns as this plan's contract does; measure quality by it.")
    ] = "",
    units: Annotated[Words, typer.Option("--unit", metavar="COLUMN=UNIT", help="Repeatable.")] = None,
    ranges: Annotated[Words, typer.Option("--range", metavar="COLUMN=LOW..HIGH", help="Your word; repeatable.")] = None,
    categories: Annotated[Words, typer.Option("--categories", metavar="COLUMN=A,B", help="Repeatable.")] = None,
    texts: Annotated[Words, typer.Option("--column", metavar="COLUMN=TEXT", help="Describe one; repeatable.")] = None,
    quality: Annotated[
        bool | None, typer.Option("--quality/--no-quality", help="Measure what is missing, repeated, imbalanced.")
    ] = None,
    terms: Annotated[
        Words, typer.Option("--term", metavar="KEY=VALUE", help=f"{TERMS}. An empty value lifts one; repeatable.")
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Choose what a dataset's card tells, and the terms that this node holds agreements and plans to.

    The terms hold from now on; nothing leaves before `concord-node data publish`.
    """
    from concord_client import cards, registry
    from concord_client.card_words import changed_choices, changed_terms, described_columns, known_columns
    from concord_client.policy import Policy
    from concord_client.sync import retry_refused
    from concord_shared.licences import read_licence
    from concord_shared.plan import load_plan

    contract = load_plan(plan).plan if plan else None
    with at_home(home) as (opened, store):
        dataset = registry.current_dataset(store, name)
        described = replace(
            dataset,
            title=dataset.title if title is None else title,
            description=dataset.description if description is None else description,
            licence=dataset.licence if licence is None else read_licence(licence),
        )
        before = cards.choices_of(store, name)
        words = {"unit": units, "range": ranges, "categories": categories, "description": texts}
        changes = {
            "keywords": keywords,
            "languages": languages,
            "rows": rows,
            "minimum": minimum,
            "columns": columns,
            "hidden": known_columns(dataset, hidden),
            "described": described_columns(dataset, before.described, contract, words),
            "terms": changed_terms(before.terms, terms or ()),
        }
        choices = changed_choices(before, {key: item for key, item in changes.items() if item is not None})
        if terms and changes["terms"] is None:
            choices = choices.model_copy(update={"terms": None})
        if quality:
            reading = registry.verify(store, dataset, Policy.load(opened.policy_file).data.roots)
            choices = _measured(dataset, choices, contract, reading)
        elif quality is not None:
            choices = choices.model_copy(update={"quality": None, "quality_of": None})
        cards.put_choices(store, described, choices)
        if described != dataset:
            store.put_dataset(described)
        retry_refused(opened, store, time.time())
        shown = registry.card_of(opened, store, described, time.time())
        file = described.spec

    def text(_: Any) -> None:
        _preview(shown, described, file)
        write("", f"nothing left this machine; concord-node data publish {name} publishes it")

    show(shown.model_dump(mode="json"), as_json, text)


def publish(
    name: Name,
    preview: Annotated[bool, typer.Option("--preview", help="Only show what would leave, and what stays.")] = False,
    yes: Yes = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Show a dataset's card, ask, sign it and send it: it is all that leaves."""
    from concord_client import registry

    with at_home(home) as (opened, store):
        dataset = registry.current_dataset(store, name)
        shown = registry.card_of(opened, store, dataset, time.time())
        if not as_json:
            _preview(shown, dataset, dataset.spec)
        if preview or not confirm(f"Publish this card of {name}?", yes):
            if as_json:
                show(shown.model_dump(mode="json") | {"card": ""}, as_json, _silent)
            return
        made = registry.publish(opened, store, name, time.time())
        sent = send_posted(opened, store)
    show(made.model_dump(mode="json") | {"card": sent}, as_json, lambda _: write(f"the card of {name}: {sent}"))


def card(
    name: Name,
    croissant: Annotated[bool, typer.Option("--croissant", help="As Croissant JSON-LD.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Print the card that others would get; nothing leaves."""
    from concord_client import registry
    from concord_shared.croissant import croissant_of

    with at_home(home) as (opened, store):
        dataset = registry.current_dataset(store, name)
        made = registry.card_of(opened, store, dataset, time.time())
        spec = dataset.spec
    found = croissant_of(made) if croissant else made.model_dump(mode="json")
    show(found, as_json or croissant, lambda _: _preview(made, dataset, spec))


# What leaves, and what stays


def _preview(made: "DatasetCard", dataset: "Dataset", spec: str) -> None:
    write(f"leaves this machine, as the card of {made.node}/{made.dataset}, signed by this node:")
    lines([("  what", "as it is told"), *((f"  {what}", said) for what, said in _leaving(made))])
    write("", "stays here:")
    lines([(f"  {what}", said) for what, said in _staying(made, dataset, spec)])


def _leaving(made: "DatasetCard") -> list[tuple[str, str]]:
    from concord_shared.cards import rows_text, terms_lines

    named = made.columns[:COLUMNS_SHOWN_MAX]
    more = f" … and {len(made.columns) - len(named)} more" if len(made.columns) > len(named) else ""
    rows = [
        ("title", made.title),
        ("description", made.description),
        ("organisation", made.organisation),
        ("version", f"{made.dataset_version} (SHA-256 of the files)"),
        ("rows", rows_text(made)),
        ("kind", made.input),
        ("columns", ", ".join(named) + more),
        ("licence", made.licence),
        ("keywords", ", ".join(made.keywords)),
        ("languages", ", ".join(made.languages)),
        *((f"column {each.name}", _column(each)) for each in made.details),
        *((f"terms: {what}", said) for what, said in (terms_lines(made.terms) if made.terms else [])),
    ]
    quality = made.quality
    if quality is not None:
        figures = {
            "repeated rows": quality.duplicates,
            "largest class": quality.largest_class,
            "smallest class": quality.smallest_class,
            "suspected wrong labels": quality.suspect_labels,
        }
        rows += [(f"quality: missing in {name}", share) for name, share in quality.missing.items()]
        rows += [(f"quality: {what}", share) for what, share in figures.items()]
    return [(what, said) for what, said in rows if said]


def _staying(made: "DatasetCard", dataset: "Dataset", spec: str) -> list[tuple[str, str]]:
    kept = [name for name in dataset.columns if name not in made.columns]
    rows = [("rows", "every one, and every value of them"), ("where", spec)]
    if made.rows_told:
        rows.append(("number of rows", f"{dataset.rows}; those who run an approved plan do learn how many it used"))
    if kept:
        rows.append(("names of columns", ", ".join(kept[:COLUMNS_SHOWN_MAX])))
    if made.quality is None:
        rows.append(
            (
                "quality",
                "not told; it is measured anew with describe --quality where the data or --minimum-count changed",
            )
        )
    else:
        rows.append(("quality", "counts, and every figure below the minimum count"))
    return rows


def _column(each: "CardColumn") -> str:
    said = (
        each.kind,
        each.unit and f"in {each.unit}",
        f"{each.range[0]} to {each.range[1]}" if each.range else "",
        ", ".join(each.categories),
        each.description,
    )
    return "; ".join(part for part in said if part)


def _silent(_: Any) -> None:
    return


def _measured(dataset: "Dataset", choices: "CardChoices", plan: "Plan | None", reading: "Reading") -> "CardChoices":
    from concord_client.quality import measure, measure_by

    minimum = choices.minimum
    found = measure_by(dataset, plan, minimum, reading) if plan else measure(dataset, minimum, reading)
    return choices.model_copy(update={"quality": found, "quality_of": dataset.version})
