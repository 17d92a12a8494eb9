"""What a person sees while a run goes on: a live view on a terminal, plain lines in a log; on standard error."""

import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from concord_shared.text import printable

if TYPE_CHECKING:
    from concord_server.client import Coordinator

__all__ = ["ago", "robust_lines", "round_line", "state_lines", "watch"]

FIGURES_SHOWN = ("accuracy", "auc", "rmse", "r2", "hit_rate_10", "ndcg_10", "loss")
LINES_SHOWN = 12
Record = Mapping[str, Any]


class _View(Protocol):
    def state(self, state: Record) -> None: ...
    def round(self, record: Record) -> None: ...
    def redraw(self) -> None: ...


def watch(api: "Coordinator", run: str) -> dict[str, Any]:
    """Follows a run to its end; returns its report."""
    from concord_server.client_nouns import watch_run

    with _view(run) as view:
        for event, data in watch_run(api, run):
            if event == "state":
                view.state(data)
            elif event == "round":
                view.round(data)
            elif event == "end":
                return data
    raise AssertionError("a stream of events ends with the end")


def ago(since: float, now: float) -> str:
    """How long something lasts, in the largest unit that fits: "3 h"."""
    seconds = max(0, int(now - since))
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def state_lines(state: Record, now: float) -> list[str]:
    """The state, and for whom it waits, a line a node: "hospital-b: approval, since 3 h"."""
    name = "stopping" if state["stop_requested"] and state["state"] == "running" else state["state"]
    head = name + (f": {state['reason']}" if state["reason"] else "")
    return [printable(line) for line in (head, *(_wait_line(each, now) for each in state["waiting_for"]))]


def round_line(record: Record) -> str:
    """One step in one line; or a person's word on a node in quarantine."""
    if "lifted" in record:
        word = ", ".join(f"{node} is asked again, by {person}" for node, person in record["lifted"].items())
        return printable(f"{word}: {record['reason']}" if record["reason"] else word)
    if "aborted" in record:
        aborted = printable(str(record["aborted"]))
        return f"{record['kind']} {record['round']}: without a result, the model is unchanged: {aborted}"
    line = f"{record['kind']} {record['round']}/{record['of']}: {len(record['survivors'])} nodes"
    failures = record.get("failures", {})
    lost = sorted([*failures, *record.get("silent", [])])
    if lost:
        line += f", without {', '.join(lost[:5])}" + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
    metrics = record.get("metrics") or {}
    told = _standing_out(record)
    told += [f"{name} {metrics[name]:.4g}" for name in FIGURES_SHOWN if isinstance(metrics.get(name), (int, float))]
    why = "".join(f"; {node}: {failures[node]}" for node in lost[:2] if node in failures)
    return printable(", ".join([line, f"{record['seconds']:.2g} s", *told]) + why)


def robust_lines(found: Record | None) -> list[str]:
    """What a robust run says of its nodes: one line for each that stood out, the others by number."""
    if found is None:
        return []
    lines = [f"robust: {found['rule']} against {found['attackers']} attackers"]
    for node, row in found["nodes"].items():
        if not row["flagged"] and not row["quarantined"]:
            continue
        line = f"{node}: flagged in {row['flagged']} of {row['rounds']} rounds ({', '.join(row['reasons'])})"
        if row["quarantined"]:
            line += f"; left out after round {row['quarantined']['round']}: {row['quarantined']['rule']}"
        if row["lifted_by"]:
            line += f"; asked again by {row['lifted_by']}"
        lines.append(line)
    quiet = sum(not row["flagged"] for row in found["nodes"].values())
    lines.append(f"{quiet} of {len(found['nodes'])} nodes never stood out")
    if found["quarantine_withheld"]:
        lines.append(found["quarantine_withheld"])
    return [printable(line) for line in lines]


def _standing_out(record: Record) -> list[str]:
    """In robust mode."""
    flags = {node: row["flag"] for node, row in record.get("anomalies", {}).get("nodes", {}).items() if row["flag"]}
    told = [f"{node} stands out ({flag})" for node, flag in list(flags.items())[:LINES_SHOWN]]
    told += [f"{node} is left out from here" for node in record.get("quarantined", {})]
    return told + ([record["quarantine_withheld"]] if "quarantine_withheld" in record else [])


def _wait_line(each: Record, now: float) -> str:
    return f"{each['node'] or 'all'}: {each['what']}, since {ago(each['since'], now)}"


@contextlib.contextmanager
def _view(run: str) -> Iterator[_View]:
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.live import Live

    view = _Screen(run)
    with Live(get_renderable=view.render, console=Console(stderr=True), refresh_per_second=2) as live:
        view.redraw = live.refresh  # type: ignore[method-assign]
        yield view


class _Lines:
    """A line for everything new."""

    def __init__(self) -> None:
        self._said: set[tuple[str, str]] = set()

    def state(self, state: Record) -> None:
        head, *_ = state_lines(state, time.time())
        waits = {(each["node"], each["what"]) for each in state["waiting_for"]}
        if ("", head) not in self._said:
            _write([head])
        _write(
            _wait_line(each, time.time())
            for each in state["waiting_for"]
            if (each["node"], each["what"]) not in self._said
        )
        self._said = {("", head), *waits}

    def round(self, record: Record) -> None:
        _write([round_line(record)])

    def redraw(self) -> None:
        """Lines stand as they were written."""


class _Screen:
    """The state, for whom it waits and since when, the last steps; drawn anew twice a second."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._state: Record | None = None
        self._rounds: list[str] = []

    def state(self, state: Record) -> None:
        self._state = state
        self.redraw()

    def round(self, record: Record) -> None:
        self._rounds = [*self._rounds, round_line(record)][-LINES_SHOWN:]
        self.redraw()

    def redraw(self) -> None:
        """Set to the live view's own."""

    def render(self) -> Any:
        from rich.text import Text

        lines = [] if self._state is None else state_lines(self._state, time.time())
        text = Text()
        text.append(self._run, style="bold")
        for index, line in enumerate(lines):
            text.append(f"  {line}" if index == 0 else f"\n  {line}", style="" if index == 0 else "yellow")
        for line in self._rounds:
            text.append(f"\n  {line}", style="dim")
        return text


def _write(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stderr.write(line + "\n")
    sys.stderr.flush()
