"""Models by name: reviewed code that both sides have installed. A plan names one, it never carries one."""

from concord_shared.models.registry import (
    MODELS,
    ModelInfo,
    build_model,
    example_inputs,
    input_shape,
    layout_of,
    new_vector,
)

__all__ = ["MODELS", "ModelInfo", "build_model", "example_inputs", "input_shape", "layout_of", "new_vector"]
