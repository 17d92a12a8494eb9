"""The directory of a run: what it is made of, and how a trained model leaves it.

plan.json  plan.toml  simulation.json  environment.json  data.json     written at the start
metrics.jsonl  checkpoint/                                             while it runs
model.safetensors  preprocessing.json  MODEL_CARD.md  summary.json     at the end
plots/  report.html
"""

import contextlib
import datetime
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from concord_client.data import Split
from concord_local.federation import Federation
from concord_local.run_files import what_is_wrong
from concord_server.driver import RunResult
from concord_shared.errors import ArtefactError, PlanError
from concord_shared.files import explain, write_atomically
from concord_shared.model_card import model_card
from concord_shared.model_files import write_model
from concord_shared.models import layout_of, new_vector
from concord_shared.plan import Plan, SimulateDefaults, parse_plan_document
from concord_shared.preprocessing import Fitted, feature_names
from concord_shared.tensors import Float32Vector, Layout, read_safetensors

__all__ = ["RunDirectory", "describe_data", "new_run_path", "plan_toml"]

START = ("data.json", "simulation.json", "environment.json", "plan.toml")
"""What is written before plan.json, without which there is no run."""


def new_run_path(name: str, out: str | Path | None) -> Path:
    """`--out`, or runs/NAME-TIME (UTC), with a number where that exists."""
    if out is not None:
        return Path(out)
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    path = Path("runs") / f"{name}-{stamp}"
    return path if not path.exists() else path.with_name(f"{path.name}-{len(list(path.parent.glob(path.name + '*')))}")


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @classmethod
    def check_free(cls, path: Path) -> None:
        """Raises: ArtefactError: it exists with something in it."""
        if path.exists() and not path.is_dir():
            raise ArtefactError(f"{path} is a file, expected a directory for the run; name another with --out")
        if path.exists() and any(path.iterdir()):
            further = f", or go on with --resume {path}" if cls(path).is_run else ""
            raise ArtefactError(f"{path} exists already; name another directory with --out{further}")

    @classmethod
    def create(cls, path: Path) -> "RunDirectory":
        """Raises: ArtefactError: it exists with something in it, or cannot be made."""
        cls.check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtefactError(f"cannot make {path}: {explain(error)}") from error
        return cls(path)

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """Makes the directory if need be, and keeps other processes from working on the same run. Of a run that never
        began nothing is left, so that its directory is free for the next try.

        Raises:
            ArtefactError: it cannot be made, or another process works on it.
        """
        made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a")
        except OSError as error:
            raise ArtefactError(f"cannot make {self.path}: {explain(error)}") from error
        with lock:
            _lock(lock.fileno(), self.path)
            try:
                yield
            finally:
                if not self.exists("plan.json"):
                    self._clear(made)

    def _clear(self, made: bool) -> None:
        with contextlib.suppress(OSError):
            for name in (".lock", *START):
                (self.path / name).unlink(missing_ok=True)
            if made:
                self.path.rmdir()

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Raises: ArtefactError: no run is there."""
        if not cls(path).is_run:
            raise ArtefactError(f"{path}: expected the directory of a run (with plan.json in it)")
        return cls(path)

    @property
    def is_run(self) -> bool:
        """Whether a run began here, or one over seeds."""
        return any((self.path / name).is_file() for name in ("plan.json", "seeds.json"))

    @property
    def node_states(self) -> Path:
        return self.path / "nodes"

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def read_json(self, name: str) -> dict[str, Any]:
        """Raises: ArtefactError: it is missing, cut short, or not what a run writes there; with what to do."""
        try:
            value: dict[str, Any] = json.loads((self.path / name).read_text("utf-8"))
        except OSError as error:
            raise self._damaged(name, explain(error)) from error
        except ValueError as error:
            raise self._damaged(name, f"no JSON: {error}") from error
        if wrong := what_is_wrong(name, value):
            raise self._damaged(name, wrong)
        return value

    def _damaged(self, name: str, wrong: str) -> ArtefactError:
        advice = "put the file back as it was, or run again with another --out"
        if name == "summary.json":
            advice = f"remove it, and write it anew with concord simulate --resume {self.path}"
        return ArtefactError(f"{self.path / name}: expected a file of this run, got: {wrong}; {advice}")

    def write_json(self, name: str, value: Any) -> None:
        write_atomically(self.path / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def write_start(
        self, plan: Plan, setting: dict[str, Any], environment: dict[str, Any], data: dict[str, Any]
    ) -> None:
        """plan.json is written last: where it is, the run can be resumed."""
        self.write_json("data.json", data)
        self.write_json("simulation.json", setting)
        self.write_json("environment.json", environment)
        write_atomically(self.path / "plan.toml", plan_toml(plan))
        self.write_json("plan.json", plan.document())

    def read_plan(self) -> Plan:
        try:
            return parse_plan_document(self.read_json("plan.json"))
        except (ValueError, PlanError) as error:
            raise self._damaged("plan.json", "not a plan of this version of concord") from error

    def read_seeds(self) -> tuple[Plan, int]:
        """The plan of a run over seeds, and how many. Raises: ArtefactError: as `read_json`."""
        document = self.read_json("seeds.json")
        try:
            return parse_plan_document(document["plan"]), document["seeds"]
        except (ValueError, PlanError) as error:
            raise self._damaged("seeds.json", "not a plan of this version of concord") from error

    def write_model(self, plan: Plan, result: RunResult, summary: dict[str, Any]) -> None:
        """The model, what prepares its inputs, and the card that says what it is."""
        from concord_local.nodes import model_builder

        if plan.kind == "statistics":
            self.write_json("statistics.json", dict(result.preprocessing))
            return
        layout = layout_of(plan, model_builder(plan)(plan))
        preprocessing = dict(result.preprocessing)
        write_model(self.path / "model.safetensors", plan, layout, result.theta, preprocessing)
        self.write_json("preprocessing.json", preprocessing)
        if plan.model.name in ("linear-regression", "logistic-regression") and plan.data.input == "table":
            self.write_json("coefficients.json", _coefficients(plan, layout, result))
        write_atomically(self.path / "MODEL_CARD.md", model_card(plan, summary))

    def read_model(self, plan: Plan) -> tuple[Float32Vector, Fitted]:
        from concord_local.nodes import model_builder

        layout = new_vector(plan, model_builder(plan))[0]
        tensors, metadata = read_safetensors(self.path / "model.safetensors")
        if set(tensors) != {name for name, _ in layout.entries} or metadata.get("plan_digest") != plan.digest:
            raise ArtefactError(f"{self.path / 'model.safetensors'}: not the model of this run's plan")
        theta = layout.join({name: tensor.astype(np.float32) for name, tensor in tensors.items()})
        return theta, Fitted.from_document(json.loads(metadata["preprocessing"]))


def plan_toml(plan: Plan, simulate: SimulateDefaults | None = None) -> str:
    """The plan as a file that `concord simulate` takes, every default written out."""
    document = {key: value for key, value in plan.document().items() if key != "schema"}
    return tomli_w.dumps(_without_nulls(document | ({"simulate": simulate.model_dump()} if simulate else {})))


def _without_nulls(value: Any) -> Any:
    """TOML has no null: an absent key means the same."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def describe_data(federation: Federation, plan: Plan) -> dict[str, Any]:
    """Who has what: rows by split, training rows by class, a digest of it all. Never sent to anybody."""
    nodes: dict[str, dict[str, Any]] = {}
    for name in federation.names:
        splits = federation.rows[name]
        targets = federation.targets[splits[Split.TRAIN]]
        nodes[name] = {split.name.lower(): len(rows) for split, rows in splits.items()}
        if plan.data.task == "classification":
            nodes[name]["classes"] = np.bincount(targets, minlength=len(plan.data.classes)).tolist()
        elif plan.data.task == "regression":
            nodes[name] |= {"target_mean": float(targets.mean()), "target_deviation": float(targets.std())}
    return {"classes": list(plan.data.classes), "nodes": nodes, "digest": federation.digest}


def _lock(descriptor: int, path: Path) -> None:
    """An advisory lock that ends with the process; where the system has none, nothing is locked."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ArtefactError(f"{path}: another process works on this run; wait for it, or stop it first") from error


def _coefficients(plan: Plan, layout: Layout, result: RunResult) -> list[dict[str, Any]]:
    """One row a feature and output: coefficient, and the standard error where the strategy gives it."""
    errors = layout.split(np.asarray(result.state.get("standard_errors", np.full(layout.size, np.nan)), np.float32))
    outputs = plan.data.classes or (plan.data.target,)
    rows = []
    for tensor, values in layout.split(result.theta).items():
        features = feature_names(plan.data, plan.preprocessing) if values.ndim == 2 else ("(intercept)",)
        shape = (len(outputs), len(features))
        table = zip(values.reshape(shape).tolist(), errors[tensor].reshape(shape).tolist(), outputs, strict=True)
        for coefficients, deviations, output in table:
            for feature, value, error in zip(features, coefficients, deviations, strict=True):
                known = None if np.isnan(error) else error
                rows.append({"feature": feature, "output": output, "coefficient": value, "standard_error": known})
    return rows
