"""What goes together: each family's model with each strategy in each way of privacy, found by trying, and why the rest
does not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from concord_shared.errors import ConcordError
from concord_shared.models import new_model, partition_of
from concord_shared.plan import load_plan

__all__ = ["STRATEGIES", "cells", "show_together", "what_goes_together"]

STRATEGIES = ("fedavg", "fedprox", "fedadam", "fednova", "scaffold", "fedbn", "ditto", "fedrep")
PRIVACY: Mapping[str, Sequence[str]] = {
    "m": ["privacy={mode='private'}"],
    "r": ["privacy={mode='robust'}"],
    "d": ["privacy={mode='plain', dp={unit='record', epsilon=5.0, delta=1e-5, clip=1.0}}"],
    "n": ["privacy={mode='private', dp={unit='node', epsilon=5.0, delta=1e-5, clip=1.0}}", "rounds.update_bound=1.0"],
}
WORDS = "m masks, r robust, d differential privacy of a record, n of a node"
MODELS: Mapping[str, tuple[str, ...]] = {
    "logistic-regression": ("digits-cnn", "model={name='logistic-regression'}"),
    "mlp": ("digits-cnn", "model={name='mlp', hidden=[8]}"),
    'mlp, norm = "batch"': ("digits-cnn", "model={name='mlp', hidden=[8], norm='batch'}"),
    "seed-cnn": ("digits-cnn", "model={name='seed-cnn'}"),
    "resnet-18": ("digits-cnn", "model={name='resnet-18', width=0.125}"),
    "efficientnet-b0": ("fashion-efficientnet", "model={name='efficientnet-b0', width=0.25}"),
    "text-encoder": ("sentiment-encoder",),
    "text-encoder, LoRA": ("sentiment-encoder", "model.lora={rank=4}"),
    "gpt-mini": ("shakespeare-gpt",),
    "matrix-factorisation": ("restaurants-mf",),
    "neural-cf": ("restaurants-ncf",),
}
"""A plan that comes with concord, and what is changed in it."""
PLAIN_SGD = (
    "training.optimiser='sgd'",
    "training.momentum=0.0",
    "training.gradient_clip=0.0",
    "training.weight_decay=0.0",
    "rounds.cohort='all'",
)


def what_goes_together() -> dict[str, dict[str, dict[str, str]]]:
    """By model, by strategy, by key of `PRIVACY`: "" where it goes, else why not."""
    return {
        model: {
            strategy: {key: _why_not(model, strategy, overrides) for key, overrides in PRIVACY.items()}
            for strategy in STRATEGIES
        }
        for model in MODELS
    }


def _why_not(model: str, strategy: str, overrides: Sequence[str]) -> str:
    base, *changes = MODELS[model]
    try:
        plan = load_plan(base, [*changes, *PLAIN_SGD, f"strategy={{name='{strategy}'}}", *overrides]).plan
        partition_of(plan, new_model(plan))
    except ConcordError as error:
        return str(error).removeprefix(f"{base}: ")
    return ""


def cells(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Of one model, by strategy: the letters of what goes, or a dash."""
    return [" ".join(key for key, reason in each.items() if not reason) or "–" for each in found.values()]


def show_together(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=WORDS, title_justify="left", box=None, pad_edge=False)
    for heading in ("model", *STRATEGIES):
        table.add_column(heading)
    for model, each in found["together"].items():
        table.add_row(model, *cells(each))
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    console.print("--json says why of each that does not go")
