"""Two published studies whose files have no header: which columns they hold, and which rows the study kept."""

from pathlib import Path
from typing import TYPE_CHECKING

from concord_client.data.contract import Tally, tolerated_by
from concord_client.data.dataset import RawData
from concord_client.data.tables import TableDecoder
from concord_shared.errors import DataError
from concord_shared.plan.schema import Plan

if TYPE_CHECKING:
    import polars as pl

__all__ = ["read_heart_disease", "read_wine_quality"]

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
HEART_COLUMNS = [
    *("age", "sex", "chest_pain", "resting_blood_pressure", "cholesterol", "fasting_blood_sugar", "resting_ecg"),
    *("max_heart_rate", "exercise_angina", "st_depression", "slope", "vessels", "thal", "diagnosis"),
]
WINE_COLUMNS = [
    *("fixed_acidity", "volatile_acidity", "citric_acid", "residual_sugar", "chlorides", "free_sulfur_dioxide"),
    *("total_sulfur_dioxide", "density", "ph", "sulphates", "alcohol", "quality"),
]


def read_heart_disease(directory: Path, plan: Plan, labelled: bool = True) -> RawData:
    """UCI Heart Disease by hospital, with FLamby's rows and split.

    `flamby_split.csv` names them: center, row (0-based in the hospital's file), set, label.
    """
    import polars as pl

    frames = []
    split = _table(directory / "flamby_split.csv")
    if not {"center", "row", "set", "label"} <= set(split.columns):
        raise DataError(f"{directory}/flamby_split.csv: expected the columns center, row, set, label")
    for center, hospital in enumerate(HOSPITALS):
        raw = _table(directory / f"processed.{hospital}.data", HEART_COLUMNS)
        kept = split.filter(pl.col("center").is_in([str(center), hospital]))
        rows = _whole_numbers(kept, "row", directory, len(raw))
        frames.append(
            raw[rows].with_columns(
                *(pl.Series(name, _categories(raw[rows], name)) for name in ("chest_pain", "resting_ecg")),
                disease=pl.Series(["yes" if label else "no" for label in _whole_numbers(kept, "label", directory, 2)]),
                hospital=pl.lit(hospital),
                split=kept["set"],
            )
        )
    return _rows_of(pl.concat(frames), plan, directory)


def read_wine_quality(directory: Path, plan: Plan, labelled: bool = True) -> RawData:
    """UCI Wine Quality, red and white; comma-separated, without a header."""
    import polars as pl

    frames = []
    for colour in ("red", "white"):
        frame = _table(directory / f"winequality-{colour}.csv", WINE_COLUMNS)
        frames.append(frame.with_columns(colour=pl.lit(colour)))
    return _rows_of(pl.concat(frames), plan, directory)


def _rows_of(frame: "pl.DataFrame", plan: Plan, directory: Path) -> RawData:
    tally = Tally(plan.data, tolerated_by(plan))
    data = TableDecoder(plan.data, tally).decode(frame)
    tally.look_at(data)
    tally.raise_for(str(directory))
    return data


def _whole_numbers(frame: "pl.DataFrame", column: str, directory: Path, below: int) -> list[int]:
    """The split file's numbers, each from 0 to below `below`."""
    import polars as pl

    if column not in frame.columns:
        raise DataError(f"{directory}/flamby_split.csv: expected a column {column}")
    numbers = frame[column].cast(pl.Float64, strict=False).cast(pl.Int64, strict=False).to_list()
    wrong = sum(number is None or not 0 <= number < below for number in numbers)
    if wrong:
        raise DataError(
            f"{directory}/flamby_split.csv: column {column}: {wrong} values are not numbers from 0 to {below - 1}"
        )
    return numbers


def _categories(frame: "pl.DataFrame", column: str) -> list[str | None]:
    """`3.0` is the category 3; anything else stays as it is, for the contract to refuse."""
    return [None if text is None else text.strip().removesuffix(".0") for text in frame[column]]


def _table(file: Path, columns: list[str] | None = None) -> "pl.DataFrame":
    """All columns as text; without a header the names are `columns`."""
    import polars as pl

    try:
        frame = pl.read_csv(file, has_header=columns is None, infer_schema=False, null_values=["?", ""])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{file}: expected this file of the study, got: {error}") from error
    if columns is not None and len(frame.columns) != len(columns):
        raise DataError(f"{file}: expected {len(columns)} columns, got {len(frame.columns)}")
    return frame if columns is None else frame.rename(dict(zip(frame.columns, columns, strict=True)))
