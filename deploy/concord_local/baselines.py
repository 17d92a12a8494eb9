"""The question people have: what would each node get alone, and what if all data lay in one place?

Both are trained as one plain process would: the plan's model, optimiser and epochs, one optimiser
throughout, no clipping to the update bound and no quantising. All are evaluated on identical test rows.

A plan's learning rate is chosen for a federation, whose optimisers begin anew in each round; momentum that is kept can
make the same rate too high. A baseline that has not learnt its own training rows is trained again at a tenth of it.

Of a language model there is the pooled one alone, with its course over rounds: a node by itself would read as many
tokens as all nodes together, each as often as there are nodes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from concord_client.data import NodeDataset, Split
from concord_client.devices import choose_device, prepare_process
from concord_client.trainer import Workbench, new_optimiser, round_learning_rate
from concord_client.turn import personal_of
from concord_local.federation import Federation
from concord_local.nodes import model_builder
from concord_server.driver import RunResult
from concord_shared.errors import DataError, TrainingDivergedError
from concord_shared.fitting import fit_locally
from concord_shared.image_cleaning import for_training
from concord_shared.metrics import MetricSums, RankingSums, headline, higher_is_better, no_sums
from concord_shared.models import new_vector
from concord_shared.plan import Plan
from concord_shared.plan.rounds import share_of
from concord_shared.plan.strategies import FedOpt
from concord_shared.preprocessing import Fitted, unfitted
from concord_shared.seeds import derive_seed
from concord_shared.strategies import State, strategy_for
from concord_shared.strategies.least_squares import place_coefficients
from concord_shared.tensors import Float32Vector

__all__ = [
    "as_one_process",
    "by_popularity",
    "compare_with_baselines",
    "evaluate_nodes",
    "train_centrally",
    "train_well",
]

Observer = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Model:
    """personal: the part of it that would stay at a node, where the plan has one."""

    theta: Float32Vector
    fitted: Fitted
    personal: Float32Vector | None = None


Kept = Callable[[str], State]
RATE_FACTORS = (1.0, 0.1, 0.01)
LEARNT = 0.95


def compare_with_baselines(
    plan: Plan, federation: Federation, result: RunResult, kept: Kept, device: str, observer: Observer
) -> dict[str, Any]:
    """For each node: alone, federated and pooled, on the node's test rows; and all three on everybody's.

    kept: a node's NodeState as the run left it, by the node's name.
    """
    prepare_process(threads=1 if plan.training.deterministic else None)
    bench = Workbench(plan, choose_device(device), model_builder(plan))
    federated, names = _federated(bench, federation, result, kept), federation.names
    if plan.data.task == "language-model":
        return _compare_with_pooled(bench, federation, federated, observer)
    pooled = _baseline(bench, federation, federation.all_rows())
    observer({"kind": "baseline", "done": 1, "of": len(names) + 1})
    alone: dict[str, dict[str, MetricSums]] = {}
    for name in names:
        alone[name] = _baseline(bench, federation, federation.dataset(name))
        observer({"kind": "baseline", "done": len(alone) + 1, "of": len(names) + 1})
    found = _table(plan, federation, federated, pooled, alone)
    if plan.data.task == "ranking":
        found["all"]["popularity"] = _headline(plan, [by_popularity(plan, federation)])
    return found


def _federated(bench: Workbench, federation: Federation, result: RunResult, kept: Kept) -> dict[str, MetricSums]:
    """Each node's sums with what it evaluates with: the run's model, and what it kept of its own."""
    strategy, fitted = strategy_for(bench.plan), Fitted.from_document(result.preprocessing)
    sums: dict[str, MetricSums] = {}
    for name in federation.names:
        own = kept(name)
        model = Model(strategy.own(result.theta, own), fitted, personal_of(bench, own))
        sums |= evaluate_nodes(bench, federation, model, (name,))
    return sums


def _headline(plan: Plan, sums: Iterable[MetricSums]) -> Any:
    """The figure of all of these rows together; None where there is none."""
    return sum(sums, no_sums(plan.data)).figures().get(headline(plan.data))


def _table(
    plan: Plan,
    federation: Federation,
    federated: Mapping[str, MetricSums],
    pooled: Mapping[str, MetricSums],
    alone: Mapping[str, Mapping[str, MetricSums]],
) -> dict[str, Any]:
    """Sums by node, of one model each; `alone` has each node's own model on the rows of every node."""

    def of_node(sums: Mapping[str, MetricSums], name: str) -> Any:
        return _headline(plan, [sums[name]] if name in sums else [])

    totals = {name: _headline(plan, sums.values()) for name, sums in alone.items()}
    known = [total for total in totals.values() if total is not None]
    best = max if higher_is_better(plan.data) else min
    return {
        "headline": headline(plan.data),
        "rows": [
            {
                "node": name,
                "train_rows": len(federation.rows[name][Split.TRAIN]),
                "test_rows": federated[name].rows,
                "alone": of_node(alone.get(name, {}), name),
                "alone_on_all": totals.get(name),
                "federated": of_node(federated, name),
                "pooled": of_node(pooled, name),
            }
            for name in federation.names
        ],
        "all": {
            "test_rows": sum(sums.rows for sums in federated.values()),
            "alone_mean": float(np.mean(known)) if known else None,
            "alone_best": best(known) if known else None,
            "federated": _headline(plan, federated.values()),
            "pooled": _headline(plan, pooled.values()),
        },
    }


