"""The mask stream: AES-256 in counter mode, expanded and added in one pass, chunk by chunk within the cache.

The key is used once (one mask of one attempt), so the counter begins at 0. The GIL is released while a chunk is made.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

__all__ = ["add_masks"]

CHUNK_BYTES = 256 << 10
ZEROS = bytes(CHUNK_BYTES)

Words = NDArray[np.unsignedinteger[Any]]


def add_masks(words: Words, plus: Iterable[bytes], minus: Iterable[bytes]) -> None:
    """Adds to `words`, in place, the stream of each key of `plus`, and takes off that of each of `minus`.

    Args:
        words: little-endian ring words `(d,)`, uint32 or uint64; sums are modulo their width.
        plus, minus: keys of 32 bytes.

    Chunk by chunk over all keys: `words` pass through memory once, whatever the number of keys.
    """
    streams = [(_stream(key), np.add) for key in plus] + [(_stream(key), np.subtract) for key in minus]
    buffer = bytearray(CHUNK_BYTES)
    size = CHUNK_BYTES // words.dtype.itemsize
    mask = np.frombuffer(buffer, words.dtype)
    for start in range(0, len(words), size):
        part = words[start : start + size]
        filled = ZEROS if len(part) == size else memoryview(ZEROS)[: part.nbytes]
        for update_into, apply in streams:
            update_into(filled, buffer)
            apply(part, mask[: len(part)], out=part)


def _stream(key: bytes) -> Any:
    return Cipher(AES256(key), CTR(bytes(16))).encryptor().update_into
