"""Text as whole numbers, for models that read one token after the other. No vocabulary is learned from anybody's texts:
an alphabet or a number of hashed units is stated in the plan.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.plan.preparation import RESERVED_TOKENS, Tokens

__all__ = ["PADDING", "UNKNOWN", "tokens"]

PADDING, UNKNOWN = 0, 1
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]")
"""A letter of a script without spaces, a run of other letters, or a mark."""


def tokens(texts: NDArray[Any], wanted: Tokens) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Of texts `(n,) str` the tokens `(n, length)`, and how many texts were cut or padded, and tokens are unknown.

    Texts are read in the form NFKC, words in small letters too; white space between characters counts as it is.
    """
    if wanted.pretrained:
        from concord_shared.pretrained.words import pretrained_tokens

        return pretrained_tokens(texts, wanted)
    number = _numbering(wanted)
    out = np.full((len(texts), wanted.length), PADDING, np.int64)
    cut = padded = 0
    for row, text in zip(out, texts, strict=True):
        units = _units(str(text), wanted)
        cut, padded = cut + (len(units) > wanted.length), padded + (len(units) < wanted.length)
        kept = units[: wanted.length]
        row[: len(kept)] = [number(unit) for unit in kept]
    return out, {"cut": cut, "padded": padded, "unknown": int((out == UNKNOWN).sum())}


def _units(text: str, wanted: Tokens) -> str | list[str]:
    text = unicodedata.normalize("NFKC", text)
    return text if wanted.unit == "character" else WORDS.findall(text.casefold())


def _numbering(wanted: Tokens) -> Callable[[str], int]:
    if wanted.alphabet:
        known = {letter: place for place, letter in enumerate(wanted.alphabet, RESERVED_TOKENS)}
        return lambda unit: known.get(unit, UNKNOWN)
    return lambda unit: RESERVED_TOKENS + _hash(unit) % wanted.vocabulary


@lru_cache(1 << 16)
def _hash(unit: str) -> int:
    digest = hashlib.blake2b(unit.encode("utf-8", "surrogatepass"), digest_size=8, person=b"concord-token")
    return int.from_bytes(digest.digest(), "big")
