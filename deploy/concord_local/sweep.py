"""`concord sweep`: a grid of plans, chosen on validation rows and never on test rows."""

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from concord_local.rundir import RunDirectory, new_run_path, plan_toml
from concord_local.simulation import Observer, run_plan, setting_for
from concord_local.transports import start_fork_server
from concord_shared.errors import UsageError
from concord_shared.files import write_atomically
from concord_shared.metrics import headline, higher_is_better
from concord_shared.plan import load_plan

__all__ = ["sweep"]

POINTS_MAX = 1000


def sweep(
    plan: str,
    overrides: Sequence[str],
    *,
    seeds: int = 1,
    data: str | None = None,
    nodes: int | None = None,
    partition: str | None = None,
    workers: int | None = None,
    out: Path | None = None,
    observer: Observer = lambda record: None,
) -> dict[str, Any]:
    """Runs every point of the grid with seeds 0…K−1, and writes the best plan as best.toml.

    A plan without `evaluation.validation_fraction` gets 0.2 for the sweep; the best plan keeps its own.

    Raises:
        UsageError: no grid, or one that is too large.
    """
    start_fork_server()
    points = list(_grid(overrides))
    if len(points) > POINTS_MAX:
        raise UsageError(f"{len(points)} points; a sweep has at most {POINTS_MAX}")
    loaded = [load_plan(plan, point) for point in points]  # every mistake shows before the first run
    loaded[0].plan.check_trains("concord sweep")
    directory = RunDirectory.create(new_run_path(f"{loaded[0].plan.name}-sweep", out))
    results = []
    for index, (point, candidate) in enumerate(zip(points, loaded, strict=True)):
        fraction = candidate.plan.evaluation.validation_fraction or 0.2
        validated = load_plan(
            plan,
            [
                *point,
                f"evaluation.validation_fraction={fraction}",
                'evaluation.on="validation"',
                "evaluation.every=0",
            ],
        )
        values = []
        for seed in range(seeds):
            observer({"kind": "point", "text": f"point {index + 1}/{len(points)}: {' '.join(point)}, seed {seed}"})
            setting = setting_for(validated, data=data, nodes=nodes, partition=partition, workers=workers)
            child = directory.path / f"point-{index + 1}" / f"seed-{seed}"
            result = run_plan(validated.plan.with_seed(seed), setting, child, observer)
            values.append(float(result.summary["metrics"][headline(validated.plan.data)]))
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        results.append({"set": list(point), "mean": statistics.fmean(values), "deviation": deviation, "values": values})
    return _conclude(directory, loaded, results)


def _conclude(directory: RunDirectory, loaded: Sequence[Any], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    contract = loaded[0].plan.data
    choose = max if higher_is_better(contract) else min
    best = choose(range(len(results)), key=lambda index: results[index]["mean"])
    path = directory.path / "best.toml"
    write_atomically(path, plan_toml(loaded[best].plan, loaded[best].simulate))
    summary = {
        "run_dir": str(directory.path),
        "headline": headline(contract),
        "chosen_on": "validation",
        "points": list(results),
        "best": results[best] | {"plan": str(path), "plan_digest": loaded[best].plan.digest},
    }
    directory.write_json("sweep.json", summary)
    return summary


def _grid(overrides: Sequence[str]) -> Any:
    """`["a=1,2", "b=3"]` to `("a=1", "b=3"), ("a=2", "b=3")`; commas inside brackets and quotes are kept."""
    axes = []
    for override in overrides:
        key, separator, values = override.partition("=")
        if not separator:
            raise UsageError(f"--set {override}: expected KEY=A,B,C")
        axes.append([f"{key}={value}" for value in _split(values)])
    return itertools.product(*axes)


def _split(text: str) -> list[str]:
    parts, depth, quoted = [""], 0, False
    for character in text:
        quoted ^= character == '"'
        depth += (character == "[") - (character == "]")
        if character == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts
