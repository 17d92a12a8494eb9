"""Damaged data at some nodes: what cleaning brings back, and that clean data lose next to nothing by it."""

from pathlib import Path

import pytest

from concord_local import simulate
from concord_local.cleaning_benchmark import bench_cleaning, show_cleaning
from datasets import needs


@pytest.mark.slow
@needs("adult", "fashion_mnist")
@pytest.mark.parametrize(("experiment", "share"), [("adult", 0.1), ("fashion", 0.2)])
def test_cleaning_brings_back_at_least_half_of_what_damage_costs(experiment: str, share: float) -> None:
    result = bench_cleaning(experiment, "", share, seeds=5)
    show_cleaning(result)
    assert result["lost"] >= 0.01
    assert result["recovered"] >= 0.5
    assert result["cost_on_clean"] <= 0.003


@pytest.mark.slow
@needs("sib200_zh")
def test_topics_of_sentences_in_four_languages(tmp_path: Path) -> None:
    """Logistic regression over characters, all rows in one place: .794."""
    assert simulate("sib200-zh", workers=1, out=tmp_path).metrics["accuracy"] >= 0.74
