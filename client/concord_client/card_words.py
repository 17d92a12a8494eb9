"""The options of `concord-node data describe`, from words to what they mean."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import ValidationError

from concord_client.cards import CardChoices
from concord_client.store import Dataset
from concord_shared.documents import CardColumn, DataTerms
from concord_shared.errors import UsageError
from concord_shared.plan.schema import Plan
from concord_shared.signing import Record

__all__ = ["changed_choices", "changed_terms", "described_columns", "known_columns"]

LISTS = {"purpose": "purposes", "who": "who", "output": "outputs"}
Kind = TypeVar("Kind", bound=Record)


def changed_choices(before: CardChoices, changes: Mapping[str, Any]) -> CardChoices:
    """Raises: UsageError: a word that is none of those expected, named."""
    return _made(CardChoices, before.model_dump(mode="json") | dict(changes))


def known_columns(dataset: Dataset, names: Sequence[str] | None) -> list[str] | None:
    """Columns that are there; an empty word hides none."""
    given = [name for name in names or () if name]
    if unknown := [name for name in given if name not in dataset.columns]:
        raise UsageError(f"dataset {dataset.name} has no column {', '.join(unknown)}; it has {_some(dataset.columns)}")
    return None if names is None else given


def described_columns(
    dataset: Dataset, before: Sequence[CardColumn], contract: Plan | None, words: Mapping[str, Sequence[str] | None]
) -> list[dict[str, Any]]:
    """Columns as they were described, then as the contract says, then in the owner's words."""
    found = {each.name: each.model_dump(mode="json") for each in before}
    for column in contract.data.columns if contract else ():
        if column.name in dataset.columns:
            said = {
                "kind": column.kind,
                "unit": column.unit,
                "range": [_decimal(end) for end in column.range] if column.range else None,
                "categories": list(column.categories),
            }
            found[column.name] = found.get(column.name, {"name": column.name}) | said
    if contract and contract.data.target in dataset.columns and contract.data.classes:
        target = contract.data.target
        said = {"kind": "category", "categories": list(contract.data.classes)}
        found[target] = found.get(target, {"name": target}) | said
    readers: dict[str, Callable[[str], Any]] = {"range": _range, "categories": lambda text: text.split(",")}
    for field, given in words.items():
        for text in given or ():
            name, value = _split(dataset, text, field)
            read = readers[field](value) if value and field in readers else value
            found[name] = found.get(name, {"name": name}) | {field: read or CardColumn.model_fields[field].default}
    return [_made(CardColumn, fields).model_dump(mode="json") for fields in found.values()]


def _split(dataset: Dataset, text: str, field: str) -> tuple[str, str]:
    """`COLUMN=…`, whose name may hold a `=` itself."""
    for name in sorted(dataset.columns, key=len, reverse=True):
        if text.startswith(f"{name}="):
            return name, text[len(name) + 1 :]
    raise UsageError(f"{field}: {text!r}: expected COLUMN=…, with one of {_some(dataset.columns)}")


def _range(text: str) -> list[str]:
    low, dots, high = text.partition("..")
    try:
        if not dots or not float(low) < float(high):
            raise ValueError(text)
    except ValueError as error:
        raise UsageError(f"range: {text!r}: expected LOW..HIGH, for example 0..120") from error
    return [low.strip(), high.strip()]


def _decimal(number: float) -> str:
    return f"{number:f}".rstrip("0").rstrip(".") if "." in f"{number:f}" else f"{number:f}"


def changed_terms(before: DataTerms | None, given: Sequence[str]) -> dict[str, Any] | None:
    """The terms of before with those that are named replaced; None where nothing is restricted any more."""
    fields = (before or DataTerms()).model_dump(mode="json")
    for text in given:
        key, equals, _ = text.partition("=")
        if not equals or key not in (*LISTS, "until", "minimum-cohort", "epsilon"):
            raise UsageError(
                f"--term {text!r}: expected KEY=VALUE with purpose, who, until, minimum-cohort, epsilon or output, as "
                "in purpose=research"
            )
        if key in LISTS:
            fields[LISTS[key]] = None if key == "output" else []
    for text in given:
        key, _, value = text.partition("=")
        match key, value:
            case ("output", "none"):
                fields["outputs"] = fields["outputs"] or []
            case ("purpose" | "who" | "output", _):
                if value:
                    fields[LISTS[key]] = [*(fields[LISTS[key]] or []), value]
            case ("until", _):
                fields["not_after"] = _day(value)
            case ("minimum-cohort", _):
                fields["minimum_cohort"] = _whole(text, value)
            case _:
                fields["epsilon"] = value
    made = _made(DataTerms, fields)
    return None if made == DataTerms() else made.model_dump(mode="json")


def _day(text: str) -> int:
    """The end of that day, UTC; 0 for none."""
    if not text:
        return 0
    try:
        return int(datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()) + 86_399
    except (ValueError, OverflowError) as error:
        raise UsageError(f"--term until={text}: expected a day, for example until=2027-12-31") from error


def _whole(term: str, text: str) -> int:
    if text and not (text.isascii() and text.isdigit() and len(text) < 9):
        raise UsageError(f"--term {term}: expected a whole number")
    return int(text or 0)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) or "none"


def _made(kind: type[Kind], fields: Mapping[str, Any]) -> Kind:
    try:
        return kind.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join([*([str(fields["name"])] if "name" in fields else []), *map(str, first["loc"][:2])])
        raise UsageError(f"{where}: {first['msg']}") from error
