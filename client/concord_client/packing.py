"""A message's content as one JSON header and plain buffers: for a pipe to this program's own process, and for a file.

Nothing is unpickled, and large tensors pass without being joined with anything.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from concord_shared.errors import ArtefactError
from concord_shared.files import explain

__all__ = ["pack", "read_packed", "unpack", "write_packed"]

Buffers = list[bytes]
MAGIC = b"concord1"
HEADER_BYTES_MAX = 64 << 20


def pack(content: RecordDict) -> tuple[dict[str, Any], Buffers]:
    """The header, and each array's bytes in its order. Records of metrics are left out: no message of ours has any."""
    arrays, buffers = [], []
    for record, held in content.array_records.items():
        for name, array in held.items():
            arrays.append([record, name, array.dtype, list(array.shape), array.stype])
            buffers.append(array.data)
    config = {
        record: {key: {"hex": value.hex()} if isinstance(value, bytes) else value for key, value in held.items()}
        for record, held in content.config_records.items()
    }
    return {"config": config, "arrays": arrays}, buffers


def unpack(header: dict[str, Any], buffers: Sequence[bytes]) -> RecordDict:
    """The inverse of `pack`."""
    records: dict[str, dict[str, Array]] = {}
    for (record, name, dtype, shape, stype), data in zip(header["arrays"], buffers, strict=True):
        records.setdefault(record, {})[name] = Array(dtype, tuple(shape), stype, data)
    content = RecordDict()
    for name, held in records.items():
        content[name] = ArrayRecord(held)
    for name, fields in header["config"].items():
        content[name] = ConfigRecord(
            {key: bytes.fromhex(value["hex"]) if isinstance(value, dict) else value for key, value in fields.items()}
        )
    return content


def write_packed(path: Path, header: dict[str, Any], buffers: Sequence[bytes]) -> None:
    """Replaces the file. Not flushed to the disk: after a power cut it may be torn, which its signature shows.

    Raises:
        ArtefactError: it cannot be written.
    """
    text = json.dumps({**header, "sizes": [len(data) for data in buffers]}).encode()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(MAGIC + len(text).to_bytes(8, "big") + text)
            for data in buffers:
                file.write(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ArtefactError(f"cannot write {path}: {explain(error)}") from error


def read_packed(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> tuple[dict[str, Any], Buffers] | None:
    """What `write_packed` wrote; None where it is absent or torn, or its header is not the one that is `wanted`."""
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return None
            size = int.from_bytes(file.read(8), "big")
            header = json.loads(file.read(min(size, HEADER_BYTES_MAX)))
            if not wanted(header):
                return None
            buffers = [file.read(size) for size in header.pop("sizes")]
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return header, buffers