def _compare_with_pooled(
    bench: Workbench, federation: Federation, federated: Mapping[str, MetricSums], observer: Observer
) -> dict[str, Any]:
    plan = bench.plan
    one = as_one_process(plan, [len(federation.rows[name][Split.TRAIN]) for name in federation.names])
    bench = Workbench(one, bench.device, model_builder(plan))
    course: list[dict[str, Any]] = []
    pooled = dict[str, MetricSums]()

    def look(number: int) -> None:
        if plan.evaluates_after(number):
            model = Model(bench.read(), unfitted(plan), bench.read_personal())
            pooled.update(evaluate_nodes(bench, federation, model))
            course.append({"round": number, **sum(pooled.values(), no_sums(plan.data)).figures()})
            observer({"kind": "baseline", "done": number, "of": plan.rounds.count})

    train_centrally(bench, federation.all_rows(), after_round=look)
    return {**_table(plan, federation, federated, pooled, {}), "pooled_course": course}


def as_one_process(plan: Plan, rows: Sequence[int]) -> Plan:
    """The plan whose local training, on all rows at one place, reads as many rows a round as a cohort does together.

    Single steps of plain SGD under FedAdam are Adam's steps on a batch of the cohort's rows: that is what one process
    takes, with the same rate, betas and τ (torch corrects the bias of its first moments, which FedAdam does not). Any
    other plan stays as it is: an epoch is an epoch. rows: the training rows of each node.
    """
    training, strategy = plan.training, plan.strategy
    single = training.local_steps == 1 and training.optimiser == "sgd" and not training.momentum
    if not single or not isinstance(strategy, FedOpt) or strategy.name != "fedadam":
        return plan
    changed = {
        "optimiser": "adam",
        "learning_rate": strategy.server_learning_rate,
        "schedule": "constant",
        "beta1": strategy.beta1,
        "beta2": strategy.beta2,
        "epsilon": strategy.tau / training.learning_rate,
        "batch_size": round(share_of(plan.rounds.cohort, len(rows)) * float(np.mean([*map(training.batch_of, rows)]))),
        "batch_share": 0.0,
    }
    return plan.with_changes(training=training.model_dump(mode="json") | changed)


def _baseline(bench: Workbench, federation: Federation, dataset: NodeDataset) -> dict[str, MetricSums]:
    """Each node's sums with a model of these rows alone; none where they cannot train one, which is an answer too."""
    try:
        return evaluate_nodes(bench, federation, train_well(bench, dataset))
    except (DataError, TrainingDivergedError):
        return {}


def train_well(bench: Workbench, dataset: NodeDataset) -> Model:
    """`train_centrally` at the plan's learning rate, or the first of its tenths that learns the training rows; the
    best on them where none does.

    Raises:
        DataError: there is nothing to train on.
        TrainingDivergedError: at every rate.
    """
    if bench.plan.data.input == "ratings":
        return train_centrally(bench, dataset)  # penalties keep it from its training rows, on purpose
    found: list[tuple[float, Model]] = []
    diverged: TrainingDivergedError | None = None
    for factor in RATE_FACTORS:
        try:
            model = train_centrally(bench, dataset, factor)
            left = _loss_left(bench, dataset, model)
        except TrainingDivergedError as error:
            diverged = error
            continue
        found.append((left, model))
        if left < LEARNT:
            break
    if not found:
        assert diverged is not None
        raise diverged
    return min(found, key=lambda each: each[0])[1]


