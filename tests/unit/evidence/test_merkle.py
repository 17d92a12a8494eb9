"""The Merkle tree is that of RFC 6962: known vectors, the RFC's own definition, and laws."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord_shared.errors import DocumentRefusedError
from concord_shared.evidence.merkle import (
    completed,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    root_of,
    verify_consistency,
    verify_inclusion,
)

LEAVES = [
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
]  # fmt: skip
"""The inputs of the reference implementation (certificate-transparency, merkle_tree_test), and its roots and proofs."""
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSION = {
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (1, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
CONSISTENCY = {
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


class Tree:
    """Stored subtrees of a growing tree."""

    def __init__(self, leaves: list[bytes]) -> None:
        self.stored: dict[tuple[int, int], bytes] = {}
        for index, data in enumerate(leaves):
            self.stored[0, index] = leaf_hash(data)
            for level, place, found in completed(index, self.stored[0, index], self.read):
                self.stored[level, place] = found

    def read(self, level: int, index: int) -> bytes:
        return self.stored[level, index]


def by_definition(leaves: list[bytes]) -> bytes:
    """RFC 6962, 2.1, as it stands there."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + by_definition(leaves[:k]) + by_definition(leaves[k:])).digest()


KNOWN = Tree([bytes.fromhex(leaf) for leaf in LEAVES])


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_the_known_ones(size: int) -> None:
    assert root_of(size, KNOWN.read).hex() == ROOTS[size - 1]


def test_the_empty_tree_is_the_hash_of_nothing() -> None:
    assert root_of(0, KNOWN.read).hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("of", INCLUSION)
def test_proofs_of_inclusion_are_the_known_ones(of: tuple[int, int]) -> None:
    assert [part.hex() for part in inclusion_proof(*of, KNOWN.read)] == INCLUSION[of]


@pytest.mark.parametrize("of", CONSISTENCY)
def test_proofs_of_consistency_are_the_known_ones(of: tuple[int, int]) -> None:
    assert [part.hex() for part in consistency_proof(*of, KNOWN.read)] == CONSISTENCY[of]


@given(st.lists(st.binary(max_size=4), max_size=70))
def test_stored_subtrees_give_the_root_of_the_definition(leaves: list[bytes]) -> None:
    assert root_of(len(leaves), Tree(leaves).read) == by_definition(leaves)


@given(st.data(), st.integers(1, 150))
def test_every_proof_holds_and_no_other(data: st.DataObject, size: int) -> None:
    tree = Tree([b"%d" % number for number in range(size)])
    root = root_of(size, tree.read)
    index, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size))
    path, steps = inclusion_proof(index, size, tree.read), consistency_proof(old, size, tree.read)
    old_root = root_of(old, tree.read)
    verify_inclusion(tree.read(0, index), index, size, path, root)
    verify_consistency(old, old_root, size, root, steps)
    other = data.draw(st.integers(0, size - 1).filter(lambda each: each != index)) if size > 1 else None
    if other is not None:
        with pytest.raises(DocumentRefusedError):
            verify_inclusion(tree.read(0, index), other, size, path, root)
    for changed in ([*path, bytes(32)], path[:-1], [*path[:-1], bytes(32)]):
        if changed != path:
            with pytest.raises(DocumentRefusedError):
                verify_inclusion(tree.read(0, index), index, size, changed, root)
    for changed in ([*steps, bytes(32)], steps[:-1], [*steps[:-1], bytes(32)]):
        if changed != steps:
            with pytest.raises(DocumentRefusedError):
                verify_consistency(old, old_root, size, root, changed)
    if old:
        with pytest.raises(DocumentRefusedError):
            verify_consistency(old, bytes(32), size, root, steps)


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.lists(st.binary(max_size=40), max_size=70))
def test_no_garbage_passes_for_a_proof(one: int, other: int, proof: list[bytes]) -> None:
    with pytest.raises(DocumentRefusedError):
        verify_inclusion(b"\1" * 32, one, other, proof, b"\2" * 32)
    if one:
        with pytest.raises(DocumentRefusedError):
            verify_consistency(one, b"\1" * 32, other, b"\2" * 32, proof)
