"""What a partner reads of a language model before approving it."""

from concord_client.plan_words import _needs
from helpers import LANGUAGE, plan_of


def test_an_owner_is_told_what_is_learned_and_that_texts_may_be_remembered() -> None:
    told = " ".join(_needs(plan_of(LANGUAGE)))
    assert "texts of at most 9 characters" in told
    assert "next token of words" in told
    assert "by heart" in told