def _loss_left(bench: Workbench, dataset: NodeDataset, model: Model) -> float:
    """The loaded model's loss on its own training rows, as a share of what the best constant answer has."""
    raw, targets = dataset.take(Split.TRAIN)
    loss: Any = bench.evaluate(bench.rows(model.fitted.transform(raw), targets)).figures()["loss"]
    if bench.plan.data.task == "regression":
        constant = float(np.var(targets))
    else:
        shares = np.unique(targets, return_counts=True)[1] / len(targets)
        constant = float(-(shares * np.log(shares)).sum())
    return float(loss) / constant if constant > 0 else 0.0


def train_centrally(
    bench: Workbench,
    dataset: NodeDataset,
    rate_factor: float = 1.0,
    after_round: Callable[[int], None] = lambda number: None,
) -> Model:
    """The plan's model trained on these rows alone, for as many epochs as the rounds of a federation would: no clock
    ends one of them, as it ends the rounds of slow nodes.

    after_round: is told which, and may evaluate the model that `bench` then holds.
    """
    plan = bench.plan
    raw, targets = dataset.take(Split.TRAIN)
    fitted = fit_locally(plan, raw)
    inputs = fitted.transform(raw)
    _, start = new_vector(plan, model_builder(plan))
    if plan.strategy.name == "least-squares":
        return Model(_solve(bench, inputs, targets), fitted)
    rows = bench.rows(inputs, targets)
    bench.load(start)
    optimiser = new_optimiser(plan.training, bench.trained(), rate_factor * plan.training.learning_rate)
    for number in range(1, plan.rounds.count + 1):
        learning_rate = rate_factor * round_learning_rate(plan.training, number, plan.rounds.count)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate
        seed = derive_seed(plan.seed, "baseline", number, dataset.name)
        if plan.preprocessing.augment is not None:
            moved = for_training(plan, raw, number, dataset.name)
            rows = bench.rows(fitted.transform(moved), targets)
        bench.train(rows, learning_rate, seed, optimiser=optimiser, timed=False)
        after_round(number)
    return Model(bench.read(), fitted, bench.read_personal())


def evaluate_nodes(
    bench: Workbench, federation: Federation, model: Model, names: Sequence[str] = ()
) -> dict[str, MetricSums]:
    """The model's sums on the test rows of these nodes, by default of each.

    With scope per-node each node prepares its rows in its own way.
    """
    bench.load(model.theta, model.personal)
    sums = {}
    for name in names or federation.names:
        dataset = federation.dataset(name)
        inputs, targets = dataset.take(Split.TEST)
        train_inputs, train_targets = dataset.take(Split.TRAIN)
        own = fit_locally(bench.plan, train_inputs) if bench.plan.preprocessing.scope == "per-node" else model.fitted
        known = bench.rows(own.transform(train_inputs), train_targets) if bench.plan.data.input == "ratings" else None
        sums[name] = bench.evaluate(bench.rows(own.transform(inputs), targets), known=known)
    return sums


def by_popularity(plan: Plan, federation: Federation) -> MetricSums:
    """What the counts of items in all training rows come to: everybody is told what most others took."""
    items, total = len(plan.data.items), no_sums(plan.data)
    taken = federation.all_rows().take(Split.TRAIN)[0][:, 1].astype(np.int64)
    counts = np.bincount(taken[taken >= 0], minlength=items).astype(np.float64)
    for name in federation.names:
        train, test = (federation.dataset(name).take(split)[0].astype(np.int64) for split in (Split.TRAIN, Split.TEST))
        places = np.full(len(test), np.inf)
        for row, (user, item) in enumerate(test):
            if item >= 0:
                seen = train[train[:, 0] == user, 1]
                unseen = np.delete(counts, seen[seen >= 0])
                places[row] = 1 + (unseen > counts[item]).sum() + ((unseen == counts[item]).sum() - 1) / 2
        total += RankingSums.of(plan.data, places)
    return total


def _solve(bench: Workbench, inputs: Any, targets: Any) -> Float32Vector:
    """Pooled least squares by NumPy, from the rows themselves and not from moments."""
    matrix = np.column_stack([np.ones(len(targets)), inputs.astype(np.float64)])
    solution = np.linalg.lstsq(matrix, targets, rcond=None)[0]
    return place_coefficients(bench.layout, solution)
