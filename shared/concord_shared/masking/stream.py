"""The mask stream: AES-256 in counter mode, expanded and added in one pass, chunk by chunk within the cache.

The key is used once (one mask of one attempt), so the counter begins at 0. The GIL is released while a chunk is made.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

__all__ = ["add_masks"]

CHUNK_BYTES = 256 << 10
ZEROS = bytes(CHUNK_BYTES)
AES_BLOCK_BYTES = 16

Words = NDArray[np.unsignedinteger[Any]]


def add_masks(words: Words, plus: Iterable[bytes], minus: Iterable[bytes], threads: int = 1) -> None:
    """Adds to `words`, in place, the stream of each key of `plus`, and takes off that of each of `minus`.

    Args:
        words: little-endian ring words `(d,)`, uint32 or uint64; sums are modulo their width.
        plus, minus: keys of 32 bytes.
        threads: how many parts of `words` are worked on at a time.

    Chunk by chunk over all keys: `words` pass through memory once, whatever the number of keys.
    """
    keys = [(key, np.add) for key in plus] + [(key, np.subtract) for key in minus]
    chunk = CHUNK_BYTES // words.dtype.itemsize
    part = chunk * max(1, -(-len(words) // (chunk * threads)))
    starts = range(0, len(words), part)
    if len(starts) <= 1:
        _add(words, 0, keys)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda start: _add(words[start : start + part], start * words.dtype.itemsize, keys), starts))


def _add(words: Words, offset: int, keys: list[tuple[bytes, Any]]) -> None:
    """offset: bytes of each stream before these words, a multiple of the cipher's block."""
    counter = (offset // AES_BLOCK_BYTES).to_bytes(AES_BLOCK_BYTES, "big")
    streams = [(Cipher(AES256(key), CTR(counter)).encryptor().update_into, apply) for key, apply in keys]
    buffer = bytearray(CHUNK_BYTES)
    size = CHUNK_BYTES // words.dtype.itemsize
    mask = np.frombuffer(buffer, words.dtype)
    for start in range(0, len(words), size):
        part = words[start : start + size]
        filled = ZEROS if len(part) == size else memoryview(ZEROS)[: part.nbytes]
        for update_into, apply in streams:
            update_into(filled, buffer)
            apply(part, mask[: len(part)], out=part)
