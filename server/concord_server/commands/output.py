"""How commands print what the API answers: a table, a record, or the JSON itself."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from concord_shared.commands import readable, show
from concord_shared.text import printable

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
    cells = [list(columns), *([printable(_text(row.get(column))) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n")


def _fields(record: Mapping[str, Any]) -> None:
    width = max((len(key) for key in record), default=0)
    for key, value in record.items():
        text = readable(value) if key == "fingerprint" and value else _text(value)
        sys.stdout.write(printable(f"{key.ljust(width)}  {text}") + "\n")


def _text(value: Any) -> str:
    """For people; programs read --json."""
    match value:
        case None | [] | {}:
            return "-"
        case str():
            return value
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case Mapping():
            return ", ".join(
                f"{key} ({_text(of)})" if isinstance(of, Mapping) else f"{key} {_text(of)}" for key, of in value.items()
            )
        case list() | tuple():
            return ", ".join(_text(each) for each in value)
    return str(value)
