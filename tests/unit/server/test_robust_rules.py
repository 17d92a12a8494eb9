"""Robust rules on numbers worked out by hand, and against what an attacker may send."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord_server.robust.rules import clip_factors, median, neighbours, trimmed_mean


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float64)[:, None]


def test_median_takes_the_middle_of_each_coordinate() -> None:
    assert median(np.array([[1.0, 10], [2, 20], [100, -5]])).tolist() == [2, 10]
    assert median(column(1, 2, 4, 100)).tolist() == [3], "between the two in the middle"


def test_trimmed_mean_leaves_out_f_at_either_end() -> None:
    assert trimmed_mean(column(100, 1, 2, 3), 1).tolist() == [2.5]
    assert trimmed_mean(np.array([[0.0, 9], [1, 8], [5, 7], [9, 1], [10, -50]]), 2).tolist() == [5, 7]


def test_neighbours_are_the_n_minus_f_nearest() -> None:
    """Of 0, 1, 3 and 100 with f = 1, everybody's three nearest but those of 100 are 0, 1 and 3."""
    rows = column(0, 1, 3, 100)
    marks = neighbours(rows @ rows.T, 1)
    assert marks.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    mixed = marks @ rows / 3
    assert mixed[:, 0].tolist() == pytest.approx([4 / 3, 4 / 3, 4 / 3, 104 / 3])
    assert trimmed_mean(mixed, 1).tolist() == pytest.approx([4 / 3])


def test_of_equally_near_ones_the_first_count() -> None:
    rows = column(0, 1, -1, 1)
    assert neighbours(rows @ rows.T, 2)[0].tolist() == [1, 1, 0, 0]


def test_clipping_goes_by_the_median_of_the_norms() -> None:
    assert clip_factors(np.array([1.0, 2, 10])).tolist() == [1, 1, 0.2]
    assert clip_factors(np.array([0.0, 4, 0, 0, 8])).tolist() == [1, 0, 1, 1, 0], "who does nothing sets no trap"


@given(
    st.lists(st.floats(-1, 1), min_size=4, max_size=7),
    st.lists(st.floats(-1e12, 1e12), min_size=3, max_size=3),
)
def test_three_attackers_cannot_leave_the_honest_range(honest: list[float], attackers: list[float]) -> None:
    """Whatever they send: the mean goes with them (Blanchard et al. 2017, lemma 1), these do not."""
    rows = column(*honest, *attackers)
    for found in (median(rows), trimmed_mean(rows, 3)):
        assert min(honest) <= found[0] <= max(honest)


def test_the_mean_goes_wherever_one_attacker_wants() -> None:
    honest = column(1, 1, 1)
    assert np.mean([*honest, [-400 - 3]]) == -100
