"""The sections of a plan, their types, ranges and defaults. Everything here is part of the plan's digest.

Every section is frozen, strict (no text becomes a number) and closed (an unknown key is an error).
"""

import json
import math
import unicodedata
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from concord_shared.canonical import canonical_bytes, canonical_digest
from concord_shared.errors import PlanError
from concord_shared.plan.models import (
    IMAGE_MODELS,
    LANGUAGE_MODELS,
    RECOMMENDERS,
    TOKEN_MODELS,
    Model,
    PretrainedModel,
)
from concord_shared.plan.section import Fraction, Name, Positive, Section, is_empty, usually
from concord_shared.plan.together import why_not_together

PLAN_SCHEMA = "concord/plan/1"
ROBUST_NODES_MAX = 1000
"""Of a cohort in robust mode: the rules compare every Update with every other."""
DENOISE_SIDE_MIN = 16
RESERVED_TOKENS = 2
"""Ids that no text has: 0 pads, 1 stands for what the alphabet does not name."""


def _share(value: Any) -> Any:
    """`"all"`, a count of nodes, or a fraction of them between 0 and 1."""
    if value == "all":
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise ValueError('expected "all", a whole number of at least 1, or a fraction between 0 and 1')


Share = Annotated[int | float | Literal["all"], PlainValidator(_share)]


def share_of(share: int | float | str, total: int) -> int:
    """The number of nodes that a `Share` means among `total`: of a fraction never less than it says."""
    if share == "all":
        return total
    if isinstance(share, int):
        return share
    assert isinstance(share, float)
    return math.ceil(round(share * total, 6))


class Column(Section):
    """One input column of a table: a number within a range, or one of some categories.

    bins: instead of categories that nobody can list, or may: into how many their words are hashed. minimum_count: bins
    that occur in fewer rows over all nodes are left out, where the preprocessing is fitted.
    unit: what the numbers are counted in, as in "mmol/L". units: others that a node may hold, with the factor that
    turns theirs into `unit`.
    """

    name: str = Field(min_length=1)
    kind: Literal["number", "category"] = "number"
    range: tuple[float, float] | None = None
    categories: tuple[str, ...] = ()
    bins: int = Field(0, ge=0, le=1 << 16, exclude_if=is_empty)
    minimum_count: int = Field(1, ge=1, le=1_000_000, exclude_if=usually(1))
    unit: str = Field("", max_length=40, exclude_if=is_empty)
    units: dict[Annotated[str, Field(min_length=1, max_length=40)], Positive] = Field({}, exclude_if=is_empty)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "category" and (len(set(self.words)) < 2 or self.range is not None):
            raise ValueError(
                f"column {self.name}: a category column lists at least 2 different categories, or hashes them into "
                "bins, at least 2; it has no range"
            )
        if self.bins and (self.kind != "category" or self.categories):
            raise ValueError(f"column {self.name}: bins stand in place of a category column's list")
        if self.minimum_count > 1 and not self.bins:
            raise ValueError(f"column {self.name}: minimum_count belongs to bins; a listed category counts as it is")
        if (self.unit or self.units) and self.kind != "number":
            raise ValueError(f"column {self.name}: a unit belongs to numbers")
        if self.units and (not self.unit or self.unit in self.units):
            raise ValueError(f"column {self.name}: units lists factors of others than its own unit, which it names")
        if self.kind == "number" and self.categories:
            raise ValueError(f"column {self.name}: a number column has a range, no categories")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"column {self.name}: expected range = [low, high] with low < high")
        return self

    @cached_property
    def words(self) -> tuple[str, ...]:
        """What a row's code is the place of: the categories, or the names of their bins; of numbers nothing."""
        return self.categories or tuple(f"bin {place}" for place in range(self.bins))


