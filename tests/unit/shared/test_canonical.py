import enum
import hashlib
import json
import math
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord_shared.canonical import canonical_bytes, canonical_digest

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | TEXT


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


DOCUMENTS = st.recursive(
    SCALARS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT.map(_nfc), inner, max_size=4),
    max_leaves=12,
)


def plainly(value: Any) -> Any:
    """An independent statement of the canonical form, as a JSON value."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, str):
        return _nfc(value)
    if isinstance(value, dict):
        return {key: plainly(item) for key, item in value.items()}
    return [plainly(item) for item in value] if isinstance(value, list) else value


def test_bytes_written_by_hand() -> None:
    value = {"ü": "u\u0308", "b": 1.5, "a": [1, True, None, -0.25, (2,)], "B": {"z": "", "y": 0}}
    expected = (
        b'{"B":{"y":0,"z":""},"a":[1,true,null,"-0x1.0000000000000p-2",[2]],'
        b'"b":"0x1.8000000000000p+0","\xc3\xbc":"\xc3\xbc"}'
    )
    assert canonical_bytes(value) == expected
    assert canonical_digest(value) == hashlib.sha256(expected).hexdigest()


def test_committed_vectors(vectors: dict[str, Any]) -> None:
    assert len(vectors["canonical"]) >= 4
    for vector in vectors["canonical"]:
        assert canonical_bytes(vector["value"]).decode() == vector["text"]
        assert hashlib.sha256(vector["text"].encode()).hexdigest() == vector["sha256"]
        assert canonical_digest(vector["value"]) == vector["sha256"]


@given(DOCUMENTS)
def test_reads_back_as_the_same_value_and_only_as_it(document: Any) -> None:
    written = canonical_bytes(document)
    assert json.loads(written) == plainly(document)
    assert canonical_bytes(json.loads(written)) == written


@given(st.dictionaries(TEXT.map(_nfc), SCALARS, min_size=2, max_size=6), st.randoms())
def test_order_of_keys_does_not_matter(document: dict[str, Any], random: Any) -> None:
    items = list(document.items())
    random.shuffle(items)
    assert canonical_bytes(dict(items)) == canonical_bytes(document)


@given(TEXT)
def test_every_unicode_spelling_gives_the_same_bytes(text: str) -> None:
    spellings = {canonical_bytes({text_form: text_form}) for text_form in map(_forms(text), ("NFC", "NFD"))}
    assert len(spellings) == 1


def _forms(text: str) -> Any:
    return lambda form: unicodedata.normalize(form, text)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
def test_floats_differ_in_every_bit(pair: list[float]) -> None:
    same = np.float64(pair[0]).tobytes() == np.float64(pair[1]).tobytes()
    assert (canonical_bytes(pair[0]) == canonical_bytes(pair[1])) is same


@pytest.mark.parametrize(("one", "other"), [(1, True), (0, False), (1, 1.0), (0, None), ("", None), ([], {}), ("1", 1)])
def test_values_that_python_confuses_stay_apart(one: Any, other: Any) -> None:
    assert canonical_bytes(one) != canonical_bytes(other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_refuses_floats_that_are_not_numbers(value: float) -> None:
    with pytest.raises(ValueError, match="holds no"):
        canonical_bytes({"a": [value]})


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize("value", [b"x", bytearray(b"x"), {1}, object(), np.int64(1), np.float32(1), 1j, Colour.RED])
def test_refuses_other_types(value: Any) -> None:
    with pytest.raises(TypeError, match="holds no"):
        canonical_bytes([value])


@pytest.mark.parametrize("key", [1, None, 1.5, True])
def test_refuses_keys_that_are_not_text(key: Any) -> None:
    with pytest.raises(TypeError, match="key"):
        canonical_bytes({key: 1})


def test_refuses_two_keys_that_normalise_to_one() -> None:
    with pytest.raises(ValueError, match="equal after"):
        canonical_bytes({"é": 1, "e\u0301": 2})


def test_refuses_half_a_surrogate_pair() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        canonical_bytes("\ud800")
