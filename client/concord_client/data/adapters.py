"""From a SPEC such as `idx:DIR` or `csv:FILE` to `RawData`. One function an adapter; a table of them at the end."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from concord_client.data import images, studies, tables
from concord_client.data.dataset import RawData, check_contract
from concord_shared.errors import DataError, UsageError
from concord_shared.plan.schema import Plan

__all__ = ["adapter_names", "locate", "read_data", "resolve_spec"]

Reader = Callable[[Path, Plan, bool], RawData]
"""From a path, for a plan; False for rows whose target is not known yet, which tables and `.npz` may leave out."""


def read_data(
    spec: str, plan: Plan, default_spec: str = "", per_directory: bool = False, labelled: bool = True
) -> RawData:
    """Reads what `spec` names and checks it against the plan's contract.

    Args:
        spec: `digits`, `ADAPTER:PATH`, or a bare directory, which is read by the adapter of `default_spec`.
        per_directory: PATH holds one directory (or file) for each node; its name becomes the group
        `directory`.
        labelled: False to read rows for prediction; targets that are not there are zeros.

    Raises:
        UsageError: no such adapter or path.
        DataError: what is there cannot be read, or breaks the contract.
    """
    name, _, where = resolve_spec(spec, default_spec).partition(":")
    path = Path(where)
    if per_directory and name == "digits":
        raise UsageError("--partition directory: the digits are built in; name data with one directory for each node")
    data = _read_per_directory(_READERS[name], path, plan) if per_directory else _READERS[name](path, plan, labelled)
    cleaning = plan.preprocessing
    check_contract(plan.data, data, spec, cleaning.missing == "impute", cleaning.outside == "missing")
    return data


def resolve_spec(spec: str, default_spec: str = "") -> str:
    """`ADAPTER:PATH` with an absolute path, so that it means the same from any directory; or `digits`.

    Raises:
        UsageError: no such adapter or path.
    """
    name, colon, where = spec.partition(":")
    if name not in _READERS:
        name, colon, where = default_spec.partition(":")[0], ":", spec
        if not locate(spec).exists() or name not in _READERS or name == "digits":
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
    return list(_READERS)


def _read_per_directory(reader: Reader, path: Path, plan: Plan) -> RawData:
    entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")] if path.is_dir() else []
    nodes = {_node_of(entry): _source_in(entry) for entry in entries}
    if not nodes:
        raise DataError(f"{path}: expected a directory with one directory or file for each node")
    if len(nodes) != len(entries):
        raise DataError(f"{path}: two entries give the same node name; rename one")
    parts = [reader(source, plan, True) for source in nodes.values()]
    splits = [part.split for part in parts if part.split is not None]
    if len(splits) not in (0, len(parts)):
        raise DataError(f"{path}: some nodes have an own test split and others not; give all of them one, or none")
    if len({(part.inputs.shape[1:], part.inputs.dtype) for part in parts}) > 1:
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


_TABLE_SUFFIXES = (".csv", ".parquet", ".npz")
_READERS: dict[str, Reader] = {
    "digits": images.read_digits,
    "idx": images.read_idx,
    "npz": images.read_npz,
    "images": images.read_folder,
    "csv": tables.read_csv,
    "parquet": tables.read_parquet,
    "adult": studies.read_adult,
    "heart-disease": studies.read_heart_disease,
    "sib200": studies.read_sib200,
    "wine-quality": studies.read_wine_quality,
}
