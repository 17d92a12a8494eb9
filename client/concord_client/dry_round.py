"""A preflight's work on data, in the training process: data, contract and budget; then two batches, thrown away.

What these functions return leaves this node as it stands, so none of it is an error's own words: see `contract.py`.
"""

import itertools
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concord_client.contract import coarse, sentences
from concord_client.home import NodeHome
from concord_client.policy import Policy, Resources
from concord_client.registry import reading_of, verify
from concord_client.store import Dataset
from concord_client.trial import Trial
from concord_shared.blocks import LANES
from concord_shared.compression import compressed_blocks, wire_of
from concord_shared.errors import ConcordError, DataError, SourceError, TrainingDivergedError, UsageError
from concord_shared.metrics import metrics_block
from concord_shared.plan.schema import Plan

if TYPE_CHECKING:
    from concord_client.data import NodeDataset

__all__ = ["Probe", "dry_round", "examine_data", "examine_round", "probe"]

BATCHES = 2
EVALUATION_BATCH = 256
MEMORY_STEP_MB = 10
Found = dict[str, Any]


def examine_data(home: NodeHome, plan: Plan, name: str, policy: Policy) -> Found:
    """Is the dataset there, as it was registered, as the contract says, and within its privacy budget?"""
    from concord_client.data import differences

    with home.store() as store:
        dataset = store.dataset(name)
        if dataset is None:
            advice = "register it: concord-node data add NAME SPEC; or agree on another one"
            return {"checks": [_check("data", "no", "this dataset is not registered here (any more)", advice)]}
        try:
            reading = verify(store, dataset, policy.data.roots)
        except SourceError:
            advice = "concord-node data show NAME says why"
            says = "its source cannot be reached, or lies outside of what the owner exposed"
            return {"checks": [_check("data", "no", says, advice)]}
        except DataError:
            advice = "register it again: concord-node data add NAME SPEC --replace --publish"
            return {"checks": [_check("data", "no", "its files are not those that were registered", advice)]}
    checks = [_check("data", "ok", "registered and unchanged")]
    if found := sentences(differences(dataset.spec, plan, reading), plan):
        says = "1 difference" if len(found) == 1 else f"{len(found)} differences"
        advice = (
            "exact counts, at this node: concord-node check PLAN --data SPEC; then correct the data and register "
            "them with --replace, or ask the study for another contract"
        )
        checks.append(_check("contract", "no", f"{says} from the plan's data contract", advice))
        return {"checks": checks, "differences": found}
    checks.append(_check("contract", "ok", "the data fit the plan's contract"))
    checks.append(_budget(home, plan, dataset, policy))
    return {"checks": checks}


def examine_round(home: NodeHome, plan: Plan, name: str, policy: Policy) -> Found:
    """Trains and evaluates two batches of a dataset of this node's."""
    from concord_client.training_desk import read_dataset

    with home.store() as store:
        held = store.dataset(name)
        assert held is not None, "looked at before"
    reading = reading_of(held, policy.data.roots)
    return dry_round(plan, lambda: read_dataset(plan, home.config.node, held.spec, reading), policy.resources)


