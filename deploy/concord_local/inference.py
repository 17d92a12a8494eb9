"""Using finished runs: evaluate and predict with a run's model, and put runs side by side."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from concord_client.data import RawData, Split, read_data
from concord_client.devices import choose_device, prepare_process
from concord_client.trainer import Workbench
from concord_local.environment import comparable
from concord_local.nodes import model_builder
from concord_local.rundir import RunDirectory
from concord_shared.errors import UsageError
from concord_shared.files import write_atomically
from concord_shared.plan import Plan
from concord_shared.preprocessing import Fitted, fit_locally

__all__ = ["compare_runs", "evaluate_run", "predict_run", "show_predictions"]


def evaluate_run(directory: Path, spec: str) -> dict[str, Any]:
    """Figures of the run's model on the test rows of `spec`, or on all rows where it has no own split."""
    plan, bench, fitted, data = _open(directory, spec, labelled=True)
    rows = np.arange(len(data)) if data.split is None else np.flatnonzero(data.split == Split.TEST)
    inputs = _prepare(plan, fitted, data)[rows]
    figures = bench.evaluate(bench.rows(inputs, data.targets[rows])).figures()
    return {"run_dir": str(directory), "data": spec, "rows": len(rows), "metrics": figures}


def predict_run(directory: Path, spec: str, out: Path | None) -> dict[str, Any]:
    """A prediction for each row of `spec`; with `out` written there as CSV."""
    plan, bench, fitted, data = _open(directory, spec, labelled=False)
    outputs = bench.predict(bench.rows(_prepare(plan, fitted, data), np.zeros(len(data))))
    if plan.data.task == "classification":
        best = outputs.argmax(1)
        columns: dict[str, list[Any]] = {
            "prediction": [plan.data.classes[code] for code in best],
            "probability": [float(p) for p in outputs[np.arange(len(best)), best]],
        }
    else:
        columns = {"prediction": [float(value) for value in outputs]}
    result = {"run_dir": str(directory), "data": spec, "rows": len(outputs), **columns}
    if out is not None:
        write_atomically(out, _as_csv(result))
        result = {"run_dir": str(directory), "data": spec, "rows": len(outputs), "out": str(out)}
    return result


def show_predictions(result: dict[str, Any]) -> None:
    if "out" in result:
        sys.stdout.write(f"{result['rows']} predictions written to {result['out']}\n")
    else:
        sys.stdout.write(_as_csv(result))


def compare_runs(directories: Sequence[Path]) -> dict[str, Any]:
    """Figures side by side, and what their digests say.

    Raises:
        UsageError: fewer than two runs.
    """
    if len(directories) < 2:
        raise UsageError("give at least two runs to compare")
    runs = [RunDirectory.open(path) for path in directories]
    summaries = [run.read_json("summary.json") for run in runs]
    environments = [run.read_json("environment.json") for run in runs]
    shown = [
        {key: summary[key] for key in ("run_dir", "plan", "plan_digest", "model_digest", "deterministic", "metrics")}
        for summary in summaries
    ]
    figures = [key for key, value in summaries[0]["metrics"].items() if isinstance(value, float)]
    return {"runs": shown, "figures": figures, "verdict": _verdict(shown, environments)}


def _verdict(runs: Sequence[dict[str, Any]], environments: Sequence[dict[str, Any]]) -> str:
    if len({run["model_digest"] for run in runs}) == 1:
        return "the models are equal, bit for bit"
    if len({run["plan_digest"] for run in runs}) > 1:
        return "the plans differ, so the models may"
    differences = sorted({item for other in environments[1:] for item in comparable(environments[0], other)})
    if differences:
        return "the models differ; no promise is broken, the environments do: " + "; ".join(differences)
    if not all(run["deterministic"] for run in runs):
        return "the models differ; training.deterministic is off"
    return "the models differ with equal plans and environments: their data or nodes differ (see simulation.json)"


def _open(directory: Path, spec: str, labelled: bool) -> tuple[Plan, Workbench, Fitted, RawData]:
    run = RunDirectory.open(directory)
    if not run.exists("model.safetensors"):
        raise UsageError(f"{directory} has no model yet; finish it with concord simulate --resume {directory}")
    plan = run.read_plan()
    theta, fitted = run.read_model(plan)
    default = str(run.read_json("simulation.json")["data"])
    data = read_data(spec, plan, default, labelled=labelled)
    prepare_process(threads=None)
    bench = Workbench(plan, choose_device(), model_builder(plan))
    bench.load(theta)
    return plan, bench, fitted, data


def _prepare(plan: Plan, fitted: Fitted, data: RawData) -> Any:
    own = fit_locally(plan, data.inputs) if plan.preprocessing.scope == "per-node" else fitted
    return own.transform(data.inputs)


def _as_csv(result: dict[str, Any]) -> str:
    names = [name for name in ("prediction", "probability") if name in result]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(zip(*(result[name] for name in names), strict=True))
    return text.getvalue()
