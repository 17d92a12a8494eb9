"""What an owner chose to tell of a dataset and to allow with it, and the card that is made of it.

The choices lie in the node's database, so that a dataset which is registered anew keeps them. The terms among them bind
this node whether or not a card with them was ever published.
"""

import json
from typing import Literal

from pydantic import Field, ValidationError

from concord_client.store import Dataset, NodeStore
from concord_shared.cards import CARD_BYTES_MAX, told_rows
from concord_shared.documents import CardColumn, DatasetCard, DataTerms, Digest, Language, Line, Quality, Word
from concord_shared.errors import DocumentRefusedError, UsageError
from concord_shared.licences import read_licence
from concord_shared.signing import Record

__all__ = ["CardChoices", "card_with", "choices_of", "columns_told", "drop_choices", "put_choices", "terms_of"]


class CardChoices(Record):
    """minimum: rows below which no number is told. described: columns in the owner's words, or a contract's.

    quality: as it was measured of the content `quality_of`; not told of another content, or under a higher minimum.
    """

    keywords: tuple[Word, ...] = Field((), max_length=50)
    languages: tuple[Language, ...] = Field((), max_length=20)
    rows: Literal["exact", "about"] = "exact"
    minimum: int = Field(10, ge=2, le=100_000)
    columns: Literal["all", "none"] = "all"
    hidden: tuple[Line, ...] = Field((), max_length=10_000)
    described: tuple[CardColumn, ...] = Field((), max_length=10_000)
    quality: Quality | None = None
    quality_of: Digest | None = None
    terms: DataTerms | None = None


def choices_of(store: NodeStore, dataset: str) -> CardChoices:
    """Raises: DocumentRefusedError: they cannot be read; then nothing is told, and nothing allowed."""
    text = store.fact(_fact(dataset))
    try:
        return CardChoices() if text is None else CardChoices.model_validate_json(text)
    except ValidationError as error:
        raise DocumentRefusedError(
            f"dataset {dataset}: its card and terms were written by another version of concord-node; run that one, or "
            f"remove the dataset and register it again"
        ) from error


def put_choices(store: NodeStore, dataset: Dataset, choices: CardChoices) -> None:
    """Raises: UsageError: they make no card that anybody would take."""
    card_with("node", "organisation", dataset, choices, dataset.registered_at)
    store.set_fact(_fact(dataset.name), choices.model_dump_json())
    terms = choices.terms.model_dump(mode="json") if choices.terms else {}
    store.record("owner", "dataset:describe", dataset.name, terms=json.dumps(terms, sort_keys=True))


def drop_choices(store: NodeStore, dataset: str) -> None:
    store.drop_fact(_fact(dataset))


def terms_of(store: NodeStore, dataset: str) -> DataTerms | None:
    """The ceiling of every agreement and plan on a dataset; None where its owner set none."""
    return choices_of(store, dataset).terms


def columns_told(dataset: Dataset, choices: CardChoices) -> tuple[str, ...]:
    if choices.columns == "none":
        return ()
    return tuple(name for name in dataset.columns if name not in choices.hidden)


def card_with(node: str, organisation: str, dataset: Dataset, choices: CardChoices, now: int) -> DatasetCard:
    """All that others would know of a dataset.

    Raises:
        UsageError: a field is too long, the licence is none, or all of it is too large.
    """
    columns = columns_told(dataset, choices)
    rows, told = told_rows(dataset.rows, choices.rows == "about", choices.minimum)
    quality = choices.quality if choices.quality_of == dataset.version else None
    if quality is not None and quality.minimum < choices.minimum:
        quality = None
    if quality is not None:
        quality = quality.model_copy(
            update={"missing": {name: share for name, share in quality.missing.items() if name in columns}}
        )
    try:
        card = DatasetCard(
            node=node,
            organisation=organisation,
            dataset=dataset.name,
            dataset_version=dataset.version,
            title=dataset.title,
            description=dataset.description,
            rows=rows,
            rows_told=told,
            input=dataset.input,
            columns=columns,
            details=tuple(column for column in choices.described if column.name in columns),
            keywords=choices.keywords,
            languages=choices.languages,
            quality=quality,
            terms=choices.terms,
            licence=read_licence(dataset.licence),
            issued_at=now,
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"dataset {dataset.name}: {where}: {first['msg']}") from error
    if len(card.canonical) > CARD_BYTES_MAX:
        raise UsageError(
            f"dataset {dataset.name}: its card has more than {CARD_BYTES_MAX} bytes; leave columns out: "
            f"concord-node data describe {dataset.name} --columns none"
        )
    return card


def _fact(dataset: str) -> str:
    return f"card/{dataset}"
