"""How data differ from a plan's contract, in sentences that may leave this node.

A sentence is made of our own words, names that the contract itself has, and coarse counts. Who asks with many contracts
could otherwise count this node's rows exactly, one range or category after the other.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from concord_shared.plan.schema import Plan

if TYPE_CHECKING:
    from concord_client.data.contract import Difference

__all__ = ["coarse", "coarse_words", "sentences"]

SMALL = 10
"""Smaller counts are never told."""
NAME_MAX = 100


def coarse(count: int) -> int:
    """A number of rows, rounded up: to one digit below 100, to two above, never less than 10."""
    if count <= SMALL:
        return SMALL
    step = int(10 ** (len(str(count)) - (1 if count < 100 else 2)))
    return -(-count // step) * step


def coarse_words(count: int) -> str:
    """How many are concerned, to one digit."""
    if count < SMALL:
        return f"fewer than {SMALL}"
    step = int(10 ** (len(str(count)) - 1))
    return f"about {round(count / step) * step}"


def sentences(found: "Iterable[Difference]", plan: Plan) -> list[str]:
    """One for each difference."""
    return list(dict.fromkeys(_sentences(found, plan)))


def _sentences(found: "Iterable[Difference]", plan: Plan) -> Iterator[str]:
    from concord_client.data.frames import NOT_UTF8

    units = {f"column {column.name}": column.unit for column in plan.data.columns}
    known = {*units, f"column {plan.data.target}", f"target {plan.data.target}", "images", "column split"}
    for each in found:
        words = NOT_UTF8 if each.code == "source" and each.what == NOT_UTF8 else WORDS.get(each.code, UNKNOWN)
        subject = _short(each.name) if each.name in known else "data"
        yield f"{subject}: " + words.format(
            count=coarse_words(each.count), unit=units.get(each.name) or "the contract's"
        )


def _short(name: str) -> str:
    return name if len(name) <= NAME_MAX else f"{name[:NAME_MAX]}…"


UNKNOWN = "cannot be read as the contract says"
WORDS = {
    "column": "missing",
    "unit": "in another unit than {unit}",
    "type": "{count} values are not numbers",
    "missing": "{count} values are missing",
    "range": "{count} values are outside the contract's range; another unit?",
    "target-range": "{count} values are missing or outside the contract's range; another unit?",
    "category": "{count} rows have a category or class that the contract does not list",
    "class": "{count} rows have a category or class that the contract does not list",
    "infinite": "{count} values are infinite or no numbers",
    "shape": "of another shape than the contract's",
    "dtype": "of another type than the contract's",
    "split": "{count} rows name no split of train, validation and test",
    "image": "{count} images are damaged or of an unknown format",
    "rows": "no rows",
}
