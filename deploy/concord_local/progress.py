"""What a person sees while a run goes on (on standard error), and at its end (on standard output)."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from concord_server.commands.statistics import show_statistics

__all__ = ["observer", "show_comparison_of_runs", "show_demo", "show_figures", "show_result", "show_sweep"]

NODES_SHOWN_MAX = 20
BARS = " ▁▂▃▄▅▆▇█"
Observer = Callable[[Mapping[str, Any]], None]


@contextmanager
def observer() -> Iterator[Observer]:
    """A live bar with the time that is left where standard error is a terminal; plain lines where it is a log."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda record: _write(_line(record))
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=None, note="")

        def observe(record: Mapping[str, Any]) -> None:
            if record["kind"] == "data":
                console.print(_data_table(record))
                bar.reset(task, total=None, description=record["plan"], note="")
            elif record["kind"] in ("train", "evaluate") and "aborted" not in record:
                note = _figures_line(record["metrics"]) if "metrics" in record else None
                bar.update(task, total=record["of"], completed=record["round"], description="round")
                if note:
                    bar.update(task, note=note)
                if record.get("failures"):
                    console.print(f"  round {record['round']}: without {_without(record)}", style="yellow")
            elif record["kind"] == "baseline":
                bar.update(
                    task,
                    description="alone and pooled",
                    completed=record["done"],
                    total=record["of"],
                    note="",
                )
            elif text := _line(record):
                console.print(text, style="yellow" if "aborted" in record else "")

        yield observe


def _write(line: str) -> None:
    if line:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _line(record: Mapping[str, Any]) -> str:
    """One line of a log for one event; empty for events that say nothing new."""
    kind = record["kind"]
    if "aborted" in record:
        return f"round aborted, the model is unchanged: {record['aborted']}"
    if kind == "data":
        return f"{record['plan']}: {len(record['nodes'])} nodes, run directory {record['run_dir']}"
    if kind == "evaluate" and "metrics" in record:
        return f"round {record['round']}/{record['of']}: {_figures_line(record['metrics'])}"
    if kind == "train":
        without = f", without {_without(record)}" if record["failures"] or record["silent"] else ""
        nodes = f"{len(record['survivors'])} nodes, {record['seconds']:.2f} s"
        return f"round {record['round']}/{record['of']}: {nodes}{without}"
    if kind == "statistics":
        return (
            f"statistics {record['round']}/{record['of']}: {len(record['survivors'])} nodes, {record['seconds']:.2f} s"
        )
    if kind == "seed":
        return f"seed {record['seed']} of {record['of']}"
    if kind == "baseline":
        return f"alone and pooled: {record['done']}/{record['of']}"
    return str(record.get("text", ""))


def _without(record: Mapping[str, Any]) -> str:
    lost = [*record["failures"], *record["silent"]]
    shown = ", ".join(sorted(lost)[:5]) + (" …" if len(lost) > 5 else "")
    reasons = sorted({str(reason) for reason in record["failures"].values()})
    return f"{shown} ({reasons[0]})" if reasons else shown


def _figures_line(metrics: Mapping[str, Any]) -> str:
    for names in (("accuracy", "loss"), ("rmse", "r2"), ("ndcg_10", "hit_rate_10")):
        if names[0] in metrics:
            return ", ".join(f"{name} {metrics[name]:.4f}" for name in names if metrics.get(name) is not None)
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "rows" and value is not None)


