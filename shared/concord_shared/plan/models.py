"""The models that a plan can name, and what it can say of each: section [model]."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from concord_shared.plan.section import Fraction, Name, Positive, Section, is_empty, usually

__all__ = [
    "IMAGE_MODELS",
    "LANGUAGE_MODELS",
    "LORA_LAYERS",
    "PRETRAINED_MODELS",
    "PRETRAINED_NAME",
    "RECOMMENDERS",
    "TOKEN_MODELS",
    "EfficientNet",
    "GptMini",
    "Lora",
    "MatrixFactorisation",
    "Model",
    "NeuralCollaborativeFiltering",
    "OwnModel",
    "PluginModel",
    "PretrainedModel",
    "ResNet",
    "TextEncoder",
]


class SeedCnn(Section):
    name: Literal["seed-cnn"]


class McMahanCnn(Section):
    name: Literal["mcmahan-cnn"]


class NiidCnn(Section):
    name: Literal["niid-cnn"]


class TanhCnn(Section):
    name: Literal["tanh-cnn"]


class TwoNN(Section):
    name: Literal["2nn"]


class LogisticRegression(Section):
    name: Literal["logistic-regression"]


class LinearRegression(Section):
    name: Literal["linear-regression"]


class Mlp(Section):
    name: Literal["mlp"]
    hidden: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field((64,), max_length=100)
    norm: Literal["none", "batch"] = Field("none", exclude_if=usually("none"))


class MatrixFactorisation(Section):
    """Users are fitted with penalties; items are held small by training.weight_decay. negatives: of a ranking, how many
    items that the user did not take are drawn for each that the user took.
    """

    name: Literal["matrix-factorisation"]
    factors: int = Field(8, ge=0, le=1024)
    bias_penalty: Positive = 2.0
    factor_penalty: Positive = 1.0
    negatives: int = Field(8, ge=1, le=1000)


class NeuralCollaborativeFiltering(Section):
    """As `MatrixFactorisation`. steps: of Adam, in which a node fits its users."""

    name: Literal["neural-cf"]
    factors: int = Field(8, ge=1, le=1024)
    hidden: tuple[Annotated[int, Field(ge=1, le=65536)], ...] = Field((16, 8), max_length=100)
    bias_penalty: Positive = 0.5
    factor_penalty: Positive = 0.5
    negatives: int = Field(8, ge=1, le=1000)
    steps: int = Field(20, ge=1, le=10_000)


class ResNet(Section):
    """He et al. 2016. stem: stride-1 and stride-2 are a 3×3 convolution; imagenet is 7×7 and a max-pool, both halving.

    width: every number of channels times this, to the nearest multiple of 8. norm: batch keeps running statistics.
    """

    name: Literal["resnet-18", "resnet-34", "resnet-50"]
    stem: Literal["stride-1", "stride-2", "imagenet"] = "stride-1"
    width: Annotated[float, Field(gt=0, le=4)] = 1.0
    norm: Literal["group", "batch"] = "group"


class EfficientNet(Section):
    """Tan and Le 2019. stem: the 3×3 convolution of the paper halves the side (stride-2); small images keep theirs.

    width, norm: as of a ResNet. dropout: before the last layer. stochastic_depth: the share of rows that skip the last
    block; of earlier ones it grows from 0.
    """

    name: Literal["efficientnet-b0"]
    stem: Literal["stride-1", "stride-2"] = "stride-1"
    width: Annotated[float, Field(gt=0, le=4)] = 1.0
    norm: Literal["group", "batch"] = "group"
    dropout: Fraction = 0.2
    stochastic_depth: Fraction = 0.0


LORA_LAYERS = ("query_key_value", "attended", "widen", "narrow")
"""The dense layers of a block of attention."""


class Lora(Section):
    """Adapters of this rank in the named dense layers (Hu et al. 2021); all else but the head is frozen.

    targets: the last parts of the layers' names.
    """

    rank: int = Field(8, ge=1, le=1024)
    alpha: Positive = 16.0
    targets: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")], ...] = ("query_key_value",)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError("lora.targets: expected names of dense layers, each once")
        return self


class _Transformer(Section):
    """Blocks of attention with so many heads, of so much width."""

    lora: Lora | None = Field(None, exclude_if=is_empty)
    layers: int = Field(4, ge=1, le=48)
    width: int = Field(128, ge=8, le=8192)
    heads: int = Field(4, ge=1, le=128)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.lora is not None and not set(self.lora.targets) <= set(LORA_LAYERS):
            raise ValueError(f"lora.targets: expected some of {', '.join(LORA_LAYERS)}")
        if self.width % self.heads:
            raise ValueError(f"model.heads: width {self.width} is not a multiple of {self.heads} heads")
        return self


class GptMini(_Transformer):
    """A decoder over tokens, whose context is `preprocessing.tokens.length` less 1."""

    name: Literal["gpt-mini"]
    dropout: Fraction = Field(0.0, exclude_if=is_empty)


class TextEncoder(_Transformer):
    """An encoder over tokens with a classification on the mean of its outputs."""

    name: Literal["text-encoder"]
    layers: int = Field(2, ge=1, le=48)
    width: int = Field(64, ge=8, le=8192)
    dropout: Fraction = 0.1


PRETRAINED_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"


class PretrainedModel(Section):
    """A transformer with weights that others trained, from a local Hugging Face directory that the owner of each node
    added, and allowed by this hash: `concord pretrained list` shows it. An encoder tells texts apart, a decoder
    predicts the next token.

    package: what people call it. parameters: how many travel, exactly: with LoRA the adapters and the head alone.
    """

    name: Literal["pretrained-encoder", "pretrained-decoder"]
    package: str = Field(pattern=f"^{PRETRAINED_NAME}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    parameters: int = Field(ge=1)
    lora: Lora | None = None


class OwnModel(Section):
    """A person's own `nn.Module`, in simulation only: every node refuses a plan that names it."""

    name: Literal["own"]
    source: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class PluginModel(Section):
    """A model of a wheel that the owner of each node installed, and allowed by this hash: `concord plugins` shows it.

    parameters: how many the model has at the most. settings: what the wheel's code reads.
    """

    name: Literal["plugin"]
    package: str = Field(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?$")
    model: Name
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    parameters: int = Field(ge=1)
    settings: dict[Name, int | float | bool | Annotated[str, Field(max_length=200)]] = Field({}, max_length=100)


class NoModel(Section):
    """Of a plan that trains none."""

    name: Literal["none"] = "none"


Model = Annotated[
    NoModel
    | SeedCnn
    | McMahanCnn
    | NiidCnn
    | TanhCnn
    | ResNet
    | EfficientNet
    | TwoNN
    | LogisticRegression
    | LinearRegression
    | Mlp
    | GptMini
    | TextEncoder
    | PretrainedModel
    | MatrixFactorisation
    | NeuralCollaborativeFiltering
    | OwnModel
    | PluginModel,
    Field(discriminator="name"),
]


IMAGE_MODELS = (SeedCnn, McMahanCnn, NiidCnn, TanhCnn, ResNet, EfficientNet)


RECOMMENDERS = ("matrix-factorisation", "neural-cf")
PRETRAINED_MODELS = ("pretrained-encoder", "pretrained-decoder")
LANGUAGE_MODELS = ("gpt-mini", "pretrained-decoder")
"""They predict the next token."""
TOKEN_MODELS = ("gpt-mini", "text-encoder", *PRETRAINED_MODELS)
"""They read whole numbers, one for each token."""
