"""The allow-list of models. Listing it imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.errors import UsageError
from concord_shared.models.partition import has_own_parts, partition_of
from concord_shared.plan.models import (
    EfficientNet,
    MatrixFactorisation,
    NeuralCollaborativeFiltering,
    PluginModel,
    PretrainedModel,
    ResNet,
)
from concord_shared.plan.preparation import Tokens
from concord_shared.plan.schema import Plan
from concord_shared.plan.vision import smallest_side
from concord_shared.preprocessing import feature_names
from concord_shared.seeds import derive_seed
from concord_shared.tensors import Float32Vector, Layout
from concord_shared.text_tokens import UNKNOWN

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "MODELS",
    "ModelBuilder",
    "ModelInfo",
    "build_model",
    "example_inputs",
    "input_shape",
    "is_personal",
    "layout_of",
    "new_model",
    "new_vector",
    "vector_of",
]

ModelBuilder = Callable[[Plan], "nn.Module"]


@dataclass(frozen=True)
class ModelInfo:
    """What `concord plans` says of a model; `needs` names an extra or a wheel that it is built with."""

    family: str
    description: str
    needs: tuple[str, ...] = ()


MODELS: dict[str, ModelInfo] = {
    "seed-cnn": ModelInfo("cnn", "Conv 32 3×3, max-pool 2, dense 128"),
    "mcmahan-cnn": ModelInfo("cnn", "2 × (conv 5×5, max-pool 2) with 32 and 64 channels, dense 512"),
    "niid-cnn": ModelInfo("cnn", "2 × (conv 5×5, max-pool 2) with 6 and 16 channels, dense 120 and 84"),
    "tanh-cnn": ModelInfo("cnn", "conv 16 8×8, conv 32 4×4, dense 32; tanh and GroupNorm, for noisy gradients"),
    "resnet-18": ModelInfo("deep vision", "17 convolutions in residual blocks (He et al. 2016), GroupNorm"),
    "resnet-34": ModelInfo("deep vision", "33 convolutions in residual blocks (He et al. 2016), GroupNorm"),
    "resnet-50": ModelInfo("deep vision", "49 convolutions in bottlenecks (He et al. 2016), GroupNorm"),
    "efficientnet-b0": ModelInfo(
        "deep vision", "inverted bottlenecks with squeeze-excite (Tan and Le 2019), GroupNorm"
    ),
    "2nn": ModelInfo("mlp", "dense 200, dense 200"),
    "mlp": ModelInfo("mlp", 'dense layers of the sizes in model.hidden; norm = "batch" with fedbn'),
    "logistic-regression": ModelInfo("linear", "one dense layer, soft-max"),
    "linear-regression": ModelInfo("linear", "one dense layer, squared error"),
    "matrix-factorisation": ModelInfo("recommender", "biases and item vectors; users are fitted at their node"),
    "neural-cf": ModelInfo("recommender", "item vectors and dense layers (NeuMF); users are fitted at their node"),
    "gpt-mini": ModelInfo("language model", "decoder over tokens: 4 layers, 128 wide, 4 heads; predicts the next one"),
    "pretrained-encoder": ModelInfo(
        "text", "a local Hugging Face encoder, dense layer on the mean; whole or LoRA", ("hf",)
    ),
    "pretrained-decoder": ModelInfo(
        "language model", "a local Hugging Face causal language model; whole or LoRA", ("hf",)
    ),
    "text-encoder": ModelInfo("text", "encoder over tokens: 2 layers, 64 wide, 4 heads; dense layer on their mean"),
}


_SMALLEST_SIDE = {"seed-cnn": 4, "mcmahan-cnn": 4, "niid-cnn": 16, "tanh-cnn": 16}
"""Below it a convolution or a pool has nothing left."""


def input_shape(plan: Plan) -> tuple[int, ...]:
    """Shape of one model input."""
    if plan.data.input == "ratings":
        return (2,)
    return plan.data.shape or (len(feature_names(plan.data, plan.preprocessing)),)


def example_inputs(plan: Plan, rows: int) -> NDArray[Any]:
    """Inputs `(rows, …)` such as prepared rows are: zeros, or tokens that are no padding."""
    if plan.preprocessing.tokens is not None:
        return np.full((rows, *input_shape(plan)), UNKNOWN, np.int64)
    return np.zeros((rows, *input_shape(plan)), np.float32)


def build_model(plan: Plan) -> "nn.Module":
    """The plan's model, uninitialised weights included; see `new_model` for the seeded start.

    Raises:
        UsageError: the plan names a person's own model, which only their simulation can build.
    """
    from concord_shared.models import cnn, dense, efficientnet, lora, resnet, transformer

    model = plan.model
    smallest, stem = _SMALLEST_SIDE.get(model.name, 1), ""
    if isinstance(model, ResNet | EfficientNet):
        smallest, stem = smallest_side(model), f" with stem {model.stem}"
    if min(plan.data.shape[1:], default=smallest) < smallest:
        raise UsageError(
            f"model {model.name}{stem} needs images of at least {smallest}×{smallest}, got {list(plan.data.shape[1:])}"
        )
    outputs = len(plan.data.classes) or 1
    shape = input_shape(plan)
    match model.name:
        case "none":
            return dense.nothing()
        case "seed-cnn":
            return cnn.seed_cnn(shape, outputs)
        case "mcmahan-cnn":
            return cnn.mcmahan_cnn(shape, outputs)
        case "niid-cnn":
            return cnn.niid_cnn(shape, outputs)
        case "tanh-cnn":
            return cnn.tanh_cnn(shape, outputs)
        case "resnet-18" | "resnet-34" | "resnet-50":
            return resnet.resnet(model, shape[0], outputs)
        case "efficientnet-b0":
            return efficientnet.efficientnet(model, shape[0], outputs)
        case "2nn":
            return dense.mlp(shape, (200, 200), outputs)
        case "mlp":
            return dense.mlp(shape, model.hidden, outputs, model.norm == "batch")
        case "gpt-mini":
            decoder = transformer.gpt_mini(
                _tokens(plan).size, shape[0] - 1, model.layers, model.width, model.heads, model.dropout
            )
            return lora.adapted(decoder, model.lora)
        case "text-encoder":
            encoder = transformer.text_encoder(
                _tokens(plan).size, shape[0], model.layers, model.width, model.heads, model.dropout, outputs
            )
            return lora.adapted(encoder, model.lora)
        case "pretrained-encoder" | "pretrained-decoder":
            return _pretrained(model, shape[0], outputs)
        case "logistic-regression" | "linear-regression":
            return dense.mlp(shape, (), outputs)
        case "plugin":
            return _of_plugin(plan, model)
        case "matrix-factorisation" | "neural-cf":
            return _recommender(plan)
    raise UsageError(f"model {model.name!r} is a person's own code; it trains in `concord simulate --model` only")


def _of_plugin(plan: Plan, model: PluginModel) -> "nn.Module":
    """Raises: UsageError: it is not installed here as the plan names it, or has more parameters than the plan says."""
    from concord_shared.models.plugins import plugin_builder

    built = plugin_builder(model)(plan)
    size = sum(parameter.numel() for parameter in built.parameters())
    if size > model.parameters:
        raise UsageError(
            f"model plugin: {model.package} built {size} parameters, expected at most {model.parameters}, which the "
            "plan says in model.parameters"
        )
    return built


def _pretrained(model: PretrainedModel, length: int, outputs: int) -> "nn.Module":
    """Raises: UsageError: it is not on this machine, or other parameters travel than the plan says."""
    from concord_shared.models import lora
    from concord_shared.pretrained.build import pretrained_model

    built = lora.adapted(pretrained_model(model, length, outputs), model.lora)
    size = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    if size != model.parameters:
        raise UsageError(
            f"model {model.name}: {size} parameters of {model.package} travel, and the plan says model.parameters = "
            f"{model.parameters}; correct it"
        )
    return built


def _recommender(plan: Plan) -> "nn.Module":
    from torch.nn import functional

    from concord_shared.models import recommender

    data, model = plan.data, plan.model
    low, high = data.target_range or (0.0, 0.0)
    middle = (low + high) / 2
    if isinstance(model, MatrixFactorisation):
        return recommender.MatrixFactorisation(
            len(data.items), model.factors, model.bias_penalty, model.factor_penalty, middle
        )
    assert isinstance(model, NeuralCollaborativeFiltering)
    loss = functional.mse_loss if data.task == "regression" else functional.binary_cross_entropy_with_logits
    return recommender.NeuralCollaborativeFiltering(
        len(data.items),
        model.factors,
        model.hidden,
        model.bias_penalty,
        model.factor_penalty,
        model.steps,
        middle,
        lambda scores, targets, reduction: loss(scores, targets, reduction=reduction),
    )


def _tokens(plan: Plan) -> Tokens:
    assert plan.preprocessing.tokens is not None
    return plan.preprocessing.tokens


def layout_of(plan: Plan, model: "nn.Module") -> Layout:
    """The layout of what travels: the shared part of the plan's model. Raises: UsageError: as `partition_of`."""
    return partition_of(plan, model).shared


def new_model(plan: Plan, build: ModelBuilder = build_model) -> "nn.Module":
    """The plan's model with its seeded start: the same at every node and at the coordinator."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(plan.seed, "init"))
        return build(plan)


def is_personal(plan: Plan, build: ModelBuilder = build_model) -> bool:
    """`has_own_parts` of the plan's model."""
    return has_own_parts(plan, partition_of(plan, new_model(plan, build)))


def new_vector(plan: Plan, build: ModelBuilder = build_model) -> tuple[Layout, Float32Vector]:
    """The seeded start of a run: the shared part of the plan's model with fresh weights, as layout and vector (d,)."""
    model = new_model(plan, build)
    layout = layout_of(plan, model)
    return layout, vector_of(model, layout)


def vector_of(model: "nn.Module", layout: Layout) -> Float32Vector:
    """A part of a model, parameters or buffers, as a vector of that part's layout."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return layout.join({name: tensors[name].detach().cpu().contiguous().numpy() for name, _ in layout.entries})
