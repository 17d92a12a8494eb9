"""Fewer bytes of an Update: what travels stands for exact ring integers, and nothing that is left out is lost."""

import numpy as np
import pytest

from concord_shared.blocks import LANES, Block, encode_update
from concord_shared.compression import (
    GROUP,
    compressed_blocks,
    expanded,
    left_over,
    packed,
    places,
    selected,
    unpacked,
    wire_of,
)
from concord_shared.errors import PlanError, UpdateRefusedError
from concord_shared.plan.schema import Plan
from concord_shared.quantiser import dequantise, extent_of, levels_of
from helpers import IMAGES, plan_of

SIZE = 2 * GROUP + 77
NODES, CAP = 10, 100
DELTA = Block("delta", SIZE, "examples", 2.0)


def plan_with(kind: str, *overrides: str) -> Plan:
    return plan_of(IMAGES, f"compression.kind={kind}", f"rounds.weight_cap={CAP}", *overrides)


def vector(seed: int = 0, norm: float = 1.0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_t(3, SIZE).astype(np.float32)
    return values * np.float32(norm / np.linalg.norm(values))


def sent_by(plan: Plan, values: np.ndarray, state: dict, number: int = 1) -> tuple[dict, dict, np.ndarray]:
    """The arrays that travel, the state that stays, and what the coordinator makes of it alone: `(size,)`."""
    blocks, rows = compressed_blocks(plan, (DELTA,)), 50
    whole, part = selected(plan, (DELTA,), number, {"delta": values}, state)
    update = encode_update(blocks, part, rows, CAP, NODES)
    arrays = packed(blocks, update, NODES)
    state = left_over(plan, (DELTA,), number, whole, update, rows, NODES)
    ring = unpacked(blocks[0], arrays["delta"], NODES)
    mean = dequantise(ring, rows / CAP, 2.0, blocks[0].ring_bits, NODES)
    return arrays, state, expanded(plan, (DELTA,), number, {"delta": mean})["delta"]


@pytest.mark.parametrize(("kind", "times"), [("fp16", 2), ("int8", 3.98), ("narrow", 2), ("rand-k", 9.9)])
def test_so_many_bytes_less_travel(kind: str, times: float) -> None:
    arrays, _, _ = sent_by(plan_with(kind), vector(), {})
    assert SIZE * 4 / arrays["delta"].nbytes >= times
    block = compressed_blocks(plan_with(kind), (DELTA,))[0]
    assert (arrays["delta"].dtype, arrays["delta"].size) == wire_of(block)


@pytest.mark.parametrize(("kind", "off"), [("fp16", 5e-4), ("int8", 0.12), ("narrow", 2e-2)])
def test_what_arrives_is_close_and_never_longer(kind: str, off: float) -> None:
    for norm in (1e-3, 1.0, 2.0):
        _, _, arrived = sent_by(plan_with(kind), vector(norm=norm), {})
        block = compressed_blocks(plan_with(kind), (DELTA,))[0]
        step = 2.0 / levels_of(block.ring_bits, NODES) / 0.5 * SIZE**0.5
        assert np.linalg.norm(arrived - vector(norm=norm)) <= off * norm + step
        assert np.linalg.norm(arrived) <= 2.0 * (1 + 1e-4) + step


@pytest.mark.parametrize("kind", ["fp16", "int8", "narrow", "rand-k"])
def test_what_one_round_leaves_out_a_later_one_sends(kind: str) -> None:
    plan, state, total = plan_with(kind, "compression.one_in=5"), {}, np.zeros(SIZE)
    rounds = 40
    for number in range(1, rounds + 1):
        _, state, arrived = sent_by(plan, vector(number, 0.1), state, number)
        total += arrived
    wanted = sum(vector(number, 0.1).astype(np.float64) for number in range(1, rounds + 1))
    assert np.allclose(total + state["residual.delta"], wanted, atol=1e-4)
    if kind == "rand-k":  # every coordinate was among those that were sent
        assert np.linalg.norm(state["residual.delta"]) < 0.6 * np.linalg.norm(wanted)
    else:
        assert np.linalg.norm(state["residual.delta"]) < 0.05 * np.linalg.norm(wanted)


def test_what_is_clipped_is_not_sent_later() -> None:
    _, state, arrived = sent_by(plan_with("int8"), vector(norm=8.0), {})
    assert np.linalg.norm(arrived + state["residual.delta"]) == pytest.approx(2.0, rel=1e-3)


def test_all_parties_draw_the_same_places_and_other_ones_each_round() -> None:
    plan = plan_with("rand-k")
    first = places(plan, 1, SIZE)
    assert first is not None
    assert np.array_equal(first, places(plan, 1, SIZE))
    assert not np.array_equal(first, places(plan, 2, SIZE))
    assert not np.array_equal(first, places(plan.with_seed(1), 1, SIZE))
    assert np.array_equal(first // 10, np.arange(-(-SIZE // 10)))
    assert first[-1] < SIZE
    assert first[:5].tolist() == [5, 19, 29, 32, 40]


def test_each_place_is_drawn_as_often() -> None:
    plan = plan_with("rand-k")
    counts = np.zeros(SIZE)
    for number in range(1, 501):
        counts[places(plan, number, SIZE)] += 1
    assert counts[: SIZE // 10 * 10].min() > 20
    assert counts[: SIZE // 10 * 10].max() < 90


def test_decoded_integers_are_the_same_whatever_sums_them() -> None:
    blocks = compressed_blocks(plan_with("int8"), (DELTA, LANES))
    update = encode_update(blocks[:1], {"delta": vector()}, 50, CAP, NODES)
    before = update.blocks["delta"].copy()
    arrays = packed(blocks, update, NODES)
    decoded = unpacked(blocks[0], arrays["delta"], NODES)
    assert decoded.dtype == np.dtype("<i4")
    assert np.array_equal(decoded, update.blocks["delta"])
    assert extent_of(decoded)[1] <= extent_of(before)[1] * (1 + 1e-5)
    assert np.array_equal(arrays["lanes"], update.blocks["lanes"])


def test_a_scale_beyond_the_ring_is_refused() -> None:
    block = compressed_blocks(plan_with("int8"), (DELTA,))[0]
    array = np.zeros(wire_of(block)[1], np.uint8)
    assert not unpacked(block, array, NODES).any()
    array[0] = 24
    with pytest.raises(UpdateRefusedError, match="a scale that the ring does not hold"):
        unpacked(block, array, NODES)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_half_numbers_that_are_none_are_refused(bad: float) -> None:
    block = compressed_blocks(plan_with("fp16"), (DELTA,))[0]
    array = np.zeros(SIZE, "<f2")
    array[3] = bad
    with pytest.raises(UpdateRefusedError, match="NaN or Inf"):
        unpacked(block, array, NODES)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("compression.kind=int8", "privacy.mode=private"), "masks hide integers of one ring"),
        (("compression.kind=fp16", "privacy.mode=private"), "masks hide integers of one ring"),
        (("compression.kind=narrow", "rounds.ring_bits=64"), "replaces rounds.ring_bits"),
        (("compression.kind=zip",), "compression"),
        (("compression.kind=rand-k", "compression.one_in=1"), "one_in"),
        (
            (
                "compression.kind=int8",
                "privacy={mode='plain', dp={unit='node', epsilon=1.0, delta=1e-5, clip=1.0}}",
                "rounds.update_bound=1.0",
            ),
            "a second time",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan_of(IMAGES, *overrides)


def test_plans_without_it_keep_their_digest() -> None:
    assert "compression" not in plan_of(IMAGES).document()
