"""Words of a column that no contract lists, as numbers of bins: the same word is in the same bin at every node, and
nobody's words are told.
"""

import hashlib
import re
from collections.abc import Iterable

from concord_shared.plan.data import Column
from concord_shared.text_features import tidy_text

__all__ = ["bins_of"]

A_BIN = re.compile(r"bin (\d{1,5})")


def bins_of(words: Iterable[str], column: Column) -> list[int]:
    """For each word its bin, 0…column.bins - 1, by BLAKE2b over its NFKC form, keyed by the column's name.

    A bin's own name is in that bin, so that rows which were written with names of bins are read as they were.
    """
    person = hashlib.blake2b(column.name.encode(), digest_size=16).digest()
    return [_bin(tidy_text(word), column.bins, person) for word in words]


def _bin(word: str, bins: int, person: bytes) -> int:
    named = A_BIN.fullmatch(word)
    if named and int(named[1]) < bins:
        return int(named[1])
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8, person=person).digest()
    return int.from_bytes(digest, "big") % bins
