"""Two batches of a plan, thrown away: what is said where they cannot be trained."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from concord_client.data import NodeDataset, Split
from concord_client.dry_round import dry_round
from concord_client.policy import Resources
from concord_client.trainer import Workbench
from concord_shared.errors import UsageError
from concord_shared.plan import Plan
from helpers import IMAGES, plan_of

CANARY = "/home/ward/secret.csv"
OUT = f"[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: {CANARY}"


def dataset(plan: Plan, train: int, test: int) -> NodeDataset:
    chance = np.random.default_rng(1)
    inputs = chance.integers(0, 256, (train + test, *plan.data.shape)).astype(np.uint8)
    rows = np.split(np.arange(train + test), [train, train])
    splits = dict(zip((Split.TRAIN, Split.VALIDATION, Split.TEST), rows, strict=True))
    return NodeDataset("alpha", inputs, chance.integers(0, 3, train + test), splits)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "check", "says"),
    [
        (RuntimeError(OUT), "memory", "two batches do not fit into the memory"),
        (MemoryError(CANARY), "memory", "two batches do not fit into the memory"),
        (UsageError(CANARY), "round", "no round of this plan can be trained on it"),
    ],
)
def test_what_ends_two_batches_is_said_and_none_of_its_own_words(
    error: Exception, check: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workbench, "_add_gradient", raising(error))
    plan = plan_of(IMAGES, "rounds.count=1")
    found = dry_round(plan, lambda: dataset(plan, 24, 8), Resources(device="cpu"))
    assert [(each["name"], each["says"]) for each in found["checks"] if each["status"] == "no"] == [(check, says)]
    assert CANARY not in str(found)


def test_any_other_fault_is_not_explained_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workbench, "_add_gradient", raising(RuntimeError("shapes differ")))
    plan = plan_of(IMAGES, "rounds.count=1")
    with pytest.raises(RuntimeError, match="shapes differ"):
        dry_round(plan, lambda: dataset(plan, 24, 8), Resources(device="cpu"))
