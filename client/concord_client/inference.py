"""A trained model on local data: figures and predictions. Nothing is sent, and no coordinator is asked."""

import csv
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from concord_shared.files import write_atomically
from concord_shared.fitting import fit_locally
from concord_shared.metrics import TOP
from concord_shared.models.partition import has_own_parts
from concord_shared.models.registry import ModelBuilder, build_model
from concord_shared.plan.schema import Plan
from concord_shared.preprocessing import Fitted
from concord_shared.strategies import State, strategy_for
from concord_shared.tensors import Float32Vector

if TYPE_CHECKING:
    from concord_client.data import NodeDataset, RawData
    from concord_client.trainer import Workbench

__all__ = ["TrainedModel", "evaluate", "evaluate_dataset", "predict", "show_predictions", "write_predictions"]


@dataclass(frozen=True)
class TrainedModel:
    """A model, the plan that made it and what prepares its inputs. build: a person's own module, in simulation only.

    kept: this node's NodeState of the run, in which lies its own part of the model, where the plan has one.
    """

    plan: Plan
    theta: Float32Vector
    fitted: Fitted
    build: ModelBuilder = build_model
    kept: State = field(default_factory=dict)

    def bench(self, device: str = "auto") -> "Workbench":
        from concord_client.devices import choose_device, prepare_process
        from concord_client.trainer import Workbench
        from concord_client.turn import personal_of

        prepare_process(threads=None)
        bench = Workbench(self.plan, choose_device(device), self.build)
        bench.load(strategy_for(self.plan).own(self.theta, self.kept), personal_of(bench, self.kept))
        return bench

    def words(self, bench: "Workbench") -> dict[str, str]:
        """Which personal part stands in the model, for a plan that has one."""
        if not has_own_parts(self.plan, bench.partition):
            return {}
        if self.kept:
            return {"personal": "this node's own, as its last applied round left it"}
        instead = "the shared model" if self.plan.strategy.name == "ditto" else "the start of the run"
        return {"personal": f"none of a node's own (it took no part, or none was named): {instead} stands in"}

    def prepare(self, inputs: Any, train_inputs: Any) -> Any:
        """With scope per-node, by what these rows themselves say."""
        per_node = self.plan.preprocessing.scope == "per-node"
        return (fit_locally(self.plan, train_inputs) if per_node else self.fitted).transform(inputs)


def evaluate(model: TrainedModel, data: "RawData", device: str = "auto") -> dict[str, Any]:
    """Figures on the test rows of `data`, or on all rows where it has no split of its own."""
    from concord_client.data import Split

    if model.plan.data.input == "ratings":
        return evaluate_dataset(model, _held_out(model.plan, data), device)
    rows = np.arange(len(data)) if data.split is None else np.flatnonzero(data.split == Split.TEST)
    bench = model.bench(device)
    inputs = model.prepare(data.inputs, data.inputs)[rows]
    figures = bench.evaluate(bench.rows(inputs, data.targets[rows])).figures()
    return {"rows": len(rows), "metrics": figures, **model.words(bench)}


def evaluate_dataset(model: TrainedModel, dataset: "NodeDataset", device: str = "auto") -> dict[str, Any]:
    """Figures on a node's own test rows: those that its training never saw."""
    from concord_client.data import Split

    inputs, targets = dataset.take(Split.TEST)
    bench = model.bench(device)
    train_inputs, train_targets = dataset.take(Split.TRAIN)
    prepared = model.prepare(inputs, train_inputs)
    known = (
        bench.rows(model.prepare(train_inputs, train_inputs), train_targets)
        if model.plan.data.input == "ratings"
        else None
    )
    figures = bench.evaluate(bench.rows(prepared, targets), known=known).figures()
    return {"rows": len(targets), "metrics": figures, **model.words(bench)}


def _held_out(plan: Plan, data: "RawData") -> "NodeDataset":
    """Ratings of which a part is predicted from the others of the same users."""
    from concord_client.data import NodeDataset
    from concord_client.data.dataset import split_for

    return NodeDataset("", data.inputs, data.targets, split_for(plan, data, np.arange(len(data)), ""))


def predict(model: TrainedModel, data: "RawData", device: str = "auto") -> dict[str, Any]:
    """A prediction for each row, and its probability for a classification. Of ratings: for each user the best items."""
    bench = model.bench(device)
    if model.plan.data.input == "ratings":
        return _recommend(model, data, bench)
    outputs = bench.predict(bench.rows(model.prepare(data.inputs, data.inputs), np.zeros(len(data))))
    if model.plan.data.task != "classification":
        return {"rows": len(outputs), **model.words(bench), "prediction": [float(value) for value in outputs]}
    best = outputs.argmax(1)
    return {
        "rows": len(outputs),
        **model.words(bench),
        "prediction": [model.plan.data.classes[code] for code in best],
        "probability": [float(p) for p in outputs[np.arange(len(best)), best]],
    }


def _recommend(model: TrainedModel, data: "RawData", bench: "Workbench") -> dict[str, Any]:
    """For each user of these ratings the `TOP` best items that the user has not rated here, best first."""
    from concord_client.tasks import Recommending

    contract = model.plan.data
    known = bench.rows(model.prepare(data.inputs, data.inputs), data.targets)
    users, first = np.unique(data.inputs[:, 0].astype(np.int64), return_index=True)
    names = data.groups[contract.user][first]
    assert isinstance(bench.task, Recommending)
    scores, places = bench.task.best(users, known, TOP)
    found = [
        (str(name), contract.items[place], float(score))
        for name, *best in zip(names, scores, places, strict=True)
        for score, place in zip(*best, strict=True)
        if np.isfinite(score)
    ]
    user, item, score = zip(*found, strict=True) if found else ((), (), ())
    return {"rows": len(found), **model.words(bench), "user": list(user), "item": list(item), "score": list(score)}


def write_predictions(result: dict[str, Any], out: Path) -> dict[str, Any]:
    """As CSV; returns the result without its columns, and with where they are."""
    write_atomically(out, _as_csv(result))
    return {key: value for key, value in result.items() if key not in _COLUMNS} | {"out": str(out)}


def show_predictions(result: dict[str, Any]) -> None:
    if "personal" in result:
        sys.stderr.write(f"personal part of the model: {result['personal']}\n")
    if "out" in result:
        sys.stdout.write(f"{result['rows']} predictions written to {result['out']}\n")
    else:
        sys.stdout.write(_as_csv(result))


_COLUMNS = ("prediction", "probability", "user", "item", "score")


def _as_csv(result: dict[str, Any]) -> str:
    names = [name for name in _COLUMNS if name in result]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(*(result[name] for name in names), strict=True))
    return text.getvalue()