def dry_round(plan: Plan, read: "Callable[[], NodeDataset]", resources: Resources) -> Found:
    """Trains and evaluates two batches on a model of its own, and says how long whole rounds would take."""
    from concord_client.devices import choose_device, describe_device, is_out_of_memory, prepare_process
    from concord_client.training_desk import limit_memory

    try:
        device = choose_device(resources.device)
    except UsageError:
        advice = "resources.device in policy.toml; concord-node device says what is there"
        return {"checks": [_check("device", "no", "the device that this node's policy names is not there", advice)]}
    checks = [_check("device", "ok", describe_device(device)[:100])]
    if plan.kind == "statistics":
        checks.append(_check("round", "ok", "a plan of statistics trains nothing"))
        checks.append(_check("memory", "ok", "it reads its rows in turn, a batch at a time"))
        return {"checks": checks}
    prepare_process(1 if plan.training.deterministic else resources.threads or None)
    limit_memory(resources.memory_mb or None, device.type)
    try:
        figures = _measure(plan, read(), device)
    except TrainingDivergedError:
        advice = "ask the study for a lower learning rate, or training.gradient_clip"
        return {"checks": [*checks, _check("round", "no", "training gave no finite numbers in two batches", advice)]}
    except (DataError, UsageError, MemoryError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, ConcordError) else error
        if cause is not None and is_out_of_memory(cause):
            advice = "raise resources.memory_mb in policy.toml, or ask the study for a smaller batch or model"
            return {"checks": [*checks, _check("memory", "no", "two batches do not fit into the memory", advice)]}
        if not isinstance(error, ConcordError):
            raise
        advice = "try it there: concord-node try PLAN --dataset NAME"
        return {"checks": [*checks, _check("round", "no", "no round of this plan can be trained on it", advice)]}
    limit = f", the policy allows {resources.memory_mb} MB" if resources.memory_mb else ""
    checks.append(_check("round", "ok", "two batches were trained and thrown away"))
    checks.append(_check("memory", "ok", f"at most {figures['memory_mb']} MB{limit}"))
    return {"checks": checks, "figures": figures}


def _budget(home: NodeHome, plan: Plan, dataset: Dataset, policy: Policy) -> Found:
    """Whether the whole plan fits; how much is left is the owner's own business."""
    from concord_client.approvals import count_rows
    from concord_client.ledger.admission import forecast

    advice = "concord-node ledger forecast PLAN says why; set-cap, or ask the study for a plan that costs less"
    try:
        with home.store() as store, home.ledger() as ledger:
            rows, _ = count_rows(store, dataset, plan, home.config.node, policy.data.roots)
            refusal = forecast(ledger.books(), plan, dataset.name, dataset.version, rows).refusal
    except DataError:
        return _check("budget", "no", "it gives no rows for training", "register more rows, or leave this study")
    if refusal:
        return _check("budget", "no", "the plan's whole cost does not fit into this dataset's privacy budget", advice)
    return _check("budget", "ok", "the plan's whole cost fits")


@dataclass(frozen=True)
class Probe:
    """What two batches of a plan cost on one node's rows.

    batch_s, evaluating_s: one batch of training, and of evaluation. once_s: what a round takes beside its batches.
    down_bytes: the model with what its strategy sends along. update_bytes, metrics_bytes: what a node answers to
    training and to evaluation. memory_mb: the most that this process ever held.
    """

    train_rows: int
    test_rows: int
    batch_s: float
    evaluating_s: float
    once_s: float
    down_bytes: int
    update_bytes: int
    metrics_bytes: int
    memory_mb: int

    def training_s(self, plan: Plan, rows: int) -> float:
        """Of one round on so many training rows, without `once_s`."""
        training = plan.training
        batches = training.local_steps or training.local_epochs * math.ceil(rows / training.batch_of(rows))
        return min(batches * self.batch_s, training.local_seconds or math.inf)

    def evaluation_s(self, rows: int) -> float:
        return math.ceil(rows / EVALUATION_BATCH) * self.evaluating_s


