import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord_shared.blocks import LANES, Block, decode_means, encode_update, example_weight, lanes_of
from concord_shared.errors import TrainingDivergedError, UsageError
from concord_shared.quantiser import levels_of

DELTA = Block("delta", 2, "examples", bound=10.0)


def mean_of(block: Block, updates: list[tuple[list[float], int]], weight_cap: int) -> np.ndarray:
    encoded = [
        encode_update((block,), {block.name: np.array(vector)}, rows, weight_cap, len(updates)).blocks
        for vector, rows in updates
    ]
    sums = {name: sum(e[name] for e in encoded) for name in (block.name, "lanes")}
    return decode_means((block,), sums, len(updates), weight_cap)[block.name]


@pytest.mark.parametrize(("rows", "weight"), [(1, 0.01), (50, 0.5), (100, 1.0), (250, 1.0)])
def test_example_weight(rows: int, weight: float) -> None:
    assert example_weight(rows, 100) == weight


def test_lanes_by_hand() -> None:
    assert lanes_of(50, 200, scaled=2).tolist() == [50, 1, 2, 0]
    assert lanes_of(230, 200).tolist() == [200, 1, 0, 30]


def test_mean_is_weighted_by_rows() -> None:
    # (100·[1, 0] + 300·[0, -2]) / 400
    assert mean_of(DELTA, [([1.0, 0.0], 100), ([0.0, -2.0], 300)], 400) == pytest.approx([0.25, -1.5], abs=1e-5)


def test_rows_above_the_cap_weigh_as_the_cap() -> None:
    assert mean_of(DELTA, [([1.0, 0.0], 100), ([0.0, 1.0], 900)], 100) == pytest.approx([0.5, 0.5], abs=1e-5)


def test_uniform_blocks_ignore_rows() -> None:
    uniform = Block("tau", 1, "uniform", bound=10.0)
    assert mean_of(uniform, [([1.0], 1), ([4.0], 900)], 1000) == pytest.approx([2.5], abs=1e-5)


def test_integer_blocks_are_summed_as_they_are() -> None:
    counts = Block("counts", 2, "none", ring_bits=64)
    encoded = encode_update((counts,), {"counts": np.array([2**61, -3])}, 1, 1, 1).blocks
    assert decode_means((counts,), encoded, 1, 100)["counts"].tolist() == [2**61, -3]


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 5000)), min_size=1, max_size=20), st.sampled_from([32, 64]))
def test_mean_is_numpys_weighted_average(updates: list[tuple[float, int]], ring_bits: int) -> None:
    block = Block("delta", 1, "examples", 10.0, ring_bits)  # type: ignore[arg-type]
    weights = [min(rows, 1000) for _, rows in updates]
    expected = np.average([value for value, _ in updates], weights=weights)
    step = 10.0 / levels_of(32, len(updates)) * 1000
    assert mean_of(block, [([v], rows) for v, rows in updates], 1000)[0] == pytest.approx(expected, abs=step)


def test_a_long_vector_is_scaled_down_counted_and_reported() -> None:
    update = encode_update((DELTA,), {"delta": np.array([30.0, 40.0])}, 4, 4, 1)
    assert update.norms == {"delta": 50.0}
    assert update.blocks["lanes"][2] == 1
    assert decode_means((DELTA,), update.blocks, 1, 4)["delta"] == pytest.approx([6.0, 8.0], abs=1e-5)


def test_of_a_block_that_noise_hides_neither_is_told() -> None:
    """Who may see a run's rounds, and not each node's Update, would read its exact length beside the noised model."""
    hidden = Block("delta", 2, "uniform", 10.0, levels=1024)
    update = encode_update((hidden,), {"delta": np.array([30.0, 40.0])}, 4, 4, 1)
    assert update.norms == {}
    assert update.blocks["lanes"][2] == 0


def test_a_vector_at_the_bound_is_not_counted_as_scaled() -> None:
    assert encode_update((DELTA,), {"delta": np.array([6.0, 8.0])}, 4, 4, 1).blocks["lanes"][2] == 0


def test_refuses_a_long_vector_that_must_not_be_scaled() -> None:
    exact = Block("moments", 2, bound=10.0, over="refuse")
    with pytest.raises(UsageError, match=r"moments has the norm 50, above its bound 10.*raise the bound"):
        encode_update((exact,), {"moments": np.array([30.0, 40.0])}, 4, 4, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_a_vector_that_is_not_finite(bad: float) -> None:
    with pytest.raises(TrainingDivergedError, match="block delta holds NaN or Inf"):
        encode_update((DELTA,), {"delta": np.array([bad, 1.0])}, 1, 1, 1)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), ()])
def test_refuses_a_vector_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match="block delta"):
        encode_update((DELTA,), {"delta": np.zeros(shape)}, 1, 1, 1)


def test_refuses_a_sum_of_nobody() -> None:
    with pytest.raises(AssertionError):
        decode_means((DELTA,), {"delta": np.zeros(2, np.int32), "lanes": np.zeros(LANES.size, np.int64)}, 1, 100)


@pytest.mark.parametrize(("rows", "weight_cap", "nodes"), [(1, 1 << 31, 10), (1, 50_000, 100_000)])
def test_no_nodes_weight_is_rounded_to_nothing(rows: int, weight_cap: int, nodes: int) -> None:
    assert lanes_of(rows, weight_cap)[0] > 0
