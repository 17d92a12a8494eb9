"""Images: scikit-learn's digits, MNIST-style IDX files, `.npz` arrays, folders of one directory a class."""

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_client.data.contract import Tally, shortened
from concord_client.data.dataset import RawData, Split
from concord_shared.errors import DataError
from concord_shared.plan.schema import Plan

__all__ = ["load_archive", "load_idx", "read_digits", "read_folder", "read_idx", "read_npz"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def read_digits(_: Path, __: Plan, labelled: bool = True) -> RawData:
    """scikit-learn's bundled digits, 1,797 images of 8×8, the grey values 0…16 stretched to 0…255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return RawData(images, digits.target.astype(np.int64), groups={"label": digits.target})


def read_idx(directory: Path, plan: Plan, labelled: bool = True) -> RawData:
    """`train-images-idx3-ubyte[.gz]` and its three companions, as MNIST and Fashion-MNIST ship them."""
    parts = [
        (load_idx(directory, f"{p}-images-idx3-ubyte"), load_idx(directory, f"{p}-labels-idx1-ubyte"))
        for p in ("train", "t10k")
    ]
    for (images, labels), part in zip(parts, ("train", "t10k"), strict=True):
        if len(images) != len(labels):
            raise DataError(f"{directory}: {part} has {len(images)} images but {len(labels)} labels")
    targets = np.concatenate([labels for _, labels in parts]).astype(np.int64)
    split = np.repeat([Split.TRAIN, Split.TEST], [len(labels) for _, labels in parts]).astype(np.uint8)
    return RawData(_joined(directory, [images for images, _ in parts])[:, None], targets, split, {"label": targets})


def read_npz(file: Path, plan: Plan, labelled: bool = True) -> RawData:
    """Arrays `x`, `y` and, for an own test split, `x_test`, `y_test`; other `(n,)` arrays become groups."""
    arrays = load_archive(file)
    if not labelled and "x" in arrays:
        arrays.setdefault("y", np.full(len(arrays["x"]), (plan.data.target_range or (0, 0))[0]))
    missing = {"x", "y"} - arrays.keys()
    if missing or ("x_test" in arrays) != ("y_test" in arrays):
        raise DataError(f"{file}: expected the arrays x and y (and x_test with y_test), found {sorted(arrays)}")
    names = ["", "_test"] if "x_test" in arrays else [""]
    for name in names:
        if len(arrays[f"x{name}"]) != len(arrays[f"y{name}"]):
            raise DataError(f"{file}: x{name} has {len(arrays[f'x{name}'])} rows but y{name} {len(arrays[f'y{name}'])}")
        _check_arrays(file, name, arrays, plan)
    inputs = _joined(file, [arrays[f"x{name}"] for name in names])
    targets = _joined(file, [arrays[f"y{name}"] for name in names])
    split = np.repeat([Split.TRAIN, Split.TEST][: len(names)], [len(arrays[f"y{name}"]) for name in names])
    groups = {name: array for name, array in arrays.items() if array.shape == (len(targets),) and name != "y"}
    return RawData(
        _as_inputs(inputs, plan),
        _as_targets(targets, plan),
        split.astype(np.uint8) if len(names) == 2 else None,
        groups,
    )


def read_folder(directory: Path, plan: Plan, labelled: bool = True) -> RawData:
    """`DIR/CLASS/*.png`, or `DIR/train/CLASS/…` and `DIR/test/CLASS/…`."""
    if (directory / "train").is_dir():
        sources = {Split.TRAIN: directory / "train", Split.TEST: directory / "test"}
    else:
        sources = {Split.TRAIN: directory}
    images, targets, split = [], [], []
    tally = Tally(plan.data)
    for part, source in sources.items():
        for code, number, file in _class_files(source, plan, tally):
            pixels = _pixels(file, plan, tally, f"number {number} of class {plan.data.classes[code]}")
            if pixels is not None:
                images.append(pixels)
                targets.append(code)
                split.append(part)
    if not tally.is_clean:
        tally.raise_for(str(directory))
    if not images:
        raise DataError(f"{directory}: expected one directory for each class with images in it, found none")
    labels = np.array(targets, np.int64)
    return RawData(
        np.stack(images), labels, np.array(split, np.uint8) if len(sources) == 2 else None, {"label": labels}
    )


def load_idx(directory: Path, stem: str) -> NDArray[np.uint8]:
    """One of the four files, plain or compressed. Raises: DataError: it is not there, or damaged."""
    path = next((p for p in (directory / f"{stem}.gz", directory / stem) if p.is_file()), None)
    if path is None:
        raise DataError(f"{directory}: expected the file {stem} or {stem}.gz")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is damaged ({error}); fetch it again") from error
    dimensions = 3 if "images" in stem else 1
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise DataError(f"{path}: expected an IDX file (magic {magic.hex()}), got {content[:4].hex() or 'nothing'}")
    header = 4 + 4 * dimensions
    shape = tuple(int(n) for n in np.frombuffer(content[4:header].ljust(4 * dimensions, b"\0"), ">u4"))
    if len(content) - header != np.prod(shape, dtype=object):
        raise DataError(f"{path}: the header says shape {list(shape)}, but {len(content) - header} bytes follow")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def load_archive(file: Path) -> dict[str, NDArray[Any]]:
    """Raises: DataError: it is no archive of plain arrays."""
    try:
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file}: expected an .npz archive of plain arrays, got: {type(error).__name__}") from error


def _check_arrays(file: Path, name: str, arrays: dict[str, NDArray[Any]], plan: Plan) -> None:
    """Numbers where numbers belong; values are never told."""
    x, y = arrays[f"x{name}"], arrays[f"y{name}"]
    if x.dtype.kind not in "biuf" or x.ndim < 2:
        raise DataError(f"{file}: x{name}: expected numbers, one row each, got {x.dtype.kind!r} of {x.ndim} dimensions")
    if plan.data.task == "own":
        if y.dtype.kind not in "biuf":
            raise DataError(f"{file}: y{name}: expected numbers, got {y.dtype}")
        return
    if y.ndim != 1 or y.dtype.kind not in "biufUS":
        raise DataError(f"{file}: y{name}: expected one target for each row, got {y.ndim} dimensions of {y.dtype}")
    whole = y.dtype.kind != "f" or bool(np.equal(np.mod(y, 1), 0).all())
    if plan.data.task == "classification" and not whole:
        raise DataError(f"{file}: y{name}: expected class indices or names, got fractions")
    if plan.data.task == "regression" and y.dtype.kind in "US":
        raise DataError(f"{file}: y{name}: expected numbers, got text")
    if plan.data.input == "table" and x.reshape(len(x), -1).shape[1] != len(plan.data.columns):
        raise DataError(
            f"{file}: x{name}: expected {len(plan.data.columns)} columns as in the contract, got {x.shape[1:]}"
        )


def _joined(source: Path, parts: list[NDArray[Any]]) -> NDArray[Any]:
    if len({(part.shape[1:], part.dtype) for part in parts}) > 1:
        shapes = " and ".join(f"{list(part.shape[1:])} {part.dtype}" for part in parts)
        raise DataError(f"{source}: training and test rows differ in shape or type: {shapes}")
    return np.concatenate(parts)


def _as_inputs(inputs: NDArray[Any], plan: Plan) -> NDArray[Any]:
    match plan.data.input:
        case "image":
            return _as_images(inputs, plan)
        case "array":
            return inputs
    return inputs.reshape(len(inputs), -1).astype(np.float64)


def _as_images(inputs: NDArray[Any], plan: Plan) -> NDArray[Any]:
    if inputs.ndim == 3:
        return inputs[:, None]
    if inputs.ndim == 4 and inputs.shape[1:] != plan.data.shape and inputs.shape[-1] == plan.data.shape[0]:
        return np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))
    return inputs


def _as_targets(targets: NDArray[Any], plan: Plan) -> NDArray[Any]:
    if plan.data.task in ("regression", "own"):
        return targets.astype(np.float64)
    if targets.dtype.kind in "US":
        codes = {name: code for code, name in enumerate(plan.data.classes)}
        return np.array([codes.get(str(value), -1) for value in targets], np.int64)
    return targets.astype(np.int64)


def _class_files(source: Path, plan: Plan, tally: Tally) -> Iterator[tuple[int, int, Path]]:
    """Class, number within it in the order of names, and file of each image; other directories are counted."""
    if not source.is_dir():
        raise DataError(f"{source}: no such directory")
    for folder in sorted(entry for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
        if folder.name not in plan.data.classes:
            names = shortened(plan.data.classes)
            what = f"lie in a directory whose name is none of the contract's classes ({names})"
            tally.note("class", "images", max(1, len(files)), f"{{count}} {what}")
            continue
        for number, file in enumerate(files, 1):
            yield plan.data.classes.index(folder.name), number, file


def _pixels(file: Path, plan: Plan, tally: Tally, place: str) -> NDArray[np.uint8] | None:
    """`(channels, height, width)`; None for an image that differs from the contract, which is counted."""
    from PIL import Image, UnidentifiedImageError

    channels, height, width = plan.data.shape
    if channels not in (1, 3):
        raise DataError(f"an image folder has 1 (grey) or 3 (colour) channels, the contract asks for {channels}")
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.uint8)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        what = "are not readable: truncated, damaged or no images; the first is"
        tally.note("image", "images", 1, f"{{count}} {what} {place}, in the order of file names")
        return None
    if pixels.shape[:2] != (height, width):
        what = f"are not of {width}×{height} pixels; resize them first. The first is"
        tally.note("shape", "images", 1, f"{{count}} {what} {place}, in the order of file names")
        return None
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)