def probe(plan: Plan, rows: "NodeDataset", device: Any, seconds: float = 0.0) -> Probe:
    """Trains and evaluates two batches on a model of its own, after one that is not counted.

    seconds: two batches are done again and again for so long, and the times are means; 0: once, the faster of two.

    Raises:
        TrainingDivergedError, DataError: as of training.
    """
    from concord_client.data import Split
    from concord_client.trainer import Workbench
    from concord_shared.blocks import encode_update
    from concord_shared.models import new_vector
    from concord_shared.strategies import strategy_for

    bench, strategy = Workbench(plan, device), strategy_for(plan)
    trial, theta = Trial(rows, bench), new_vector(plan)[1]
    blocks, state = strategy.blocks(plan, bench.layout), strategy.init(plan, bench.layout)
    clock, evaluating = _Clock(device), _Clock(device)
    turn = trial.turn(1, theta, {}, clock)
    turn.rows = trial.train_rows
    work = trial.work(turn, state, {})
    inputs, targets = work.rows()
    size = plan.training.batch_of(len(targets))
    few = BATCHES * size

    bench.load(theta)
    bench.warm_up(
        replace(trial.train_rows, inputs=trial.train_rows.inputs[:size], targets=trial.train_rows.targets[:size])
    )
    two_batches = replace(work, rows=lambda: (inputs[:few], targets[:few]))
    begun, spent = time.perf_counter(), list[float]()
    while not spent or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        clock.run(lambda: strategy.local(two_batches))
        bench.read()  # what two batches made of the model must be finite
        spent.append(time.perf_counter() - started)
        evaluating.run(lambda: bench.evaluate(trial.test_rows, evaluating))
    batch_s = clock.second(bool(seconds)) or spent[0] / BATCHES  # a strategy that takes rows as a whole
    once_s = max(0.0, statistics.fmean(spent) - BATCHES * batch_s)
    if seconds:
        started = time.perf_counter()
        after = replace(two_batches, train=lambda *_, **__: (bench.read(), 0))
        encode_update(blocks, strategy.encode(after, strategy.local(after)), 1, plan.rounds.weight_cap, 1)
        once_s += time.perf_counter() - started
    return Probe(
        train_rows=rows.size(Split.TRAIN),
        test_rows=rows.size(Split.TEST),
        batch_s=batch_s,
        evaluating_s=evaluating.second(bool(seconds)),
        once_s=once_s,
        down_bytes=len(theta) * (4 + 8 * len(strategy.broadcast)),
        update_bytes=sum(
            dtype.itemsize * count for dtype, count in map(wire_of, (*compressed_blocks(plan, blocks), LANES))
        ),
        metrics_bytes=8 * metrics_block(plan.data).size,
        memory_mb=_peak_mb(device),
    )


def _measure(plan: Plan, rows: "NodeDataset", device: Any) -> dict[str, int]:
    found = probe(plan, rows, device)
    train_rows, test_rows = coarse(found.train_rows), coarse(found.test_rows)
    round_s = found.training_s(plan, train_rows) + found.evaluation_s(test_rows)
    return {
        "rows": train_rows,
        "batch_us": round(found.batch_s * 1e6),
        "round_ms": math.ceil(round_s * 1e3),
        "total_ms": math.ceil(round_s * plan.rounds.count * 1e3),
        "down_bytes": found.down_bytes,
        "up_bytes": found.update_bytes + found.metrics_bytes,
        "memory_mb": found.memory_mb,
    }


class _EnoughError(Exception):
    """Two batches are done."""


@dataclass
class _Clock:
    """Called before each batch: notes the time, and ends the work before the third."""

    device: Any
    times: list[float] = field(default_factory=list)
    batches_s: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        self._note()
        if len(self.times) > BATCHES:
            raise _EnoughError

    def run(self, work: Callable[[], object]) -> None:
        self.times.clear()
        try:
            work()
        except _EnoughError:
            pass
        else:
            if self.times:
                self._note()
        self.batches_s += [end - begin for begin, end in itertools.pairwise(self.times)]

    def second(self, usual: bool) -> float:
        """Of one batch: the mean, with what a busy machine makes it wait, or the least; 0 where none was noted."""
        return (statistics.fmean if usual else min)(self.batches_s or [0.0])

    def _note(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())


def _peak_mb(device: Any) -> int:
    """The most that this process ever held, and an accelerator beside it; rounded up."""
    held = 0.0
    if device.type == "cuda":
        import torch

        held = torch.cuda.max_memory_allocated(device) / 1e6
    try:
        status = Path("/proc/self/status").read_text("ascii", "replace")
        held += int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.M)[1]) * 1024 / 1e6  # type: ignore[index]
    except (OSError, TypeError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        held += resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return math.ceil(held / MEMORY_STEP_MB) * MEMORY_STEP_MB


def _check(name: str, status: str, says: str, next: str = "") -> Found:
    return {"name": name, "status": status, "says": says, "next": next}
