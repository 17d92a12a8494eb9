"""A model as one flat vector and its layout; digests of both; safetensors files.

The engine works on one contiguous `(d,) float32` vector. The layout says which tensor lies where.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from concord_shared.canonical import canonical_digest
from concord_shared.errors import ArtefactError
from concord_shared.files import replacing

__all__ = ["Float32Vector", "Layout", "model_digest", "read_safetensors", "write_safetensors"]

Float32Vector = NDArray[np.float32]
Tensors = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a model's float32 tensors, in name order."""

    entries: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> "Layout":
        return cls(tuple(sorted((name, tuple(shape)) for name, shape in shapes.items())))

    @cached_property
    def size(self) -> int:
        """Number of coordinates d."""
        return sum(math.prod(shape) for _, shape in self.entries)

    @cached_property
    def digest(self) -> str:
        return canonical_digest(
            {"schema": "concord/layout/1", "tensors": [[n, "float32", list(s)] for n, s in self.entries]}
        )

    def split(self, vector: Float32Vector) -> dict[str, Float32Vector]:
        """Views into `vector` (d,), one per tensor, in its shape."""
        assert vector.shape == (self.size,)
        views, start = {}, 0
        for name, shape in self.entries:
            stop = start + math.prod(shape)
            views[name] = vector[start:stop].reshape(shape)
            start = stop
        return views

    def join(self, tensors: Mapping[str, NDArray[np.generic]]) -> Float32Vector:
        """One new vector (d,) float32 from the named tensors."""
        vector = np.empty(self.size, np.float32)
        for name, view in self.split(vector).items():
            assert tensors[name].shape == view.shape, f"{name}: {tensors[name].shape} is not {view.shape}"
            view[...] = tensors[name]
        return vector


def model_digest(layout: Layout, vector: Float32Vector) -> str:
    """SHA-256 over, per tensor in name order: length-prefixed name, dtype, shape, little-endian bytes."""
    digest = hashlib.sha256(b"concord/model/1")
    for name, view in layout.split(vector).items():
        for part in (name.encode(), b"float32", ",".join(map(str, view.shape)).encode()):
            digest.update(len(part).to_bytes(4, "big") + part)
        data = np.ascontiguousarray(view, dtype="<f4").reshape(-1).view(np.uint8)
        digest.update(data.nbytes.to_bytes(8, "big"))
        digest.update(data.data)
    return digest.hexdigest()


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str]) -> None:
    """Replaces `path`, without a copy of the tensors. Raises: ArtefactError: the file system refuses."""
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, dict(metadata))
        except SafetensorError as error:
            raise _as_os_error(error) from error


def _as_os_error(error: SafetensorError) -> OSError:
    """The library tells of a full disk in words alone."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Reads our own file.

    Raises:
        ArtefactError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ArtefactError(
            f"{path}: expected a safetensors file of concord, got: {error}. Was the run stopped before its first round?"
        ) from error
