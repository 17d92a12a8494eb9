"""Models by name: reviewed code that both sides have installed. A plan names one, it never carries one."""

from concord_shared.models.partition import Partition, partition_of
from concord_shared.models.registry import (
    MODELS,
    ModelInfo,
    build_model,
    example_inputs,
    input_shape,
    is_personal,
    layout_of,
    new_model,
    new_vector,
    vector_of,
)

__all__ = [
    "MODELS",
    "ModelInfo",
    "Partition",
    "build_model",
    "example_inputs",
    "input_shape",
    "is_personal",
    "layout_of",
    "new_model",
    "new_vector",
    "partition_of",
    "vector_of",
]
