"""Nodes that share one machine: one copy of the arrays, and for each node the indices of its rows."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_client.data import NodeDataset, RawData, Split
from concord_client.data.dataset import split_for
from concord_local.partitions import deal
from concord_shared.errors import ArtefactError, DataError
from concord_shared.files import explain
from concord_shared.plan.schema import Plan
from concord_shared.transport import NodeEntry

__all__ = ["Federation"]

NodeRows = Mapping[Split, NDArray[np.int64]]


@dataclass(frozen=True)
class Federation:
    """All rows, and who has which. directory: where the arrays lie that other processes map too, once shared.
    dropped: how many duplicates each node left out of its training rows.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    rows: Mapping[str, NodeRows]
    directory: Path | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, data: RawData, plan: Plan, partition: str, nodes: int | None) -> "Federation":
        """Deals rows to nodes; each node then splits its own.

        Raises:
            DataError: a node has no training rows.
        """
        dealt = deal(data, plan.data, partition, nodes, plan.seed)
        rows = {name: split_for(plan, data, own, name) for name, own in dealt.items()}
        empty = [name for name, splits in rows.items() if not len(splits[Split.TRAIN])]
        if empty:
            raise DataError(f"no training rows at {', '.join(empty[:5])}; use fewer nodes or another partition")
        kept = {name: sum(map(len, splits.values())) for name, splits in rows.items()}
        dropped = {
            name: len(own) - kept[name] for name, own in dealt.items() if plan.preprocessing.duplicates == "drop"
        }
        return cls(data.inputs, data.targets, rows, dropped=dropped)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.rows))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every value, and over which rows each node has for what."""
        digest = hashlib.sha256()
        for array in (self.inputs, self.targets):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        for name in self.names:
            for split in Split:
                digest.update(
                    f"{name} {split}".encode() + np.ascontiguousarray(self.rows[name][split], "<i8").tobytes()
                )
        return digest.hexdigest()

    def dataset(self, name: str) -> NodeDataset:
        return NodeDataset(name, self.inputs, self.targets, self.rows[name])

    def all_rows(self) -> NodeDataset:
        """Every node's rows at one place: what the pooled baseline trains on."""
        splits = {split: np.concatenate([self.rows[name][split] for name in self.names]) for split in Split}
        return NodeDataset("pooled", self.inputs, self.targets, splits)

    def entries(self, plan: Plan) -> list[NodeEntry]:
        """The nodes as the coordinator registers them; node ids from 2, the coordinator is 1."""
        split = Split.TEST if plan.evaluation.on == "test" else Split.VALIDATION
        return [
            NodeEntry(name, index + 2, len(self.rows[name][Split.TRAIN]), len(self.rows[name][split]))
            for index, name in enumerate(self.names)
        ]

    def share(self, directory: Path) -> "Federation":
        """Writes the arrays to a new `directory` and returns the federation that maps them.

        Raises:
            ArtefactError: it cannot be written.
        """
        try:
            shutil.rmtree(directory, ignore_errors=True)  # of a run that was killed
            directory.mkdir(parents=True)
            np.save(directory / "inputs.npy", self.inputs)
            np.save(directory / "targets.npy", self.targets)
            parts = [self.rows[name][split] for name in self.names for split in Split]
            np.save(directory / "rows.npy", np.concatenate(parts))
            sizes = [len(part) for part in parts]
            (directory / "nodes.json").write_text(json.dumps({"names": self.names, "sizes": sizes}), "utf-8")
        except OSError as error:
            raise ArtefactError(f"cannot share the data with workers in {directory}: {explain(error)}") from error
        return self.map(directory)

    @classmethod
    def map(cls, directory: Path) -> "Federation":
        """A shared federation, its arrays mapped read-only: all processes use the same pages."""
        inputs, targets, rows = (
            np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("inputs", "targets", "rows")
        )
        index = json.loads((directory / "nodes.json").read_text("utf-8"))
        parts = iter(np.split(rows, np.cumsum(index["sizes"])[:-1]))
        rows_of = {name: {split: next(parts) for split in Split} for name in index["names"]}
        return cls(inputs, targets, rows_of, directory)
