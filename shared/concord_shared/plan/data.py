"""`[data]`: what a row looks like at every node."""

from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from concord_shared.plan.section import Name, Positive, Section, is_empty, usually

__all__ = ["Column", "DataContract"]


class Column(Section):
    """One input column of a table: a number within a range, or one of some categories.

    bins: instead of categories that nobody can list, or may: into how many their words are hashed. minimum_count: bins
    that occur in fewer rows over all nodes are left out, where the preprocessing is fitted.
    unit: what the numbers are counted in, as in "mmol/L". units: others that a node may hold, with the factor that
    turns theirs into `unit`.
    """

    name: str = Field(min_length=1)
    kind: Literal["number", "category"] = "number"
    range: tuple[float, float] | None = None
    categories: tuple[str, ...] = ()
    bins: int = Field(0, ge=0, le=1 << 16, exclude_if=is_empty)
    minimum_count: int = Field(1, ge=1, le=1_000_000, exclude_if=usually(1))
    unit: str = Field("", max_length=40, exclude_if=is_empty)
    units: dict[Annotated[str, Field(min_length=1, max_length=40)], Positive] = Field({}, exclude_if=is_empty)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "category" and (len(set(self.words)) < 2 or self.range is not None):
            raise ValueError(
                f"column {self.name}: a category column lists at least 2 different categories, or hashes them into "
                "bins, at least 2; it has no range"
            )
        if self.bins and (self.kind != "category" or self.categories):
            raise ValueError(f"column {self.name}: bins stand in place of a category column's list")
        if self.minimum_count > 1 and not self.bins:
            raise ValueError(f"column {self.name}: minimum_count belongs to bins; a listed category counts as it is")
        if (self.unit or self.units) and self.kind != "number":
            raise ValueError(f"column {self.name}: a unit belongs to numbers")
        if self.units and (not self.unit or self.unit in self.units):
            raise ValueError(f"column {self.name}: units lists factors of others than its own unit, which it names")
        if self.kind == "number" and self.categories:
            raise ValueError(f"column {self.name}: a number column has a range, no categories")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"column {self.name}: expected range = [low, high] with low < high")
        return self

    @cached_property
    def words(self) -> tuple[str, ...]:
        """What a row's code is the place of: the categories, or the names of their bins; of numbers nothing."""
        return self.categories or tuple(f"bin {place}" for place in range(self.bins))


class DataContract(Section):
    """What a row looks like at every node. Differences are errors at the node, before any training.

    text: the column that holds a row's text, of at most length_max characters, where input is text. The target of a
    language model is the next token of that text: there is no column of it.
    user, item: the columns of who rated what, where input is ratings; items: what can be rated. Others are taken as
    unknown ones. Users are no part of the contract: each node numbers its own. In a ranking a row is something that a
    user took, whatever it says beside that.
    An array, of `shape`, is whatever a model of another wheel reads, and learns to answer, of `target_shape`. scores:
    what that model says of each answer, between 0 and 1, the first the one that matters.
    """

    task: Literal["classification", "regression", "ranking", "language-model", "own"]
    input: Literal["image", "table", "text", "ratings", "array"]
    shape: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = ()
    dtype: Literal["uint8", "float32"] = "uint8"
    classes: tuple[str, ...] = ()
    target: str = "label"
    target_range: tuple[float, float] | None = None
    columns: tuple[Column, ...] = ()
    text: str = Field("", exclude_if=is_empty)
    length_max: int = Field(0, ge=0, le=1_000_000, exclude_if=is_empty)
    target_shape: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field((), exclude_if=is_empty)
    scores: tuple[Name, ...] = Field((), max_length=20, exclude_if=is_empty)
    user: str = Field("", exclude_if=is_empty)
    item: str = Field("", exclude_if=is_empty)
    items: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(
        (), max_length=1_000_000, exclude_if=is_empty
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._fits_ratings()
        self._fits_array()
        if (self.input == "text") != bool(self.text) or (self.input == "text") != bool(self.length_max):
            raise ValueError('input = "text" names its column in text and its longest in length_max; nothing else does')
        if self.input == "text" and (self.columns or self.shape):
            raise ValueError("a text has neither [[data.columns]] nor a shape")
        if self.input == "image" and (len(self.shape) != 3 or self.columns):
            raise ValueError("an image has shape = [channels, height, width] and no columns")
        if self.target_range is not None and self.task == "own":
            raise ValueError("target_range belongs to a regression")
        if self.input == "table" and (not self.columns or self.shape):
            raise ValueError("a table lists its [[data.columns]] and has no shape")
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names) or self.target in (*names, self.text):
            raise ValueError("column names are unique, and the target is not one of the columns")
        if self.task == "ranking" and (self.classes or self.target_range is not None):
            raise ValueError("a ranking is of what users took: it has neither classes nor target_range")
        if self.task == "classification" and len(set(self.classes)) != max(2, len(self.classes)):
            raise ValueError("a classification lists at least 2 different classes")
        if self.task == "regression" and (self.classes or self.target_range is None):
            raise ValueError("a regression has target_range = [low, high] and no classes")
        if self.task == "language-model" and (self.input != "text" or self.classes or self.target_range is not None):
            raise ValueError('a language model reads input = "text", and predicts its next token: no classes, no range')
        if self.target_range is not None and not self.target_range[0] < self.target_range[1]:
            raise ValueError("expected target_range = [low, high] with low < high")
        return self

    def _fits_array(self) -> None:
        if self.input != "array":
            if self.task == "own" or self.target_shape or self.scores:
                raise ValueError('task = "own", target_shape and scores belong to input = "array"')
            return
        if self.task != "own" or not self.shape or not self.target_shape or self.columns or self.classes:
            raise ValueError(
                'input = "array" has task = "own", a shape and a target_shape, and neither columns nor classes'
            )
        if len({*self.scores, "rows", "loss"}) != len(self.scores) + 2:
            raise ValueError("scores: expected different names, other than rows and loss")

    def _fits_ratings(self) -> None:
        given = [bool(self.user), bool(self.item), bool(self.items)]
        if self.input != "ratings":
            if any(given) or self.task == "ranking":
                raise ValueError('user, item, items and task = "ranking" belong to input = "ratings"')
            return
        if not all(given) or self.columns or self.shape or self.task == "classification":
            raise ValueError(
                'input = "ratings" names its columns in user and item, lists what can be rated in items, and has '
                'task = "regression" (how much) or "ranking" (what next); it has neither [[data.columns]] nor a shape'
            )
        if len(set(self.items)) != len(self.items) or len(self.items) < 2:
            raise ValueError("items: expected at least 2 different ones")
        if len({self.user, self.item, self.target}) != 3:
            raise ValueError("user, item and target are three columns")

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The columns of a table file that a row's inputs are made of; none for images."""
        if self.input == "ratings":
            return self.user, self.item
        return (self.text,) if self.text else tuple(column.name for column in self.columns)
