"""The differencing guard: exact statistics that left are remembered; what could be subtracted from them is refused.

    two answers over rows that differ in a few       their difference is those few rows
    two sums of nodes that differ in a few nodes     their difference is those few nodes
    one column under another range or other bins     counts below a threshold of the asker's choice

What is remembered of rows is a sketch: by column, how many values fall into each of CELLS cells of a hash that only
this node can compute. The sums of two sketches' differences are at most the number of rows that differ, and equal to it
but for collisions, which make the guard refuse too much. No sketch ever leaves the node.

Not covered: a value replaced by one of the same cell (one in CELLS, by a hash that nobody else can compute); what two
askers find by many different questions over the same rows (their answers are the same rows'); answers with differential
privacy, which the privacy ledger adds up instead.
"""

import base64
import hashlib
import json
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_client.store import NodeStore
from concord_shared.errors import ConsentRefusedError
from concord_shared.plan.data import DataContract
from concord_shared.plan.schema import Plan
from concord_shared.statistics import Batch, Programme

__all__ = ["Answer", "StatisticsGuard", "selection_of", "sketch_rows"]

CELLS = 1024
IMAGES = "images"
Sketch = Mapping[str, NDArray[np.int64]]
AGAIN = "The owner can see earlier answers with: concord-node statistics list"


@dataclass(frozen=True)
class Answer:
    """Exact statistics that left: of which rows of which dataset, in which run, what was asked of each column.

    cohort: who else is in the sum; empty in plain mode, where each node's figures stand alone.
    """

    run: str
    plan_digest: str
    study: str
    dataset: str
    version: str
    selection: str
    at: int
    columns: Mapping[str, Mapping[str, Any]]
    cohort: tuple[str, ...] = ()

    @property
    def rows(self) -> str:
        return f"{self.version}/{self.selection}"


def selection_of(plan: Plan) -> str:
    """Which rows of a dataset a plan's statistics are of."""
    if plan.statistics is not None and plan.statistics.rows == "all":
        return "all"
    return f"train/{plan.seed}/{plan.evaluation.validation_fraction:g}"


def sketch_rows(contract: DataContract, batches: Iterable[Batch], key: bytes) -> Sketch:
    """By column, target included: how many values fall into each cell, `(CELLS,) int64`."""
    found: dict[str, NDArray[np.int64]] = {}
    for inputs, targets in batches:
        for name, hashes in _hashes(contract, inputs, targets, key):
            counts = np.bincount(hashes, minlength=CELLS)
            found[name] = found[name] + counts if name in found else counts
    return found


