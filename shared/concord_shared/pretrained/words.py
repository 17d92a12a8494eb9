"""Texts as the tokens of a pretrained model, by its own tokenizer."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.errors import UsageError
from concord_shared.plan.preparation import RESERVED_TOKENS, Tokens
from concord_shared.pretrained.store import TOKENIZER, find
from concord_shared.text_tokens import PADDING

__all__ = ["largest_token", "pretrained_tokens"]

AT_ONCE = 1000
LENGTH = 512


def pretrained_tokens(texts: NDArray[Any], wanted: Tokens) -> tuple[NDArray[np.int64], dict[str, int]]:
    """As `text_tokens.tokens`: each number is the tokenizer's own and `RESERVED_TOKENS`, so that 0 pads with every one.

    Marks that the tokenizer sets around a text, such as [CLS] and [SEP], are there, in texts that are cut too.

    Raises:
        UsageError: `tokenizers` is not installed, or the model is not on this machine.
    """
    tokenizer = _tokenizer(wanted.pretrained, wanted.length)
    out = np.full((len(texts), wanted.length), PADDING, np.int64)
    cut = padded = 0
    for start in range(0, len(texts), AT_ONCE):
        found = _encoded(tokenizer, [str(text) for text in texts[start : start + AT_ONCE]])
        for row, each in zip(out[start:], found, strict=False):
            kept = each.ids[: wanted.length]
            row[: len(kept)] = kept
            row[: len(kept)] += RESERVED_TOKENS
            cut, padded = cut + bool(each.overflowing), padded + (len(kept) < wanted.length)
    return out, {"cut": cut, "padded": padded, "unknown": 0}


def largest_token(sha256: str) -> int:
    """The largest number that its tokenizer gives. Raises: UsageError: as `pretrained_tokens`."""
    return max(_tokenizer(sha256, LENGTH).get_vocab(with_added_tokens=True).values(), default=0)


def _encoded(tokenizer: Any, texts: list[str]) -> Any:
    try:
        return tokenizer.encode_batch_fast(texts)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its library is no Exception
        raise UsageError(f"the pretrained model's tokenizer cannot read texts: {error}") from None


@functools.lru_cache(4)
def _tokenizer(sha256: str, length: int) -> Any:
    file = find(sha256).folder / TOKENIZER
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError(
            "pretrained models need the packages transformers and tokenizers, which are not installed here: install "
            "the extra hf"
        ) from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
    except Exception as error:  # its only class of errors
        raise UsageError(f"{file}: not a tokenizer: {error}") from error
    return tokenizer
