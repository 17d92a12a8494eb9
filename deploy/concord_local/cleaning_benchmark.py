"""`concord bench cleaning`: what damaged data at some of the nodes cost a model, and how much cleaning brings back.

Training rows of three nodes, drawn by the seed, are damaged; test rows are as they were. Each seed is run four times:
clean and damaged, without cleaning and with it.

    adult     a share of the numeric cells × 100, at 3 of 7 employers; the contract's ranges are as much wider, so that
              they do not tell what is damaged. Cleaned by fences from federated quartiles
    fashion   salt and pepper on a share of the pixels, at 3 of 10 nodes. Cleaned by the switching median filter
"""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_client.data import Split, read_data
from concord_local.federation import Federation
from concord_local.memory import PeakMemory
from concord_local.rundir import RunDirectory
from concord_local.simulation import Setting, federate
from concord_shared.errors import UsageError
from concord_shared.plan import Plan, load_plan
from concord_shared.seeds import derive_seed

__all__ = ["EXPERIMENTS", "bench_cleaning", "show_cleaning"]

EXPERIMENTS = {"adult": "adult:adult", "fashion": "idx:fashion_mnist"}
"""And where their data are, by default."""
DAMAGED_NODES = 3
FACTOR = 100.0
SHORT = {
    "adult": ("evaluation.every=0", "rounds.count=15", "privacy.mode=private"),
    "fashion": (
        *("evaluation.every=0", "rounds.count=6", "model.name=tanh-cnn", "training.learning_rate=0.05"),
        *("training.local_epochs=2", "rounds.weight_cap=1000"),
    ),
}
CLEANING: dict[str, dict[str, Any]] = {
    "adult": {"outliers": {"rule": "iqr", "factor": 3.0}},
    "fashion": {"denoise": "median"},
}
FASHION_ROWS = 10_000
"""Of the training images, so that five seeds take minutes; all test images count."""


def bench_cleaning(experiment: str, spec: str, share: float, seeds: int) -> dict[str, Any]:
    """Medians over seeds of the test accuracy, by what was done to the rows.

    Args:
        experiment: one of EXPERIMENTS.
        spec: its data, where they are not in their usual place.
        share: of numeric cells, or of pixels, that are damaged at the damaged nodes.
    """
    if experiment not in EXPERIMENTS:
        raise UsageError(f"no experiment {experiment!r}; expected {' or '.join(EXPERIMENTS)}")
    plan = load_plan(experiment if experiment == "adult" else "fashion-cnn", SHORT[experiment]).plan
    if experiment == "adult":
        plan = _with_wider_ranges(plan)
    data = read_data(spec or EXPERIMENTS[experiment], plan)
    if experiment == "fashion":
        assert data.split is not None
        kept = np.concatenate([np.arange(FASHION_ROWS), np.flatnonzero(data.split == Split.TEST)])
        data = replace(data, inputs=data.inputs[kept], targets=data.targets[kept], split=data.split[kept], groups={})
    runs: dict[str, list[float]] = {}
    for seed in range(seeds):
        seeded = plan.with_seed(seed)
        cleaned = _cleaned(seeded, CLEANING[experiment])
        partition, nodes = ("natural:employer", None) if experiment == "adult" else ("iid", 10)
        clean = Federation.of(data, seeded, partition, nodes)
        damaged = _damaged(clean, seeded, share)
        for name, federation in (("clean", clean), ("damaged", damaged)):
            runs.setdefault(name, []).append(_accuracy(seeded, federation))
            runs.setdefault(f"{name}_cleaned", []).append(_accuracy(cleaned, federation))
    medians = {name: statistics.median(values) for name, values in runs.items()}
    lost = medians["clean"] - medians["damaged"]
    return {
        "experiment": experiment,
        "share": share,
        "seeds": seeds,
        "accuracy": medians,
        "runs": runs,
        "lost": lost,
        "recovered": (medians["damaged_cleaned"] - medians["damaged"]) / lost if lost > 0 else None,
        "cost_on_clean": medians["clean"] - medians["clean_cleaned"],
    }


def show_cleaning(result: dict[str, Any]) -> None:
    from rich.console import Console

    figures = ", ".join(f"{name.replace('_', ', ')} {value:.4f}" for name, value in result["accuracy"].items())
    recovered = "–" if result["recovered"] is None else f"{result['recovered']:.0%}"
    Console().print(
        f"{result['experiment']}, {result['share']:.0%} damaged at {DAMAGED_NODES} nodes, median of {result['seeds']} "
        f"seeds: {figures}. Lost {100 * result['lost']:.2f} points, cleaning brings back {recovered} of them; on clean "
        f"data it costs {100 * result['cost_on_clean']:.2f} points"
    )


def _cleaned(plan: Plan, cleaning: dict[str, Any]) -> Plan:
    return plan.with_changes(preprocessing=plan.preprocessing.model_dump(mode="json") | cleaning)


def _with_wider_ranges(plan: Plan) -> Plan:
    document = plan.data.model_dump(mode="json")
    for column in document["columns"]:
        if column["range"] is not None:
            low, high = column["range"]
            column["range"] = [low, high * FACTOR]
    return plan.with_changes(data=document)


def _damaged(federation: Federation, plan: Plan, share: float) -> Federation:
    """The same nodes, some with damaged training rows."""
    chance = np.random.default_rng(derive_seed(plan.seed, "damage"))
    inputs = federation.inputs.copy()
    for name in sorted(chance.choice(federation.names, DAMAGED_NODES, replace=False)):
        rows = federation.rows[name][Split.TRAIN]
        damage = _salt_and_pepper if plan.data.input == "image" else _times
        inputs[rows] = damage(inputs[rows], plan, share, chance)
    return replace(federation, inputs=inputs)


def _times(rows: NDArray[Any], plan: Plan, share: float, chance: np.random.Generator) -> NDArray[Any]:
    number = np.array([column.kind == "number" for column in plan.data.columns])
    hit = (chance.random(rows.shape) < share) & number
    return np.where(hit, rows * FACTOR, rows)


def _salt_and_pepper(images: NDArray[Any], plan: Plan, share: float, chance: np.random.Generator) -> NDArray[Any]:
    drawn = chance.random(images.shape)
    return np.where(drawn < share / 2, 0, np.where(drawn > 1 - share / 2, 255, images)).astype(np.uint8)


def _accuracy(plan: Plan, federation: Federation) -> float:
    """Of the model of a run in this process, on all test rows."""
    setting = Setting("", None, "", workers=1)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(Path(folder) / "run")
        result, _, _ = federate(plan, federation, setting, run, lambda record: None, None, PeakMemory())
    return float(result.metrics["accuracy"])  # type: ignore[arg-type]
