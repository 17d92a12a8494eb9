"""The node's datasets: where they lie, which files at which content, and what others may know of them."""

import gzip
import hashlib
import importlib.util
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from concord_client.cards import card_with, choices_of
from concord_client.home import NodeHome
from concord_client.store import Dataset, NodeStore
from concord_shared.documents import DatasetCard
from concord_shared.errors import DataError, UsageError
from concord_shared.files import explain, file_digest
from concord_shared.plan.load import LoadedPlan, load_plan
from concord_shared.plan.schema import Name
from concord_shared.protocol import CardWithdrawal
from concord_shared.signing import seal

__all__ = ["add_dataset", "card_of", "current_dataset", "publish", "verify", "withdraw_card"]

FILES_MAX = 5_000_000


@dataclass(frozen=True)
class _Shape:
    """What can be said of data without telling a value."""

    rows: int
    input: Literal["image", "table"]
    columns: tuple[str, ...] = ()


def add_dataset(
    store: NodeStore,
    name: str,
    spec: str,
    now: float,
    plan: str = "",
    title: str = "",
    description: str = "",
    licence: str = "",
    replaces: bool = False,
) -> Dataset:
    """Registers data at this node; nothing leaves it.

    Args:
        spec: as for `--data`: csv:FILE, parquet:FILE, npz:FILE, idx:DIR, images:DIR, or a directory that `plan` knows.
        plan: a plan whose contract the data must fit; without one, only what the files themselves say is known.
        replaces: the name may be registered already; approvals of the earlier version no longer hold.

    Raises:
        UsageError: no such adapter, path or plan; or the name is taken.
        DataError: the data cannot be read, or break the contract.
    """
    from concord_client.data import resolve_spec

    _check_name(name)
    held = store.dataset(name)
    if held is not None and not replaces:
        raise UsageError(f"dataset {name} is registered already. Register its new content with --replace")
    loaded = load_plan(plan) if plan else None
    resolved = resolve_spec(spec, loaded.simulate.data if loaded else "")
    files = _files(resolved)
    shape = _contract_shape(resolved, loaded) if loaded else _shape(resolved)
    if shape.rows < 1:
        raise DataError(f"{spec}: no rows")
    dataset = Dataset(
        name=name,
        version=_version(files),
        spec=resolved,
        title=title or (held.title if held else name),
        description=description or (held.description if held else ""),
        rows=shape.rows,
        input=shape.input,
        columns=shape.columns,
        licence=licence or (held.licence if held else ""),
        registered_at=int(now),
        files=_stamps(files),
    )
    choices = choices_of(store, name)
    card_with("node", "organisation", dataset, choices, dataset.registered_at)  # what would be refused is refused now
    store.put_dataset(dataset)
    return dataset


def publish(home: NodeHome, store: NodeStore, name: str, now: float) -> DatasetCard:
    """Signs the dataset's card and posts it. Raises: UsageError: no such dataset."""
    dataset = current_dataset(store, name)
    card = card_of(home, store, dataset, now)
    store.post("card", name, seal(card, home.identity_key()))
    store.put_dataset(replace(dataset, published=True))
    return card


def withdraw_card(home: NodeHome, store: NodeStore, name: str, now: float) -> bool:
    """Signs that the dataset is gone and posts it; False where its card never left. Raises: UsageError: no such
    dataset.
    """
    dataset = current_dataset(store, name)
    left = dataset.published or any((each.kind, each.subject) == ("card", name) for each in store.egress())
    if not left:
        return False
    config = home.config
    word = CardWithdrawal(node=config.node, organisation=config.organisation, dataset=name, issued_at=int(now))
    store.post("card-withdrawal", name, seal(word, home.identity_key()))
    store.put_dataset(replace(dataset, published=False))
    return True


def card_of(home: NodeHome, store: NodeStore, dataset: Dataset, now: float) -> DatasetCard:
    """All that others would know of it."""
    choices = choices_of(store, dataset.name)
    return card_with(home.config.node, home.config.organisation, dataset, choices, int(now))


def current_dataset(store: NodeStore, name: str) -> Dataset:
    """Raises: UsageError: no such dataset."""
    dataset = store.dataset(name)
    if dataset is None:
        known = ", ".join(each.name for each in store.datasets()) or "none"
        raise UsageError(f"no dataset {name} is registered here; registered: {known}")
    return dataset


def verify(store: NodeStore, dataset: Dataset) -> None:
    """The files are those that were registered. Size and time of change first; their content where these differ.

    Raises:
        DataError: they are not.
    """
    changed = DataError(
        f"dataset {dataset.name}: its files changed since registration, so its approvals are for other data. "
        f"Register again: concord-node data add {dataset.name} {dataset.spec} --replace"
    )
    try:
        files = _files(dataset.spec)
        stamps = _stamps(files)
        if stamps == dataset.files:
            return
        same = _version(files) == dataset.version
    except DataError as error:
        raise changed from error
    if not same:
        raise changed
    store.put_dataset(replace(dataset, files=stamps))


