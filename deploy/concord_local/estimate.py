"""`concord estimate`: what a plan will cost in time, bytes and memory, from a probe of two batches.

As many processes as would train do the probe at the same time, so that they share cores and memory as they would. What
preparing costs before the first round (`preprocessing.scope = "federated"`) is not counted.
"""

import math
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concord_client.data import Split
from concord_client.dry_round import Probe
from concord_client.dry_round import probe as probe_rows
from concord_local.federation import Federation
from concord_local.masking_benchmark import bench_masking
from concord_local.memory import PeakMemory
from concord_local.simulation import Setting, cores, prepare, setting_for
from concord_local.transports import start_fork_server, worker_context
from concord_shared.errors import ConcordError, RunFailedError, UsageError
from concord_shared.masking.attempt import STAGES
from concord_shared.plan import load_plan, parse_plan_document
from concord_shared.plan.rounds import share_of
from concord_shared.plan.schema import Plan
from concord_shared.plan.sizes import parameters

__all__ = ["estimate", "show_estimate"]

PROBE_S = 3.0
"""Of a busy machine too long to be lucky in, or unlucky."""
MASKED_MAX = 128
"""Nodes of one masked step, at most."""


@dataclass(frozen=True)
class Cost:
    """Bytes of one node in one step, of training or evaluation. masks: both ways, beyond a step without them."""

    down: int
    up: int
    masks: int

    @property
    def total(self) -> int:
        return self.down + self.up + self.masks


