"""The files of a run directory as one value: what the report is made of."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from concord_shared.errors import ArtefactError
from concord_shared.metrics import headline, higher_is_better
from concord_shared.plan.schema import Plan, parse_plan_document

__all__ = ["Record", "Run", "read_run"]

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run. `comparison` is None and `coefficients` empty where the run has none."""

    plan: Plan
    setting: Record
    environment: Record
    data: Record
    records: Sequence[Record]
    summary: Record
    comparison: Record | None
    coefficients: Sequence[Record]

    @property
    def headline(self) -> str:
        """The figure that everything is judged by: accuracy, rmse, ndcg_10, or the loss of a language model."""
        return headline(self.plan.data)

    @property
    def curves(self) -> tuple[str, ...]:
        """The figures that are drawn over rounds."""
        second = "accuracy" if self.headline == "loss" else "loss"
        return self.headline, second

    @property
    def higher_is_better(self) -> bool:
        return higher_is_better(self.plan.data)

    @property
    def personal(self) -> bool:
        """Whether the figures are of each node's own model, and not of the shared one."""
        return bool(self.summary.get("personal"))

    @property
    def counts_rows(self) -> bool:
        """Whether the headline is a share of rows, of which an interval can be told."""
        return self.plan.data.task == "classification"

    @property
    def nodes(self) -> Mapping[str, Record]:
        """What each node has, by name."""
        nodes: Mapping[str, Record] = self.data.get("nodes", {})
        return nodes

    @property
    def metrics(self) -> Record:
        metrics: Record = self.summary.get("metrics") or {}
        return metrics

    @property
    def per_node(self) -> Mapping[str, Record]:
        figures: Mapping[str, Record] = self.summary.get("per_node") or {}
        return figures

    @cached_property
    def evaluations(self) -> tuple[Record, ...]:
        """The settled evaluate rounds in order; the last word on each round counts."""
        found = {record["round"]: record for record in self.records if _evaluated(record)}
        return tuple(found[number] for number in sorted(found))

    @cached_property
    def trainings(self) -> tuple[Record, ...]:
        """The train rounds in order, aborted ones too."""
        return tuple(record for record in self.records if record.get("kind") == "train")


def read_run(directory: Path) -> Run:
    """Reads what a run wrote.

    Raises:
        ArtefactError: plan, summary, data or metrics are missing, or a file is not what it should be.
    """
    try:
        plan = parse_plan_document(_read(directory / "plan.json"))
    except ValueError as error:
        raise ArtefactError(f"{directory / 'plan.json'}: not a plan of this version of concord") from error
    return Run(
        plan=plan,
        setting=_read(directory / "simulation.json", {}),
        environment=_read(directory / "environment.json", {}),
        data=_read(directory / "data.json"),
        records=_read_lines(directory / "metrics.jsonl"),
        summary=_read(directory / "summary.json"),
        comparison=_read(directory / "comparison.json", None),
        coefficients=_read(directory / "coefficients.json", []),
    )


_REQUIRED = object()


def _read(path: Path, default: Any = _REQUIRED) -> Any:
    if default is not _REQUIRED and not path.exists():
        return default
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: expected a JSON file of this run: {error}") from error


def _read_lines(path: Path) -> tuple[Record, ...]:
    try:
        return tuple(json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip())
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: expected one JSON object a line: {error}") from error


def _evaluated(record: Record) -> bool:
    return record.get("kind") == "evaluate" and "aborted" not in record and bool(record.get("metrics"))
