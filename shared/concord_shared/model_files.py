"""A trained model as a file: safetensors, with the plan and the preprocessing that belong to it in its header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from concord_shared.plan.schema import Plan
from concord_shared.tensors import Float32Vector, Layout, model_digest, write_safetensors

__all__ = ["MODEL_FORMAT", "write_model"]

MODEL_FORMAT = "concord/model/1"


def write_model(path: Path, plan: Plan, layout: Layout, theta: Float32Vector, preprocessing: Mapping[str, Any]) -> None:
    """Raises: ArtefactError: the file system refuses."""
    metadata = {
        "format": MODEL_FORMAT,
        "plan_digest": plan.digest,
        "model_digest": model_digest(layout, theta),
        "preprocessing": json.dumps(dict(preprocessing)),
    }
    write_safetensors(path, layout.split(theta), metadata)
