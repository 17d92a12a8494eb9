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
from concord_shared.blocks import LANES, Block, encode_update
from concord_shared.compression import compressed_blocks, wire_of
from concord_shared.errors import ConcordError, DataError, SourceError, TrainingDivergedError, UsageError
from concord_shared.messages import Offer, answer, bytes_of, offer_message
from concord_shared.metrics import metrics_block
from concord_shared.models import new_vector
from concord_shared.plan.schema import Plan
from concord_shared.strategies import strategy_for
from concord_shared.strategies.base import Adjust, Part
from concord_shared.tensors import Float32Vector

if TYPE_CHECKING:
    from concord_client.data import NodeDataset

__all__ = ["Probe", "dry_round", "examine_data", "examine_round", "probe"]

BATCHES = 2
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

    trainings: those that the strategy asks for in a round, each by its epochs in place of the plan's local work; 0: the
    plan's. epoch_rows: what an epoch of `train_rows` goes over. epoch_s: what beginning one takes. batch_s,
    evaluating_s: one batch of training, and of evaluation, which has `rows_at_once`. once_s, evaluating_once_s: what a
    round of training, and an evaluation, take beside these. model_bytes: the model; down_bytes: with what its strategy
    sends along to train. update_bytes, evaluation_bytes: what a node answers to training and to evaluation;
    metrics_bytes: what it adds to the first where it evaluates the model that comes in. request_bytes, answer_bytes:
    what each message says beside these; the first tells what was fitted to rows, and stays here. memory_mb: the most
    that this process ever held.
    """

    train_rows: int
    test_rows: int
    trainings: tuple[int, ...]
    epoch_rows: int
    epoch_s: float
    batch_s: float
    once_s: float
    rows_at_once: int
    evaluating_s: float
    evaluating_once_s: float
    model_bytes: int
    down_bytes: int
    update_bytes: int
    evaluation_bytes: int
    metrics_bytes: int
    request_bytes: int
    answer_bytes: int
    memory_mb: int

    def work(self, plan: Plan, rows: int) -> list[tuple[int, int]]:
        """Of each training in a round on so many training rows: the epochs that it begins, and its batches."""
        training, longer = plan.training, max(1, round(rows * self.epoch_rows / self.train_rows))
        each, steps = math.ceil(longer / training.batch_of(longer)), training.local_steps
        wanted = [epochs or training.local_epochs for epochs in self.trainings]
        return [(epochs, epochs * each) if epochs else (math.ceil(steps / each), steps) for epochs in wanted]

    def training_s(self, plan: Plan, rows: int) -> float:
        """Of one round on so many training rows, without `once_s`."""
        begin_s, limit_s = self.epoch_s * rows / self.train_rows, plan.training.local_seconds or math.inf
        work = self.work(plan, rows)
        return sum(min(epochs * begin_s + batches * self.batch_s, limit_s) for epochs, batches in work)

    def evaluation_s(self, rows: int) -> float:
        return self.evaluating_once_s + math.ceil(rows / self.rows_at_once) * self.evaluating_s


def probe(plan: Plan, rows: "NodeDataset", device: Any, seconds: float = 0.0) -> Probe:
    """Does a round whose trainings and evaluation end after two batches, after a batch that is not counted.

    seconds: it is done again and again for so long, and the times are means; 0: once, of two batches the faster.

    Raises:
        TrainingDivergedError, DataError, UsageError: as of training.
    """
    from concord_client.data import Split

    short = _ShortRound(plan, rows, device)
    short.warm_up()
    begun, rounds = time.perf_counter(), [short.measure()]
    while time.perf_counter() - begun < seconds:
        rounds.append(short.measure())
    epoch_s, training_s, evaluation_s = (statistics.fmean(each) for each in zip(*rounds, strict=True))
    training, evaluating, usual = short.training, short.evaluating, bool(seconds)
    request_bytes, answer_bytes = short.message_bytes()
    found = Probe(
        train_rows=rows.size(Split.TRAIN),
        test_rows=rows.size(Split.TEST),
        trainings=tuple(short.trainings),
        epoch_rows=short.epoch_rows,
        epoch_s=epoch_s,
        batch_s=training.second(usual),
        once_s=max(0.0, training_s - training.total_s / len(rounds) - len(short.trainings) * epoch_s),
        rows_at_once=short.bench.task.rows_at_once,
        evaluating_s=evaluating.second(usual),
        evaluating_once_s=max(0.0, evaluation_s - evaluating.total_s / len(rounds)),
        model_bytes=4 * short.bench.layout.size,
        down_bytes=4 * short.bench.layout.size * (1 + len(short.strategy.broadcast)),
        update_bytes=_bytes(*compressed_blocks(plan, short.blocks), LANES),
        evaluation_bytes=_bytes(metrics_block(plan.data), LANES),
        metrics_bytes=_bytes(metrics_block(plan.data)),
        request_bytes=request_bytes,
        answer_bytes=answer_bytes,
        memory_mb=_peak_mb(device),
    )
    if found.trainings:
        return found
    batches = math.ceil(found.train_rows / plan.training.batch_of(found.train_rows))
    return replace(found, trainings=(1,), batch_s=training_s / batches, once_s=0.0)  # it takes its rows as a whole


class _ShortRound:
    """A round on a model of its own, each training and the evaluation of two batches at the most.

    trainings: as of `Probe`, of the last round. training, evaluating: the times of all batches.
    """

    def __init__(self, plan: Plan, rows: "NodeDataset", device: Any) -> None:
        from concord_client.trainer import Workbench

        self.plan, self.bench, self.strategy = plan, Workbench(plan, device), strategy_for(plan)
        self.blocks = self.strategy.blocks(plan, self.bench.layout)
        self.training, self.evaluating = _Clock(device), _Clock(device, ahead=1)
        self.trainings: list[int] = []
        self.epoch_rows = 0
        self._trial, self._theta = Trial(rows, self.bench), new_vector(plan)[1]
        self._rows, self._turn = self._trial.train_rows, self._trial.turn(1, self._theta, {})
        state = self.strategy.init(plan, self.bench.layout)
        self._work = replace(self._trial.work(self._turn, state, {}), train=self._train)

    def warm_up(self) -> None:
        size = self.plan.training.batch_of(len(self._rows))
        self.bench.load(self._theta)
        self.bench.warm_up(replace(self._rows, inputs=self._rows.inputs[:size], targets=self._rows.targets[:size]))

    def measure(self) -> tuple[float, float, float]:
        """Seconds of beginning an epoch, of all that a round of training does, and of all that an evaluation does."""
        self.trainings.clear()
        times = [time.perf_counter()]
        for work in (self._begin_epoch, self._train_round, self._evaluate):
            work()
            times.append(self.training.now())
        begin_s, training_s, evaluation_s = (end - begin for begin, end in itertools.pairwise(times))
        return begin_s, training_s, evaluation_s

    def message_bytes(self) -> tuple[int, int]:
        """Of a request and of an answer, beside what is asked about and what is answered."""
        digest, norms = "0" * 64, {block.name: 0.1234567890123456 for block in self.blocks}
        names = digest[:16], "train", 1, 1, self._trial.dataset.name, digest, digest, digest
        offer = Offer(*names, nodes_max=100, rows_max=1 << 20, preprocessing=self._trial.preprocessing)  # type: ignore[arg-type]
        request = offer_message(offer, None, 2, time.time())
        notes = {"rows": 1000, "steps": 100, "seconds": 0.1234567890123456, "norms": norms, "precision": "fp32"}
        return bytes_of(request), bytes_of(answer(request, offer, {}, notes))

    def _begin_epoch(self) -> None:
        import torch

        self.epoch_rows = len(self.bench.task.epoch(self._rows, torch.Generator().manual_seed(self._turn.seed)))

    def _train_round(self) -> None:
        vectors = self.strategy.encode(self._work, self.strategy.local(self._work))
        encode_update(self.blocks, vectors, len(self._rows), self.plan.rounds.weight_cap, 1)

    def _train(
        self, adjust: Adjust | None, start: Float32Vector | None = None, part: Part = "all", epochs: int = 0
    ) -> tuple[Float32Vector, int]:
        """As `strategies.base.Train`. Of one epoch, so that no other begins between two batches."""
        self.trainings.append(epochs)
        self.bench.load(self._theta if start is None else start)
        given = self._rows, self._turn.learning_rate, self._turn.seed, adjust
        self.training.run(
            lambda: self.bench.train(*given, before_batch=self.training, part=part, epochs=1, timed=False)
        )
        return self.bench.read(), BATCHES  # what two batches made of the model must be finite

    def _evaluate(self) -> None:
        self.bench.load(self._theta)
        self.evaluating.run(lambda: self.bench.evaluate(self._trial.test_rows, self.evaluating, self._rows))


def _bytes(*blocks: Block) -> int:
    """Of these blocks as they travel."""
    return sum(dtype.itemsize * count for dtype, count in map(wire_of, blocks))


def _measure(plan: Plan, rows: "NodeDataset", device: Any) -> dict[str, int]:
    found = probe(plan, rows, device)
    train_rows, test_rows = coarse(found.train_rows), coarse(found.test_rows)
    round_s = found.training_s(plan, train_rows) + found.evaluation_s(test_rows)
    return {
        "rows": train_rows,
        "batch_us": round(found.batch_s * 1e6),
        "round_ms": math.ceil(round_s * 1e3),
        "total_ms": math.ceil(round_s * plan.rounds.count * 1e3),
        "down_bytes": found.down_bytes + found.model_bytes,
        "up_bytes": found.update_bytes + found.evaluation_bytes,
        "memory_mb": found.memory_mb,
    }


class _EnoughError(Exception):
    """Two batches are done."""


@dataclass
class _Clock:
    """Called before each batch: notes the time, and ends the work before the third. ahead: calls before the first."""

    device: Any
    ahead: int = 0
    times: list[float] = field(default_factory=list)
    batches_s: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        self.times.append(self.now())
        if len(self.times) > self.ahead + BATCHES:
            raise _EnoughError

    def run(self, work: Callable[[], object]) -> None:
        self.times.clear()
        try:
            work()
        except _EnoughError:
            pass
        else:
            self.times.append(self.now())
        self.batches_s += [end - begin for begin, end in itertools.pairwise(self.times[self.ahead :])]

    @property
    def total_s(self) -> float:
        return sum(self.batches_s)

    def second(self, usual: bool) -> float:
        """Of one batch: the mean, with what a busy machine makes it wait, or the least; 0 where none was noted."""
        return (statistics.fmean if usual else min)(self.batches_s or [0.0])

    def now(self) -> float:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()


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
