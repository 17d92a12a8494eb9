"""How much a plan makes everyone hold, by arithmetic: nothing of it is built."""

import itertools
import math

from concord_shared.errors import PlanError
from concord_shared.metrics import metrics_block
from concord_shared.plan.models import GptMini, Lora, TextEncoder
from concord_shared.plan.schema import Plan
from concord_shared.plan.strategies import LeastSquares
from concord_shared.plan.vision import efficientnet_parameters, resnet_parameters
from concord_shared.preprocessing import feature_names
from concord_shared.statistics import Programme

__all__ = ["check_size", "parameters"]


def parameters(plan: Plan) -> int:
    """d of the plan's model, as `models/` builds it.

    Raises:
        PlanError: the model is a person's own code, whose size nobody can know from the plan.
    """
    outputs = len(plan.data.classes) or 1
    shape = plan.data.shape or (len(feature_names(plan.data, plan.preprocessing)),)
    inputs = math.prod(shape)
    channels, height, width = (*shape, 1, 1)[:3]
    model = plan.model
    match model.name:
        case "none":
            return 0
        case "seed-cnn":
            pixels = _half(height - 2) * _half(width - 2)
            return _conv(channels, 32, 3) + _dense(32 * pixels, 128, outputs)
        case "mcmahan-cnn":
            return _conv(channels, 32, 5) + _conv(32, 64, 5) + _dense(64 * (height // 4) * (width // 4), 512, outputs)
        case "niid-cnn":
            pixels = _half(_half(height - 4) - 4) * _half(_half(width - 4) - 4)
            return _conv(channels, 6, 5) + _conv(6, 16, 5) + _dense(16 * pixels, 120, 84, outputs)
        case "tanh-cnn":
            pixels = (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
            return _conv(channels, 16, 8) + _conv(16, 32, 4) + _dense(32 * pixels, 32, outputs)
        case "resnet-18" | "resnet-34" | "resnet-50":
            return resnet_parameters(model, channels, outputs)
        case "efficientnet-b0":
            return efficientnet_parameters(model, channels, outputs)
        case "2nn":
            return _dense(inputs, 200, 200, outputs)
        case "mlp":
            return _dense(inputs, *model.hidden, outputs)
        case "gpt-mini":
            vocabulary = _vocabulary(plan)
            if model.lora is not None:
                return _adapters(model, model.lora) + model.width * vocabulary
            return _transformer(vocabulary, inputs - 1, model.layers, model.width) + model.width * vocabulary
        case "text-encoder":
            if model.lora is not None:
                return _adapters(model, model.lora) + _dense(model.width, outputs)
            return _transformer(_vocabulary(plan), inputs, model.layers, model.width) + _dense(model.width, outputs)
        case "logistic-regression" | "linear-regression":
            return _dense(inputs, outputs)
        case "plugin" | "pretrained-encoder" | "pretrained-decoder":
            return model.parameters
        case "matrix-factorisation":
            return 1 + len(plan.data.items) * (1 + model.factors)
        case "neural-cf":
            items, factors = len(plan.data.items), model.factors
            return 1 + items * (1 + 2 * factors) + factors + _dense(2 * factors, *model.hidden, 1)
    raise PlanError(f"model {model.name!r} is a person's own code; its size does not follow from the plan")


def check_size(plan: Plan, parameters_max: int, metrics_max: int) -> None:
    """Raises: PlanError: the model, what its strategy or statistics sum, or the metrics have more numbers than that."""
    programme = Programme.of(plan)
    sums = max(programme.block(stage).size for stage in range(1, programme.stages + 1)) if plan.needs_statistics else 0
    if sums > parameters_max:
        raise PlanError(
            f"a stage of statistics sums {sums} numbers, expected at most {parameters_max} (parameters_max); ask for "
            "fewer quantiles or bins, or of fewer columns"
        )
    size = parameters(plan)
    if (whole := size + _beneath(plan)) > parameters_max:
        raise PlanError(
            f"model {plan.model.name} has {whole} parameters on these data, expected at most {parameters_max} "
            "(parameters_max)"
        )
    moments = math.comb(size + 2, 2) if isinstance(plan.strategy, LeastSquares) else 0
    if moments > parameters_max:
        raise PlanError(
            f"strategy least-squares sums {moments} moments of these columns, expected at most {parameters_max} "
            "(parameters_max)"
        )
    counts = metrics_block(plan.data).size
    if counts > metrics_max:
        raise PlanError(
            f"data.classes: the metrics of {len(plan.data.classes)} classes are {counts} counts, expected at most "
            f"{metrics_max} (metrics_max)"
        )


def _conv(inputs: int, outputs: int, side: int) -> int:
    return inputs * outputs * side * side + outputs


def _dense(*sizes: int) -> int:
    """Weights and biases of layers between these sizes."""
    return sum(before * after + after for before, after in itertools.pairwise(sizes))


def _vocabulary(plan: Plan) -> int:
    assert plan.preprocessing.tokens is not None
    return plan.preprocessing.tokens.size


def _beneath(plan: Plan) -> int:
    """What a node makes and holds under adapters, though nobody trains or sends it."""
    if not isinstance(plan.model, GptMini | TextEncoder) or plan.model.lora is None:
        return 0
    return parameters(plan.model_copy(update={"model": plan.model.model_copy(update={"lora": None})}))


def _adapters(model: GptMini | TextEncoder, lora: Lora) -> int:
    """Of each adapted layer, rank × (inputs + outputs)."""
    wide = {"query_key_value": 4, "attended": 2, "widen": 5, "narrow": 5}
    return model.layers * lora.rank * model.width * sum(wide[target] for target in lora.targets)


def _transformer(vocabulary: int, length: int, layers: int, width: int) -> int:
    """All but the head: embeddings of tokens and places, blocks, and the norm after them."""
    block = _dense(width, 3 * width) + _dense(width, width) + _dense(width, 4 * width, width) + 4 * width
    return (vocabulary + length) * width + layers * block + 2 * width


def _half(side: int) -> int:
    """After a max-pool of 2."""
    return max(0, side // 2)
