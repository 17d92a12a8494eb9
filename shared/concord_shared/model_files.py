"""A trained model as a file: safetensors, with the plan and the preprocessing that belong to it in its header.

Written by the coordinator, read by everybody as if a stranger had written it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from concord_shared.errors import ArtefactError, DocumentRefusedError
from concord_shared.plan.schema import Plan
from concord_shared.preprocessing import Fitted
from concord_shared.tensors import Float32Vector, Layout, model_digest, write_safetensors

__all__ = ["HEADER_BYTES_MAX", "MODEL_FORMAT", "read_model", "read_strictly", "write_model"]

MODEL_FORMAT = "concord/model/1"
HEADER_BYTES_MAX = 16 << 20


def write_model(path: Path, plan: Plan, layout: Layout, theta: Float32Vector, preprocessing: Mapping[str, Any]) -> None:
    """Raises: ArtefactError: the file system refuses."""
    metadata = {
        "format": MODEL_FORMAT,
        "plan_digest": plan.digest,
        "model_digest": model_digest(layout, theta),
        "preprocessing": json.dumps(dict(preprocessing)),
    }
    write_safetensors(path, layout.split(theta), metadata)


def read_model(file: BinaryIO, size: int, plan: Plan, layout: Layout, digest: str) -> tuple[Float32Vector, Fitted]:
    """The parameters `(d,)` and what prepares inputs, after these checks:

    1. the tensors are exactly the plan's, and finite
    2. the digest over them is the one that was promised
    3. the plan that it names is this one, and its preprocessing is of the plan's contract, and complete

    Raises:
        DocumentRefusedError: with the check that it failed.
    """
    theta, metadata = read_strictly(file, size, layout)
    if model_digest(layout, theta) != digest:
        raise DocumentRefusedError("its tensors are not those of the released model")
    if metadata.get("plan_digest") != plan.digest:
        raise DocumentRefusedError("it says that another plan made it")
    try:
        fitted = Fitted.from_document(json.loads(metadata["preprocessing"]))
    except (KeyError, ValueError, RecursionError, ArtefactError) as error:
        raise DocumentRefusedError("it does not say how its inputs are prepared") from error
    if (fitted.contract, fitted.preprocessing) != (plan.data, plan.preprocessing):
        raise DocumentRefusedError("its inputs are prepared for another contract than the plan's")
    if plan.needs_statistics and not fitted.is_complete:
        raise DocumentRefusedError("what prepares its inputs does not describe every column of the contract")
    return theta, fitted


def read_strictly(file: BinaryIO, size: int, layout: Layout) -> tuple[Float32Vector, dict[str, str]]:
    """The vector `(d,)` and the metadata of a safetensors file that holds exactly the layout's tensors.

    Nothing is taken from the header that the layout does not say: names, dtypes, shapes and the number of bytes must
    be the expected ones, without gaps, overlaps or duplicate keys; values must be finite.

    Raises:
        DocumentRefusedError: with the difference.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(HEADER_BYTES_MAX, size - 8) or size != 8 + length + 4 * layout.size:
        raise DocumentRefusedError(
            f"expected a header and {4 * layout.size} bytes of tensors, got a file of {size} bytes"
        )
    entries, metadata = _header(file.read(length))
    if set(entries) != {name for name, _ in layout.entries}:
        raise DocumentRefusedError(f"expected the tensors of the plan's model, got {sorted(entries)[:20]}")
    starts = {name: _start(name, entries[name], shape) for name, shape in layout.entries}
    vector, covered = np.empty(layout.size, np.float32), 0
    views = layout.split(vector)
    for name, start in sorted(starts.items(), key=lambda item: item[1]):
        if start != covered:
            raise DocumentRefusedError(f"tensor {name} begins at byte {start}, expected {covered}")
        views[name][...] = np.frombuffer(file.read(views[name].nbytes), "<f4").reshape(views[name].shape)
        covered += views[name].nbytes
    if not np.isfinite(vector).all():
        raise DocumentRefusedError("the model holds NaN or Inf")
    return vector, metadata


def _header(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise DocumentRefusedError(f"the header cannot be read: {str(error)[:100]}") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DocumentRefusedError("the header's metadata are not texts")
    return header, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands in it twice")
    return fields


def _start(name: str, entry: Any, shape: tuple[int, ...]) -> int:
    """Where a tensor begins; it is of the expected type, shape and length."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DocumentRefusedError(f"tensor {name} is not described as safetensors does")
    offsets = entry["data_offsets"]
    if entry["dtype"] != "F32" or json.dumps(entry["shape"]) != json.dumps(shape):
        raise DocumentRefusedError(
            f"tensor {name}: expected F32 {list(shape)}, got {str(entry['dtype'])[:20]} {str(entry['shape'])[:80]}"
        )
    if not isinstance(offsets, list) or [type(each) for each in offsets] != [int, int]:
        raise DocumentRefusedError(f"tensor {name} has no place in the file")
    size = 4 * int(np.prod(shape, dtype=object))
    if offsets[1] - offsets[0] != size:
        raise DocumentRefusedError(f"tensor {name}: expected {size} bytes, got {offsets[1] - offsets[0]}")
    return int(offsets[0])