@dataclass(frozen=True)
class StatisticsGuard:
    """store: this node's; what is remembered outlives the process."""

    store: NodeStore

    def remember_rows(self, version: str, plan: Plan, batches: Iterable[Batch]) -> None:
        """Keeps the sketch of the rows that a plan's statistics would be of."""
        name = f"statistics/rows/{version}/{selection_of(plan)}"
        before = self._sketch(f"{version}/{selection_of(plan)}")
        sketch = {**before, **sketch_rows(plan.data, batches, self._key())}
        packed = {
            column: base64.b64encode(zlib.compress(c.astype("<i8").tobytes())).decode() for column, c in sketch.items()
        }
        self.store.set_fact(name, json.dumps(packed))

    def answers(self) -> list[Answer]:
        """Every exact answer that is remembered, oldest first."""
        found = [_answer(json.loads(text)) for text in self.store.facts("statistics/answer/").values()]
        return sorted(found, key=lambda answer: (answer.at, answer.run))

    def check(self, run: str, plan: Plan, version: str, minimum_count: int) -> None:
        """Before anything is measured.

        Raises:
            ConsentRefusedError: an earlier exact answer and this one would tell of a few rows, or probe a column.
        """
        if plan.noise != "none":
            return
        rows, columns = f"{version}/{selection_of(plan)}", columns_of(plan)
        sketch = self._sketch(rows)
        if not set(columns) <= sketch.keys() | ({*columns} if IMAGES in sketch else set()):
            raise ConsentRefusedError(
                "this node has not looked at the rows of these statistics yet; its owner approves the plan again"
            )
        fewest = max(minimum_count, plan.statistics.minimum_count if plan.statistics else 1)
        for earlier in self.answers():
            if earlier.run == run:
                continue
            shared = sorted(set(columns) & set(earlier.columns))
            if earlier.rows == rows:
                self._check_questions(earlier, shared, columns)
            elif shared and 0 < (few := _distance(sketch, self._sketch(earlier.rows), shared)) < fewest:
                raise ConsentRefusedError(
                    f"statistics of these columns were answered over rows that differ in about {few} from these: fewer "
                    f"than {fewest}, so the difference would tell of single rows. {AGAIN}"
                )

    def check_cohort(self, run: str, plan: Plan, cohort: tuple[str, ...], minimum_cohort: int) -> None:
        """Before a masked sum over `cohort` is agreed to.

        Raises:
            ConsentRefusedError: with an earlier sum it would tell of a few nodes.
        """
        if plan.noise != "none":
            return
        columns = set(columns_of(plan))
        for earlier in self.answers():
            if earlier.run == run or not earlier.cohort or not columns & set(earlier.columns):
                continue
            apart = sorted(set(earlier.cohort) ^ set(cohort))
            if 0 < len(apart) < minimum_cohort:
                raise ConsentRefusedError(
                    f"statistics of these columns were answered together with nodes that differ in {len(apart)} from "
                    f"now ({', '.join(apart)}): the difference would tell of them alone. Ask when the same nodes are "
                    f"there. {AGAIN}"
                )

    def note(self, answer: Answer) -> None:
        """Durable before the answer leaves."""
        self.store.set_fact(f"statistics/answer/{answer.run}", json.dumps(asdict(answer)))

    def forget(self, dataset: str | None) -> int:
        """Drops what is remembered of a dataset, or of all; how many answers that were."""
        gone = [answer for answer in self.answers() if dataset in (None, answer.dataset)]
        for answer in gone:
            self.store.drop_fact(f"statistics/answer/{answer.run}")
            self.store.record("owner", "statistics:forget", answer.run, dataset=answer.dataset, plan=answer.plan_digest)
        return len(gone)

    def _check_questions(self, earlier: Answer, shared: list[str], columns: Mapping[str, Mapping[str, Any]]) -> None:
        for name in shared:
            before, now = earlier.columns[name], columns[name]
            for key in ("range", "categories", "bins", "resolution"):
                if before.get(key) and now.get(key) and before[key] != now[key]:
                    raise ConsentRefusedError(
                        f"column {name}: these rows were asked about with another {key} before; both answers together "
                        f"would tell how many values lie between. Ask with the {key} of the first plan. {AGAIN}"
                    )

    def _sketch(self, rows: str) -> dict[str, NDArray[np.int64]]:
        text = self.store.fact(f"statistics/rows/{rows}")
        packed: dict[str, str] = json.loads(text) if text else {}
        return {
            column: np.frombuffer(zlib.decompress(base64.b64decode(data)), "<i8") for column, data in packed.items()
        }

    def _key(self) -> bytes:
        text = self.store.fact("statistics/key")
        if text is None:
            text = secrets.token_hex(32)
            self.store.set_fact("statistics/key", text)
        return bytes.fromhex(text)


def columns_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """What a plan's statistics ask of each column."""
    programme = Programme.of(plan)
    wanted = programme.wanted
    return {
        column.name: {
            "range": list(column.range or ()),
            "categories": list(column.words),
            "bins": wanted.bins if column.kind == "number" else 0,
            "resolution": wanted.resolution if wanted.ranks and column.kind == "number" else 0,
        }
        for column in programme.columns
    }


def _distance(one: Sketch, other: Sketch, columns: list[str]) -> int:
    """In how many rows two sketches differ, by the column in which most do; 0 where nothing is known of one."""
    names = [IMAGES] if IMAGES in one else columns
    both = [name for name in names if name in one and name in other]
    return max((int(np.abs(one[name] - other[name]).sum()) for name in both), default=0)


def _hashes(
    contract: DataContract, inputs: NDArray[Any], targets: NDArray[Any] | None, key: bytes
) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """By column the cell of each value."""
    if contract.input != "table":
        rows = (str(row).encode("utf-8", "surrogatepass") if contract.text else row.tobytes() for row in inputs)
        cells = [int.from_bytes(hashlib.blake2b(row, digest_size=8, key=key).digest()) % CELLS for row in rows]
        yield IMAGES, np.array(cells, np.int64)
        return
    for index, column in enumerate(contract.columns):
        yield column.name, _cells(np.ascontiguousarray(inputs[:, index], np.float64), column.name, key)
    if targets is not None:
        yield contract.target, _cells(np.asarray(targets, np.float64), contract.target, key)


def _cells(values: NDArray[np.float64], name: str, key: bytes) -> NDArray[np.int64]:
    """Two keyed multiplications of 64 bits: not for anybody who sees their results, which nobody does."""
    digest = hashlib.blake2b(name.encode(), digest_size=24, key=key).digest()
    salt, first, second = (np.uint64(int.from_bytes(digest[i : i + 8]) | 1) for i in (0, 8, 16))
    words = values.view(np.uint64) ^ salt
    words *= first
    words ^= words >> np.uint64(32)
    words *= second
    words >>= np.uint64(64 - (CELLS.bit_length() - 1))
    return words.view(np.int64)


def _answer(document: dict[str, Any]) -> Answer:
    return Answer(**{**document, "cohort": tuple(document["cohort"])})
