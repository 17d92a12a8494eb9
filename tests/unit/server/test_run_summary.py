"""What a worker says of a run that succeeded."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from concord_server.driver import RunResult
from concord_server.worker.task import _summary
from helpers import IMAGES, plan_of


@pytest.mark.parametrize(("strategy", "personal"), [("fedavg", False), ("ditto", True), ("fedrep", True)])
def test_it_says_whether_figures_are_of_nodes_own_models(strategy: str, personal: bool) -> None:
    plan = plan_of(IMAGES, "model={name='mlp', hidden=[4]}", f"strategy.name={strategy}")
    result = RunResult(np.zeros(1, np.float32), "0" * 64, {}, {}, {"accuracy": 0.5}, {}, 0, 0, 1.0)
    summary = _summary(cast(Any, SimpleNamespace(id="run")), plan, result, ["north"], {})
    assert summary["personal"] is personal
