"""The allow-list of models. Listing it imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from concord_shared.errors import UsageError
from concord_shared.models.partition import partition_of
from concord_shared.plan.schema import MatrixFactorisation, NeuralCollaborativeFiltering, Plan
from concord_shared.preprocessing import feature_names
from concord_shared.seeds import derive_seed
from concord_shared.tensors import Float32Vector, Layout

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "MODELS",
    "ModelBuilder",
    "ModelInfo",
    "build_model",
    "input_shape",
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
    "2nn": ModelInfo("mlp", "dense 200, dense 200"),
    "mlp": ModelInfo("mlp", 'dense layers of the sizes in model.hidden; norm = "batch" with fedbn'),
    "logistic-regression": ModelInfo("linear", "one dense layer, soft-max"),
    "linear-regression": ModelInfo("linear", "one dense layer, squared error"),
    "matrix-factorisation": ModelInfo("recommender", "biases and item vectors; users are fitted at their node"),
    "neural-cf": ModelInfo("recommender", "item vectors and dense layers (NeuMF); users are fitted at their node"),
}


_SMALLEST_SIDE = {"seed-cnn": 4, "mcmahan-cnn": 4, "niid-cnn": 16, "tanh-cnn": 16}
"""Below it a convolution or a pool has nothing left."""


def input_shape(plan: Plan) -> tuple[int, ...]:
    """Shape of one model input."""
    if plan.data.input == "ratings":
        return (2,)
    return plan.data.shape or (len(feature_names(plan.data, plan.preprocessing)),)


def build_model(plan: Plan) -> "nn.Module":
    """The plan's model, uninitialised weights included; see `new_model` for the seeded start.

    Raises:
        UsageError: the plan names a person's own model, which only their simulation can build.
    """
    from concord_shared.models import cnn, dense

    model = plan.model
    smallest = _SMALLEST_SIDE.get(model.name, 1)
    if plan.data.shape and min(plan.data.shape[1:]) < smallest:
        raise UsageError(
            f"model {model.name} needs images of at least {smallest}×{smallest}, got {list(plan.data.shape[1:])}"
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
        case "2nn":
            return dense.mlp(shape, (200, 200), outputs)
        case "mlp":
            return dense.mlp(shape, model.hidden, outputs, model.norm == "batch")
        case "logistic-regression" | "linear-regression":
            return dense.mlp(shape, (), outputs)
        case "matrix-factorisation" | "neural-cf":
            return _recommender(plan)
    raise UsageError(f"model {model.name!r} is a person's own code; it trains in `concord simulate --model` only")


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


def layout_of(plan: Plan, model: "nn.Module") -> Layout:
    """The layout of what travels: the shared part of the plan's model. Raises: UsageError: as `partition_of`."""
    return partition_of(plan, model).shared


def new_model(plan: Plan, build: ModelBuilder = build_model) -> "nn.Module":
    """The plan's model with its seeded start: the same at every node and at the coordinator."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(plan.seed, "init"))
        return build(plan)


def new_vector(plan: Plan, build: ModelBuilder = build_model) -> tuple[Layout, Float32Vector]:
    """The seeded start of a run: the shared part of the plan's model with fresh weights, as layout and vector (d,)."""
    model = new_model(plan, build)
    layout = layout_of(plan, model)
    return layout, vector_of(model, layout)


def vector_of(model: "nn.Module", layout: Layout) -> Float32Vector:
    """A part of a model, parameters or buffers, as a vector of that part's layout."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return layout.join({name: tensors[name].detach().cpu().contiguous().numpy() for name, _ in layout.entries})
