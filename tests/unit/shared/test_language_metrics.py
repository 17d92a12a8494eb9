"""Figures of language models: sums of whole numbers, which no node can make say what no text says."""

import math

import numpy as np
import pytest

from concord_shared.metrics import TokenSums, better, headline, metric_sums, metrics_block, no_sums
from helpers import LANGUAGE, plan_of

CONTRACT = plan_of(LANGUAGE).data


def test_sums_of_two_nodes_are_those_of_all_rows() -> None:
    both = TokenSums.of(CONTRACT, 2, 6.0, 8, 3) + TokenSums.of(CONTRACT, 3, 2.0, 8, 5)
    assert both.figures() == {
        "rows": 5,
        "tokens": 16,
        "loss": 0.5,
        "perplexity": pytest.approx(math.exp(0.5)),
        "accuracy": 0.5,
    }
    assert metrics_block(CONTRACT).size == len(both.vector) == 4


def test_lower_loss_is_better() -> None:
    assert headline(CONTRACT) == "loss"
    assert better(CONTRACT, 1.0, 2.0)


def test_honest_sums_are_no_problem() -> None:
    assert TokenSums.of(CONTRACT, 3, 9.0, 24, 24).problem(3) is None
    assert no_sums(CONTRACT).problem(3) is None


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        ([4, 0, 0, 0], "4 rows"),
        ([1, 0, 60, 0], "60 tokens"),
        ([1, 0, -1, -1], "-1 tokens"),
        ([1, -1, 8, 0], "below 0"),
        ([1, 0, 8, 9], "more tokens told right"),
        ([1, 0, 8, -1], "more tokens told right"),
    ],
)
def test_sums_that_no_texts_have_are_refused(vector: list[int], words: str) -> None:
    problem = metric_sums(CONTRACT, np.array(vector, np.int64)).problem(3)
    assert problem is not None
    assert words in problem
