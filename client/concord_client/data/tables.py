"""Tables: frames of any format, with the plan's contract as their schema."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from concord_client.data.contract import Tally
from concord_client.data.dataset import RawData, Split
from concord_shared.hashed_words import bins_of
from concord_shared.plan.data import Column, DataContract

if TYPE_CHECKING:
    import polars as pl

__all__ = ["SPLIT_COLUMN", "TableDecoder"]

SPLIT_COLUMN = "split"


class TableDecoder:
    """Frames to rows of the contract: its columns and target; other columns are groups.

    A column `split` with the words train, validation and test is the source's own split. What cannot be read is NaN
    here and counted in `tally`.

    units: in which the columns are at this node, by the owner's word. labelled: False where the target may be absent.
    groups: whether columns that the contract does not name are wanted too.
    """

    def __init__(
        self,
        contract: DataContract,
        tally: Tally,
        units: Mapping[str, str] | None = None,
        labelled: bool = True,
        groups: bool = True,
    ) -> None:
        self._contract, self._tally, self._labelled, self._groups = contract, tally, labelled, groups
        self._users: dict[str, int] = {}
        self._items = {item: place for place, item in enumerate(contract.items)}
        self._factors = {
            column.name: self._factor(column, (units or {}).get(column.name, "")) for column in contract.columns
        }

    @property
    def _inputs(self) -> list[str]:
        """The columns that a row's inputs are made of."""
        return list(self._contract.input_columns)

    @property
    def wanted(self) -> list[str] | None:
        """The columns that it looks at; None for all."""
        names = [*self._inputs]
        return None if self._groups else [*names, self._contract.target, SPLIT_COLUMN]

    def decode(self, frame: "pl.DataFrame") -> RawData:
        contract = self._contract
        if contract.input == "ratings":
            return self._ratings(frame)
        inputs = self._texts(frame) if contract.text else self._numbers(frame)
        targets = self._targets(frame)
        known = {*self._inputs, contract.target}
        split = self._own_split(frame)
        rest = [name for name in frame.columns if name not in known and name != SPLIT_COLUMN] if self._groups else []
        groups = {name: _words(frame[name]) for name in rest if _is_plain(frame[name])}
        groups |= {contract.target: targets} if contract.task == "classification" and self._groups else {}
        return RawData(inputs, targets, split, groups)

    def _own_split(self, frame: "pl.DataFrame") -> NDArray[np.uint8] | None:
        taken = SPLIT_COLUMN in (*self._inputs, self._contract.target)
        return self._split(frame[SPLIT_COLUMN]) if SPLIT_COLUMN in frame.columns and not taken else None

    def _ratings(self, frame: "pl.DataFrame") -> RawData:
        """Inputs `(n, 2)`: the number of the user, in the order in which they come, and the place of the item or -1.

        The words of both are groups: to deal by, and for the owner's eyes.
        """
        contract = self._contract
        users, items = (self._names(frame, name) for name in contract.input_columns)
        numbers = [self._users.setdefault(user, len(self._users)) for user in users]
        places = [self._items.get(item, -1) for item in items]
        inputs = np.stack([np.array(numbers, np.float64), np.array(places, np.float64)], 1)
        ranked = contract.task == "ranking"
        targets = np.ones(len(frame)) if ranked else self._targets(frame)
        return RawData(inputs, targets, self._own_split(frame), {contract.user: users, contract.item: items})

    def _names(self, frame: "pl.DataFrame", name: str) -> NDArray[Any]:
        """Words without the space around them, so that they are the same however a file is written."""
        if name not in frame.columns:
            self._tally.note("column", name)
            return np.full(len(frame), "", object)
        if not _is_plain(frame[name]):
            self._tally.note("type", name, len(frame), "expected text or numbers, got lists, structures or bytes")
            return np.full(len(frame), "", object)
        words = np.array([word.strip() for word in _words(frame[name])], object)
        self._tally.note("missing", name, int((words == "").sum()), "{count} rows do not say it; remove those rows")
        return words

    def _texts(self, frame: "pl.DataFrame") -> NDArray[np.str_]:
        """`(n,)`; empty where there is none."""
        name = self._contract.text
        if name not in frame.columns:
            self._tally.note("column", name)
            return np.zeros(len(frame), "<U1")
        return _words(frame[name]).astype(np.str_)

    def _numbers(self, frame: "pl.DataFrame") -> NDArray[np.float64]:
        columns = self._contract.columns
        inputs = np.empty((len(columns), len(frame))).T  # a column lies together: it is written and read as one
        for index, column in enumerate(columns):
            inputs[:, index] = self._column(frame, column)
        return inputs

    def _column(self, frame: "pl.DataFrame", column: Column) -> NDArray[np.float64]:
        if column.name not in frame.columns:
            self._tally.note("column", column.name)
            return np.full(len(frame), np.nan)
        values = self._values(frame[column.name], column)
        factor = self._factors[column.name]
        return values if factor == 1 else values * factor

    def _targets(self, frame: "pl.DataFrame") -> NDArray[Any]:
        contract = self._contract
        if contract.target not in frame.columns or contract.task == "language-model":
            # what is known of users are their ratings; a text tells its own next tokens
            wanted = self._labelled or contract.input == "ratings"
            if wanted and contract.task != "language-model":
                self._tally.note("column", contract.target)
            if contract.task != "regression":
                return np.zeros(len(frame), np.int64)
            return np.full(len(frame), (contract.target_range or (0.0, 0.0))[0])
        if contract.task == "regression":
            return self._values(frame[contract.target], Column(name=contract.target))
        target = Column(name=contract.target, kind="category", categories=contract.classes)
        codes = self._values(frame[contract.target], target)
        return np.where(np.isnan(codes), -1, codes).astype(np.int64)

    def _factor(self, column: Column, unit: str) -> float:
        """By which this node's values are multiplied to be in the contract's unit."""
        if not unit or not column.unit or unit == column.unit:
            return 1.0
        if unit not in column.units:
            self._tally.note("unit", column.name, 1, f"{unit} here, {column.unit} in the plan")
        return column.units.get(unit, 1.0)

    def _values(self, series: "pl.Series", column: Column) -> NDArray[np.float64]:
        """`(n,) float64` with NaN where missing; a category as its place or bin, -1 where the contract has none."""
        import polars as pl

        if not _is_plain(series):
            what = "expected numbers or text, got lists, structures or bytes"
            self._tally.note("type", column.name, len(series), what)
            return np.full(len(series), np.nan)
        if column.kind == "number" and series.dtype.is_numeric():
            return _floats(series)
        text = series.cast(pl.String, strict=False).str.strip_chars()
        if column.kind == "number":
            numbers = text.cast(pl.Float64, strict=False)
            self._tally.note("type", column.name, numbers.null_count() - text.null_count())
            return _floats(numbers)
        known = text.drop_nulls().unique().to_list() if column.bins else list(column.categories)
        places = bins_of(known, column) if column.bins else range(len(known))
        codes = text.replace_strict(known, places, default=-1.0, return_dtype=pl.Float64)
        return _floats(pl.select(pl.when(text.is_null()).then(None).otherwise(codes)).to_series())

    def _split(self, series: "pl.Series") -> NDArray[np.uint8]:
        import polars as pl

        words = {split.name.lower(): int(split) for split in Split}
        text = series.cast(pl.String, strict=False).str.strip_chars().str.to_lowercase()
        codes = text.replace_strict(list(words), list(words.values()), default=None, return_dtype=pl.UInt8)
        what = "expected train, validation or test in every row"
        self._tally.note("split", f"column {SPLIT_COLUMN}", codes.null_count(), what)
        return codes.fill_null(int(Split.TRAIN)).to_numpy()


def _floats(series: "pl.Series") -> NDArray[np.float64]:
    import polars as pl

    numbers = series.cast(pl.Float64)
    return (numbers.fill_null(float("nan")) if numbers.null_count() else numbers).to_numpy()


def _is_plain(series: "pl.Series") -> bool:
    """Whether a column holds numbers or text, not lists, structures or bytes."""
    import polars as pl

    return not series.dtype.is_nested() and series.dtype not in (pl.Binary, pl.Object)


def _words(series: "pl.Series") -> NDArray[Any]:
    """A column as text, to deal rows by; empty where it is missing or no text."""
    import polars as pl

    return series.cast(pl.String, strict=False).fill_null("").to_numpy()
