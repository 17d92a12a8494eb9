import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from concord_shared.quantiser import CHUNK, clip_to_bound, dequantise, extent_of, levels_of, norm_of, quantise

RINGS = st.sampled_from([32, 64])
NODES = st.integers(1, 100_000)


@pytest.mark.parametrize(
    ("ring_bits", "nodes", "levels"),
    [
        (32, 1, 16_777_215),
        (32, 127, 16_777_215),
        (32, 128, 16_777_214),  # (2³¹ - 1) // 128 - 1
        (32, 1000, 2_147_482),
        (64, 10, 4_503_599_627_370_495),
        (64, 2048, 4_503_599_627_370_494),
    ],
)
def test_levels_by_hand(ring_bits: int, nodes: int, levels: int) -> None:
    assert levels_of(ring_bits, nodes) == levels


@given(RINGS, NODES)
@example(32, 127)
@example(32, 128)
@example(64, 2047)
@example(64, 2048)
def test_levels_are_the_most_that_a_cohort_can_sum(ring_bits: int, nodes: int) -> None:
    levels, half = levels_of(ring_bits, nodes), 1 << (ring_bits - 1)
    assert nodes * (levels + 1) < half
    capped = levels == (1 << (24 if ring_bits == 32 else 52)) - 1
    assert capped or nodes * (levels + 2) >= half


@given(RINGS, st.sampled_from([1, 2, 127, 128, 1000, 99_999]), st.sampled_from([-1.0, 1.0]), st.floats(1e-3, 1e6))
def test_a_whole_cohort_at_the_bound_does_not_overflow(ring_bits: int, nodes: int, sign: float, bound: float) -> None:
    one = quantise(np.array([sign * bound]), 1.0, bound, ring_bits, nodes)
    total = nodes * int(one[0])
    assert abs(total) < 1 << (ring_bits - 1)
    assert levels_of(ring_bits, nodes) - 1 <= abs(int(one[0])) <= levels_of(ring_bits, nodes)
    assert dequantise(np.array([total], one.dtype), nodes, bound, ring_bits, nodes)[0] == pytest.approx(sign * bound)


def test_rounds_half_to_even() -> None:
    bound = float(levels_of(32, 1))  # so that one level is 1
    vector = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49, -2.51])
    assert quantise(vector, 1.0, bound, 32, 1).tolist() == [0, 2, 2, 0, -2, 0, -3]


def test_weight_scales_the_integers() -> None:
    assert quantise(np.array([4.0]), 0.25, float(levels_of(64, 1)), 64, 1).tolist() == [1]


@given(
    arrays(np.float64, st.integers(1, 20), elements=st.floats(-1, 1)),
    RINGS,
    st.integers(1, 1000),
    st.floats(0.01, 1),
    st.floats(1e-3, 1e4),
)
def test_error_is_at_most_half_a_level(
    directions: np.ndarray, ring_bits: int, nodes: int, weight: float, bound: float
) -> None:
    vector, _ = clip_to_bound(directions * bound, bound)
    back = dequantise(quantise(vector, weight, bound, ring_bits, nodes), weight, bound, ring_bits, nodes)
    half_a_level = 0.5 * bound / levels_of(ring_bits, nodes) / weight
    assert np.abs(back - vector).max() <= half_a_level + 4e-16 * bound


@pytest.mark.parametrize(("ring_bits", "dtype"), [(32, "<i4"), (64, "<i8")])
def test_integers_are_little_endian_and_cross_chunks(ring_bits: int, dtype: str) -> None:
    vector = np.zeros(2 * CHUNK + 3, np.float32)
    vector[[0, CHUNK - 1, CHUNK, 2 * CHUNK + 2]] = [1, 2, 3, -4]
    encoded = quantise(vector, 1.0, 8.0, ring_bits, 1)
    assert encoded.dtype == np.dtype(dtype)
    eighth = levels_of(ring_bits, 1) / 8
    assert encoded[[0, CHUNK - 1, CHUNK, 2 * CHUNK + 2]] == pytest.approx(eighth * np.array([1, 2, 3, -4]), abs=0.5)
    assert np.count_nonzero(encoded) == 4


def test_a_coordinate_that_float32_left_above_the_bound_stays_within_the_levels() -> None:
    above = np.nextafter(np.float32(1), np.float32(2))
    assert quantise(np.array([above, -above]), 1.0, 1.0, 32, 1).tolist() == [levels_of(32, 1), -levels_of(32, 1)]


class TestClipping:
    def test_by_hand(self) -> None:
        clipped, norm = clip_to_bound(np.array([3.0, -4.0]), 1.0)
        assert clipped == pytest.approx([0.6, -0.8])
        assert norm == 5.0

    def test_a_short_vector_is_the_same_vector(self) -> None:
        vector = np.array([3.0, 4.0])
        clipped, norm = clip_to_bound(vector, 5.0)
        assert clipped is vector
        assert norm == 5.0

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_reports_that_a_vector_is_not_finite(self, bad: float) -> None:
        _, norm = clip_to_bound(np.array([1.0, bad], np.float32), 1.0)
        assert not np.isfinite(norm)

    @given(arrays(np.float32, st.integers(1, 30), elements=st.floats(-1e6, 1e6, width=32)), st.floats(0.01, 100))
    def test_keeps_direction_and_dtype(self, vector: np.ndarray, bound: float) -> None:
        clipped, norm = clip_to_bound(vector, bound)
        assert clipped.dtype == np.float32
        assert norm == pytest.approx(float(np.linalg.norm(vector.astype(np.float64))))
        assert norm_of(clipped) <= bound * (1 + 1e-6)
        if norm > bound:
            assert clipped == pytest.approx(vector * (bound / norm), rel=1e-5, abs=1e-30)

    def test_norm_counts_every_coordinate_of_every_chunk(self) -> None:
        assert norm_of(np.full(2 * CHUNK + 4, 0.5, np.float32)) == pytest.approx(0.5 * (2 * CHUNK + 4) ** 0.5)
        assert norm_of(np.zeros(0)) == 0.0

    def test_norm_of_integers_does_not_overflow(self) -> None:
        assert norm_of(np.array([2**62, 2**62], np.int64)) == pytest.approx(2**62.5)


class TestExtent:
    @given(arrays(np.int32, st.integers(0, 50), elements=st.integers(-(2**31), 2**31 - 1)))
    def test_is_the_largest_magnitude_and_the_norm(self, values: np.ndarray) -> None:
        largest, norm = extent_of(values)
        assert largest == max((abs(int(value)) for value in values), default=0)
        assert norm == pytest.approx(math.sqrt(sum(int(value) ** 2 for value in values)), rel=1e-6)

    def test_of_64_bits_does_not_overflow(self) -> None:
        assert extent_of(np.array([-(2**63), 0])) == (2**63, 2.0**63)

    @pytest.mark.parametrize("value", [1, 3, 1025, 4097, 6_000_001, 16_777_213])
    def test_is_right_to_one_in_ten_thousand_also_for_equal_coordinates_in_many_chunks(self, value: int) -> None:
        for size in (CHUNK, CHUNK + 1, 3 * CHUNK):
            largest, norm = extent_of(np.full(size, value, np.int32))
            assert largest == value
            assert norm == pytest.approx(value * size**0.5, rel=1e-4)
