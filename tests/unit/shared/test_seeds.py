import hashlib
import hmac
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from concord_shared.seeds import derive_seed


def hkdf(seed: int, info: bytes) -> int:
    """RFC 5869 with SHA-256, no salt, 8 bytes, written out; the top bit is dropped."""
    key = hmac.digest(b"\0" * 32, seed.to_bytes(8, "big"), hashlib.sha256)
    return int.from_bytes(hmac.digest(key, info + b"\x01", hashlib.sha256)[:8], "big") >> 1


def test_is_hkdf_of_seed_purpose_round_and_node() -> None:
    assert derive_seed(7, "train", 3, "köln") == hkdf(7, '["concord/seed/1","train",3,"köln"]'.encode())
    assert derive_seed(0, "init") == hkdf(0, b'["concord/seed/1","init",0,""]')


def test_committed_vectors(vectors: dict[str, Any]) -> None:
    assert len(vectors["derive_seed"]) >= 4
    for vector in vectors["derive_seed"]:
        assert derive_seed(*vector["arguments"]) == vector["seed"]


@given(st.integers(0, 2**63 - 1), st.text(max_size=5), st.integers(0, 10**6), st.text(max_size=5))
def test_fits_what_torch_and_numpy_take(seed: int, purpose: str, round_number: int, node: str) -> None:
    assert 0 <= derive_seed(seed, purpose, round_number, node) < 2**63


def test_every_argument_matters_and_none_can_be_shifted_into_another() -> None:
    arguments: list[tuple[Any, ...]] = [
        (1, "a", 1, "n"),
        (2, "a", 1, "n"),
        (1, "b", 1, "n"),
        (1, "a", 2, "n"),
        (1, "a", 1, "m"),
        (1, "a", 11, ""),
        (1, "a1", 1, ""),
        (1, 'a",1,"', 1, ""),
    ]
    assert len({derive_seed(*a) for a in arguments}) == len(arguments)
