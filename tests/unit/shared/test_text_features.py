import numpy as np
import pytest

from concord_shared.plan.preparation import TextFeatures
from concord_shared.text_features import document_counts, features, inverse_frequencies, tidy_text

WANTED = TextFeatures(bins=4096, ngrams=3, minimum_count=1)


def test_letters_that_look_the_same_are_one() -> None:
    assert tidy_text("  Ａ１　心脏\n\t病 ") == "A1 心脏 病"
    wide, plain = features(np.array(["ＡＢＣ　心", "ABC 心"]), WANTED, None)
    assert np.array_equal(wide, plain)


def test_the_bins_of_a_text_are_those_that_they_always_were() -> None:
    """A model's weights belong to bins: another hash would be another model."""
    found = features(np.array(["心脏病", "heart"]), TextFeatures(bins=64, ngrams=2, minimum_count=1), None)
    bins = [np.flatnonzero(row).tolist() for row in found]
    assert bins == [
        [15, 48, 51, 52, 60],
        [10, 14, 16, 18, 21, 23, 27, 28, 45],
    ]


def test_n_grams_by_hand() -> None:
    [row] = features(np.array(["aab"]), WANTED, None)
    # a twice; b, aa, ab, aab once
    assert sorted(np.round(row[row > 0] * np.sqrt(8), 6).tolist()) == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("text", ["", " ", "a", "\ud800", "\x00", "😀" * 50])
def test_any_text_has_features(text: str) -> None:
    [row] = features(np.array([text], dtype=object), WANTED, None)
    assert np.isfinite(row).all()


def test_rare_bins_are_left_out_and_common_ones_weigh_less() -> None:
    texts = np.array(["ab", "ac", "ad", "ad"])
    wanted = TextFeatures(bins=4096, ngrams=1, minimum_count=2)
    counts = document_counts(texts, wanted)
    weights = inverse_frequencies(4, counts, wanted)
    assert sorted(counts[counts > 0].tolist()) == [1, 1, 2, 4]
    assert sorted(weights[weights > 0].tolist()) == pytest.approx([1.0, np.log(5 / 3) + 1])
    assert np.flatnonzero(features(texts[:1], wanted, weights)[0]).size == 1
