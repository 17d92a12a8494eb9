"""What the commands of an enrolled node share: its home, a person's yes, and sending what is posted."""

import datetime
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from concord_shared.errors import ConcordError, UsageError
from concord_shared.text import printable

if TYPE_CHECKING:
    from concord_client.home import NodeHome
    from concord_client.store import NodeStore

__all__ = ["SPECS", "Home", "Yes", "at_home", "confirm", "day", "home_path", "lines", "send_posted", "write"]

SPECS = "csv:FILE, parquet:FILE, arrow:FILE, jsonl:FILE, sql:FILE, npz:FILE, idx:DIR, images:DIR."
"""How data are named, for help."""
Home = Annotated[
    Path | None,
    typer.Option(
        "--home", envvar="CONCORD_NODE_HOME", metavar="DIR", help="The node's home; ~/.concord-node by default."
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def home_path(home: Path | None) -> Path:
    from concord_client.home import default_home

    return home.expanduser() if home is not None else default_home()


@contextmanager
def at_home(home: Path | None) -> Iterator[tuple["NodeHome", "NodeStore"]]:
    """An enrolled home and its database. Raises: ArtefactError: there is none."""
    from concord_client.home import NodeHome

    opened = NodeHome.open(home_path(home))
    with opened.store() as store:
        yield opened, store


def send_posted(home: "NodeHome", store: "NodeStore") -> str:
    """Sends what waits, if the coordinator can be reached; says in a line how that went. Never fails."""
    from concord_client.control import ControlChannel

    if not store.outbox():
        return "sent"
    try:
        with ControlChannel(home, store) as channel:
            channel.deliver()
    except ConcordError as error:
        return f"kept to be sent later, by `concord-node up` or the next command: {error}"
    return "sent"


def confirm(question: str, yes: bool) -> bool:
    """Raises: UsageError: nobody is there to be asked."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Nobody can be asked here; confirm with --yes")
    return typer.confirm(question)


def write(*rows: str) -> None:
    sys.stdout.write("".join(f"{row}\n" for row in rows))


def lines(rows: Iterable[Iterable[object]]) -> None:
    """Columns as wide as their widest cell; what others wrote loses its control characters."""
    table = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    write(*("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table))


def day(at: float) -> str:
    return f"{datetime.datetime.fromtimestamp(at, datetime.UTC):%Y-%m-%d %H:%M} UTC"
