from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord_server.collector import RingSum
from concord_shared.blocks import Block

NARROW, WIDE = Block("narrow", 3), Block("wide", 2, "none", ring_bits=64)
INT32, INT64 = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
UPDATES = st.lists(
    st.tuples(st.lists(INT32, min_size=3, max_size=3), st.lists(INT64, min_size=2, max_size=2)),
    min_size=1,
    max_size=6,
)


def ring_sum(updates: list[tuple[list[int], list[int]]]) -> dict[str, list[int]]:
    total = RingSum((NARROW, WIDE))
    for index, (narrow, wide) in enumerate(updates):
        total.add(f"node-{index}", {"narrow": np.array(narrow, "<i4"), "wide": np.array(wide, "<i8")})
    return {name: values.tolist() for name, values in total.sums().items()}


def wrapped(value: int, bits: int) -> int:
    return (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


@given(UPDATES)
def test_is_the_sum_of_integers_in_the_ring(updates: Any) -> None:
    sums = ring_sum(updates)
    assert sums["narrow"] == [wrapped(sum(column), 32) for column in zip(*(u[0] for u in updates), strict=True)]
    assert sums["wide"] == [wrapped(sum(column), 64) for column in zip(*(u[1] for u in updates), strict=True)]


@given(UPDATES, st.randoms())
def test_does_not_depend_on_the_order_of_arrival(updates: Any, random: Any) -> None:
    shuffled = list(updates)
    random.shuffle(shuffled)
    assert ring_sum(shuffled) == ring_sum(updates)


def test_shows_who_was_counted() -> None:
    """Node i contributes 1 in coordinate i only: a right sum is 0 or 1 everywhere."""
    total = RingSum((Block("delta", 5),))
    for node in (0, 3, 4):
        total.add(str(node), {"delta": np.eye(5, dtype="<i4")[node]})
    assert total.sums()["delta"].tolist() == [1, 0, 0, 1, 1]
    assert total.nodes == {"0", "3", "4"}


def test_a_node_is_never_counted_twice() -> None:
    total = RingSum((NARROW,))
    total.add("a", {"narrow": np.ones(3, "<i4")})
    with pytest.raises(AssertionError):
        total.add("a", {"narrow": np.ones(3, "<i4")})
    assert total.sums()["narrow"].tolist() == [1, 1, 1]


def test_reads_arrays_that_cannot_be_written() -> None:
    total = RingSum((NARROW,))
    total.add("a", {"narrow": np.frombuffer(b"\xff" * 12, "<i4")})
    assert total.sums()["narrow"].tolist() == [-1, -1, -1]


def test_nothing_yet_is_zero_in_the_blocks_dtype() -> None:
    sums = RingSum((NARROW, WIDE)).sums()
    assert [(name, values.dtype.str, values.tolist()) for name, values in sums.items()] == [
        ("narrow", "<i4", [0, 0, 0]),
        ("wide", "<i8", [0, 0]),
    ]
