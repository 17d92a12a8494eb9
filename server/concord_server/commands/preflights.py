"""A preflight on a terminal: who has answered, then a row a node and a column a check, and what to do about each no."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from concord_shared.text import printable

if TYPE_CHECKING:
    from concord_server.client import Coordinator

__all__ = ["follow", "show_matrix"]

MARKS = {"ok": ("✓", "green"), "no": ("✗", "bold red"), "unknown": ("?", "yellow")}
WIDTH = 110
"""Where the output is no terminal."""
Record = Mapping[str, Any]


def follow(api: "Coordinator", asked: Record, wait_s: int) -> dict[str, Any]:
    """Waits for the answers and says on standard error who gave theirs; returns what stands in the end."""
    from concord_server.client_nouns import await_preflight

    said: set[str] = set()
    count = len(asked["nodes"])
    sys.stderr.write(f"asked {count} {'node' if count == 1 else 'nodes'}; waiting up to {wait_s} s\n")
    found: dict[str, Any] = dict(asked)
    for found in await_preflight(api, dict(asked), wait_s):
        for node in found["nodes"]:
            if node["answered_at"] is not None and node["node"] not in said:
                said.add(node["node"])
                word = "go" if node["go"] else "no go"
                sys.stderr.write(printable(f"{node['node']}: {word} ({len(said)} of {count})") + "\n")
        sys.stderr.flush()
    return found


def show_matrix(found: Record) -> None:
    """The matrix; what was measured; then, for all that is not ok, what the steward of that node does."""
    from rich.console import Console

    console = Console(
        file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False, emoji=False
    )
    nodes: Sequence[Record] = found["nodes"]
    console.print(_matrix(nodes))
    if any(node["figures"] for node in nodes):
        console.print(_figures(nodes))
    for line in _advice(nodes):
        console.print(line, soft_wrap=True)
    ready = sum(node["go"] for node in nodes)
    console.print("go" if found["go"] else f"no go: {ready} of {len(nodes)} nodes are ready", style="bold")


def _matrix(nodes: Sequence[Record]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("node", no_wrap=True)
    for check in nodes[0]["checks"] if nodes else ():
        table.add_column(printable(check["name"]), justify="center")
    for node in nodes:
        marks = [Text(*MARKS[check["status"]]) for check in node["checks"]]
        table.add_row(Text(printable(node["node"]), "green" if node["go"] else "bold"), *marks)
    return table


def _figures(nodes: Sequence[Record]) -> Any:
    """Rows are coarse, and times follow from them."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("node", "rows", "s/batch", "s/round", "all rounds", "down/round", "up/round", "memory"):
        table.add_column(name, justify="left" if name == "node" else "right", no_wrap=True)
    for node in nodes:
        figures = node["figures"] or {}
        cells = (
            _cell(figures, "rows", lambda rows: f"about {rows}"),
            _cell(figures, "batch_us", lambda us: f"{us / 1e6:.3g}"),
            _cell(figures, "round_ms", lambda ms: f"{ms / 1e3:.3g}"),
            _cell(figures, "total_ms", lambda ms: _seconds(ms / 1e3)),
            _cell(figures, "down_bytes", _bytes),
            _cell(figures, "up_bytes", _bytes),
            _cell(figures, "memory_mb", lambda mb: f"{mb} MB"),
        )
        table.add_row(Text(printable(node["node"])), *map(Text, cells))
    return table


def _advice(nodes: Sequence[Record]) -> Iterator[str]:
    for node in nodes:
        for check in node["checks"]:
            if check["status"] == "ok" or (check["status"] == "unknown" and not check["next"]):
                continue
            mark, _ = MARKS[check["status"]]
            yield printable(f"{mark} {node['node']} · {check['name']}: {check['says']}")
            if check["name"] == "contract":
                yield from (printable(f"    {each}") for each in node["differences"])
                if node["more"]:
                    yield f"    and {node['more']} more"
            if check["next"]:
                yield printable(f"  → {check['next']}")


def _cell(figures: Record, name: str, text: Any) -> str:
    value = figures.get(name)
    return "–" if value is None else str(text(value))


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
