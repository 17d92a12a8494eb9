"""One canonical form for everything that is hashed or signed.

UTF-8 JSON, sorted keys, no white space, NFC strings, integers as numbers, floats as `float.hex()` strings.
Two parties that mean the same thing write the same bytes; the committed test vectors pin them, because
changing them would void every approval that exists.
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["canonical_bytes", "canonical_digest"]


def canonical_bytes(value: Any) -> bytes:
    """Encodes `value` (mappings with string keys, sequences, str, int, float, bool, None).

    Raises:
        TypeError: for any other type.
        ValueError: for NaN and Inf, and for two keys that are equal after NFC.
    """
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def canonical_digest(value: Any) -> str:
    """SHA-256 of the canonical bytes, hexadecimal."""
    return hashlib.sha256(canonical_bytes(value)).hexdigest()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"a canonical document holds no {value}")
        return (value + 0.0).hex()  # -0.0 means 0.0
    if isinstance(value, Mapping):
        plain = {_key(key): _plain(item) for key, item in value.items()}
        if len(plain) != len(value):
            raise ValueError("two keys are equal after Unicode normalisation")
        return plain
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item) for item in value]
    raise TypeError(f"a canonical document holds no {type(value).__name__}")


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a key of a canonical document is a string, not {type(key).__name__}")
    return unicodedata.normalize("NFC", key)
