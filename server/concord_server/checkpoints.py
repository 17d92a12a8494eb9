"""What survives a kill. The model's tensors lie in a file, written whole or not at all; a document says where the run
stands and names that file with its digest, and is stored only after the file is on the disk. So whatever it says is
true.

`RunStore` keeps the document and the records of steps in files, for a run on one machine:

    metrics.jsonl            one line a step, appended
    checkpoint/state.json    the document; replaced last
    checkpoint/round-N.safetensors

metrics.jsonl may hold lines that are younger; resuming cuts it back to the length that state.json gives. The
coordinator keeps both in its database instead: `concord_server.runs.store`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from concord_shared.errors import ArtefactError
from concord_shared.files import explain, file_digest, write_atomically
from concord_shared.signed_rounds import Sent
from concord_shared.strategies.base import State
from concord_shared.tensors import Float32Vector, Layout, model_digest, read_safetensors, write_safetensors

__all__ = ["Checkpoint", "RunStore", "StepStore", "TensorFiles"]

CHECKPOINT_SCHEMA = "concord/checkpoint/1"


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after `done`, the last step that was settled or abandoned (None before the first).

    run: a random name, so that no reply of another run of the same plan fits; attempt: how often it was taken up.
    applied: per node the last round that was applied with its Update in it.
    preprocessing: the fitted preprocessing's document, or the first stage's result while fitting.
    """

    plan_digest: str
    theta: Float32Vector
    model_digest: str
    state: State
    run: str = ""
    attempt: int = 1
    version: int = 0
    done: tuple[str, int] | None = None
    aborts: int = 0
    applied: Mapping[str, int] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)


class StepStore(Protocol):
    """The durable side of one run, as the driver uses it."""

    @property
    def folder(self) -> Path:
        """The run's own: where what a step needs for a while may lie."""

    def lifted(self) -> Mapping[str, str]:
        """Whom people took out of quarantine: by node, who did."""

    def load(self, plan_digest: str, layout: Layout) -> Checkpoint | None:
        """The last checkpoint, verified; None where there is none yet. Raises: ArtefactError."""

    def records(self) -> list[dict[str, Any]]:
        """The records of all steps so far."""

    def append(self, record: Mapping[str, Any], sent: Mapping[str, Sent] | None = None) -> None:
        """Takes the record of a step; durable at the latest with the `save` that follows it.

        sent: what nodes signed for what is in it, where replies are signed.
        """

    def save(self, checkpoint: Checkpoint) -> None:
        """Makes `checkpoint` durable."""


