"""The mask stream: the vector of the standard, and the same words however they are cut."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from concord_shared.masking.stream import CHUNK_BYTES, add_masks

KEY = bytes(range(32))


def test_the_vector_of_the_design() -> None:
    """HKDF(00…1f, salt 0, "fl/secagg/v1/self") expanded by AES-256-CTR from 0; made by a second implementation."""
    key = HKDF(SHA256(), 32, bytes(32), b"fl/secagg/v1/self").derive(KEY)
    assert key.hex() == "f2ee059810087d1c0f0ec7470874b1be7537d09a09b7af4b836cbfd3c9163177"
    words = np.zeros(8, "<u4")
    add_masks(words, [key], [])
    assert [f"{word:08x}" for word in words] == [
        "f7019638", "8b0e91b9", "2b99fb35", "3a20281e", "9fdf5491", "dcedc731", "e0a11790", "85903679",
    ]  # fmt: skip


def test_it_is_the_counter_mode_of_the_standard() -> None:
    """By the block cipher alone, block by block."""
    encrypt = Cipher(AES256(KEY), ECB()).encryptor()
    blocks = b"".join(encrypt.update(counter.to_bytes(16, "big")) for counter in range(5))
    words = np.zeros(20, "<u4")
    add_masks(words, [KEY], [])
    assert words.tobytes() == blocks


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
@pytest.mark.parametrize("size", [1, 3, CHUNK_BYTES // 4, CHUNK_BYTES // 4 + 1, 5 * CHUNK_BYTES // 4 + 7])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_same_words_for_any_number_of_threads(dtype: str, size: int, threads: int) -> None:
    whole, parts = np.zeros(size, dtype), np.zeros(size, dtype)
    add_masks(whole, [KEY, bytes(32)], [KEY[::-1]])
    add_masks(parts, [KEY, bytes(32)], [KEY[::-1]], threads)
    assert np.array_equal(whole, parts)
    add_masks(parts, [KEY[::-1]], [KEY, bytes(32)], threads)
    assert not parts.any()
