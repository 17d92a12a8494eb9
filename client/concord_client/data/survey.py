"""A walk over a table that infers what it looks like, in bounded memory whatever it holds."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from concord_client.schema import DatasetSchema, SchemaColumn

if TYPE_CHECKING:
    import polars as pl

__all__ = ["CATEGORIES_MAX", "infer"]

CATEGORIES_MAX = 1000
"""Different words of a column; one with more of them is text, as names or notes are."""
WORD_CHARACTERS_MAX = 200
CLASSES_MAX = 20
TARGETS = ("target", "label", "class", "outcome", "diagnosis", "disease", "income", "y")


@dataclass
class _Seen:
    """What was seen of one column; bounded, whatever it holds."""

    missing: int = 0
    low: float = np.inf
    high: float = -np.inf
    is_number: bool = True
    is_text: bool = False
    words: set[str] = field(default_factory=set)

    def look_at(self, series: "pl.Series") -> None:
        import polars as pl

        self.missing += series.null_count()
        if series.dtype.is_nested() or series.dtype in (pl.Binary, pl.Object):
            self.is_text, self.is_number = True, False
            return
        text = None if series.dtype.is_numeric() else series.cast(pl.String).str.strip_chars()
        numbers = (series if text is None else text).cast(pl.Float64, strict=False)
        if text is not None and numbers.null_count() > text.null_count():
            self.is_number = False
        missing = int(numbers.is_nan().sum() or 0)
        self.missing += missing
        finite = numbers.filter(numbers.is_finite())
        if len(finite):
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))  # type: ignore[arg-type]
        if not self.is_text:
            self._note_words(series.cast(pl.String) if text is None else text)

    def _note_words(self, text: "pl.Series") -> None:
        found = text.drop_nulls().unique()
        self.is_text = bool(len(found) > CATEGORIES_MAX) or bool((found.str.len_chars() > WORD_CHARACTERS_MAX).any())
        if not self.is_text:
            self.words.update(found)
            self.is_text = len(self.words) > CATEGORIES_MAX
        if self.is_text:
            self.words.clear()

    def column(self, name: str) -> SchemaColumn:
        if self.is_number and self.low <= self.high:
            return SchemaColumn(name=name, kind="number", missing=self.missing, range=(self.low, self.high))
        kind: Literal["text", "category"] = "text" if self.is_text else "category"
        return SchemaColumn(name=name, kind=kind, missing=self.missing, categories=tuple(sorted(self.words)))

    @property
    def classes(self) -> int:
        """How many classes it would have as a target; 0 where it cannot be one."""
        return len(self.words) if 2 <= len(self.words) <= CLASSES_MAX else 0


def infer(frames: Iterable["pl.DataFrame"], encoding: str) -> DatasetSchema:
    """From all rows, in one pass and bounded memory.

    Raises:
        SourceError: they cannot be read.
    """
    seen: dict[str, _Seen] = {}
    rows = 0
    for frame in frames:
        for name in frame.columns:
            if name not in seen:
                seen[name] = _Seen(missing=rows)  # a line of JSON may bring a column that those before left out
            seen[name].look_at(frame[name])
        for name in seen.keys() - set(frame.columns):
            seen[name].missing += len(frame)
        rows += len(frame)
    columns = tuple(each.column(name) for name, each in seen.items() if name)
    return DatasetSchema(rows=rows, encoding=encoding, target=_target(seen), columns=columns)


def _target(seen: dict[str, _Seen]) -> str:
    """By its name, or the last column if it has few different values; "" where nothing looks like one."""
    named = [name for wanted in TARGETS for name in seen if name.lower() == wanted]
    last = [name for name in list(seen)[-1:] if name and seen[name].classes]
    return next(iter([*named, *last]), "")
