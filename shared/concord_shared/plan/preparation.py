"""`[preprocessing]`: how raw rows become model inputs."""

import unicodedata
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from concord_shared.plan.section import Section, is_empty, usually

__all__ = ["RESERVED_TOKENS", "Augmentation", "Outliers", "Preprocessing", "TextFeatures", "Tokens"]

RESERVED_TOKENS = 2
"""Ids that no text has: 0 pads, 1 stands for what the alphabet does not name."""


class Outliers(Section):
    """Numbers far from the others are moved to a fence, which follows from quantiles over all nodes.

    iqr: factor × (Q3 - Q1) beyond the quartiles (Tukey 1977). mad: factor × 1.4826 × the median distance from the
    median, beyond the median: as many standard deviations of a normal distribution. Where that distance is 0, as in a
    column that is mostly zeros: the 1st and the 99th percentile; where these are equal too, no fence at all.
    """

    rule: Literal["iqr", "mad"]
    factor: float = Field(3.0, ge=0.5, le=1000)


class Augmentation(Section):
    """Training images in other positions, drawn anew in each round: half of them mirrored, all moved by up to `shift`
    pixels along each side.
    """

    flip: bool = False
    shift: int = Field(0, ge=0, le=64)


class TextFeatures(Section):
    """Characters to numbers: n-grams of 1 to `ngrams` characters, hashed into `bins`.

    minimum_count: bins that occur in fewer texts over all nodes are left out, where the scope is not none.
    """

    bins: int = Field(4096, ge=64, le=1 << 16)
    ngrams: int = Field(3, ge=1, le=5)
    minimum_count: int = Field(2, ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.bins & (self.bins - 1):
            raise ValueError(f"bins: expected a power of two, got {self.bins}")
        return self


class Tokens(Section):
    """A text as `length` whole numbers: longer ones are cut, shorter ones padded with 0.

    unit: what one token is; a word of letters that need no spaces (Chinese, Japanese) is each letter. alphabet: the
    characters there are, in the order of their numbers; any other is "unknown", 1. vocabulary: instead of an alphabet,
    into how many numbers units are hashed. Both are stated in the plan: nobody's texts tell what occurs in them.
    pretrained: instead of these, the hash of a pretrained model, whose own tokenizer says what a token is.
    """

    length: int = Field(ge=2, le=4096)
    unit: Literal["character", "word"] = "character"
    alphabet: str = Field("", max_length=65536, exclude_if=is_empty)
    vocabulary: int = Field(0, ge=0, le=1 << 20, exclude_if=is_empty)
    pretrained: str = Field("", pattern="^([0-9a-f]{64})?$", exclude_if=is_empty)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if [bool(self.alphabet), bool(self.vocabulary), bool(self.pretrained)].count(True) != 1:
            raise ValueError(
                "tokens: give an alphabet, a vocabulary to hash into, or the hash of a pretrained model; one of them"
            )
        if self.pretrained and self.unit != "character":
            raise ValueError("tokens.unit: what a token is, the tokenizer of the pretrained model says; leave unit out")
        if self.alphabet and self.unit != "character":
            raise ValueError('tokens.alphabet lists characters: expected unit = "character", or a vocabulary')
        if len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError("tokens.alphabet: names a character twice")
        changed = [each for each in self.alphabet if unicodedata.normalize("NFKC", each) != each]
        if changed:
            raise ValueError(f"tokens.alphabet: {changed[0]!r} never occurs, as texts are read in the form NFKC")
        return self

    @property
    def size(self) -> int:
        """How many numbers there are, the reserved ones too; of a pretrained model its own tokenizer knows."""
        return RESERVED_TOKENS + (len(self.alphabet) or self.vocabulary)


class Preprocessing(Section):
    """How raw rows become model inputs. With scope federated: fitted across nodes from exact integer sums.

    standardise: the word for normalise = "standard". outside: values outside a column's range are an error, or missing.
    duplicates: training rows of one node that are equal to an earlier one in every input and the target.
    denoise: images with many lone black or white pixels get the median of their neighbours in these places.
    """

    scope: Literal["federated", "per-node", "none"] = "none"
    standardise: bool = False
    missing: Literal["refuse", "impute"] = "refuse"
    encode: Literal["one-hot", "one-hot-drop-first"] = "one-hot"
    scale: Literal["unit", "none"] = "unit"
    normalise: Literal["", "min-max", "robust"] = Field("", exclude_if=is_empty)
    outliers: Outliers | None = Field(None, exclude_if=is_empty)
    outside: Literal["refuse", "missing"] = Field("refuse", exclude_if=usually("refuse"))
    duplicates: Literal["keep", "drop"] = Field("keep", exclude_if=usually("keep"))
    denoise: Literal["none", "median"] = Field("none", exclude_if=usually("none"))
    augment: Augmentation | None = Field(None, exclude_if=is_empty)
    text: TextFeatures | None = Field(None, exclude_if=is_empty)
    tokens: Tokens | None = Field(None, exclude_if=is_empty)

    @model_validator(mode="before")
    @classmethod
    def _standard_is_one_word(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("normalise") == "standard":
            return {key: value for key, value in given.items() if key != "normalise"} | {"standardise": True}
        return given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.scope == "none" and self.fits_numbers:
            raise ValueError(
                'standardise, normalise, outliers and missing = "impute" need scope = "federated" or "per-node"'
            )
        if self.standardise and self.normalise:
            raise ValueError(f'normalise = "{self.normalise}" and standardise are two ways; choose one')
        if self.outside == "missing" and self.missing != "impute":
            raise ValueError('outside = "missing" needs missing = "impute"')
        return self

    @property
    def fits_numbers(self) -> bool:
        """Whether anything is learned from numbers before training."""
        return self.standardise or bool(self.normalise or self.outliers) or self.missing == "impute"

    @property
    def cleans(self) -> bool:
        """Whether single values, images or rows are changed or left out, which is counted."""
        return bool(self.outliers) or self.outside == "missing" or self.denoise != "none" or self.duplicates == "drop"

    @property
    def fits_quantiles(self) -> bool:
        return bool(self.normalise or self.outliers)
