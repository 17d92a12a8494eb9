"""What a run depends on beside its plan: recorded, because equal digests are promised only where this is equal."""

import os
import platform
import sys
from importlib.metadata import version
from typing import Any

from concord_shared import __version__
from concord_shared.plan import Plan

__all__ = ["comparable", "describe_environment"]

BINDING = ("concord", "python", "torch", "numpy", "device", "cpu_capability", "machine", "side_by_side")


def describe_environment(plan: Plan, device: str = "auto", side_by_side: int = 0) -> dict[str, Any]:
    """side_by_side: where nodes are trained as one computation, how many; each bit may depend on it."""
    import torch

    from concord_client.devices import choose_device, describe_device

    return {
        "schema": "concord/environment/1",
        "concord": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "flwr": version("flwr"),
        "device": describe_device(choose_device(device)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "platform": sys.platform,
        "cores": os.cpu_count(),
        "deterministic": plan.is_repeatable,
        "plan_digest": plan.digest,
        **({"side_by_side": side_by_side} if side_by_side else {}),
    }


def comparable(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The differences that make two runs' digests incomparable; empty where equal digests are promised."""
    return [f"{key}: {first.get(key)} and {second.get(key)}" for key in BINDING if first.get(key) != second.get(key)]
