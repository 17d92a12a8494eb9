"""From a SPEC such as `idx:DIR` or `csv:FILE` to `RawData`: at once, or batch by batch, by the same code.

Tables are frames of some format (`frames.py`) that one decoder reads (`tables.py`); of the others each has a function
of its own, in the table at the end.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from concord_client.data import images, sql, studies
from concord_client.data.contract import Code, Difference, Tally, tolerated_by
from concord_client.data.dataset import RawData, joined
from concord_client.data.files import check_roots, files_of, unchanged
from concord_client.data.frames import READERS as FILES
from concord_client.data.frames import ROWS, read_frames
from concord_client.data.tables import TableDecoder
from concord_shared.errors import ConcordError, ContractError, DataError, SourceError, UsageError
from concord_shared.plan.schema import Plan

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "Reading",
    "adapter_names",
    "check_exposed",
    "differences",
    "is_table",
    "locate",
    "read_batches",
    "read_data",
    "resolve_spec",
    "table_frames",
]

SQL = "sql"
Reader = Callable[[Path, Plan, bool], RawData]
"""From a path, for a plan; False for rows whose target is not known yet, which tables and `.npz` may leave out."""


@dataclass(frozen=True)
class Reading:
    """What a node says of data beside their SPEC.

    units: in which columns are here, by the owner's word. roots: as in the policy, where data may lie; none: anywhere.
    version: as registered, which a database's rows are compared with as they are read; "" where it does not matter.
    """

    units: Mapping[str, str] = field(default_factory=dict)
    roots: tuple[str, ...] = ()
    version: str = ""


def read_data(
    spec: str,
    plan: Plan,
    default_spec: str = "",
    per_directory: bool = False,
    labelled: bool = True,
    reading: Reading | None = None,
) -> RawData:
    """Reads what `spec` names and checks it against the plan's contract.

    Args:
        spec: `digits`, `ADAPTER:PATH`, or a bare directory, which is read by the adapter of `default_spec`.
        per_directory: PATH holds one directory (or file) for each node; its name becomes the group
        `directory`.
        labelled: False to read rows for prediction; targets that are not there are zeros.
        reading: what this node says of the data.

    Raises:
        UsageError: no such adapter or path.
        SourceError: what is there cannot be read.
        ContractError: it breaks the contract, with every difference.
    """
    resolved = resolve_spec(spec, default_spec)
    name, _, where = resolved.partition(":")
    if not per_directory:
        tally = Tally(plan.data, tolerated_by(plan))
        data = joined(list(_batches(resolved, plan, tally, ROWS, reading, labelled, groups=True)))
        tally.raise_for(spec)
        return data
    if name == "digits":
        raise UsageError("--partition directory: the digits are built in; name data with one directory for each node")
    data = _read_per_directory(name, Path(where), plan)
    tally = Tally(plan.data, tolerated_by(plan))
    tally.look_at(data)
    tally.raise_for(spec)
    return data


def read_batches(
    spec: str,
    plan: Plan,
    rows: int = ROWS,
    reading: Reading | None = None,
    tolerated: Collection[Code] = (),
    labelled: bool = True,
) -> Iterator[RawData]:
    """The rows of `read_data` in their order, at most `rows` at a time: tables without more of them in memory.

    Args:
        spec: a resolved one.
        reading: what this node says of the data.
        tolerated: differences that are taken as they are, beside those that the plan takes: for example "missing"
        (NaN then) or "range" (whoever reads counts those outside).

    Yields:
        Batches without groups, until the first that differs from the contract; the rest is only counted.

    Raises:
        SourceError: what is there cannot be read, or changed meanwhile. ContractError, at the end: it differs from the
        contract. Either way nothing that was yielded is to be used.
    """
    tally = Tally(plan.data, (*tolerated_by(plan), *tolerated))
    yield from _batches(spec, plan, tally, rows, reading, labelled, groups=False)
    tally.raise_for(spec)


def differences(spec: str, plan: Plan, reading: Reading | None = None) -> list[Difference]:
    """In what the data of a resolved SPEC differ from a plan's contract: all of it, none where they fit.

    Names of the contract and counts, never a value, a path or a name of the data: it can be told to others.
    """
    tally = Tally(plan.data, tolerated_by(plan))
    try:
        for _ in _batches(spec, plan, tally, ROWS, reading, labelled=True, groups=False):
            pass
    except ContractError as error:
        return list(error.differences)
    except SourceError as error:
        return [*(tally.differences() if tally.rows else ()), Difference("source", "data", error.reason)]
    except ConcordError:
        return [Difference("source", "data", "cannot be read; `concord-node check` says why, at the node")]
    return tally.differences()


def _batches(
    spec: str,
    plan: Plan,
    tally: Tally,
    rows: int,
    reading: Reading | None,
    labelled: bool,
    groups: bool,
) -> Iterator[RawData]:
    """Batches as long as nothing differs; `tally` has looked at all of them in the end."""
    how = reading or Reading()
    check_exposed(spec, how.roots)
    with unchanged(spec):
        for data in _decoded(spec, plan, tally, rows, how, labelled, groups):
            tally.look_at(data)
            if len(data) and tally.is_clean:
                yield data


def _decoded(
    spec: str, plan: Plan, tally: Tally, rows: int, how: Reading, labelled: bool, groups: bool
) -> Iterator[RawData]:
    name, _, where = spec.partition(":")
    if is_table(spec):
        decoder = TableDecoder(plan.data, tally, how.units, labelled, groups)
        for frame in table_frames(spec, decoder.wanted, rows, how.version):
            yield decoder.decode(frame)
        return
    data = _READERS[name](Path(where), plan, labelled)
    if groups:
        yield data
        return
    for start in range(0, len(data), rows):
        part = slice(start, start + rows)
        split = None if data.split is None else data.split[part]
        yield RawData(data.inputs[part], data.targets[part], split)


def is_table(spec: str) -> bool:
    """Whether a resolved SPEC names columns that can be walked: see `table_frames`."""
    name = spec.partition(":")[0]
    return name in FILES or name == SQL


def table_frames(
    spec: str, columns: Collection[str] | None = None, rows: int = ROWS, version: str = ""
) -> Iterator["pl.DataFrame"]:
    """The rows of a table as frames with the source's own types.

    Raises:
        SourceError: it cannot be read; or a database does not hold the rows of `version`, where one is given.
    """
    name, _, where = spec.partition(":")
    if name != SQL:
        yield from read_frames(name, Path(where), columns, rows)
        return
    digest = sql.RowsDigest()
    yield from sql.read_rows(Path(where), rows, digest if version else None)
    if version and digest.hexdigest() != version:
        raise SourceError(where, "the database's rows are not those that were registered; register them again")


def check_exposed(spec: str, roots: Sequence[str]) -> None:
    """Whether all that a resolved SPEC reads lies below `roots`; anywhere where there are none.

    Raises:
        SourceError: it does not.
    """
    if not roots:
        return
    name, _, where = spec.partition(":")
    files = files_of(spec)
    if name == SQL and (database := sql.database_file(Path(where))) is not None:
        files = {**files, "database": database}
    if name != "digits":
        check_roots(files, roots)


def resolve_spec(spec: str, default_spec: str = "") -> str:
    """`ADAPTER:PATH` with an absolute path, so that it means the same from any directory; or `digits`.

    Raises:
        UsageError: no such adapter or path.
    """
    name, colon, where = spec.partition(":")
    if name not in adapter_names():
        name, colon, where = default_spec.partition(":")[0], ":", spec
        if not locate(spec).exists() or name not in adapter_names() or name == "digits":
            raise UsageError(
                f"--data {spec}: expected one of {', '.join(adapter_names())} (as in idx:DIR), or a directory that the "
                "plan has an adapter for"
            )
    if name == "digits":
        if colon:
            raise UsageError(f"--data {spec}: the digits are built in and have no path; expected digits alone")
        return name
    path = locate(where)
    if not path.exists():
        raise UsageError(
            f"--data {name}:{where}: no such file or directory. Looked in the working directory and in $CONCORD_DATA"
            f" ({os.environ.get('CONCORD_DATA', 'not set')}); name the place with --data {name}:PATH"
        )
    return f"{name}:{path.resolve()}"


def locate(where: str) -> Path:
    """`where` as it is, or else below $CONCORD_DATA, or else below ../shared/data."""
    path = Path(where).expanduser()
    if path.is_absolute() or (path.exists() and where):
        return path
    for root in filter(None, [os.environ.get("CONCORD_DATA"), "../shared/data"]):
        if (Path(root) / path).exists():
            return Path(root) / path
    return path


def adapter_names() -> list[str]:
    return [*_READERS, *FILES, SQL]


def _read_per_directory(name: str, path: Path, plan: Plan) -> RawData:
    entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")] if path.is_dir() else []
    nodes = {_node_of(entry): _source_in(entry) for entry in entries}
    if not nodes:
        raise DataError(f"{path}: expected a directory with one directory or file for each node")
    if len(nodes) != len(entries):
        raise DataError(f"{path}: two entries give the same node name; rename one")
    parts = [read_data(f"{name}:{source}", plan) for source in nodes.values()]
    splits = [part.split for part in parts if part.split is not None]
    if len(splits) not in (0, len(parts)):
        raise DataError(f"{path}: some nodes have an own test split and others not; give all of them one, or none")
    if len({(part.inputs.shape[1:], part.inputs.dtype.kind) for part in parts}) > 1:
        raise DataError(f"{path}: the nodes' rows have different shapes or types; each must fit the plan's contract")
    return RawData(
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate(splits) if splits else None,
        {"directory": np.repeat(list(nodes), [len(part) for part in parts])},
    )


def _node_of(entry: Path) -> str:
    """A directory's name; a table file's name without its suffix."""
    return entry.stem if entry.is_file() and entry.suffix in _TABLE_SUFFIXES else entry.name


def _source_in(entry: Path) -> Path:
    """What a node's reader gets: the one table file in its directory, or else the entry itself."""
    files = [file for file in entry.iterdir() if file.suffix in _TABLE_SUFFIXES] if entry.is_dir() else []
    if len(files) > 1:
        raise DataError(f"{entry}: expected one table of this node, found {len(files)}")
    return files[0] if files else entry


_TABLE_SUFFIXES = (".csv", ".parquet", ".arrow", ".feather", ".jsonl", ".npz")
_READERS: dict[str, Reader] = {
    "digits": images.read_digits,
    "idx": images.read_idx,
    "npz": images.read_npz,
    "images": images.read_folder,
    "adult": studies.read_adult,
    "heart-disease": studies.read_heart_disease,
    "sentiment": studies.read_sentiment,
    "sib200": studies.read_sib200,
    "sms-spam": studies.read_sms_spam,
    "tang-poems": studies.read_tang_poems,
    "tiny-shakespeare": studies.read_tiny_shakespeare,
    "wine-quality": studies.read_wine_quality,
}
