"""The node's datasets: where they lie, which files at which content, and what others may know of them."""

import gzip
import hashlib
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter, ValidationError

from concord_client.cards import card_with, choices_of
from concord_client.home import NodeHome
from concord_client.schema import DatasetSchema, check_correction
from concord_client.store import Dataset, NodeStore
from concord_shared.documents import DatasetCard
from concord_shared.errors import DataError, SourceError, UsageError
from concord_shared.files import file_digest
from concord_shared.plan.load import LoadedPlan, load_plan
from concord_shared.plan.section import Name
from concord_shared.protocol import CardWithdrawal
from concord_shared.signing import seal

if TYPE_CHECKING:
    from concord_client.data import Reading
    from concord_client.data.image_survey import ImageSurvey

__all__ = [
    "add_dataset",
    "card_of",
    "correct_schema",
    "current_dataset",
    "infer_schema",
    "publish",
    "reading_of",
    "survey_images",
    "verify",
    "withdraw_card",
]

CHECKED_S = 600
"""How long a database's rows count as looked at: a walk over all of them is the only way to see a change. Whoever reads
them compares anyway.
"""


@dataclass(frozen=True)
class _Shape:
    """What can be said of data without telling a value."""

    rows: int
    input: Literal["image", "table", "text", "array"]
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
    roots: Sequence[str] = (),
    schema: DatasetSchema | None = None,
) -> Dataset:
    """Registers data at this node; nothing leaves it.

    Args:
        spec: as for `--data`: csv:FILE, parquet:FILE, arrow:FILE, jsonl:FILE, sql:FILE, npz:FILE, idx:DIR, images:DIR,
        or a directory that `plan` knows.
        plan: a plan whose contract the data must fit; without one, only what the files themselves say is known.
        replaces: the name may be registered already; approvals of the earlier version no longer hold.
        roots: of the policy: where data may lie.
        schema: of a table, corrected by its owner; what it says is kept with the dataset.

    Raises:
        UsageError: no such adapter, path or plan; or the name is taken.
        DataError: the data cannot be read, or break the contract.
    """
    from concord_client.data import resolve_spec
    from concord_client.data.files import unchanged

    _check_name(name)
    held = store.dataset(name)
    if held is not None and not replaces:
        raise UsageError(f"dataset {name} is registered already. Register its new content with --replace")
    loaded = load_plan(plan) if plan else None
    resolved = resolve_spec(spec, loaded.simulate.data if loaded else "")
    stated = schema or (held.schema if held else None)
    reading = _reading("", stated, resolved, roots)
    _check_exposed(resolved, roots)
    with unchanged(resolved):
        stamps, version = _stamps(resolved), _version(resolved)
        shape = _contract_shape(resolved, loaded, reading) if loaded else _shape(resolved)
    if shape.rows < 1:
        raise DataError(f"{spec}: no rows")
    dataset = Dataset(
        name=name,
        version=version,
        spec=resolved,
        title=title or (held.title if held else name),
        description=description or (held.description if held else ""),
        rows=shape.rows,
        input=shape.input,
        columns=shape.columns,
        licence=licence or (held.licence if held else ""),
        registered_at=int(now),
        files=stamps,
        schema=stated,
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


def infer_schema(spec: str, roots: Sequence[str] = (), plan: str = "") -> DatasetSchema | None:
    """What a table looks like, from a walk over all of it; None where the data are no table with names of columns.

    Raises:
        UsageError: no such adapter or path. SourceError: it cannot be read.
    """
    from concord_client.data import is_table, resolve_spec, table_frames
    from concord_client.data.survey import infer

    resolved = resolve_spec(spec, load_plan(plan).simulate.data if plan else "")
    if not is_table(resolved):
        return None
    _check_exposed(resolved, roots)
    return infer(table_frames(resolved), "utf-8" if resolved.startswith(("csv:", "jsonl:")) else "")


def survey_images(spec: str, roots: Sequence[str] = (), plan: str = "") -> "ImageSurvey | None":
    """What a set of images looks like; None where the data are none.

    Raises:
        UsageError: no such adapter or path. DataError: it cannot be read.
    """
    from concord_client.data import image_survey, resolve_spec

    resolved = resolve_spec(spec, load_plan(plan).simulate.data if plan else "")
    _check_exposed(resolved, roots)
    return image_survey.survey_images(resolved)


def correct_schema(store: NodeStore, name: str, schema: DatasetSchema) -> Dataset:
    """Keeps what the owner says of the columns of a dataset: from now on it is read so.

    Raises:
        UsageError: no such dataset, or the schema is of other columns.
    """
    dataset = current_dataset(store, name)
    if dataset.schema is None:
        raise UsageError(f"dataset {name} has no schema: register it anew, or it is no table")
    check_correction(schema, dataset.schema)
    corrected = replace(dataset, schema=schema)
    store.put_dataset(corrected)
    return corrected


def reading_of(dataset: Dataset, roots: Sequence[str] = ()) -> "Reading":
    """How the rows of a registered dataset are read. roots: of the policy."""
    return _reading(dataset.version, dataset.schema, dataset.spec, roots)


def verify(store: NodeStore, dataset: Dataset, roots: Sequence[str] = (), now: float | None = None) -> "Reading":
    """The files are those that were registered: size and time of change first; their content where these differ. Of a
    database all rows are walked, every ten minutes at the most.

    roots: of the policy: where data may lie. Returns how they are to be read.

    Raises:
        DataError: they are not.
    """
    _check_exposed(dataset.spec, roots)
    moment, fact = time.time() if now is None else now, f"checked:{dataset.name}"
    if dataset.spec.startswith("sql:"):
        version, _, at = (store.fact(fact) or "").partition(" ")
        if version == dataset.version and 0 <= moment - float(at) < CHECKED_S:
            return reading_of(dataset, roots)
    changed = DataError(
        f"dataset {dataset.name}: its files changed since registration, so its approvals are for other data. "
        f"Register again: concord-node data add {dataset.name} {dataset.spec} --replace"
    )
    try:
        stamps = _stamps(dataset.spec)
        if stamps and stamps == dataset.files:
            return reading_of(dataset, roots)
        same = _version(dataset.spec) == dataset.version
    except SourceError as error:
        if dataset.spec.startswith("sql:"):
            raise  # a database that cannot be reached just now did not change
        raise changed from error
    except DataError as error:
        raise changed from error
    if not same:
        raise changed
    if dataset.spec.startswith("sql:"):
        store.set_fact(fact, f"{dataset.version} {moment}")
    if stamps != (dataset.files or {}):
        store.put_dataset(replace(dataset, files=stamps))
    return reading_of(dataset, roots)


def _reading(version: str, schema: DatasetSchema | None, spec: str, roots: Sequence[str]) -> "Reading":
    from concord_client.data import Reading

    return Reading(schema.units if schema else {}, tuple(roots), version if spec.startswith("sql:") else "")


def _check_exposed(spec: str, roots: Sequence[str]) -> None:
    from concord_client.data.adapters import check_exposed

    check_exposed(spec, roots)


def _stamps(spec: str) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file, by a hash of its name: names of images may be names of patients. None for
    a database, whose rows alone say whether they changed.
    """
    from concord_client.data.files import files_of, stamps_of

    if spec.startswith("sql:"):
        return {}
    return {name and _hashed(name): stamp for name, stamp in stamps_of(files_of(spec)).items()}


def _hashed(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _version(spec: str) -> str:
    """SHA-256 over the names and the bytes of all files, in the order of their names; of a database over its rows."""
    from concord_client.data.files import files_of
    from concord_client.data.sql import digest_of

    if spec.startswith("sql:"):
        return digest_of(Path(spec.removeprefix("sql:")))
    digest = hashlib.sha256()
    try:
        for name, file in files_of(spec).items():
            encoded = name.encode("utf-8", "surrogateescape")
            digest.update(len(encoded).to_bytes(8, "little") + encoded + bytes.fromhex(file_digest(file)))
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error
    return digest.hexdigest()


# What the files say of themselves


def _contract_shape(spec: str, loaded: LoadedPlan, reading: "Reading | None" = None) -> _Shape:
    from concord_client.data import read_data

    contract = loaded.plan.data
    target = () if contract.task == "ranking" else (contract.target,)
    names = (*contract.input_columns, *target) if contract.input_columns else ()
    kind = "table" if contract.input == "ratings" else contract.input
    return _Shape(len(read_data(spec, loaded.plan, reading=reading)), kind, names)


def _shape(spec: str) -> _Shape:
    """Of a resolved SPEC without a plan; the studies that concord knows have one of their own."""
    from concord_client.data import is_table

    adapter, _, where = spec.partition(":")
    if is_table(spec):
        return _table_shape(spec)
    if adapter in _SHAPES:
        return _SHAPES[adapter](Path(where))
    return _contract_shape(spec, load_plan(adapter))


def _table_shape(spec: str) -> _Shape:
    from concord_client.data import table_frames

    rows, columns = 0, dict[str, None]()
    for frame in table_frames(spec):
        rows += len(frame)
        columns |= dict.fromkeys(frame.columns)
    return _Shape(rows, "table", tuple(columns))


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
    from concord_client.data.files import files_of
    from concord_client.data.images import IMAGE_SUFFIXES

    return _Shape(sum(file.suffix.lower() in IMAGE_SUFFIXES for file in files_of(f"images:{path}").values()), "image")


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
