"""One node's rows as a file of its own, as a partner would have it: the same rows in the same order, so that the split
into training and test rows is that of a simulation.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_client.data import RawData, Split
from concord_shared.plan.schema import Plan

__all__ = ["write_slice"]


def write_slice(data: RawData, rows: NDArray[np.int64], plan: Plan, folder: Path) -> str:
    """Writes `rows` of `data` into `folder`; returns the SPEC that reads them. rows: ascending."""
    assert bool((np.diff(rows) > 0).all()), "a node's rows are ascending"
    if plan.data.input in ("image", "array"):
        return _write_images(data, rows, folder / "images.npz")
    if plan.data.input == "text":
        return _write_texts(data, rows, plan, folder / "rows.parquet")
    return _write_table(data, rows, plan, folder / "rows.csv")


def _write_images(data: RawData, rows: NDArray[np.int64], file: Path) -> str:
    if data.split is None:
        np.savez(file, x=data.inputs[rows], y=data.targets[rows])
    else:
        test = data.split[rows] == Split.TEST
        train, test = rows[~test], rows[test]
        np.savez(
            file,
            x=data.inputs[train],
            y=data.targets[train],
            x_test=data.inputs[test],
            y_test=data.targets[test],
        )
    return f"npz:{file}"


def _write_texts(data: RawData, rows: NDArray[np.int64], plan: Plan, file: Path) -> str:
    """As Parquet: a CSV file would lose the spaces around a text, and take some words for missing ones."""
    import polars as pl

    columns: dict[str, list[Any]] = {plan.data.text: data.inputs[rows].tolist(), **_targets(data, rows, plan)}
    pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String)).write_parquet(file)
    return f"parquet:{file}"


def _write_table(data: RawData, rows: NDArray[np.int64], plan: Plan, file: Path) -> str:
    import polars as pl

    columns: dict[str, list[Any]] = {}
    if plan.data.input == "ratings":
        columns = {name: data.groups[name][rows].tolist() for name in plan.data.input_columns}
    for index, column in enumerate(plan.data.columns):
        values = data.inputs[rows, index]
        columns[column.name] = [_cell(value, column.words) for value in values]
    columns |= _targets(data, rows, plan)
    pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String)).write_csv(file)
    return f"csv:{file}"


def _targets(data: RawData, rows: NDArray[np.int64], plan: Plan) -> dict[str, list[Any]]:
    """The columns of targets, where the plan has any, and of the split, where the source has one."""
    columns: dict[str, list[Any]] = {}
    if plan.data.task != "language-model":
        columns[plan.data.target] = [
            plan.data.classes[value] if plan.data.classes else repr(float(value)) for value in data.targets[rows]
        ]
    if data.split is not None:
        columns["split"] = [Split(value).name.lower() for value in data.split[rows]]
    return columns


def _cell(value: float, categories: tuple[str, ...]) -> str | None:
    """Text that reads back as exactly this number or category."""
    if np.isnan(value):
        return None
    return categories[int(value)] if categories else repr(float(value))
