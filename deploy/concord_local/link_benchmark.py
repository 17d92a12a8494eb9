"""`concord bench link`: what a round costs between machines, beside training.

A real coordinator and real `concord-node` processes over TLS on loopback; consent, signing, checkpoints and the egress
log are on. Only the training is replaced by a fixed update, so what is measured is everything else. Node k's update is
a step in coordinate k, so that the model tells afterwards whether any update was lost or counted twice.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from concord_client.fixed_update import ENVIRONMENT, STEP
from concord_local.deployment import Deployment, Partner
from concord_local.environment import describe_environment
from concord_local.memory import cpu_seconds, peak_rss_mb, pss_mb
from concord_server.client_nouns import (
    agree,
    create_study,
    offer_agreement,
    request_agreement,
    start_run,
    watch_run,
)
from concord_shared.errors import RunFailedError, UsageError
from concord_shared.models import new_vector
from concord_shared.plan import Plan
from concord_shared.plan.load import parse_plan
from concord_shared.tensors import read_safetensors

__all__ = ["bench_link", "link_plan", "show_link"]

STUDY = "link"
IDLE_S = 20.0


def link_plan(parameters: int, rounds: int, mode: str = "plain") -> Plan:
    """A perceptron over 8 × 8 images of about so many parameters. Each round trains; only the last evaluates.

    mode: "plain", or "private": under masks.
    """
    hidden = _hidden(parameters)
    text = f"""
