"""`concord bench`: a simulation beside the bare PyTorch loop that does the same steps, in one run on one
machine.

Fashion-MNIST, seed-cnn, 100 IID nodes, 10 a round, 1 local epoch, batch 32, SGD 0.05, 5 rounds: 950 steps.
Timed are the steps of the bare loop, and from the first offer to the last model applied with quantising,
summing and a checkpoint each round. No evaluation in either.
"""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from concord_client.data import locate, read_data
from concord_local.federation import Federation
from concord_local.memory import PeakMemory, pss_mb
from concord_local.rundir import RunDirectory
from concord_local.simulation import Setting, cores, federate
from concord_local.transports import start_fork_server
from concord_server.collector import RingSum
from concord_server.replies import Expectation, accept_reply
from concord_shared.blocks import LANES, Block, encode_update
from concord_shared.errors import RunFailedError
from concord_shared.messages import Offer, answer, offer_message
from concord_shared.plan import Plan, load_plan
from concord_shared.transport import NodeEntry

__all__ = ["BENCH_OVERRIDES", "bench_aggregation", "bench_simulation", "show_aggregation", "show_bench"]

NODES = 100
BENCH_OVERRIDES = (
    "rounds.count=5",
    "rounds.cohort=10",
    "rounds.weight_cap=600",
    "training.learning_rate=0.05",
    "training.momentum=0.0",
    "evaluation.every=0",
)


def bench_simulation(spec: str, repeats: int, workers: int | None) -> dict[str, Any]:
    """Medians of `repeats` interleaved runs of each: bare loop, concord in fp32, concord in bf16."""
    start_fork_server()
    available = cores()
    setting = Setting(spec, NODES, "iid", workers or available)
    times: dict[str, list[float]] = {"bare": [], "fp32": [], "bf16": []}
    first_offers = []
    for _ in range(repeats):
        times["bare"].append(_bare_seconds(spec, threads=available))
        for precision in ("fp32", "bf16"):
            plan = load_plan("fashion-cnn", [*BENCH_OVERRIDES, f"training.precision={precision}"]).plan
            training, first_offer = _concord_seconds(plan, setting)
            times[precision].append(training)
            first_offers.append(first_offer)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "ratio_fp32": _median_ratio(times["fp32"], times["bare"]),
        "ratio_bf16": _median_ratio(times["bf16"], times["bare"]),
        "seconds": {name: round(value, 3) for name, value in medians.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in times.items()},
        "first_offer_s": round(statistics.median(first_offers), 3),
        "repeats": repeats,
        "workers": setting.workers,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": available,
            "python": platform.python_version(),
        },
        "versions": _versions(),
    }


def show_bench(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "median s", "spread s", "ratio to the bare loop"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in ("bare", "fp32", "bf16"):
        low, high = result["spread"][name]
        ratio = "1" if name == "bare" else f"{result[f'ratio_{name}']:.2f}"
        table.add_row(name, f"{result['seconds'][name]:.2f}", f"{low:.2f}–{high:.2f}", ratio)
    console = Console()
    console.print(table)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    console.print(f"first offer after {result['first_offer_s']:.2f} s; {result['repeats']} runs of each, {versions}")


def bench_aggregation(updates: int, parameters: int, repeats: int) -> dict[str, Any]:
    """Real replies, checked and summed one by one, beside one numpy add of the same bytes."""
    block = Block("delta", parameters, "examples", 10.0)
    offer, messages = _update_messages(block, updates)
    entry = NodeEntry("node-1", 2, 1000, 0)
    expected = Expectation(offer, entry, (block, LANES), 1000, load_plan("digits-cnn").plan.data)
    times: dict[str, list[float]] = {"bare": [], "concord": []}
    peak = 0.0
    for _ in range(repeats):
        times["bare"].append(_timed(lambda: _add_only(messages, updates, parameters)))
        before = pss_mb([os.getpid()]) or 0.0
        total = RingSum((block, LANES))
        times["concord"].append(_timed(lambda total=total: _check_and_add(messages, updates, expected, total)))  # type: ignore[misc]
        peak = max(peak, (pss_mb([os.getpid()]) or 0.0) - before)
    return {
        "updates": updates,
        "parameters": parameters,
        "seconds": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in times.items()},
        "ratio": _median_ratio(times["concord"], times["bare"]),
        "growth_mb": round(peak, 1),
        "process_mb": pss_mb([os.getpid()]),
        "repeats": repeats,
        "versions": _versions(),
    }


def show_aggregation(result: dict[str, Any]) -> None:
    from rich.console import Console

    seconds = result["seconds"]
    Console().print(
        f"{result['updates']} updates of {result['parameters'] / 1e6:.0f} M parameters: checked and summed in "
        f"{seconds['concord']:.2f} s, one numpy add of the same bytes {seconds['bare']:.2f} s, ratio "
        f"{result['ratio']:.2f}; "
        f"the whole process {result['process_mb']} MB, {result['growth_mb']} MB of it while summing"
    )


def _update_messages(block: Block, updates: int) -> tuple[Offer, list[Message]]:
    """Two different replies, used in turn: a real coordinator holds one at a time as well."""
    offer = Offer("bench", "train", 1, 1, "node-1", "p", "m", "l", updates, 1 << 20)
    request = offer_message(offer, None, 2, time.time())
    chance = np.random.default_rng(0)
    made = []
    for _ in range(2):
        vector = chance.standard_normal(block.size, np.float32)
        update = encode_update((block,), {block.name: vector}, 1000, 1000, updates)
        made.append(answer(request, offer, update.blocks, {}))
    return offer, made


def _check_and_add(messages: list[Message], updates: int, expected: Expectation, total: RingSum) -> None:
    for index in range(updates):
        total.add(f"node-{index}", accept_reply(messages[index % len(messages)], expected))


def _add_only(messages: list[Message], updates: int, parameters: int) -> None:
    total = np.zeros(parameters, np.int32)
    for index in range(updates):
        data = messages[index % len(messages)].content.array_records["blocks"]["delta"].data
        np.add(total, np.frombuffer(data, np.int32), out=total)


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _concord_seconds(plan: Plan, setting: Setting) -> tuple[float, float]:
    """Seconds from the first offer to the last model, and from the start of workers to the first offer."""
    data = read_data(setting.data, plan)
    federation = Federation.of(data, plan, setting.partition, setting.nodes)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(Path(folder) / "run")
        federation = federation.share(Path(folder) / "shared")
        _, _, timing = federate(plan, federation, setting, run, lambda record: None, None, PeakMemory())
    return timing["training"], timing["first_offer_at"] - began


def _bare_seconds(spec: str, threads: int) -> float:
    directory = locate(spec.partition(":")[2])
    command = [sys.executable, "-m", "concord_local.bare_loop", str(directory), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own module)
    if done.returncode:
        raise RunFailedError(f"the bare loop failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout)


def _median_ratio(first: list[float], second: list[float]) -> float:
    """The median of ratios pair by pair, so that a machine that slows down slows both."""
    return round(statistics.median(a / b for a, b in zip(first, second, strict=True)), 3)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "flwr", "numpy")}
