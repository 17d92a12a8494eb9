"""Texts as whole numbers: which, in what order, and what a plan may not ask for."""

import numpy as np
import pytest

from concord_shared.errors import PlanError
from concord_shared.plan.preparation import Tokens
from concord_shared.preprocessing import unfitted
from concord_shared.text_tokens import PADDING, UNKNOWN, tokens
from helpers import IMAGES, LANGUAGE, TABLE, TOPICS, plan_of


def of(text: str, **wanted: object) -> list[int]:
    return tokens(np.array([text]), Tokens.model_validate({"length": 6, **wanted}))[0][0].tolist()  # type: ignore[no-any-return]


def test_characters_are_numbered_as_the_alphabet_names_them() -> None:
    assert of("ba b", alphabet="ab ") == [3, 2, 4, 3, PADDING, PADDING]


def test_a_character_outside_of_the_alphabet_is_unknown_and_counted() -> None:
    found, counts = tokens(np.array(["abxx", "b"]), Tokens(length=4, alphabet="ab"))
    assert found.tolist() == [[2, 3, UNKNOWN, UNKNOWN], [3, PADDING, PADDING, PADDING]]
    assert counts == {"cut": 0, "padded": 1, "unknown": 2}


def test_what_is_too_long_is_cut_and_counted() -> None:
    found, counts = tokens(np.array(["aaaaaaaa", "aaa"]), Tokens(length=3, alphabet="a"))
    assert found.shape == (2, 3)
    assert found.dtype == np.int64
    assert counts == {"cut": 1, "padded": 0, "unknown": 0}


def test_letters_that_look_the_same_are_one() -> None:
    assert of("Ａb", alphabet="Ab") == of("Ab", alphabet="Ab")
    assert of("ﬁ", alphabet="fi") == [2, 3, 0, 0, 0, 0]


def test_words_are_small_letters_marks_and_single_chinese_letters() -> None:
    several = of("Good, GOOD 好的!", unit="word", vocabulary=1 << 20)
    assert several[0] == several[2]
    assert PADDING not in several
    assert len(set(several)) == 5
    assert of("好", unit="word", vocabulary=1 << 20)[0] == several[3]


def test_hashes_are_below_the_vocabulary_and_never_reserved() -> None:
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 500)))
    found = tokens(np.array([letters]), Tokens(length=500, vocabulary=16))[0]
    assert set(found.ravel().tolist()) == set(range(2, 18))


def test_a_hash_is_the_same_everywhere() -> None:
    assert of("aé好", vocabulary=4096)[:3] == [2444, 2065, 145]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["preprocessing.tokens={length=9}"], "give an alphabet, a vocabulary"),
        (["preprocessing.tokens={length=9, alphabet='ab', vocabulary=9}"], "one of them"),
        (["preprocessing.tokens={length=9, alphabet='aba'}"], "names a character twice"),
        (["preprocessing.tokens={length=9, alphabet='abＡ'}"], "never occurs"),
        (["preprocessing.tokens={length=9, alphabet='ab', unit='word'}"], "lists characters"),
        (["preprocessing.tokens.length=11"], "has never 11 tokens"),
        (["preprocessing.tokens.length=1"], "length"),
        (["model.heads=3"], "not a multiple of 3 heads"),
        (["model={name='logistic-regression'}"], r"belongs to the models gpt-mini"),
        (["model={name='text-encoder'}"], "does not solve"),
        (["data.classes=['a', 'b']"], "no classes"),
        (["preprocessing.text={bins=64}"], "one of the sections"),
    ],
)
def test_a_plan_of_tokens_that_cannot_be_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan_of(LANGUAGE, *overrides)


@pytest.mark.parametrize("text", [IMAGES, TABLE])
def test_tokens_are_of_texts(text: str) -> None:
    with pytest.raises(PlanError, match="tokens"):
        plan_of(text, "preprocessing.tokens={length=9, alphabet='ab'}")


def test_gpt_mini_solves_no_classification() -> None:
    with pytest.raises(PlanError, match="gpt-mini and pretrained-decoder are for"):
        plan_of(TOPICS, "model={name='gpt-mini'}")


def test_preparing_texts_gives_tokens_and_says_what_was_cut() -> None:
    fitted, texts = unfitted(plan_of(LANGUAGE)), np.array(["abc", "hello abc hello"])
    assert fitted.transform(texts)[0].tolist() == [3, 4, 5, 0, 0, 0, 0, 0, 0]
    assert fitted.counts(texts) == {"cut": 1, "padded": 1, "unknown": 3}
    assert fitted.is_complete
