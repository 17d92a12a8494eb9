"""`concord-node try`: a plan on this node's own data alone, before anything is approved. Nothing is sent to anybody.

What a federation of this one node would compute: each round from the model of the round before, through the plan's
strategy, clipping and quantiser. The figures are this node's, for its owner's eyes: nothing leaves, so the privacy
ledger is charged nothing. Whoever publishes them tells something of the rows.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from concord_shared.blocks import decode_means, encode_update
from concord_shared.errors import DataError
from concord_shared.fitting import fit_locally
from concord_shared.image_cleaning import for_training
from concord_shared.metrics import headline
from concord_shared.models import new_vector
from concord_shared.plan.schema import Plan
from concord_shared.preprocessing import Fitted, unfitted
from concord_shared.seeds import derive_seed
from concord_shared.strategies import strategy_for
from concord_shared.strategies.base import LocalWork, State
from concord_shared.tensors import Float32Vector, model_digest

if TYPE_CHECKING:
    from concord_client.batches import Rows
    from concord_client.data import NodeDataset, Reading
    from concord_client.trainer import Workbench
    from concord_client.turn import Turn

__all__ = ["Trial", "try_plan"]

Observer = Callable[[Mapping[str, Any]], None]


@dataclass
class Trial:
    """One node's data on a workbench, and what a round needs of them."""

    dataset: "NodeDataset"
    bench: "Workbench"
    cleaning: dict[str, int] = field(init=False)
    _raw: Any = field(init=False)
    _fitted: Fitted = field(init=False)
    _inputs: Any = field(init=False)

    def __post_init__(self) -> None:
        from concord_client.data import Split

        raw, self.targets = self.dataset.take(Split.TRAIN)
        test, test_targets = self.dataset.take(Split.TEST)
        if not len(raw):
            raise DataError(f"node {self.dataset.name} has no training rows")
        fitted = fit_locally(self.bench.plan, raw)
        self._raw, self._fitted, self._inputs = raw, fitted, fitted.transform(raw)
        self.cleaning = fitted.counts(raw)
        self.train_rows: Rows = self.bench.rows(self._inputs, self.targets)
        self.test_rows: Rows = self.bench.rows(fitted.transform(test), test_targets)

    @property
    def preprocessing(self) -> str:
        """What each request says of it, once it is fitted: here to this node's rows alone."""
        plan = self.bench.plan
        return json.dumps((self._fitted if plan.needs_statistics else unfitted(plan)).document())

    def turn(
        self,
        number: int,
        theta: Float32Vector,
        node_state: State,
        before_batch: Callable[[], None] | None = None,
    ) -> "Turn":
        from concord_client.trainer import round_learning_rate
        from concord_client.turn import Turn, personal_of

        plan = self.bench.plan
        return Turn(
            self.bench,
            theta,
            personal_of(self.bench, node_state),
            lambda: self._rows_of(number),
            round_learning_rate(plan.training, number, plan.rounds.count),
            derive_seed(plan.seed, "train", number, self.dataset.name),
            before_batch,
        )

    def work(self, turn: "Turn", state: State, node_state: State) -> LocalWork:
        return LocalWork(
            plan=self.bench.plan,
            layout=self.bench.layout,
            theta=turn.theta,
            broadcast={name: state[name].astype("float32") for name in strategy_for(self.bench.plan).broadcast},
            node_state=node_state,
            learning_rate=turn.learning_rate,
            train=turn.train,
            rows=lambda: (self._inputs, self.targets),
        )

    def _rows_of(self, number: int) -> "Rows":
        """The training rows of a round, in its own positions where the plan augments."""
        plan = self.bench.plan
        if plan.preprocessing.augment is None:
            return self.train_rows
        raw = for_training(plan, self._raw, number, self.dataset.name)
        return self.bench.rows(self._fitted.transform(raw), self.targets)


def try_plan(
    plan: Plan,
    spec: str,
    node: str,
    device: str = "auto",
    threads: int | None = None,
    rounds: int | None = None,
    observer: Observer = lambda record: None,
    reading: "Reading | None" = None,
) -> dict[str, Any]:
    """Trains alone for the plan's rounds, or the first `rounds` of them.

    Args:
        node: the name that the split and the seeds depend on.
        observer: called with each round's record.
        reading: what this node says of the data.

    Raises:
        DataError: the data cannot be read, or do not fit the plan's contract.
        TrainingDivergedError: NaN or Inf.
    """
    from concord_client.devices import choose_device, describe_device, prepare_process
    from concord_client.trainer import Workbench
    from concord_client.training_desk import read_dataset

    plan.check_trains("concord-node try")
    chosen = choose_device(device)
    prepare_process(1 if plan.training.deterministic else threads)
    trial = Trial(read_dataset(plan, node, spec, reading), Workbench(plan, chosen))
    count = min(plan.rounds.count, rounds or plan.rounds.count)
    records, trained = [], new_vector(plan)[1]
    for record, after in _rounds(trial, trained, count):
        records.append(record)
        trained = after
        observer(record)
    median = statistics.median(record["seconds"] for record in records)
    return {
        "plan": plan.name,
        "plan_digest": plan.digest,
        "node": node,
        "device": str(chosen),
        "device_name": describe_device(chosen),
        "precision": trial.bench.precision,
        "rows": {"train": len(trial.train_rows), "test": len(trial.test_rows)},
        "cleaning": trial.cleaning,
        "headline": headline(plan.data),
        "rounds": records,
        "metrics": records[-1]["metrics"],
        "model_digest": model_digest(trial.bench.layout, trained),
        "seconds_per_round": median,
        "estimate": {"rounds": plan.rounds.count, "seconds": median * plan.rounds.count},
        "complete": count == plan.rounds.count,
    }


def _rounds(trial: Trial, theta: Float32Vector, count: int) -> Iterator[tuple[dict[str, Any], Float32Vector]]:
    """Each round's record, and the model after it."""
    from concord_client.turn import personal_of

    bench, plan = trial.bench, trial.bench.plan
    strategy = strategy_for(plan)
    blocks, state = strategy.blocks(plan, bench.layout), strategy.init(plan, bench.layout)
    node_state: State = {}
    for number in range(1, count + 1):
        begun = time.perf_counter()
        turn = trial.turn(number, theta, node_state)
        work = trial.work(turn, state, node_state)
        result = strategy.local(work)
        rows = len(trial.train_rows)
        update = encode_update(blocks, strategy.encode(work, result), rows, plan.rounds.weight_cap, 1)
        means = decode_means(blocks, update.blocks, 1, plan.rounds.weight_cap)
        theta, state = strategy.apply(plan, bench.layout, theta, state, means, 1.0)
        node_state = turn.kept(result.node_state)
        seconds = time.perf_counter() - begun
        bench.load(strategy.own(theta, node_state), personal_of(bench, node_state))
        metrics = bench.evaluate(trial.test_rows, known=trial.train_rows).figures()
        yield {"round": number, "seconds": seconds, "steps": result.steps, "metrics": metrics}, theta
