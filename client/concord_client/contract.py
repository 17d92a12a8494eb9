"""How data differ from a plan's contract, in sentences that may leave this node.

A sentence is made of our own words, names that the contract itself has, and coarse counts. Whatever else an error says
(a path, a column that only this node has, a first line that is a row) stays here: what is not known is not passed on.
"""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from concord_shared.errors import DataError
from concord_shared.plan.schema import Plan

if TYPE_CHECKING:
    from concord_client.data import RawData

__all__ = ["coarse", "coarse_words", "read_within"]

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


def read_within(spec: str, plan: Plan) -> tuple["RawData | None", list[str]]:
    """The data, or how they differ from the plan's contract."""
    from concord_client.data import read_data

    try:
        return read_data(spec, plan), []
    except DataError as error:
        return None, list(_sentences(str(error), plan))


def _sentences(text: str, plan: Plan) -> Iterator[str]:
    """At least one. text: of a `DataError`, written for people at this node."""
    found = [sentence for line in text.splitlines() for sentence in _known(line, plan)]
    yield from dict.fromkeys(found) or [UNKNOWN]


def _known(line: str, plan: Plan) -> Iterator[str]:
    contract = plan.data
    names = {column.name for column in contract.columns} | {contract.target}
    if match := re.search(r"the columns (.*) of the plan's contract are missing", line):
        for name in sorted(names, key=lambda each: each == contract.target):
            if re.search(rf"(^|, ){re.escape(name)}($|, )", match[1]):
                yield f"column {_shown(name)} is missing"
        return
    for pattern, words in _OF_COLUMNS:
        for name in names:
            if match := re.search(rf"(?:column|target) {re.escape(name)}: {pattern}", line):
                yield f"column {_shown(name)}: {words(match[1])}"
                return
    for pattern, words in _OF_ALL:
        if match := re.search(pattern, line):
            yield words(match[1] if match.groups() else "")
            return


def _shown(name: str) -> str:
    return name if len(name) <= NAME_MAX else f"{name[:NAME_MAX]}…"


def _counted(words: str) -> Callable[[str], str]:
    return lambda count: words.format(coarse_words(int(count)))


UNKNOWN = "the data cannot be read as the contract says"
_OUTSIDE = "{} rows have a category or class that the contract does not list"
_OF_COLUMNS: tuple[tuple[str, Callable[[str], str]], ...] = (
    (r"(\d+) values are not numbers", _counted("{} values are not numbers")),
    (r"(\d+) rows have a (?:value|class) outside", _counted(_OUTSIDE)),
    (r"(\d+) values are outside its", _counted(_OUTSIDE)),
    (r"(\d+) of \d+ values are missing", _counted("{} values are missing")),
    (
        r"(\d+) values are (?:missing or )?outside",
        _counted("{} values are outside the contract's range; another unit?"),
    ),
    (r"(\d+) values are infinite", _counted("{} values are infinite")),
    (r"(expected numbers or text)", lambda _: "neither numbers nor text"),
)
_OF_ALL: tuple[tuple[str, Callable[[str], str]], ...] = (
    (r"not a readable CSV file", lambda _: "the file is no CSV in UTF-8: another encoding, or damaged"),
    (r"not a readable", lambda _: "the file is of another format than registered, or damaged"),
    (r"images: expected (shape|dtype)", lambda what: f"images are of another {what} than the contract's"),
    (r"images: (\d+) pixels are NaN or Inf", _counted("{} pixels are no numbers")),
    (r"expected (\d+) columns", lambda count: f"the contract has {count} columns, these rows another number"),
    (r"(?:^|: |^  )no rows$", lambda _: "no rows"),
)
