"""Tables: CSV and Parquet, with the plan's contract as their schema."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from concord_client.data.dataset import RawData, Split
from concord_shared.errors import DataError
from concord_shared.plan.schema import Column, Plan

if TYPE_CHECKING:
    import polars as pl

__all__ = ["from_frame", "read_csv", "read_parquet"]

SPLIT_COLUMN = "split"


def read_csv(file: Path, plan: Plan, labelled: bool = True) -> RawData:
    import polars as pl

    try:
        frame = pl.read_csv(file, infer_schema=False, null_values=["", "?", "NA", "NaN", "nan", "null"])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{file}: not a readable CSV file: {type(error).__name__}") from error
    return from_frame(frame, plan, str(file), labelled)


def read_parquet(file: Path, plan: Plan, labelled: bool = True) -> RawData:
    import polars as pl

    try:
        frame = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file: {type(error).__name__}") from error
    return from_frame(frame, plan, str(file), labelled)


def from_frame(frame: "pl.DataFrame", plan: Plan, source: str, labelled: bool = True) -> RawData:
    """The contract's columns and target of `frame`; its other columns are groups.

    A column `split` with the words train, validation and test is the source's own split.
    """
    if not labelled and plan.data.target not in frame.columns:
        frame = frame.with_columns(_any_target(plan))
    wanted = [
        *([plan.data.text] if plan.data.text else (column.name for column in plan.data.columns)),
        plan.data.target,
    ]
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        raise DataError(
            f"{source}: the columns {', '.join(missing)} of the plan's contract are missing; "
            f"found {', '.join(frame.columns)}"
        )
    if plan.data.text:
        inputs: NDArray[Any] = _words(frame[plan.data.text]).astype(str)
    else:
        inputs = np.stack([_values(frame[column.name], column, source) for column in plan.data.columns], 1)
    if plan.data.task == "classification":
        target = Column(name=plan.data.target, kind="category", categories=plan.data.classes)
        codes = _values(frame[plan.data.target], target, source)
        targets: NDArray[Any] = np.where(np.isnan(codes), -1, codes).astype(np.int64)
    else:
        targets = _values(frame[plan.data.target], Column(name=plan.data.target), source)
    rest = [name for name in frame.columns if name not in wanted and name != SPLIT_COLUMN]
    split = (
        _split(frame[SPLIT_COLUMN], source) if SPLIT_COLUMN in frame.columns and SPLIT_COLUMN not in wanted else None
    )
    groups = {name: _words(frame[name]) for name in rest if _is_plain(frame[name])}
    groups |= {plan.data.target: targets} if plan.data.task == "classification" else {}
    return RawData(inputs, targets, split, groups)


def _any_target(plan: Plan) -> "pl.Expr":
    """A target that fits the contract, for rows whose own is not known."""
    import polars as pl

    value = plan.data.classes[0] if plan.data.classes else str((plan.data.target_range or (0, 0))[0])
    return pl.lit(value).alias(plan.data.target)


def _is_plain(series: "pl.Series") -> bool:
    """Whether a column holds numbers or text, not lists, structures or bytes."""
    import polars as pl

    return not series.dtype.is_nested() and series.dtype != pl.Binary


def _words(series: "pl.Series") -> NDArray[Any]:
    """A column as text, to deal rows by; empty where it is missing or no text."""
    import polars as pl

    return series.cast(pl.String, strict=False).fill_null("").to_numpy()


def _values(series: "pl.Series", column: Column, source: str) -> NDArray[np.float64]:
    """float64 with NaN where missing; a category as its index."""
    import polars as pl

    if not _is_plain(series):
        raise DataError(f"{source}: column {column.name}: expected numbers or text, got {series.dtype}")
    text = series.cast(pl.String).str.strip_chars()
    if column.kind == "number":
        numbers = text.cast(pl.Float64, strict=False)
        unreadable = int((numbers.is_null() & text.is_not_null()).sum())
        if unreadable:
            raise DataError(f"{source}: column {column.name}: {unreadable} values are not numbers")
        return numbers.fill_null(float("nan")).to_numpy()
    codes = text.replace_strict(
        list(column.categories), range(len(column.categories)), default=None, return_dtype=pl.Float64
    )
    outside = int((codes.is_null() & text.is_not_null()).sum())
    if outside:
        raise DataError(
            f"{source}: column {column.name}: {outside} rows have a value outside the contract's categories "
            f"({', '.join(column.categories)})"
        )
    return codes.fill_null(float("nan")).to_numpy()


def _split(series: "pl.Series", source: str) -> NDArray[np.uint8]:
    words = {split.name.lower(): int(split) for split in Split}
    values = [words.get(str(value).strip().lower(), -1) for value in series]
    if -1 in values:
        raise DataError(f"{source}: column {SPLIT_COLUMN}: expected train, validation or test in every row")
    return np.array(values, np.uint8)
