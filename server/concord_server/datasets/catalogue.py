"""The catalogue: what cards are found by. Folded text beside each card and LIKE, the same on SQLite and PostgreSQL."""

import unicodedata
from typing import Annotated, Any

from fastapi import Depends, Query
from sqlalchemy import ColumnElement, or_
from sqlalchemy.orm import load_only
from sqlmodel import col, select
from sqlmodel.sql.expression import SelectOfScalar

from concord_server.datasets.tables import DatasetCardRow
from concord_shared.documents import DatasetCard
from concord_shared.plan.section import Name
from concord_shared.text import printable

__all__ = ["Filters", "Wanted", "folded", "found_by", "indexed"]

TEXT_MAX = 300
WORDS_MAX = 20
SHOWN: tuple[Any, ...] = (
    *(DatasetCardRow.name, DatasetCardRow.node, DatasetCardRow.dataset, DatasetCardRow.organisation),
    *(DatasetCardRow.version, DatasetCardRow.input, DatasetCardRow.licence, DatasetCardRow.told),
    DatasetCardRow.updated_at,
)


class Filters:
    """What a card must have; each narrows what the others found."""

    def __init__(
        self,
        q: Annotated[
            str | None,
            Query(
                max_length=TEXT_MAX,
                description="Words: each is somewhere in names, title, description, keywords or columns.",
            ),
        ] = None,
        organisation: Annotated[Name | None, Query(description="Its owner.")] = None,
        input: Annotated[Name | None, Query(description="The kind of its rows: table, image, text.")] = None,
        licence: Annotated[str | None, Query(max_length=TEXT_MAX, description="As the card has it.")] = None,
        purpose: Annotated[Name | None, Query(description="Its terms allow this purpose, or name none.")] = None,
        rows_min: Annotated[int | None, Query(ge=0, lt=1 << 53, description="It tells at least as many rows.")] = None,
        column: Annotated[
            str | None, Query(max_length=TEXT_MAX, description="It tells of a column of this name.")
        ] = None,
    ) -> None:
        self.q, self.organisation, self.input, self.licence = q, organisation, input, licence
        self.purpose, self.rows_min, self.column = purpose, rows_min, column


Wanted = Annotated[Filters, Depends()]


def indexed(card: DatasetCard) -> dict[str, Any]:
    """The fields of a row that cards are found by."""
    said = (
        f"{card.node}/{card.dataset}",
        card.organisation,
        card.title,
        card.description,
        *card.keywords,
        *card.columns,
        *(column.description for column in card.details),
    )
    return {
        "rows": card.rows - (card.rows_told == "fewer"),
        "input": card.input,
        "licence": card.licence,
        "words": "\n".join(folded(each) for each in said),
        "columns": _lines(card.columns),
        "purposes": _lines(card.terms.purposes if card.terms else ()),
        "told": {
            "title": card.title,
            "rows": card.rows,
            "rows_told": card.rows_told,
            "keywords": list(card.keywords),
            "languages": list(card.languages),
        },
    }


def found_by(wanted: Filters) -> SelectOfScalar[DatasetCardRow]:
    """The rows, of which only what a list shows is read."""
    row = DatasetCardRow
    found: list[ColumnElement[bool]] = []
    for word in folded(wanted.q or "").split()[:WORDS_MAX]:
        found.append(col(row.words).contains(word, autoescape=True))
    for field, value in (("organisation", wanted.organisation), ("input", wanted.input)):
        if value is not None:
            found.append(getattr(row, field) == value)
    if wanted.licence is not None:
        found.append(col(row.licence).ilike(_literal(printable(wanted.licence)), escape="/"))
    if wanted.purpose is not None:
        allowed = col(row.purposes).contains(_lines((wanted.purpose,)), autoescape=True)
        found.append(or_(col(row.purposes) == "", allowed))
    if wanted.rows_min is not None:
        found.append(col(row.rows) >= wanted.rows_min)
    if wanted.column is not None:
        found.append(col(row.columns).contains(_lines((wanted.column,)), autoescape=True))
    return select(row).where(*found).options(load_only(*SHOWN, raiseload=True))


def folded(text: str) -> str:
    """As it is compared: without case, compatible forms alike, nothing that a database would not store."""
    return " ".join(printable(unicodedata.normalize("NFKC", text).casefold()).split())


def _lines(words: tuple[str, ...]) -> str:
    """One a line, each with a line end on both sides; "" for none."""
    return "\n" + "".join(f"{folded(each)}\n" for each in words) if words else ""


def _literal(text: str) -> str:
    """Nothing in it is a wildcard."""
    for letter in "/%_":
        text = text.replace(letter, f"/{letter}")
    return text
