import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord_shared.canonical import canonical_digest
from concord_shared.errors import ArtefactError
from concord_shared.models import layout_of
from concord_shared.models.registry import build_model
from concord_shared.plan import load_plan
from concord_shared.tensors import Layout, model_digest, read_safetensors, write_safetensors

SHAPES = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    min_size=1,
    max_size=5,
)


@given(SHAPES, st.randoms())
def test_join_and_split_are_inverse_in_any_order_of_names(shapes: dict[str, tuple[int, ...]], random: Any) -> None:
    layout = Layout.of(shapes)
    assert layout.size == sum(math.prod(shape) for shape in shapes.values())
    vector = np.arange(layout.size, dtype=np.float32)
    tensors = list(layout.split(vector).items())
    assert [name for name, _ in tensors] == sorted(shapes)
    random.shuffle(tensors)
    assert Layout.of({name: tensor.shape for name, tensor in tensors}) == layout
    assert np.array_equal(layout.join(dict(tensors)), vector)


def test_split_gives_views_in_name_order() -> None:
    vector = np.arange(7, dtype=np.float32)
    views = Layout.of({"w": (2, 3), "b": (1,)}).split(vector)
    assert views["b"].tolist() == [0.0]
    assert views["w"].tolist() == [[1, 2, 3], [4, 5, 6]]
    views["w"][0, 0] = 9
    assert vector[1] == 9


def test_split_refuses_another_length() -> None:
    with pytest.raises(AssertionError):
        Layout.of({"w": (3,)}).split(np.zeros(4, np.float32))


def test_join_refuses_a_broadcastable_shape() -> None:
    with pytest.raises((AssertionError, ValueError)):
        Layout.of({"w": (3,)}).join({"w": np.ones(1, np.float32)})


def test_layout_digest_is_of_names_and_shapes(vectors: dict[str, Any]) -> None:
    layout = Layout.of({"w": (2, 3), "b": ()})
    written = b'{"schema":"concord/layout/1","tensors":[["b","float32",[]],["w","float32",[2,3]]]}'
    assert layout.digest == hashlib.sha256(written).hexdigest()
    others = [{"w": (3, 2), "b": ()}, {"w": (6,), "b": ()}, {"v": (2, 3), "b": ()}, {"w": (2, 3), "b": (1,)}]
    assert len({Layout.of(other).digest for other in others} | {layout.digest}) == 5  # type: ignore[arg-type]


def by_hand(tensors: list[tuple[str, str, bytes]]) -> str:
    """The definition: length-prefixed name, dtype and shape, then the bytes with their length."""
    written = b"concord/model/1"
    for name, shape, data in tensors:
        for part in (name.encode(), b"float32", shape.encode()):
            written += struct.pack(">I", len(part)) + part
        written += struct.pack(">Q", len(data)) + data
    return hashlib.sha256(written).hexdigest()


def test_model_digest_is_the_hash_of_hand_written_bytes() -> None:
    layout = Layout.of({"w": (2, 1), "b": (), "none": (0, 3)})
    vector = np.array([0.5, -1.0, 2.0], np.float32)
    expected = by_hand(
        [("b", "", struct.pack("<f", 0.5)), ("none", "0,3", b""), ("w", "2,1", struct.pack("<2f", -1.0, 2.0))]
    )
    assert model_digest(layout, vector) == expected


def test_model_digest_sees_a_single_bit() -> None:
    layout, vector = Layout.of({"w": (3,)}), np.zeros(3, np.float32)
    changed = vector.copy()
    changed.view(np.uint32)[1] = 1
    assert model_digest(layout, vector) != model_digest(layout, changed)


def test_committed_vectors(vectors: dict[str, Any]) -> None:
    plan = load_plan("digits-cnn").plan
    layout = layout_of(plan, build_model(plan))
    assert layout.digest == vectors["digits-cnn"]["layout_digest"]
    shapes = [[name, "float32", list(shape)] for name, shape in vectors["digits-cnn"]["shapes"]]
    assert canonical_digest({"schema": "concord/layout/1", "tensors": shapes}) == layout.digest
    vector = np.arange(layout.size, dtype=np.float32) / np.float32(1024)
    assert model_digest(layout, vector) == vectors["digits-cnn"]["model_digest_of_ramp"]


def test_safetensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"a": np.array([[1, -0.0], [np.inf, 5e-324]]).T, "b": np.arange(3, dtype=np.float32), "c": np.array(7)}
    write_safetensors(tmp_path / "t", tensors, {"round": "3", "名": "值"})
    read, metadata = read_safetensors(tmp_path / "t")
    assert metadata == {"round": "3", "名": "值"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].tobytes() == tensor.tobytes()


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "t"
    write_safetensors(file, {"a": np.arange(10, dtype=np.float32)}, {})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtefactError, match="expected a safetensors file"):
        read_safetensors(file)


def test_where_a_file_cannot_be_written_the_reason_is_said(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"cannot write .*No such file or directory"):
        write_safetensors(tmp_path / "missing" / "t", {"a": np.arange(3)}, {})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="nothing"):
        read_safetensors(tmp_path / "nothing")
