"""What people do with the catalogue over the API: lay cards side by side, and ask for access within their terms."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from concord_server.client import Coordinator
from concord_server.client_nouns import DAY_S, request_agreement
from concord_shared.cards import terms_lines
from concord_shared.documents import CardColumn, DataTerms
from concord_shared.errors import UsageError
from concord_shared.signing import PrivateKey

__all__ = ["compared", "request_access", "rows_said"]

Record = dict[str, Any]


def rows_said(found: Mapping[str, Any]) -> str:
    """A card's number of rows, as its owner tells it."""
    words = {"about": "about ", "fewer": "fewer than "}
    return f"{words.get(found['rows_told'], '')}{found['rows']}"


def compared(cards: Sequence[Mapping[str, Any]]) -> Record:
    """Cards side by side: each field and each column by dataset, "" where one says nothing of it.

    differing: names of columns of which not all say the same.
    """
    terms = {each["name"]: dict(terms_lines(_terms(each) or DataTerms())) for each in cards}
    columns: dict[str, dict[str, str]] = {}
    for card in cards:
        details = {column["name"]: column for column in card["details"]}
        for name in card["columns"]:
            columns.setdefault(name, {})[card["name"]] = _column(details.get(name)) or "named"
    names = [str(each["name"]) for each in cards]
    fields = {
        "organisation": {each["name"]: each["organisation"] for each in cards},
        "title": {each["name"]: each["title"] for each in cards},
        "rows": {each["name"]: rows_said(each) for each in cards},
        "kind": {each["name"]: each["input"] for each in cards},
        "licence": {each["name"]: each["licence"] for each in cards},
        "languages": {each["name"]: ", ".join(each["languages"]) for each in cards},
    }
    fields |= {f"terms: {what}": {name: terms[name].get(what, "") for name in names} for what in _all_of(terms)}
    shown = {name: {each: said.get(each, "") for each in names} for name, said in columns.items()}
    return {
        "datasets": names,
        "fields": fields,
        "columns": shown,
        "differing": [name for name, said in shown.items() if len(set(said.values())) > 1],
    }


def request_access(
    api: Coordinator,
    key: PrivateKey,
    study: str,
    datasets: Sequence[str],
    *,
    purposes: Sequence[str] = (),
    outputs: Sequence[str] | None = None,
    days: int = 365,
    agreement: str | None = None,
    organisation: str | None = None,
) -> Record:
    """Asks for datasets of one owner on the widest terms that their cards allow. purposes: what for, in their words.

    Raises:
        UsageError: the cards name purposes and none of them was, or their terms are over.
    """
    ceilings = [found for name in datasets if (found := _terms(api.get(f"/api/v1/datasets/{name}"))) is not None]
    if not purposes and any(each.purposes for each in ceilings):
        known = sorted(set.intersection(*(set(each.purposes) for each in ceilings if each.purposes)))
        raise UsageError(f"say what for: --purpose, one of {', '.join(known) or 'none that all of them allow'}")
    ends = [each.not_after for each in ceilings if each.not_after]
    left = (min(ends) - int(time.time())) // DAY_S if ends else days
    if left < 1:
        raise UsageError("the terms of these datasets end within a day; ask their owner for later ones")
    allowed: list[set[str]] = [set(each.outputs) for each in ceilings if each.outputs is not None]
    if outputs is None and allowed:
        outputs = sorted(set.intersection(*allowed))
    terms: Record = {"minimum_cohort": max([2, *(each.minimum_cohort for each in ceilings)])}
    terms |= {"purposes": tuple(purposes)} if purposes else {}
    terms |= {"outputs": tuple(outputs)} if outputs is not None else {}
    return request_agreement(
        api,
        key,
        study,
        datasets,
        terms=terms,
        days=min(days, left),
        agreement=agreement,
        organisation=organisation,
    )


def _terms(found: Mapping[str, Any]) -> DataTerms | None:
    return None if found["terms"] is None else DataTerms.model_validate(found["terms"], strict=False)


def _column(said: Mapping[str, Any] | None) -> str:
    if said is None:
        return ""
    column = CardColumn.model_validate(said, strict=False)
    parts = (
        column.kind,
        column.unit and f"in {column.unit}",
        f"{column.range[0]} to {column.range[1]}" if column.range else "",
        ", ".join(column.categories),
    )
    return "; ".join(part for part in parts if part)


def _all_of(terms: Mapping[str, Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(what for said in terms.values() for what in said))