class TensorFiles:
    """The tensors of checkpoints in one folder, a file for each version of the model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._version = -1
        self._sha256 = ""
        for torn in folder.glob(".*tmp*"):  # of a process that was killed
            torn.unlink(missing_ok=True)

    def write(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Puts a new version's tensors on the disk; the document that describes the checkpoint."""
        name = f"round-{checkpoint.version}.safetensors"
        if checkpoint.version != self._version:
            tensors = {"theta": checkpoint.theta} | {f"state.{key}": value for key, value in checkpoint.state.items()}
            self._make_folder()
            write_safetensors(self._folder / name, tensors, {"model_digest": checkpoint.model_digest})
            self._sha256 = file_digest(self._folder / name)
            self._version = checkpoint.version
        return {
            "schema": CHECKPOINT_SCHEMA,
            "plan_digest": checkpoint.plan_digest,
            "tensors": name,
            "tensors_sha256": self._sha256,
            "model_digest": checkpoint.model_digest,
            "run": checkpoint.run,
            "attempt": checkpoint.attempt,
            "version": checkpoint.version,
            "done": checkpoint.done,
            "aborts": checkpoint.aborts,
            "applied": dict(checkpoint.applied),
            "preprocessing": dict(checkpoint.preprocessing),
            "counters": dict(checkpoint.counters),
        }

    def read(self, document: Mapping[str, Any], where: str, plan_digest: str, layout: Layout) -> Checkpoint:
        """The checkpoint that a document describes, with every digest in it verified.

        Raises:
            ArtefactError: it is damaged, or belongs to another plan.
        """
        try:
            path = self._folder / document["tensors"]
            tensors, _ = read_safetensors(path)
            theta = tensors.pop("theta").astype(np.float32, copy=False)
            checkpoint = Checkpoint(
                plan_digest=document["plan_digest"],
                theta=theta,
                model_digest=document["model_digest"],
                state={key.removeprefix("state."): value for key, value in tensors.items()},
                run=document["run"],
                attempt=document["attempt"],
                version=document["version"],
                done=tuple(document["done"]) if document["done"] else None,
                aborts=document["aborts"],
                applied=document["applied"],
                preprocessing=document["preprocessing"],
                counters=document["counters"],
            )
            sha256 = file_digest(path)
            sound = document["schema"] == CHECKPOINT_SCHEMA and theta.shape == (layout.size,)
            sound = sound and model_digest(layout, theta) == checkpoint.model_digest
            sound = sound and sha256 == document["tensors_sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{where}: not a checkpoint of concord ({error}); start a new run") from error
        if checkpoint.plan_digest != plan_digest:
            raise ArtefactError(f"{where}: belongs to plan {checkpoint.plan_digest[:12]}, not to {plan_digest[:12]}")
        if not sound:
            raise ArtefactError(f"{where}: the stored model is not the one that the checkpoint names; start a new run")
        self._version, self._sha256 = checkpoint.version, sha256
        return checkpoint

    def remove(self, version: int) -> None:
        (self._folder / f"round-{version}.safetensors").unlink(missing_ok=True)

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            raise ArtefactError(f"cannot make {self._folder}: {explain(error)}") from error


class RunStore:
    """A `StepStore` of files in `directory`, which exists."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._document = directory / "checkpoint" / "state.json"
        self._tensors = TensorFiles(directory / "checkpoint")
        self._metrics = directory / "metrics.jsonl"
        self._version = -1

    @property
    def folder(self) -> Path:
        return self.directory

    def lifted(self) -> Mapping[str, str]:
        """A simulation is over before anybody could."""
        return {}

    def append(self, record: Mapping[str, Any], sent: Mapping[str, Sent] | None = None) -> None:
        """One line of metrics.jsonl. On one machine nothing is signed."""
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ArtefactError(f"cannot write {self._metrics}: {explain(error)}") from error

    def records(self) -> list[dict[str, Any]]:
        if not self._metrics.exists():
            return []
        try:
            return [dict(json.loads(line)) for line in self._metrics.read_text("utf-8").split("\n") if line]
        except (OSError, ValueError, TypeError) as error:
            raise ArtefactError(f"{self._metrics}: not the records of a run ({error}); start a new run") from error

    def save(self, checkpoint: Checkpoint) -> None:
        """Keeps the tensors of the last version only."""
        document = self._tensors.write(checkpoint)
        size = self._metrics.stat().st_size if self._metrics.exists() else 0
        write_atomically(self._document, json.dumps(document | {"metrics_bytes": size}))
        if checkpoint.version != self._version:
            self._tensors.remove(self._version)
        self._version = checkpoint.version

    def load(self, plan_digest: str, layout: Layout) -> Checkpoint | None:
        """The last checkpoint, verified, with metrics.jsonl cut back to it; None where there is none yet.

        Raises:
            ArtefactError: it is damaged, or belongs to another plan.
        """
        if not self._document.exists():
            self._metrics.unlink(missing_ok=True)
            return None
        try:
            document = json.loads(self._document.read_text("utf-8"))
            size = int(document["metrics_bytes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{self._document}: not a checkpoint of concord ({error}); start a new run") from error
        checkpoint = self._tensors.read(document, str(self._document), plan_digest, layout)
        self._cut_metrics(size)
        self._version = checkpoint.version
        return checkpoint

    def _cut_metrics(self, size: int) -> None:
        there = self._metrics.stat().st_size if self._metrics.exists() else 0
        if there < size:
            raise ArtefactError(
                f"{self._metrics}: expected at least {size} bytes, got {there}; lines are lost, start anew"
            )
        if there > size:
            os.truncate(self._metrics, size)