def estimate(
    plan: str = "digits-cnn",
    *,
    data: str | None = None,
    nodes: int | None = None,
    partition: str | None = None,
    overrides: Sequence[str] = (),
    workers: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Seconds, bytes and MB of a simulation of a plan, and of its nodes one by one. Arguments as of `simulate`.

    Raises:
        UsageError, DataError, PlanError: as of `simulate`, and where two batches cannot be trained.
    """
    start_fork_server()
    loaded = load_plan(plan, overrides)
    loaded.plan.check_trains("concord estimate")
    setting = setting_for(loaded, data, nodes, partition, workers, device=device)
    federation, _ = prepare(loaded.plan, setting)
    probes, total_mb = _probe(loaded.plan, federation, setting)
    return _figures(loaded.plan, federation, probes, total_mb)


def _figures(plan: Plan, federation: Federation, probes: Sequence[Probe], total_mb: float | None) -> dict[str, Any]:
    entries, processes = federation.entries(plan), len(probes)
    cohort, rounds = share_of(plan.rounds.cohort, len(entries)), plan.rounds.count
    evaluations = sum(plan.evaluates_after(number) for number in range(1, rounds + 1))
    usual = [_mean(probes, each.rows, each.evaluation_rows, plan) for each in entries]
    evaluating = [each[1] for each in usual]
    training = [each[0] + (each[1] if plan.evaluation.incoming else 0.0) for each in usual]
    share = cohort / len(entries)
    train_s, evaluate_s = _together(training, processes, share), _together(evaluating, processes, 1.0)
    train, evaluate = _bytes(plan, probes[0], cohort, len(entries))
    total_bytes = rounds * cohort * train.total + evaluations * len(entries) * evaluate.total
    node_mb = max(each.memory_mb for each in probes)
    figures = {
        "plan": plan.name,
        "plan_digest": plan.digest,
        "nodes": len(entries),
        "cohort": cohort,
        "rounds": rounds,
        "evaluations": evaluations,
        "processes": processes,
        "parameters": parameters(plan),
        "seconds": {
            "batch": sum(each.batch_s for each in probes) / processes,
            "slowest_node_round": max(training),
            "round": train_s + evaluate_s * evaluations / rounds,
            "total": rounds * train_s + evaluations * evaluate_s,
            "training": rounds * train_s,
            "evaluating": evaluations * evaluate_s,
            "apart": rounds * max(training) + evaluations * max(evaluating),
        },
        "bytes": {
            "node_round_down": train.down + evaluate.down * evaluations // rounds,
            "node_round_up": train.up + evaluate.up * evaluations // rounds,
            "node_round_masks": train.masks + evaluate.masks * evaluations // rounds,
            "total": total_bytes,
        },
        "memory_mb": {"node": node_mb, "total": total_mb},
    }
    return figures | {"advice": _advice(plan, figures, evaluate, train)}


def _mean(probes: Sequence[Probe], rows: int, test_rows: int, plan: Plan) -> tuple[float, float]:
    """Seconds of one node in a round of training, and in an evaluation."""
    training = [each.training_s(plan, rows) + each.once_s for each in probes]
    evaluating = [each.evaluation_s(test_rows) for each in probes]
    return sum(training) / len(probes), sum(evaluating) / len(probes)


def _together(seconds: Sequence[float], processes: int, share: float) -> float:
    """Of nodes that take turns on so many processes: no less than the slowest, nor than an even share of all."""
    expected = sum(seconds) * share
    at_once = math.ceil(len(seconds) * share / processes) * expected / max(1.0, len(seconds) * share)
    return max(max(seconds) * min(1.0, share * len(seconds)), expected / processes, at_once)


def _bytes(plan: Plan, found: Probe, cohort: int, nodes: int) -> tuple[Cost, Cost]:
    masks, request, reply = [0, 0], found.request_bytes, found.answer_bytes
    if plan.privacy.mode == "private":
        more = (len(STAGES) - 1) * (request + reply)
        masks = [_masks(cohort) + more, _masks(nodes) + more]
    asked = found.metrics_bytes if plan.evaluation.incoming else 0
    train = Cost(found.down_bytes + request, found.update_bytes + asked + reply, masks[0])
    return train, Cost(found.model_bytes + request, found.evaluation_bytes + reply, masks[1])


def _masks(nodes: int) -> int:
    """Bytes of keys, shares and openings at one node of a masked step, by the protocol itself."""
    if nodes < 3:
        return 0  # too few for one; the run says so
    return int(bench_masking(min(nodes, MASKED_MAX), 1000, 1)["bytes_beyond_fp32"])


def _advice(plan: Plan, figures: dict[str, Any], evaluate: Cost, train: Cost) -> list[str]:
    """What costs most, and which setting would lower it."""
    seconds, said = figures["seconds"], []
    if seconds["evaluating"] > seconds["training"]:
        said.append("time: evaluation takes most of it; a higher evaluation.every, as 5, lowers it")
    else:
        said.append(
            "time: training takes most of it; fewer training.local_epochs or rounds.count, a smaller rounds.cohort, or "
            "a smaller model lower it"
        )
    spent = figures["rounds"] * figures["cohort"] * train.total
    if figures["bytes"]["total"] > 2 * spent:
        said.append("bytes: evaluation carries most of them; a higher evaluation.every lowers them")
    elif train.masks > train.down + train.up:
        said.append("bytes: keys and shares of the masks are most of them; a smaller rounds.cohort lowers them")
    else:
        said.append(
            f"bytes: the model's {figures['parameters']} parameters are most of them; a smaller model or fewer "
            "rounds.count lower them"
        )
    said.append(
        "memory: each training process holds torch, its rows and one batch; a smaller training.batch_size or fewer "
        "--workers lower it"
    )
    return said


def _probe(plan: Plan, federation: Federation, setting: Setting) -> tuple[list[Probe], float | None]:
    """From as many processes as would train, all at once; and the most memory that all of them held."""
    largest = sorted(federation.entries(plan), key=lambda each: (-each.rows, each.name))
    count = min(setting.workers, len(largest), cores())
    context, found = worker_context(), []
    with tempfile.TemporaryDirectory(prefix="concord-estimate-") as folder, PeakMemory() as memory:
        federation.share(Path(folder) / "shared")
        running = []
        for entry in largest[:count]:
            ours, theirs = context.Pipe()
            arguments = (theirs, plan.document(), Path(folder) / "shared", entry.name, setting.device, PROBE_S)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            running.append((process, ours))
        memory.watch(process.pid for process, _ in running)
        try:
            for process, ours in running:
                found.append(_answer(process, ours))
            memory.sample()
        finally:
            for process, ours in running:
                with closing(ours):
                    process.kill()
                    process.join()
    return found, memory.peak_mb


def _answer(process: Any, connection: Any) -> Probe:
    try:
        answer = connection.recv()
    except EOFError as error:
        process.join(2)
        raise RunFailedError(
            f"two batches ended their process with code {process.exitcode}; if the machine is short of memory, set a "
            "smaller training.batch_size or fewer --workers"
        ) from error
    if isinstance(answer, str):
        raise UsageError(answer)
    assert isinstance(answer, Probe)
    return answer


def _serve(connection: Any, document: dict[str, Any], directory: Path, name: str, device: str, seconds: float) -> None:
    """One process of a probe: answers once, then holds what it has until it is ended."""
    import signal

    from concord_client.devices import choose_device, prepare_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    prepare_process(threads=1)
    plan = parse_plan_document(document)
    try:
        rows = Federation.map(directory).dataset(name)
        assert rows.size(Split.TRAIN)
        connection.send(probe_rows(plan, rows, choose_device(device), seconds))
    except ConcordError as error:
        connection.send(str(error))
    connection.poll(None)


def show_estimate(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    seconds, sent, memory = found["seconds"], found["bytes"], found["memory_mb"]
    table = Table(box=None, pad_edge=False)
    for heading in ("", "a round", "in all"):
        table.add_column(heading, justify="right" if heading else "left")
    here = f"time here, {found['processes']} processes"
    table.add_row(here, f"{seconds['round']:.3g} s", f"{seconds['total']:.3g} s")
    table.add_row("time of nodes apart", f"{seconds['apart'] / found['rounds']:.3g} s", f"{seconds['apart']:.3g} s")
    for way in ("down", "up", "masks"):
        each = sent[f"node_round_{way}"]
        table.add_row(f"bytes of a node, {way}", f"{each / 1e6:.3g} MB", f"{each * found['rounds'] / 1e6:.3g} MB")
    table.add_row("bytes of all nodes", "", f"{sent['total'] / 1e6:.3g} MB")
    total = "not known here" if memory["total"] is None else f"{memory['total']:.0f} MB"
    table.add_row("memory of a node, of all here", f"{memory['node']} MB", total)
    console = Console()
    console.print(
        f"{found['plan']}: {found['parameters']:,} parameters, {found['nodes']} nodes, {found['rounds']} rounds of "
        f"{found['cohort']}"
    )
    console.print(table)
    for sentence in found["advice"]:
        console.print(sentence, highlight=False)
