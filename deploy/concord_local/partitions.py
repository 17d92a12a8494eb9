"""Who has what: deals the rows of one source to named nodes. Seeded, and total: every row at exactly one
node.

    iid              shuffled, equal counts
    dirichlet:ALPHA  per class, proportions over nodes from Dir(ALPHA) (Hsu et al. 2019); smaller is more
    uneven
    shards:K         sorted by class, cut into shards, K shards a node (McMahan et al. 2017)
    quantity:ALPHA   shuffled, counts from Dir(ALPHA)
    grouped:COLUMN   all rows of a value of a column at one node, equal counts of values
    natural:COLUMN   one node for each value of a column that the source has
    directory        one node for each directory of the source

Rows with an official test split are dealt twice by the same rule and proportions: training rows, then test
rows.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from concord_client.data import RawData, Split
from concord_shared.errors import DataError, UsageError
from concord_shared.plan.data import DataContract
from concord_shared.seeds import derive_seed

__all__ = ["deal", "is_natural"]

Rows = NDArray[np.int64]
Dealer = Callable[[Rows, np.random.Generator], list[Rows]]
DRAWS_MAX = 1000
TARGET_BINS = 10
PARAMETER_LIMIT = 1_000_000


def is_natural(spec: str) -> bool:
    """Whether the source itself says which rows belong together."""
    return spec == "directory" or spec.startswith("natural:")


def deal(data: RawData, contract: DataContract, spec: str, nodes: int | None, seed: int) -> dict[str, Rows]:
    """Rows `(n,)` of each node, by node name.

    Args:
        nodes: how many; None takes a natural partition's own number.

    Raises:
        UsageError: no such partition, a parameter out of range, more nodes than rows.
        DataError: a node would have no rows.
    """
    if is_natural(spec):
        return _natural(data, spec.partition(":")[2] or "directory", nodes)
    if nodes is None:
        raise UsageError(f"--partition {spec}: say how many nodes with --nodes")
    if nodes < 1:
        raise UsageError(f"--nodes {nodes}: expected at least 1")
    train_rows = len(data) if data.split is None else int((data.split == Split.TRAIN).sum())
    if nodes > train_rows:
        raise UsageError(f"--nodes {nodes}: more nodes than training rows ({train_rows}); lower it")
    if spec.startswith("grouped:"):
        dealt = _grouped(data, spec.partition(":")[2], nodes, seed)
    else:
        dealt = _deal_by_rule(data, contract, spec, nodes, seed)
    width = len(str(nodes))
    return {f"node-{index + 1:0{width}d}": rows for index, rows in enumerate(dealt)}


def _deal_by_rule(data: RawData, contract: DataContract, spec: str, nodes: int, seed: int) -> list[Rows]:
    if contract.task in ("own", "language-model") and spec.partition(":")[0] in ("dirichlet", "shards"):
        raise UsageError(f"--partition {spec} deals rows by their class, and these have none; expected iid or quantity")
    targets = data.targets.reshape(len(data), -1)[:, 0]
    classes = _bins(targets) if contract.task in ("regression", "own") else targets
    parts = [np.arange(len(data))]
    if data.split is not None:
        parts = [np.flatnonzero(data.split == split) for split in Split]
    for draw in range(DRAWS_MAX):
        chance = np.random.default_rng(derive_seed(seed, "partition", draw))
        dealer = _dealer(spec, nodes, classes, chance)
        dealt = [dealer(part, chance) for part in parts]
        if min(len(rows) for rows in dealt[0]) >= _rows_min(len(parts[0]), nodes):
            return [np.sort(np.concatenate([part[node] for part in dealt])) for node in range(nodes)]
    raise DataError(
        f"--partition {spec} leaves a node with almost no rows in {DRAWS_MAX} draws; raise its parameter, or lower "
        "--nodes"
    )


def _rows_min(rows: int, nodes: int) -> int:
    """The least that a node may get: 10 rows (as NIID-Bench), or a fifth of an equal share where that is fewer."""
    return max(1, min(10, rows // (5 * nodes)))


def _dealer(spec: str, nodes: int, classes: Rows, chance: np.random.Generator) -> Dealer:
    name, _, text = spec.partition(":")
    if name == "iid" and not text:
        return lambda rows, chance: np.array_split(chance.permutation(rows), nodes)
    if name == "shards":
        return _shards(nodes, int(_parameter(spec, text, whole=True)), classes)
    if name == "quantity":
        shares = chance.dirichlet(np.full(nodes, _parameter(spec, text)))
        return lambda rows, chance: _cut(chance.permutation(rows), shares)
    if name == "dirichlet":
        by_class = chance.dirichlet(np.full(nodes, _parameter(spec, text)), int(classes.max()) + 1)
        return _by_class(by_class, classes)
    raise UsageError(
        f"--partition {spec}: expected iid, dirichlet:ALPHA, shards:K, quantity:ALPHA, grouped:COLUMN, "
        "natural:COLUMN or directory"
    )


def _by_class(shares: NDArray[np.float64], classes: Rows) -> Dealer:
    def dealer(rows: Rows, chance: np.random.Generator) -> list[Rows]:
        cuts = [_cut(chance.permutation(rows[classes[rows] == k]), share) for k, share in enumerate(shares)]
        return [np.concatenate(parts) for parts in zip(*cuts, strict=True)]

    return dealer


def _shards(nodes: int, each: int, classes: Rows) -> Dealer:
    order: list[NDArray[np.int64]] = []  # training and test rows take the same shards

    def dealer(rows: Rows, chance: np.random.Generator) -> list[Rows]:
        shuffled = chance.permutation(rows)
        shards = np.array_split(shuffled[np.argsort(classes[shuffled], kind="stable")], nodes * each)
        if not order:
            order.append(chance.permutation(nodes * each))
        return [np.concatenate([shards[s] for s in order[0][n * each : (n + 1) * each]]) for n in range(nodes)]

    return dealer


def _cut(rows: Rows, shares: NDArray[np.float64]) -> list[Rows]:
    return np.split(rows, np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(int))


def _grouped(data: RawData, column: str, nodes: int, seed: int) -> list[Rows]:
    values, groups = np.unique(_column(data, column, "grouped"), return_inverse=True)
    if nodes > len(values):
        raise UsageError(f"--nodes {nodes}: column {column} has only {len(values)} values to deal; lower it")
    order = np.random.default_rng(derive_seed(seed, "partition", 0)).permutation(len(values))
    return [np.flatnonzero(np.isin(groups, part)) for part in np.array_split(order, nodes)]


def _column(data: RawData, column: str, how: str) -> NDArray[np.str_]:
    if column not in data.groups:
        raise UsageError(
            f"--partition {how}:{column}: the data have no such column; found {', '.join(data.groups) or 'none'}"
        )
    return data.groups[column].astype(str)


def _natural(data: RawData, column: str, nodes: int | None) -> dict[str, Rows]:
    values = _column(data, column, "natural")
    names = {value: _node_name(column, value) for value in sorted(set(values))}
    if len(set(names.values())) != len(names):
        raise DataError(f"column {column}: two values give the same node name; rename one")
    if nodes is not None and nodes != len(names):
        raise UsageError(f"--nodes {nodes}: column {column} makes {len(names)} nodes; leave --nodes out")
    return {name: np.flatnonzero(values == value) for value, name in names.items()}


def _node_name(column: str, value: str) -> str:
    """`Zürich 2` is zurich-2; a value in another script gets the column's name and a digest of itself."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", value) if not unicodedata.combining(c))
    name = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")[:56]
    if name and plain.isascii():
        return name
    digest = hashlib.sha256(value.encode()).hexdigest()[:6]
    return f"{name or _node_name('node', column)}-{digest}"


def _bins(targets: NDArray[np.float64]) -> Rows:
    edges = np.quantile(targets, np.linspace(0, 1, TARGET_BINS + 1)[1:-1])
    return np.searchsorted(edges, targets).astype(np.int64)


def _parameter(spec: str, text: str, whole: bool = False) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = 0
    if not 0 < value < PARAMETER_LIMIT:
        kind = "whole number" if whole else "number"
        raise UsageError(
            f"--partition {spec}: expected a {kind} above 0 and below {PARAMETER_LIMIT:,} after the colon, got {text!r}"
        )
    return value
