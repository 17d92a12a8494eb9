"""How commands print what the API answers: a table, a record, or the JSON itself."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from concord_shared.commands import show

if TYPE_CHECKING:
    from concord_server.client import Coordinator

__all__ = ["coordinator", "show_items", "show_record"]


def coordinator() -> "Coordinator":
    """The one that `concord login` named."""
    from concord_server.client import Coordinator

    return Coordinator.from_profile()


def show_items(items: Iterable[Mapping[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """A table of the items' columns; with --json, `{"items": […]}`."""
    rows = list(items)
    show({"items": rows}, as_json, lambda _: _table(rows, columns))


def show_record(record: Mapping[str, Any], as_json: bool, text: Callable[[Any], object] | None = None) -> None:
    """One thing, a line a field, or as `text` prints it."""
    show(dict(record), as_json, text or _fields)


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    if not rows:
        sys.stdout.write("none\n")
        return
    cells = [list(columns), *([_text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n")


def _fields(record: Mapping[str, Any]) -> None:
    width = max((len(key) for key in record), default=0)
    for key, value in record.items():
        sys.stdout.write(f"{key.ljust(width)}  {_text(value)}\n")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