def _data_table(record: Mapping[str, Any]) -> Table:
    """Who has what: rows, and for classes a bar each."""
    table = Table(title="who has what", box=None, title_justify="left")
    table.add_column("node")
    table.add_column("train", justify="right")
    table.add_column("test", justify="right")
    table.add_column("classes" if record["classes"] else "target, mean ± deviation")
    for name, node in list(record["nodes"].items())[:NODES_SHOWN_MAX]:
        if record["classes"]:
            top = max(node["classes"]) or 1
            shape = "".join(BARS[-(-count * (len(BARS) - 1) // top)] for count in node["classes"])
        else:
            shape = f"{node['target_mean']:.3g} ± {node['target_deviation']:.3g}"
        table.add_row(name, str(node["train"]), str(node["test"]), shape)
    if len(record["nodes"]) > NODES_SHOWN_MAX:
        table.add_row(f"… {len(record['nodes']) - NODES_SHOWN_MAX} more", "", "", "")
    return table


def show_result(summary: Mapping[str, Any]) -> None:
    """The end of a run: its figures, the table of nodes, and where everything lies."""
    console = Console()
    if "comparison" in summary:
        console.print(_comparison_table(summary["comparison"]))
    elif summary["per_node"]:
        console.print(_node_table(summary))
    if "robust" in summary:
        console.print(_robust_table(summary["robust"], summary.get("attack")))
    if "attack" in summary:
        console.print(_attack_line(summary["attack"]), soft_wrap=True)
    if "cleaning" in summary:
        console.print(_cleaning_line(summary["cleaning"]), soft_wrap=True)
    if "statistics" in summary:
        show_statistics(summary["statistics"], summary["plan_document"])
    show_figures({"metrics": summary["metrics"], "deviation": summary.get("deviation", {})})
    if summary.get("worst_node"):
        figure = next(key for key in summary["worst_node"] if key != "node")
        console.print(f"worst node: {summary['worst_node']['node']} ({figure} {summary['worst_node'][figure]:.4f})")
    seconds = summary["seconds"]
    memory = f", {summary['peak_pss_mb']:.0f} MB" if summary["peak_pss_mb"] else ""
    console.print(
        f"{summary['nodes']} nodes, {_steps(summary)} in {seconds['total']:.1f} s{memory}; "
        f"{_size(summary['bytes_down'])} down, {_size(summary['bytes_up'])} up; no row left its node",
        soft_wrap=True,
    )
    if "seeds" not in summary and "statistics" not in summary:
        deterministic = str(summary["deterministic"]).lower()
        console.print(f"model digest {summary['model_digest'][:16]}… (deterministic: {deterministic})", soft_wrap=True)
    if summary.get("personal"):
        console.print(
            "these figures are of each node's own model; model.safetensors holds what they share. One node's: concord "
            f"evaluate {summary['run_dir']} --data SPEC --node NAME",
            soft_wrap=True,
        )
    if summary["guarantee"]:
        promised = summary["guarantee"]
        console.print(
            f"differential privacy of each {promised['unit']}: ε = {promised['epsilon']:g}, δ = {promised['delta']:g} "
            "over the whole run; figures of evaluation are not covered",
            soft_wrap=True,
        )
    where = "summary.json" if "seeds" in summary else "report.html"
    console.print(f"report: {summary['run_dir']}/{where}", soft_wrap=True)
    if "perplexity" in summary["metrics"]:
        sys.stdout.write(f"Test loss of a token: {summary['metrics']['loss']:.4f}\n")
    elif "accuracy" in summary["metrics"]:
        sys.stdout.write(f"Test accuracy: {summary['metrics']['accuracy']:.2%}\n")


def _cleaning_line(cleaning: Mapping[str, Mapping[str, int]]) -> str:
    words = {
        "duplicates": "duplicate rows dropped",
        "outside": "values outside of the contract",
        "outliers": "outliers moved",
        "denoised": "images filtered",
    }
    totals = {name: sum(counts.get(name, 0) for counts in cleaning.values()) for name in words}
    named = [f"{total:,} {words[name]}" for name, total in totals.items() if any(name in c for c in cleaning.values())]
    return f"cleaned before training: {', '.join(named)}"


def _steps(summary: Mapping[str, Any]) -> str:
    if "statistics" in summary:
        return f"{summary['statistics']['stage']} stages"
    return f"{summary['rounds']} rounds"


def show_demo(summary: Mapping[str, Any]) -> None:
    """The end of a demo: the table, what it took, and how to look further."""
    console = Console()
    console.print(_comparison_table(summary["comparison"]))
    console.print(
        "alone and pooled: known to this demo alone, which dealt the rows; nobody in a real federation knows them",
        style="dim",
        soft_wrap=True,
    )
    show_figures(summary)
    seconds = summary["seconds"]
    console.print(
        f"{summary['nodes']} nodes in processes of their own, {summary['rounds']} rounds in {seconds['training']:.1f} s"
        f", all of it in {seconds['total']:.1f} s; {_size(summary['bytes_down'])} down, {_size(summary['bytes_up'])} up"
        "; no row left its home",
        soft_wrap=True,
    )
    deterministic = str(summary["deterministic"]).lower()
    console.print(f"model digest {summary['model_digest'][:16]}… (deterministic: {deterministic})", soft_wrap=True)
    if summary["run_dir"]:
        console.print(
            f"kept: {summary['run_dir']} (concord server up {summary['run_dir']}/coordinator)", soft_wrap=True
        )
    if "accuracy" in summary["metrics"]:
        sys.stdout.write(f"Test accuracy: {summary['metrics']['accuracy']:.2%}\n")


def show_figures(result: Mapping[str, Any]) -> None:
    deviation = result.get("deviation", {})
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in result["metrics"].items():
        if isinstance(value, (int, float)) and name != "rows":
            spread = f" ± {deviation[name]:.4f}" if name in deviation else ""
            table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}{spread}")
    Console().print(table)


def show_sweep(summary: Mapping[str, Any]) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False)
    table.add_column("point")
    table.add_column(f"validation {summary['headline']}", justify="right")
    for point in summary["points"]:
        mark = " ← best" if point["set"] == summary["best"]["set"] else ""
        table.add_row(" ".join(point["set"]), f"{point['mean']:.4f} ± {point['deviation']:.4f}{mark}")
    console.print(table)
    console.print(f"best plan: {summary['best']['plan']}", soft_wrap=True)


def show_comparison_of_runs(comparison: Mapping[str, Any]) -> None:
    console = Console()
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for run in comparison["runs"]:
        table.add_column(str(run["run_dir"]), justify="right", overflow="fold")
    for key in comparison["figures"]:
        cells = [run["metrics"].get(key) for run in comparison["runs"]]
        table.add_row(key, *("–" if cell is None else f"{cell:.4f}" for cell in cells))
    for key in ("plan_digest", "model_digest"):
        table.add_row(key, *(str(run[key])[:16] for run in comparison["runs"]))
    console.print(table)
    console.print(comparison["verdict"])


def _node_table(summary: Mapping[str, Any]) -> Table:
    own = (name for name in summary["metrics"] if name not in ("rows", "loss"))
    figure = next((name for name in ("accuracy", "ndcg_10", "rmse") if name in summary["metrics"]), next(own, "loss"))
    table = Table(box=None, pad_edge=False)
    for heading in ("node", "test rows", figure, "loss"):
        table.add_column(heading, justify="left" if heading == "node" else "right")
    for name, figures in list(summary["per_node"].items())[:NODES_SHOWN_MAX]:
        table.add_row(name, f"{figures['rows']:.0f}", _cell(figures.get(figure)), _cell(figures.get("loss")))
    return table


def _robust_table(found: Mapping[str, Any], attack: Mapping[str, Any] | None) -> Table:
    """Who stood out, and in a drill who attacked."""
    title = f"{found['rule']} against {found['attackers']} attackers: means over rounds"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    attacked = ["attacks"] if attack else []
    for heading in ("node", *attacked, "flagged", "why", "norm", "distance", "cosine", "trimmed", "left out"):
        table.add_column(heading, justify="left" if heading in ("node", "attacks", "why", "left out") else "right")
    rows = sorted(found["nodes"].items(), key=lambda item: (-item[1]["flagged"], item[0]))
    for name, row in rows[:NODES_SHOWN_MAX]:
        drill = [("yes" if name in attack["nodes"] else "")] if attack else []
        figures = [f"{row[key]:.3g}" for key in ("norm", "distance", "cosine")]
        out = f"after round {row['quarantined']['round']}" if row["quarantined"] else ""
        flagged, why = f"{row['flagged']}/{row['rounds']}", ", ".join(row["reasons"])
        table.add_row(name, *drill, flagged, why, *figures, f"{row['trimmed']:.0%}", out)
    if len(rows) > NODES_SHOWN_MAX:
        table.add_row(f"… {len(rows) - NODES_SHOWN_MAX} more")
    return table


def _attack_line(attack: Mapping[str, Any]) -> str:
    seen, kind = attack["seen"], attack["kind"] + (f":{attack['value']:g}" if "value" in attack else "")
    line = f"attack {kind} by {', '.join(attack['nodes'])} (chosen {attack['chosen']})"
    if seen["refused"]:
        line += f"; {seen['refused']} of their replies were refused"
    if seen["updates_of_attackers"]:
        line += f"; {seen['flags_on_attackers']} of {seen['updates_of_attackers']} of their Updates were flagged"
    if seen["flags"]:
        line += f"; {seen['flags_on_attackers']} of {seen['flags']} flags hit an attacker ({seen['precision']:.0%})"
    return line


def _comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Alone, federated, pooled: each node's on its own test rows, then all on everybody's."""
    table = Table(
        title=f"{comparison['headline']} on identical test rows",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for heading in ("node", "train", "test", "alone", "federated", "pooled"):
        table.add_column(heading, justify="left" if heading == "node" else "right")
    rows: Sequence[Mapping[str, Any]] = comparison["rows"]
    for row in rows[:NODES_SHOWN_MAX]:
        cells = (_cell(row[key]) for key in ("alone", "federated", "pooled"))
        table.add_row(row["node"], str(row["train_rows"]), str(row["test_rows"]), *cells)
    total = comparison["all"]
    table.add_section()
    cells = (_cell(total[key]) for key in ("alone_mean", "federated", "pooled"))
    table.add_row("everybody's rows", "", str(total["test_rows"]), *cells, style="bold")
    if total.get("popularity") is not None:
        table.add_row("by popularity alone", "", "", "", "", _cell(total["popularity"]))
    return table


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