class DataContract(Section):
    """What a row looks like at every node. Differences are errors at the node, before any training.

    text: the column that holds a row's text, of at most length_max characters, where input is text. The target of a
    language model is the next token of that text: there is no column of it.
    user, item: the columns of who rated what, where input is ratings; items: what can be rated. Others are taken as
    unknown ones. Users are no part of the contract: each node numbers its own. In a ranking a row is something that a
    user took, whatever it says beside that.
    An array, of `shape`, is whatever a model of another wheel reads, and learns to answer, of `target_shape`. scores:
    what that model says of each answer, between 0 and 1, the first the one that matters.
    """

    task: Literal["classification", "regression", "ranking", "language-model", "own"]
    input: Literal["image", "table", "text", "ratings", "array"]
    shape: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = ()
    dtype: Literal["uint8", "float32"] = "uint8"
    classes: tuple[str, ...] = ()
    target: str = "label"
    target_range: tuple[float, float] | None = None
    columns: tuple[Column, ...] = ()
    text: str = Field("", exclude_if=is_empty)
    length_max: int = Field(0, ge=0, le=1_000_000, exclude_if=is_empty)
    target_shape: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field((), exclude_if=is_empty)
    scores: tuple[Name, ...] = Field((), max_length=20, exclude_if=is_empty)
    user: str = Field("", exclude_if=is_empty)
    item: str = Field("", exclude_if=is_empty)
    items: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = Field(
        (), max_length=1_000_000, exclude_if=is_empty
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._fits_ratings()
        self._fits_array()
        if (self.input == "text") != bool(self.text) or (self.input == "text") != bool(self.length_max):
            raise ValueError('input = "text" names its column in text and its longest in length_max; nothing else does')
        if self.input == "text" and (self.columns or self.shape):
            raise ValueError("a text has neither [[data.columns]] nor a shape")
        if self.input == "image" and (len(self.shape) != 3 or self.columns):
            raise ValueError("an image has shape = [channels, height, width] and no columns")
        if self.target_range is not None and self.task == "own":
            raise ValueError("target_range belongs to a regression")
        if self.input == "table" and (not self.columns or self.shape):
            raise ValueError("a table lists its [[data.columns]] and has no shape")
        names = [column.name for column in self.columns]
        if len(set(names)) != len(names) or self.target in (*names, self.text):
            raise ValueError("column names are unique, and the target is not one of the columns")
        if self.task == "ranking" and (self.classes or self.target_range is not None):
            raise ValueError("a ranking is of what users took: it has neither classes nor target_range")
        if self.task == "classification" and len(set(self.classes)) != max(2, len(self.classes)):
            raise ValueError("a classification lists at least 2 different classes")
        if self.task == "regression" and (self.classes or self.target_range is None):
            raise ValueError("a regression has target_range = [low, high] and no classes")
        if self.task == "language-model" and (self.input != "text" or self.classes or self.target_range is not None):
            raise ValueError('a language model reads input = "text", and predicts its next token: no classes, no range')
        if self.target_range is not None and not self.target_range[0] < self.target_range[1]:
            raise ValueError("expected target_range = [low, high] with low < high")
        return self

    def _fits_array(self) -> None:
        if self.input != "array":
            if self.task == "own" or self.target_shape or self.scores:
                raise ValueError('task = "own", target_shape and scores belong to input = "array"')
            return
        if self.task != "own" or not self.shape or not self.target_shape or self.columns or self.classes:
            raise ValueError(
                'input = "array" has task = "own", a shape and a target_shape, and neither columns nor classes'
            )
        if len({*self.scores, "rows", "loss"}) != len(self.scores) + 2:
            raise ValueError("scores: expected different names, other than rows and loss")

    def _fits_ratings(self) -> None:
        given = [bool(self.user), bool(self.item), bool(self.items)]
        if self.input != "ratings":
            if any(given) or self.task == "ranking":
                raise ValueError('user, item, items and task = "ranking" belong to input = "ratings"')
            return
        if not all(given) or self.columns or self.shape or self.task == "classification":
            raise ValueError(
                'input = "ratings" names its columns in user and item, lists what can be rated in items, and has '
                'task = "regression" (how much) or "ranking" (what next); it has neither [[data.columns]] nor a shape'
            )
        if len(set(self.items)) != len(self.items) or len(self.items) < 2:
            raise ValueError("items: expected at least 2 different ones")
        if len({self.user, self.item, self.target}) != 3:
            raise ValueError("user, item and target are three columns")

    @property
    def input_columns(self) -> tuple[str, ...]:
        """The columns of a table file that a row's inputs are made of; none for images."""
        if self.input == "ratings":
            return self.user, self.item
        return (self.text,) if self.text else tuple(column.name for column in self.columns)


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


class Training(Section):
    """Local work between two messages. A fresh optimiser each round; the schedule runs over rounds.

    batch_share: a batch holds this share of a node's rows, one at least and batch_size at most: steps of nodes that
    hold much and little are then those of one process on all rows. micro_batch: rows on the device at once, of a larger
    batch the gradients of parts are added up; 0: a whole batch. recompute_activations: of each block only the input is
    kept for the way back. local_seconds: a node's work of a round ends after so long, with one step at least; 0: never.
    """

    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.1
    schedule: Literal["constant", "cosine", "step"] = "constant"
    schedule_step: int = Field(10, ge=1)
    schedule_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    momentum: Fraction = 0.0
    nesterov: bool = False
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0
    batch_size: int = Field(32, ge=1, le=1 << 20)
    batch_share: Fraction = Field(0.0, exclude_if=is_empty)
    local_epochs: int = Field(1, ge=0, le=10_000)
    local_steps: int = Field(0, ge=0, le=1_000_000)
    local_seconds: float = Field(0.0, ge=0, le=86_400, exclude_if=is_empty)
    micro_batch: int = Field(0, ge=0, le=1 << 20, exclude_if=is_empty)
    recompute_activations: bool = Field(False, exclude_if=is_empty)
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    deterministic: bool = True

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_epochs(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("local_steps") and "local_epochs" not in given:
            return {**given, "local_epochs": 0}
        return given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.local_epochs > 0) == (self.local_steps > 0):
            raise ValueError("give local_epochs or local_steps, one of them above 0")
        if self.local_seconds and self.deterministic:
            raise ValueError("local_seconds lets a clock decide how many steps a node takes: set deterministic = false")
        if self.batch_share and not self.local_steps:
            raise ValueError("batch_share belongs to local_steps: an epoch has as many batches as the share says")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0")
        if self.optimiser != "sgd" and self.momentum:
            raise ValueError('momentum belongs to optimiser = "sgd"; Adam\'s are beta1 and beta2')
        return self

    def batch_of(self, rows: int) -> int:
        """The rows of a batch at a node that trains on so many."""
        wanted = max(1, round(self.batch_share * rows)) if self.batch_share else self.batch_size
        return max(1, min(wanted, self.batch_size, rows))


class FedAvg(Section):
    name: Literal["fedavg"] = "fedavg"


class FedAvgM(Section):
    name: Literal["fedavgm"]
    server_learning_rate: Positive = 1.0
    server_momentum: Fraction = 0.9


class FedProx(Section):
    name: Literal["fedprox"]
    mu: Annotated[float, Field(ge=0)] = 0.01


class FedOpt(Section):
    """Reddi et al. 2021, Algorithm 2."""

    name: Literal["fedadam", "fedyogi", "fedadagrad"]
    server_learning_rate: Positive = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Positive = 1e-3


class FedNova(Section):
    """Wang et al. 2020: nodes that take more steps than others do not pull the model to themselves."""

    name: Literal["fednova"]


class Scaffold(Section):
    """Karimireddy et al. 2020, option II. control_bound: the L2 bound of a change of a node's control variate."""

    name: Literal["scaffold"]
    server_learning_rate: Positive = 1.0
    control_bound: Positive = 100.0


class FedBN(Section):
    """Li et al. 2021: normalisation layers, with their running statistics, stay at their node."""

    name: Literal["fedbn"]


class Ditto(Section):
    """Li et al. 2021: each node also trains a whole model of its own, pulled to the shared one by `pull` (λ)."""

    name: Literal["ditto"]
    pull: Annotated[float, Field(ge=0)] = 0.1


class FedRep(Section):
    """Collins et al. 2021: the last `head_layers` layers stay at their node; they are trained first, for `head_epochs`
    epochs, then the body by [training].
    """

    name: Literal["fedrep"]
    head_layers: int = Field(1, ge=1, le=100)
    head_epochs: int = Field(1, ge=1, le=10_000)


class LeastSquares(Section):
    """One round: the exact solution of linear regression from summed XᵀX and Xᵀy."""

    name: Literal["least-squares"]
    moment_bound: Positive = 1e6


StrategySection = Annotated[
    FedAvg | FedAvgM | FedProx | FedOpt | FedNova | Scaffold | FedBN | Ditto | FedRep | LeastSquares,
    Field(discriminator="name"),
]


class Rounds(Section):
    """How many rounds, who is asked, how many must answer, and how large an Update may be."""

    count: int = Field(10, ge=1, le=100_000)
    cohort: Share = "all"
    quorum: Share = 0.5
    grace_s: Positive = 30.0
    deadline_s: Positive = 3600.0
    update_bound: Positive = 10.0
    weight_cap: int = Field(1000, ge=1, le=1 << 31)
    ring_bits: Literal[32, 64] = 32
    aborts_max: int = Field(3, ge=1)


class Compression(Section):
    """Fewer bytes of an Update. What a round leaves out, the node adds to its next one.

    kind: fp16 and int8 send each coordinate with fewer bits (not under masks, which need integers of one ring); rand-k
    sends one of `one_in` coordinates, drawn for each round; narrow sums in a ring of 16 bits.
    """

    kind: Literal["fp16", "int8", "rand-k", "narrow"]
    one_in: int = Field(10, ge=2, le=1000)


class Evaluation(Section):
    """`every`: an evaluate round over all nodes after every k-th round (0: only at the end).

    `incoming`: the cohort also evaluates the model that it is sent, on the training message.
    """

    every: int = Field(1, ge=0)
    incoming: bool = False
    validation_fraction: Fraction = 0.0
    on: Literal["test", "validation"] = "test"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.on == "validation" and self.validation_fraction == 0:
            raise ValueError('on = "validation" needs validation_fraction above 0')
        return self


class DifferentialPrivacy(Section):
    """How much one record, or all data of one node, can change what leaves: by (epsilon, delta), in the whole run.

    unit: with "record", each node trains by DP-SGD. With "node", noise hides a whole Update: added by the nodes under
    masks (mode "private"), or by the coordinator to the sum.
    clip: the L2 bound of one record's gradient; of an Update where the unit is a node.
    """

    unit: Literal["record", "node"]
    epsilon: float = Field(ge=1e-3, le=100)
    delta: float = Field(gt=0, le=1e-3)
    clip: Positive


class Plain(Section):
    """The coordinator sees each node's Update."""

    mode: Literal["plain"] = "plain"
    dp: DifferentialPrivacy | None = None


class Private(Section):
    """Updates leave a node masked (FSA-1): the coordinator learns the sum of those who survived, and no node's own.

    minimum_cohort: how many Updates must be in a sum. collusion: how many nodes may work together with the coordinator
    without learning more; by default a third of a cohort's others.
    """

    mode: Literal["private"]
    minimum_cohort: int = Field(3, ge=2, le=128)
    collusion: int | None = Field(None, ge=0, le=126)
    dp: DifferentialPrivacy | None = None


class Robust(Section):
    """The coordinator sees each node's Update and combines them so that `attackers` of them cannot steer the model.

    rule: how. attackers: f, how many nodes may send anything at all; a round needs 2f + 1 Updates. quarantine_after:
    a node whose Updates stand out in so many rounds in a row is not asked any more; 0: never.
    """

    mode: Literal["robust"]
    rule: Literal["nnm-trimmed-mean", "trimmed-mean", "median", "clipped-mean"] = "nnm-trimmed-mean"
    attackers: int = Field(1, ge=1, le=ROBUST_NODES_MAX // 2)
    quarantine_after: int = Field(3, ge=0, le=1000)
    dp: DifferentialPrivacy | None = None


PrivacySection = Annotated[Plain | Private | Robust, Field(discriminator="mode")]


class StatisticsSection(Section):
    """Of a plan of kind statistics: what is told of all nodes' rows together.

    of: moments (mean, variance), extremes, categories, classes (the target as one more column), correlation, sites (how
    nodes differ). How many values there are, are missing or outside of the contract's ranges, and each category's
    count, is always told.
    quantiles: levels. bins: of a histogram over each column's range; 0 for none. resolution: of quantiles and extremes,
    as a share of a column's range. minimum_count: smaller counts are not told, nor is anything of fewer rows.
    rows: all that a node has, or those that it would train on.
    """

    of: tuple[Literal["moments", "extremes", "classes", "correlation", "sites"], ...] = ("moments", "classes")
    quantiles: tuple[Annotated[float, Field(ge=0.001, le=0.999)], ...] = Field((), max_length=100)
    bins: int = Field(0, ge=0, le=1024)
    resolution: float = Field(1e-3, ge=1e-9, le=0.1)
    minimum_count: int = Field(5, ge=1, le=1_000_000)
    rows: Literal["all", "train"] = "all"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name, values in (("of", self.of), ("quantiles", self.quantiles)):
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names something twice")
        if self.bins == 1:
            raise ValueError("bins = 1 is the count, which is always told; give 2 or more, or 0 for no histogram")
        return self


COMPRESSED = ("fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi", "fedadagrad", "fedbn", "ditto", "fedrep")
"""Strategies that send a difference and nothing else."""
TRAINING_SECTIONS = ("model", "preprocessing", "training", "strategy", "evaluation")
"""What a plan of kind statistics does not have."""
COLUMNS_MAX_OF_PAIRS = 256


def robust_problem(privacy: Robust, nodes: int, what: str) -> str:
    """Why so many Updates cannot be combined in robust mode, or are too many; "" where they can."""
    if nodes > ROBUST_NODES_MAX:
        return f"{what} of {nodes} nodes: robust mode compares at most {ROBUST_NODES_MAX}; set rounds.cohort lower"
    if nodes <= 2 * privacy.attackers:
        return (
            f"{what} of {nodes} nodes cannot outvote privacy.attackers = {privacy.attackers}: expected at least "
            f"{2 * privacy.attackers + 1} (twice the attackers, and one more). Ask more nodes, or tolerate fewer "
            "attackers"
        )
    return ""


class Plan(Section):
    """One immutable description of a computation. Equal plans have equal digests, wherever they run."""

    name: Name
    kind: Literal["train", "statistics"] = "train"
    seed: int = Field(0, ge=0, lt=1 << 63)
    data: DataContract
    preprocessing: Preprocessing = Preprocessing()
    model: Model
    training: Training = Training()
    strategy: StrategySection = FedAvg()
    rounds: Rounds = Rounds()
    evaluation: Evaluation = Evaluation()
    privacy: PrivacySection = Plain()
    compression: Compression | None = Field(None, exclude_if=is_empty)
    statistics: StatisticsSection | None = Field(None, exclude_if=is_empty)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.statistics is not None:
            self._fits_statistics(self.statistics)
            return self
        if self.model.name == "none":
            raise ValueError('a plan of kind = "train" names a model that it trains; see: concord plans')
        if isinstance(self.model, IMAGE_MODELS) and self.data.input != "image":
            raise ValueError(f'model {self.model.name} reads images: expected data.input = "image"')
        if (self.model.name in RECOMMENDERS) != (self.data.input == "ratings"):
            raise ValueError(f'data.input = "ratings" and the models {", ".join(RECOMMENDERS)} need each other')
        if self.data.task == "own" and self.model.name != "plugin":
            raise ValueError('data.task = "own" is learned by a model of another wheel: expected model.name = "plugin"')
        self._check_tokens()
        solves_both = self.model.name in ("mlp", "own", "plugin", *LANGUAGE_MODELS, *RECOMMENDERS)
        if not solves_both and (self.model.name == "linear-regression") != (self.data.task == "regression"):
            raise ValueError(f"model {self.model.name} does not solve data.task = {self.data.task!r}")
        if self.strategy.name == "least-squares" and (self.model.name != "linear-regression" or self.rounds.count != 1):
            raise ValueError("strategy least-squares needs model linear-regression and rounds.count = 1")
        self._check_preparation(self.preprocessing, self.data.input)
        if self.preprocessing.scope != "none":
            self._check_ranges("fitted preprocessing sums fixed-point integers")
        if self.privacy.dp is not None:
            self._check_covered(self.privacy.dp)
        if isinstance(self.privacy, Robust):
            self._fits_robust(self.privacy)
        if self.compression is not None:
            self._fits_compression(self.compression)
        if problem := why_not_together(self):
            raise ValueError(problem)
        return self

    def _check_tokens(self) -> None:
        tokens = self.preprocessing.tokens
        if (tokens is not None) != (self.model.name in TOKEN_MODELS):
            raise ValueError(
                f"[preprocessing.tokens] belongs to the models {', '.join(TOKEN_MODELS)}, and they to it; got model "
                f"{self.model.name}"
            )
        if (self.model.name in LANGUAGE_MODELS) != (self.data.task == "language-model"):
            raise ValueError(
                f'model {self.model.name} does not solve data.task = "{self.data.task}": '
                f'{" and ".join(LANGUAGE_MODELS)} are for "language-model", and only they'
            )
        named = self.model.sha256 if isinstance(self.model, PretrainedModel) else ""
        if tokens is not None and tokens.pretrained != named:
            raise ValueError(
                "preprocessing.tokens.pretrained and model.sha256 are the same hash: a pretrained model reads the "
                "tokens of its own tokenizer, and no other model does"
            )
        if tokens is not None and not named and tokens.length > self.data.length_max + 1:
            raise ValueError(
                f"preprocessing.tokens.length: a text of at most data.length_max = {self.data.length_max} characters "
                f"has never {tokens.length} tokens; lower it"
            )

    def _check_ranges(self, why: str) -> None:
        unbounded = [c.name for c in self.data.columns if c.kind == "number" and c.range is None]
        if unbounded:
            raise ValueError(
                f"{why}, so each number column needs range = [low, high]; missing for: {', '.join(unbounded)}"
            )

    def _check_preparation(self, wanted: Preprocessing, kind: str) -> None:
        """Refuses a step that the contract's kind of input does not have: none is ever left out silently."""
        own = {
            "image": {"denoise": wanted.denoise != "none", "augment": wanted.augment is not None},
            "text": {"text": wanted.text is not None, "tokens": wanted.tokens is not None},
            "table": {
                "normalise": bool(wanted.normalise),
                "outliers": wanted.outliers is not None,
                "outside": wanted.outside != "refuse",
            },
        }
        for owner, steps in own.items():
            if owner != kind and (given := [name for name, is_on in steps.items() if is_on]):
                raise ValueError(f'preprocessing.{given[0]} is for data.input = "{owner}", got "{kind}"')
        prepared = (wanted.text is None) != (wanted.tokens is None)
        if kind == "text" and (not prepared or wanted.standardise or wanted.missing != "refuse"):
            raise ValueError(
                'data.input = "text" has one of the sections [preprocessing.text] and [preprocessing.tokens], and '
                "nothing to standardise or impute"
            )
        if kind in ("ratings", "array") and wanted != Preprocessing(scale=wanted.scale):
            raise ValueError(f'data.input = "{kind}": there is nothing to prepare; leave [preprocessing] out')
        if kind == "image" and self.data.dtype != "uint8" and (wanted.standardise or wanted.denoise != "none"):
            raise ValueError('standardise and denoise of images need data.dtype = "uint8"')
        if wanted.denoise != "none" and min(self.data.shape[1:]) < DENOISE_SIDE_MIN:
            raise ValueError(
                f"preprocessing.denoise needs images of at least {DENOISE_SIDE_MIN}×{DENOISE_SIDE_MIN}: the strokes of "
                "smaller ones look like noise"
            )
        if wanted.scope == "federated" and wanted.fits_quantiles and self.privacy.mode == "plain":
            raise ValueError(
                "preprocessing.outliers and normalise follow from quantiles, of many small counts, and with "
                'privacy.mode = "plain" the coordinator would see those of each node. Set privacy.mode = "private", or '
                'preprocessing.scope = "per-node"'
            )
        if wanted.augment is not None and wanted.augment.shift >= min(self.data.shape[1:], default=0):
            raise ValueError("preprocessing.augment.shift: moves a whole image away; lower it")

    def _fits_statistics(self, wanted: StatisticsSection) -> None:
        if self.kind != "statistics":
            raise ValueError('[statistics] belongs to kind = "statistics"')
        if self.data.input == "image" and self.data.dtype != "uint8":
            raise ValueError('statistics of images need data.dtype = "uint8"')
        if self.data.input in ("ratings", "array"):
            raise ValueError(
                f'statistics of data.input = "{self.data.input}" are not offered; describe the columns as a table'
            )
        self._check_ranges("statistics are sums of fixed-point integers")
        binned = bool(wanted.quantiles or wanted.bins or "extremes" in wanted.of)
        if binned and self.privacy.mode == "plain" and self.privacy.dp is None:
            raise ValueError(
                'quantiles, extremes and histograms are made of many small counts, and with privacy.mode = "plain" the '
                'coordinator would see those of each node. Set privacy.mode = "private", or give [privacy.dp]'
            )
        if self.rounds.count != 1:
            raise ValueError("rounds.count: statistics are asked for once; leave it out")
        numbers = sum(column.kind == "number" for column in self.data.columns)
        if "correlation" in wanted.of and (self.data.input != "table" or numbers > COLUMNS_MAX_OF_PAIRS):
            raise ValueError(f"correlation needs a table with at most {COLUMNS_MAX_OF_PAIRS} number columns")
        if self.privacy.mode == "robust":
            raise ValueError(
                'privacy.mode = "robust": statistics over nodes are a plain sum, which one node can bend. Choose '
                'privacy.mode = "plain" or "private"'
            )
        dp = self.privacy.dp
        if dp is not None and (dp.unit != "record" or dp.clip != 1):
            raise ValueError(
                'privacy.dp of statistics hides records: set unit = "record", and clip = 1, as what one record adds is '
                "bounded by the contract's ranges"
            )
        if dp is not None and "sites" in wanted.of:
            raise ValueError("privacy.dp does not cover sites: what one record adds to them has no bound. Leave it out")

    def _check_covered(self, dp: DifferentialPrivacy) -> None:
        """Refuses what would leave without noise, or would make one record count in more than its own gradient."""
        fitted = self.preprocessing.scope != "none" and self.fits_something
        if self.strategy.name == "least-squares":
            raise ValueError("privacy.dp covers training by gradients; least-squares sends exact sums of products")
        if self.needs_statistics:
            raise ValueError(
                'privacy.dp does not cover the exact sums of preprocessing.scope = "federated": leave standardise, '
                "normalise, outliers, impute and text off"
            )
        if dp.unit == "node":
            if dp.clip != self.rounds.update_bound:
                raise ValueError(
                    'with privacy.dp.unit = "node" the clip is the bound of an Update: set privacy.dp.clip and '
                    f"rounds.update_bound equal, got {dp.clip:g} and {self.rounds.update_bound:g}"
                )
            return
        if self.data.input == "ratings":
            raise ValueError(
                'with privacy.dp.unit = "record" a rating would count in its user too, and so in the gradients of all '
                'ratings of that user: choose unit = "node"'
            )
        if fitted:
            raise ValueError(
                'with privacy.dp.unit = "record" nothing may be fitted to the rows before training, as each of them '
                "would then change all others: leave preprocessing.scope at none"
            )
        if self.training.gradient_clip:
            raise ValueError('training.gradient_clip: with privacy.dp.unit = "record" its place is privacy.dp.clip')
        if self.training.precision != "fp32":
            raise ValueError('privacy.dp.unit = "record" needs training.precision = "fp32"')
        if self.training.micro_batch or self.training.recompute_activations:
            raise ValueError(
                'training.micro_batch and recompute_activations: with privacy.dp.unit = "record" gradients are made '
                "record by record, and clipped before they are added; leave both off"
            )

    def _fits_robust(self, privacy: Robust) -> None:
        """What one node could bend without its Update standing out is refused, not explained away."""
        if self.strategy.name == "least-squares":
            raise ValueError(
                'privacy.mode = "robust" compares Updates of models; strategy least-squares sums exact moments, in '
                "which one node can hide anything. Choose another strategy or mode"
            )
        if self.needs_statistics:
            raise ValueError(
                'privacy.mode = "robust": statistics over nodes are a plain sum, which one node can bend. Set '
                'preprocessing.scope = "per-node", or choose another mode'
            )
        if self.noise == "central" and privacy.rule != "clipped-mean":
            raise ValueError(
                f'privacy.dp.unit = "node" in robust mode hides a node in a sum, and rule {privacy.rule} makes none: '
                'one node may move it by much more. Set privacy.rule = "clipped-mean", or privacy.dp.unit = "record"'
            )
        if self.noise == "central" and privacy.quarantine_after:
            raise ValueError(
                'privacy.dp.unit = "node" in robust mode: whom one node\'s Update puts into quarantine changes the sum '
                "by more than that Update, and no noise hides it. Set privacy.quarantine_after = 0"
            )
        for key in ("cohort", "quorum"):
            share = getattr(self.rounds, key)
            if isinstance(share, int) and (problem := robust_problem(privacy, share, f"rounds.{key}")):
                raise ValueError(problem)

    def _fits_compression(self, wanted: Compression) -> None:
        if self.strategy.name not in COMPRESSED:
            raise ValueError(
                f"compression leaves part of a difference for later; strategy {self.strategy.name} sends other things "
                f"as well, which must arrive whole. It goes with {', '.join(COMPRESSED)}"
            )
        if self.privacy.mode == "private" and wanted.kind in ("fp16", "int8"):
            raise ValueError(
                f'compression.kind = "{wanted.kind}" and privacy.mode = "private": masks hide integers of one ring, '
                'and numbers with a scale of their own are none. Choose "rand-k" or "narrow"'
            )
        if self.noise in ("distributed", "central"):
            raise ValueError(
                'privacy.dp.unit = "node" covers what one round sends, and compression sends some of it later, a '
                'second time: leave it out, or choose privacy.dp.unit = "record"'
            )
        if wanted.kind == "narrow" and self.rounds.ring_bits != 32:
            raise ValueError('compression.kind = "narrow" replaces rounds.ring_bits: leave it at 32')

    @cached_property
    def canonical(self) -> bytes:
        return canonical_bytes(self.document())

    @cached_property
    def digest(self) -> str:
        return canonical_digest(self.document())

    def document(self) -> dict[str, Any]:
        """The plan with every default written out."""
        fields = self.model_dump(mode="json")
        if fields["privacy"]["dp"] is None:
            del fields["privacy"]["dp"]  # plans without it keep the digest that they had before there was any
        if self.kind == "statistics":
            for section in TRAINING_SECTIONS:
                del fields[section]
        return {"schema": PLAN_SCHEMA, **fields}

    @property
    def noise(self) -> Literal["none", "dp-sgd", "tallies", "distributed", "central"]:
        """Where the noise of differential privacy is added: to each step, by each node to its statistics, by nodes to a
        sum, or by the coordinator."""
        if self.privacy.dp is None:
            return "none"
        if self.kind == "statistics":
            return "tallies"
        if self.privacy.dp.unit == "record":
            return "dp-sgd"
        return "distributed" if self.privacy.mode == "private" else "central"

    @property
    def is_repeatable(self) -> bool:
        """Whether equal runs end with equal digests: noise is never seeded."""
        return self.training.deterministic and self.noise == "none"

    @property
    def needs_statistics(self) -> bool:
        """Whether nodes sum statistics: before the first training round, or at all."""
        return self.kind == "statistics" or (self.preprocessing.scope == "federated" and self.fits_something)

    @property
    def fits_something(self) -> bool:
        """Whether anything is learned from rows before training, where the scope is not none."""
        return self.preprocessing.text is not None or self.preprocessing.fits_numbers

    def check_trains(self, what: str) -> None:
        """Raises: PlanError: this plan has no model; what: of which a person asks for something."""
        if self.kind != "train":
            raise PlanError(f"{what} is for plans that train a model; {self.name} is of kind {self.kind}")

    def evaluates_after(self, round_number: int) -> bool:
        """Whether an evaluate round over all nodes follows this round: every k-th, and always the last."""
        every = self.evaluation.every
        return round_number == self.rounds.count or (every > 0 and round_number % every == 0)

    def with_changes(self, **changes: Any) -> "Plan":
        """Another plan, checked as one from a file; its digest is its own."""
        return parse_plan_document(self.document() | changes)

    def with_seed(self, seed: int) -> "Plan":
        return self.with_changes(seed=seed)


class SimulateDefaults(Section):
    """`[simulate]`: defaults of `concord simulate` for this plan. Not part of the plan or its digest.

    side_by_side: how many nodes are trained at once, as one batched computation; 0: each by itself.
    """

    data: str = "digits"
    nodes: int = Field(10, ge=1)
    partition: str = "iid"
    side_by_side: int = Field(0, ge=0, le=10_000)


class About(Section):
    """`[about]`: what `concord plans` says of a plan. Not part of the plan or its digest."""

    title: str = ""
    title_zh: str = ""
    family: str = ""
    data: str = ""
    target: str = ""
    needs: tuple[str, ...] = ()


def completed(given: dict[str, Any], source: str = "the plan") -> dict[str, Any]:
    """A plan's sections with those that its kind settles: one of statistics trains nothing, and asks once.

    Raises:
        PlanError: it has a section of another kind.
    """
    if given.get("kind") != "statistics":
        return given
    for section in TRAINING_SECTIONS:
        if section in given:
            raise PlanError(f'{source}: [{section}] belongs to kind = "train"; leave it out of a plan of statistics')
    rounds = given.get("rounds", {})
    if isinstance(rounds, dict):
        rounds = {"count": 1, **rounds}
    return {"statistics": {}, **given, "rounds": rounds, "model": {"name": "none"}}


def parse_plan_document(document: dict[str, Any]) -> Plan:
    """The inverse of `Plan.document`.

    Raises:
        PlanError: it is not a plan of this version.
        ValueError: a key of it is not valid.
    """
    if document.get("schema") != PLAN_SCHEMA:
        raise PlanError(f"expected a document of schema {PLAN_SCHEMA}, got {document.get('schema')!r}")
    fields = completed({key: value for key, value in document.items() if key != "schema"})
    return Plan.model_validate_json(json.dumps(fields))
