"""What a set of images looks like: sizes, classes, what cannot be read. For its owner, and a contract to begin with."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from concord_client.data.images import IMAGE_SUFFIXES, load_archive, load_idx
from concord_shared.errors import DataError

__all__ = ["ImageSurvey", "survey_images"]

GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")
CLASSES_MAX = 1000


@dataclass(frozen=True)
class ImageSurvey:
    """images: readable ones. shapes: `channels×height×width` and how many images have it, most frequent first.

    classes: name, or number, and how many images have it. numbered: they are numbers. unreadable: files that are no
    images.
    """

    images: int
    shapes: Mapping[str, int]
    dtype: str
    classes: Mapping[str, int]
    unreadable: int = 0
    numbered: bool = False

    def document(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def contract(self) -> str:
        """The `[data]` section of a plan that these images fit, as TOML; "" where sizes or classes do not allow one."""
        names = list(self.classes)
        if self.numbered and 0 <= min(map(int, names)) <= max(map(int, names)) < CLASSES_MAX:
            names = [str(number) for number in range(max(map(int, names)) + 1)]  # a number is a place among the classes
        elif self.numbered:
            return ""
        known = self.dtype in ("uint8", "float32") and 2 <= len(names) <= CLASSES_MAX
        if len(self.shapes) != 1 or self.unreadable or not known:
            return ""
        shape = [int(side) for side in next(iter(self.shapes)).split("×")]
        data = {"task": "classification", "input": "image", "shape": shape, "dtype": self.dtype}
        return tomli_w.dumps({"data": data | {"classes": names}})


def survey_images(spec: str) -> ImageSurvey | None:
    """Of a resolved SPEC; None where it is none of images. Of a folder's files the headers are read, no pixels.

    Raises:
        DataError: it cannot be read.
    """
    adapter, _, where = spec.partition(":")
    match adapter:
        case "idx":
            return _of_arrays(_idx_parts(Path(where)))
        case "npz":
            arrays = load_archive(Path(where))
            parts = [(arrays[x], arrays[y]) for x, y in (("x", "y"), ("x_test", "y_test")) if {x, y} <= arrays.keys()]
            return _of_arrays(parts) if parts and parts[0][0].ndim > 2 and parts[0][1].dtype.kind != "f" else None
        case "images":
            return _of_folder(Path(where))
    return None


def _idx_parts(directory: Path) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    return [
        (load_idx(directory, f"{part}-images-idx3-ubyte"), load_idx(directory, f"{part}-labels-idx1-ubyte"))
        for part in ("train", "t10k")
    ]


def _of_arrays(parts: list[tuple[NDArray[Any], NDArray[Any]]]) -> ImageSurvey:
    shapes, classes = Counter[str](), Counter[Any]()
    for images, targets in parts:
        channels_last = images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3)
        sides = images.shape[-1:] + images.shape[1:-1] if channels_last else images.shape[1:]
        shapes["×".join(map(str, sides if len(sides) == 3 else (1, *sides)))] += len(images)
        words, counts = np.unique(targets, return_counts=True)
        classes.update(dict(zip(words.tolist(), counts.tolist(), strict=True)))
    found = {str(word): classes[word] for word in sorted(classes)}
    numbered = parts[0][1].dtype.kind in "biu"
    return ImageSurvey(
        sum(shapes.values()), dict(shapes.most_common()), str(parts[0][0].dtype), found, numbered=numbered
    )


def _of_folder(directory: Path) -> ImageSurvey:
    from PIL import Image, UnidentifiedImageError

    shapes, classes, unreadable = Counter[str](), Counter[str](), 0
    for name, file in _files(directory):
        try:
            with Image.open(file) as image:
                width, height = image.size
                channels = 1 if image.mode in GREY_MODES else 3
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            unreadable += 1
            continue
        shapes[f"{channels}×{height}×{width}"] += 1
        classes[name] += 1
    if not shapes:
        raise DataError(f"{directory}: expected one directory for each class with images in it, found none")
    return ImageSurvey(
        sum(shapes.values()), dict(shapes.most_common()), "uint8", dict(sorted(classes.items())), unreadable
    )


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """Class and file of each image, in training and test directories where there are such."""
    sources = [directory / part for part in ("train", "test")] if (directory / "train").is_dir() else [directory]
    for source in sources:
        folders = sorted(entry for entry in source.iterdir() if entry.is_dir()) if source.is_dir() else []
        for folder in folders:
            if not folder.name.startswith("."):
                files = (file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES)
                yield from ((folder.name, file) for file in files)