name = "link"
[data]
task = "classification"
input = "image"
shape = [1, 8, 8]
classes = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
[model]
name = "mlp"
hidden = {hidden}
[rounds]
count = {rounds}
quorum = "all"
update_bound = 1000.0
weight_cap = 100
[evaluation]
every = 0
[privacy]
mode = "{mode}"
"""
    return parse_plan(text, "link").plan


def _hidden(parameters: int) -> list[int]:
    """One layer where the model is small, two equal ones where it is large."""
    if parameters < 100_000:
        return [max(1, round((parameters - 10) / 75))]
    return [round(((75**2 + 4 * parameters) ** 0.5 - 75) / 2)] * 2


def bench_link(nodes: int, parameters: int, rounds: int, private: bool = False) -> dict[str, Any]:
    """Medians over the train rounds after the first, whose offers also find nodes that have just begun to listen.

    private: rounds under masks; at least three nodes, as their policies ask.
    """
    if private and nodes < 3:
        raise UsageError("--private: nodes take part under masks with two others at least; expected --nodes 3 or more")
    plan = link_plan(parameters, rounds, "private" if private else "plain")
    with tempfile.TemporaryDirectory(prefix="concord-link-") as folder, ExitStack() as stack:
        deployment = stack.enter_context(Deployment(Path(folder), "link"))
        partners = _prepare(deployment, nodes)
        idle = _idle_cost([partner.process.pid for partner in partners if partner.process is not None])
        research = deployment.organisations["research"]
        run = start_run(research.api, research.key, STUDY, plan)["id"]
        deployment.each(lambda partner: partner.approve(plan, wait_s=120), partners)
        report: dict[str, Any] = {}
        for _, record in watch_run(research.api, run):
            report = record
        if report["state"] != "succeeded":
            raise RunFailedError(f"the run {report['state']}: {report['reason']}")
        periods = _periods(deployment, run)
        pids = deployment.pids()
        summary = report["summary"]
        return {
            "nodes": nodes,
            "parameters": _check_counts(deployment, plan, summary, nodes),
            "rounds": rounds,
            "private": private,
            "round_s": round(statistics.median(periods), 3),
            "spread_s": [round(min(periods), 3), round(max(periods), 3)],
            "spent_s": {name: round(value / rounds, 4) for name, value in summary["spent_s"].items()},
            "peak_mb": {name: peak_rss_mb(pid) for name, pid in pids.items()},
            "idle_node": idle,
            "environment": describe_environment(plan, "cpu"),
        }


def _prepare(deployment: Deployment, nodes: int) -> list[Partner]:
    """Enrolled, agreed and listening nodes, all of one organisation, each with a few rows."""
    research, owner = deployment.add_organisation("research"), deployment.add_organisation("owner")
    names = [f"node-{index + 1:03d}" for index in range(nodes)]
    partners = deployment.each(lambda name: deployment.enrol(name, owner), names)  # type: ignore[arg-type]

    def begin(partner: Partner) -> None:
        file = partner.home / "rows.npz"
        np.savez(file, x=np.zeros((20, 1, 8, 8), np.uint8), y=np.arange(20) % 10)
        partner.run("data", "add", "rows", f"npz:{file}", "--publish")
        deployment.start_node(partner, {ENVIRONMENT: str(names.index(partner.name))})

    deployment.each(begin, partners)
    create_study(research.api, research.key, STUDY, title="Link", purpose="to time rounds", members=[owner.name])
    terms = {"minimum_cohort": 1, "rounds_max": 100_000}
    asked = request_agreement(research.api, research.key, STUDY, [f"{name}/rows" for name in names], terms=terms)
    offered = offer_agreement(owner.api, owner.key, asked["agreement"], terms={"rounds_max": 10_000})
    agree(research.api, research.key, asked["agreement"], offered["digest"])
    return list(partners)


def _idle_cost(pids: list[int]) -> dict[str, float | None]:
    """Of one node that waits: its share of memory, and of a core."""
    time.sleep(5)
    before, started = sum(map(cpu_seconds, pids)), time.monotonic()
    time.sleep(IDLE_S)
    used = sum(map(cpu_seconds, pids)) - before
    memory = pss_mb(pids)
    return {
        "core_percent": round(100 * used / (time.monotonic() - started) / len(pids), 3),
        "memory_mb": None if memory is None else round(memory / len(pids), 1),
    }


def _periods(deployment: Deployment, run: str) -> list[float]:
    """Seconds from one durable train round to the next, as the database dates them."""
    from concord_server.runs import service
    from concord_server.settings import Home

    database = Home.open(deployment.coordinator_home).database()
    with database.reading() as session:
        steps = service.records_after(session, run)
    times = [step.created_at.timestamp() for step in steps if step.kind == "train"]
    database.close()
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def _check_counts(deployment: Deployment, plan: Plan, summary: Mapping[str, Any], nodes: int) -> int:
    """Each node was counted once in every round: its coordinate moved by exactly so many steps. Returns the size."""
    layout, start = new_vector(plan)
    folder = deployment.coordinator_home / "models" / summary["model_digest"] / summary["run"]
    tensors, _ = read_safetensors(folder / "model.safetensors")
    moved = (layout.join(tensors) - start)[: nodes + 10] * nodes / STEP
    expected = np.where(np.arange(len(moved)) < nodes, plan.rounds.count, 0)
    if not np.allclose(moved, expected, atol=0.05):
        raise RunFailedError(f"updates were lost or counted twice: {np.round(moved, 2).tolist()}")
    return layout.size


def show_link(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    low, high = result["spread_s"]
    console.print(
        f"{result['nodes']} nodes, {result['parameters']:,} parameters, {result['rounds']} rounds"
        f"{' under masks' if result['private'] else ''}: "
        f"{result['round_s']:.2f} s a round (median; {low:.2f}–{high:.2f}); every update counted once"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("of a round")
    table.add_column("s", justify="right")
    spent = result["spent_s"]
    rest = max(0.0, result["round_s"] - sum(spent.values()))
    for name, value in (
        ("offers to the SuperLink", spent["offers"]),
        ("waiting: nodes fetch, check, answer, sign, send", spent["waiting"]),
        ("replies fetched and verified", spent["replies"]),
        ("checked, summed, applied, stored", rest),
    ):
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    peaks = ", ".join(f"{name} {value} MB" for name, value in result["peak_mb"].items())
    idle = result["idle_node"]
    console.print(f"peak memory: {peaks}; an idle node: {idle['memory_mb']} MB, {idle['core_percent']} % of a core")