def _files(spec: str) -> dict[str, Path]:
    """What a resolved SPEC reads, by name; "" for a single file. Names that begin with a dot are left out.

    Raises:
        DataError: nothing is there.
    """
    adapter, _, where = spec.partition(":")
    path = _bundled_digits() if adapter == "digits" else Path(where)
    if path.is_file():
        return {"": path}
    found = {}
    for directory, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                file = Path(directory) / name
                found[file.relative_to(path).as_posix()] = file
        if len(found) > FILES_MAX:
            raise DataError(f"{path}: more than {FILES_MAX} files")
    if not found:
        raise DataError(f"{path}: no files")
    return dict(sorted(found.items()))


def _version(files: Mapping[str, Path]) -> str:
    """SHA-256 over the names and the bytes of all files, in the order of their names."""
    digest = hashlib.sha256()
    try:
        for name, file in files.items():
            encoded = name.encode("utf-8", "surrogateescape")
            digest.update(len(encoded).to_bytes(8, "little") + encoded + bytes.fromhex(file_digest(file)))
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    return digest.hexdigest()


def _stamps(files: Mapping[str, Path]) -> dict[str, tuple[int, int]]:
    try:
        found = {name: file.stat() for name, file in files.items()}
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {explain(error)}") from error
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def _bundled_digits() -> Path:
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError("the digits come with scikit-learn, which is not installed")
    return Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"


# What the files say of themselves


def _contract_shape(spec: str, loaded: LoadedPlan) -> _Shape:
    from concord_client.data import read_data

    contract = loaded.plan.data
    names = (*(column.name for column in contract.columns), contract.target) if contract.columns else ()
    return _Shape(len(read_data(spec, loaded.plan)), contract.input, names)


def _shape(spec: str) -> _Shape:
    """Of a resolved SPEC without a plan; the studies that concord knows have one of their own."""
    adapter, _, where = spec.partition(":")
    if adapter in ("csv", "parquet"):
        return _table_shape(adapter, Path(where))
    if adapter in _SHAPES:
        return _SHAPES[adapter](Path(where))
    return _contract_shape(spec, load_plan(adapter))


def _table_shape(adapter: str, path: Path) -> _Shape:
    import polars as pl

    try:
        frame = pl.scan_csv(path, infer_schema=False) if adapter == "csv" else pl.scan_parquet(path)
        rows = frame.select(pl.len()).collect().item()
        return _Shape(int(rows), "table", tuple(frame.collect_schema().names()))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: not a readable {adapter} file: {type(error).__name__}") from error


def _npz_shape(path: Path) -> _Shape:
    """From the headers of the archive's arrays; their content is not read."""
    from numpy.lib import format as npy

    shapes = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in ("x", "x_test"):
                if f"{name}.npy" in archive.namelist():
                    with archive.open(f"{name}.npy") as file:
                        version = npy.read_magic(file)
                        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                        shapes[name] = read(file)[0]
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise DataError(f"{path}: not a readable .npz file: {error}") from error
    if not shapes.get("x"):
        raise DataError(f"{path}: expected the arrays x and y")
    return _Shape(sum(shape[0] for shape in shapes.values()), "image" if len(shapes["x"]) > 2 else "table")


def _idx_shape(path: Path) -> _Shape:
    rows = 0
    for part in ("train", "t10k"):
        names = [path / f"{part}-labels-idx1-ubyte", path / f"{part}-labels-idx1-ubyte.gz"]
        file = next((name for name in names if name.is_file()), None)
        if file is None:
            raise DataError(f"{path}: expected {names[0].name}, plain or with .gz")
        try:
            with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
                rows += int.from_bytes(stream.read(8)[4:8], "big")
        except (OSError, EOFError) as error:
            raise DataError(f"{file}: not a readable IDX file") from error
    return _Shape(rows, "image")


def _folder_shape(path: Path) -> _Shape:
    from concord_client.data.images import IMAGE_SUFFIXES

    return _Shape(sum(file.suffix.lower() in IMAGE_SUFFIXES for file in _files(f"images:{path}").values()), "image")


_SHAPES: Mapping[str, Callable[[Path], _Shape]] = {
    "digits": lambda _: _Shape(1797, "image"),
    "npz": _npz_shape,
    "idx": _idx_shape,
    "images": _folder_shape,
}


def _check_name(name: str) -> None:
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise UsageError(
            f"dataset {name!r}: expected a name of small letters, digits and hyphens, at most 63 of them"
        ) from error
