"""Rows against the plan's data contract: what differs, as names of the contract and counts, never a value.

A `Tally` looks at one batch after the other and keeps counts only, so that all differences of a dataset, however
large, are told at once.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from concord_client.data.dataset import RawData
from concord_shared.errors import ContractError
from concord_shared.plan.data import Column, DataContract
from concord_shared.plan.schema import Plan

__all__ = ["Code", "Difference", "Tally", "shortened", "tolerated_by"]

Code = Literal[
    "column", "unit", "type", "missing", "range", "category", "infinite", "class", "target-range",
    "shape", "dtype", "split", "image", "rows", "source", "repeated",
]  # fmt: skip
NAMES_SHOWN = 10


@dataclass(frozen=True)
class Difference:
    """One thing in which a dataset differs from a plan's contract; it can be told to others.

    code: which check. name: what of the contract is concerned, as in `column age`; "data" for all of them. what: how
    it differs, for a person. count: how many rows (values, images) do; 0 where it is the whole.
    """

    code: Code
    name: str
    what: str
    count: int = 0

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


class Tally:
    """Counts of what differs, over all batches of a dataset.

    tolerated: codes that are counted (`counts`) but are no differences, as "missing" where the plan imputes.
    """

    def __init__(self, contract: DataContract, tolerated: Collection[Code] = ()) -> None:
        self._contract, self._tolerated = contract, frozenset(tolerated)
        self.counts: Counter[tuple[Code, str]] = Counter()
        self._words: dict[tuple[Code, str], str] = {}
        self.rows = 0
        self._pairs = np.empty(0, np.int64)

    def note(self, code: Code, name: str, count: int = 1, what: str = "") -> None:
        """Adds to a count. what: words of its own with `{count}` in it, where the code alone does not say it; the first
        are kept.
        """
        self.counts[code, name] += count
        if what and count:
            self._words.setdefault((code, name), what)

    def look_at(self, data: RawData) -> None:
        """Compares one batch with the contract."""
        self.rows += len(data)
        if self._contract.input in ("image", "array"):
            self._look_at_images(data.inputs)
        elif self._contract.input == "text":
            self._look_at_texts(data.inputs)
        elif self._contract.input == "ratings":
            self._look_at_ratings(data.inputs)
        elif data.inputs.shape[1:] != (len(self._contract.columns),):
            shape = list(data.inputs.shape[1:])
            self.note("shape", "rows", len(data), f"expected {len(self._contract.columns)} columns, got {shape}")
        elif len(data):
            for index, column in enumerate(self._contract.columns):
                self._look_at_column(column, data.inputs[:, index])
        self._look_at_targets(data.targets)

    @property
    def is_clean(self) -> bool:
        """Whether nothing differs so far. Not whether there were rows."""
        return not any(count and code not in self._tolerated for (code, _), count in self.counts.items())

    def differences(self) -> list[Difference]:
        """In the order of the contract."""
        found = list(self._found())
        if not self.rows and not found:
            return [Difference("rows", "data", "no rows")]
        return found

    def raise_for(self, source: str) -> None:
        """Raises: ContractError: something differs; one line for each difference."""
        found = self.differences()
        if found:
            lines = "\n  ".join(map(str, found))
            raise ContractError(f"{source}: does not fit the plan's data contract:\n  {lines}", found)

    def _found(self) -> Iterator[Difference]:
        known = self._contract.input_columns
        order = {name: index for index, name in enumerate(known)}
        counts = {key: count for key, count in self.counts.items() if count and key[0] not in self._tolerated}
        for code, name in sorted(counts, key=lambda key: order.get(key[1], len(order))):
            whole = [kind for kind in ("column", "unit") if (kind, name) in counts]
            if whole and code != whole[0]:
                continue  # of a column that is not there, or in other units, nothing more is to say
            count = counts[code, name]
            if code == "missing":
                count -= self.counts["type", name]
                if count <= 0:
                    continue
            what = self._words.get((code, name), "").replace("{count}", str(count)) or self._explain(code, name, count)
            label = f"column {name}" if name in order else f"target {name}" if name == self._contract.target else name
            yield Difference(code, label, what, 0 if code in ("column", "unit", "dtype") else count)

    def _explain(self, code: Code, name: str, count: int) -> str:
        column = next((each for each in self._contract.columns if each.name == name), None)
        limits = self._contract.target_range if column is None else column.range
        classes = self._contract.classes if column is None else column.words
        return {
            "column": "missing; the plan's contract names it",
            "type": f"{count} values are not numbers",
            "missing": f'{count} of {self.rows} values are missing; set preprocessing.missing = "impute" or remove '
            "those rows",
            "range": f"{count} values are outside the range {list(limits or ())}",
            "category": f"{count} rows have a value outside the contract's categories ({shortened(classes)})",
            "infinite": f"{count} values are infinite",
            "class": f"{count} rows have a class outside the contract's {len(classes)} classes",
            "target-range": f"{count} values are missing or outside {list(limits or ())}",
        }[code]

    def _look_at_column(self, column: Column, values: NDArray[Any]) -> None:
        """values: `(n,) float64`. Two passes where all is well: the least and the greatest are NaN where one is."""
        low, high = values.min(), values.max()
        known = (0.0, len(column.words) - 1.0) if column.kind == "category" else column.range
        whole = column.kind == "number" or bool((values == np.floor(values)).all())
        if whole and np.isfinite(low) and np.isfinite(high) and (known is None or known[0] <= low <= high <= known[1]):
            return
        self.note("missing", column.name, int(np.isnan(values).sum()))
        if column.kind == "category":
            inside = np.isin(values, np.arange(len(column.words))) | np.isnan(values)
            self.note("category", column.name, int((~inside).sum()))
        elif column.range is not None:
            outside = (values < column.range[0]) | (values > column.range[1])
            self.note("range", column.name, int(outside.sum()))
        self.note("infinite", column.name, int(np.isinf(values).sum()))

    def _look_at_images(self, images: NDArray[Any]) -> None:
        contract = self._contract
        if images.shape[1:] != contract.shape:
            wanted, got = list(contract.shape), list(images.shape[1:])
            named = " (channels, height, width)" if contract.input == "image" else ""
            self.note("shape", "images", len(images), f"expected shape {wanted}{named}, got {got}")
        if images.dtype != np.dtype(contract.dtype):
            self.note("dtype", "images", len(images), f"expected dtype {contract.dtype}, got {images.dtype}")
        elif images.dtype == np.float32 and (bad := int((~np.isfinite(images)).sum())):
            self.note("infinite", "images", bad, "{count} pixels are NaN or Inf")

    def _look_at_texts(self, texts: NDArray[Any]) -> None:
        name, most = self._contract.text, self._contract.length_max
        if texts.ndim != 1 or texts.dtype.kind != "U":
            what = f"expected one text in each row, got {texts.dtype} of shape {list(texts.shape)}"
            self.note("shape", "rows", len(texts), what)
            return
        lengths = np.char.str_len(texts)
        empty, long = int((lengths == 0).sum()), int((lengths > most).sum())
        if self._contract.task == "language-model":
            what = "{count} texts have a single character: there is no next one to tell; remove those rows"
            self.note("range", name, int((lengths == 1).sum()), what)
        self.note("missing", name, empty, "{count} texts are missing or empty; remove those rows")
        self.note("range", name, long, f"{{count}} texts have more than {most} characters; shorten them")

    def _look_at_ratings(self, inputs: NDArray[Any]) -> None:
        """Nobody rates an item twice, in whichever batch; of items that the contract does not name it is not known."""
        if inputs.shape[1:] != (2,):
            self.note("shape", "rows", len(inputs), "expected a user and an item in each row")
            return
        known = inputs[inputs[:, 1] >= 0].astype(np.int64)
        pairs = known[:, 0] * len(self._contract.items) + known[:, 1]
        before = len(self._pairs) + len(pairs)
        self._pairs = np.union1d(self._pairs, pairs)
        what = "{count} rows rate what the same user rated in another row; keep one of them"
        self.note("repeated", "data", before - len(self._pairs), what)

    def _look_at_targets(self, targets: NDArray[Any]) -> None:
        contract = self._contract
        if contract.task == "own":
            if targets.shape[1:] != contract.target_shape:
                wanted, got = list(contract.target_shape), list(targets.shape[1:])
                self.note("shape", contract.target, len(targets), f"expected shape {wanted}, got {got}")
            self.note("infinite", contract.target, int((~np.isfinite(targets)).sum()))
        elif contract.task == "classification":
            outside = (targets < 0) | (targets >= len(contract.classes))
            self.note("class", contract.target, int(outside.sum()))
        elif contract.target_range is not None:
            low, high = contract.target_range
            self.note("target-range", contract.target, int((~((targets >= low) & (targets <= high))).sum()))


def tolerated_by(plan: Plan) -> frozenset[Code]:
    """What a plan takes as it is: missing values, where its preprocessing fills them; whatever statistics count."""
    if plan.kind == "statistics":
        return frozenset({"missing", "range", "infinite", "category", "class", "target-range"})
    missing: set[Code] = {"missing"} if plan.preprocessing.missing == "impute" else set()
    outside: set[Code] = {"range", "infinite"} if plan.preprocessing.outside == "missing" else set()
    return frozenset(missing | outside)


def shortened(names: tuple[str, ...]) -> str:
    """Names of the contract; of very many the first ones."""
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
