"""Using finished runs: evaluate and predict with a run's model, and put runs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from concord_client.data import RawData, read_data
from concord_client.inference import TrainedModel, evaluate, predict, show_predictions, write_predictions
from concord_client.state import NodeStates
from concord_local.environment import comparable
from concord_local.nodes import model_builder
from concord_local.rundir import RunDirectory
from concord_shared.errors import UsageError
from concord_shared.models import is_personal
from concord_shared.plan import Plan
from concord_shared.strategies import State

__all__ = ["compare_runs", "evaluate_run", "predict_run", "show_predictions"]


def evaluate_run(directory: Path, spec: str, node: str | None = None) -> dict[str, Any]:
    """Figures of the run's model on the test rows of `spec`, or on all rows where it has no own split. node: with the
    part of the model that stayed at this node.
    """
    model, data = _open(directory, spec, node, labelled=True)
    return {"run_dir": str(directory), "data": spec, **evaluate(model, data)}


def predict_run(directory: Path, spec: str, out: Path | None, node: str | None = None) -> dict[str, Any]:
    """A prediction for each row of `spec`; with `out` written there as CSV. node: as in `evaluate_run`."""
    model, data = _open(directory, spec, node, labelled=False)
    result = {"run_dir": str(directory), "data": spec, **predict(model, data)}
    return result if out is None else write_predictions(result, out)


def compare_runs(directories: Sequence[Path]) -> dict[str, Any]:
    """Figures side by side, and what their digests say.

    Raises:
        UsageError: fewer than two runs, or one over seeds, which has no model of its own.
    """
    if len(directories) < 2:
        raise UsageError("give at least two runs to compare")
    runs = [_one_run(path) for path in directories]
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


def _one_run(directory: Path) -> RunDirectory:
    run = RunDirectory.open(directory)
    if run.exists("seeds.json"):
        raise UsageError(
            f"{directory} is a run over seeds, with a model for each of them; name one of those: {directory / 'seed-0'}"
        )
    return run


def _open(directory: Path, spec: str, node: str | None, labelled: bool) -> tuple[TrainedModel, RawData]:
    run = _one_run(directory)
    if not run.exists("model.safetensors"):
        raise UsageError(f"{directory} has no model yet; finish it with concord simulate --resume {directory}")
    plan = run.read_plan()
    theta, fitted = run.read_model(plan)
    default = str(run.read_json("simulation.json")["data"])
    data = read_data(spec, plan, default, labelled=labelled)
    kept = {} if node is None else _kept(run, plan, node)
    return TrainedModel(plan, theta, fitted, model_builder(plan), kept), data


def _kept(run: RunDirectory, plan: Plan, node: str) -> State:
    names = run.read_json("data.json")["nodes"]
    if node not in names:
        raise UsageError(f"--node {node}: the run has no node {node}; it has {', '.join(names)}")
    if not is_personal(plan, model_builder(plan)):
        raise UsageError(
            f"--node {node}: nothing of this run's model stays at a node, all have the same; leave --node out"
        )
    return NodeStates(run.node_states).current(node, plan.rounds.count)
