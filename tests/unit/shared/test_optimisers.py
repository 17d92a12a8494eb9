"""Torch's optimisers without torch.compile: the same bits, and nothing of it is imported."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from concord_shared import optimisers

SETTINGS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"lr": 0.01},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
}


def after_steps(kind: type[torch.optim.Optimizer], fused: bool, **settings: object) -> Tensor:
    weights = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    optimiser = kind([weights], fused=fused, **settings)  # type: ignore[call-arg]
    for step in range(1, 6):
        optimiser.zero_grad()
        (weights.sin() * step).square().sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return weights.detach()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_bits_as_torchs(name: str, fused: bool) -> None:
    ours, theirs = getattr(optimisers, name), getattr(torch.optim, name)
    assert torch.equal(after_steps(ours, fused, **SETTINGS[name]), after_steps(theirs, fused, **SETTINGS[name]))


def test_a_process_that_trains_does_not_import_torch_compile() -> None:
    code = """
import sys
import numpy as np, torch
from concord_client.trainer import Workbench
from concord_shared.plan import load_plan
plan = load_plan("digits-cnn").plan
bench = Workbench(plan, torch.device("cpu"))
bench.train(bench.rows(np.zeros((8, 1, 8, 8), np.float32), np.zeros(8, np.int64)), 0.1, seed=1)
print("torch._dynamo" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "False\n"), ran.stderr
