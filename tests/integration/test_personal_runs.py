"""Whole runs of the strategies for nodes that differ: each does what its paper says, through the product's own code."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from concord_local.federation import Federation
from concord_local.inference import evaluate_run
from concord_local.progress import show_result
from concord_local.report import words
from concord_local.simulation import simulate
from concord_shared.errors import UsageError
from concord_shared.plan import Plan
from concord_shared.strategies.registry import _STRATEGIES
from federations import digits, driver, federation, run, small_plan, transport

NODES = 5
MLP = "model={name='mlp', hidden=[32]}", "training.learning_rate=0.1", "training.momentum=0.0"


def accuracies(plan: Plan, nodes: Federation, directory: Path) -> dict[str, float]:
    """Each node's accuracy on its own test rows after the run, and of all rows under ""."""
    carried = transport("in-process", plan, nodes, directory)
    try:
        result = driver(plan, nodes, carried, directory).run()
    finally:
        carried.close()
    each: dict[str, Any] = {name: figures["accuracy"] for name, figures in result.per_node.items()}
    return {**each, "": float(result.metrics["accuracy"])}  # type: ignore[arg-type]


@lru_cache(maxsize=8)
def skewed(strategy: str) -> dict[str, float]:
    """Two classes at most nodes, four rounds of two epochs."""
    plan = small_plan(*MLP, strategy, "rounds.count=4", "training.local_epochs=2")
    with TemporaryDirectory() as directory:
        return accuracies(plan, federation(plan, NODES, "shards:2"), Path(directory))


@pytest.mark.parametrize("strategy", ["strategy={name='ditto', pull=0.1}", "strategy={name='fedrep', head_epochs=2}"])
def test_under_label_skew_nodes_own_models_are_better_at_each_node(strategy: str) -> None:
    personal, shared = skewed(strategy), skewed("strategy.name=fedavg")
    assert personal[""] > shared[""] + 0.05, (personal, shared)
    assert min(personal.values()) > min(shared.values()), (personal, shared)


def test_fedbn_learns_more_than_groups_of_other_inputs_allow(tmp_path: Path) -> None:
    """Feature shift: each node's images have another contrast and brightness; two of five are inverted."""
    figures = {}
    for name, norm in (("fedavg", "none"), ("fedbn", "batch")):
        plan = small_plan(
            *MLP, f"model.norm={norm}", f"strategy.name={name}", "rounds.count=4", "training.local_epochs=2"
        )
        dealt = federation(plan, NODES)
        inputs = np.array(digits().inputs)
        for place, node in enumerate(dealt.names):
            rows = np.concatenate(list(dealt.rows[node].values()))
            seen = inputs[rows].astype(np.float64) * (1.0 - 0.2 * place) + 10.0 * place
            inputs[rows] = np.clip(255.0 - seen if place >= 3 else seen, 0, 255).astype(inputs.dtype)
        shifted = Federation.of(replace(digits(), inputs=inputs), plan, "iid", NODES)
        figures[name] = accuracies(plan, shifted, tmp_path / name)[""]
    assert figures["fedbn"] > figures["fedavg"] + 0.05, figures


@pytest.mark.parametrize("name", ["ditto", "fedrep"])
def test_workers_give_the_same_model(name: str, tmp_path: Path) -> None:
    plan = small_plan(*MLP, f"strategy.name={name}", "rounds.count=2")
    assert run(plan, tmp_path / "a")[0].model_digest == run(plan, tmp_path / "b", "workers")[0].model_digest


def test_every_strategy_has_words_in_the_report() -> None:
    assert words.STRATEGIES.keys() == _STRATEGIES.keys()


def test_a_simulated_runs_model_is_used_with_a_nodes_own_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each node has two classes of ten: its own head knows them, the start's does not."""
    result = simulate(
        "digits-cnn",
        nodes=NODES,
        partition="shards:2",
        overrides=["strategy={name='fedrep', head_epochs=2}", "rounds.count=3"],
        workers=1,
        out=tmp_path,
    )
    assert json.loads((tmp_path / "summary.json").read_text("utf-8"))["personal"] is True
    show_result(result.summary)
    assert "these figures are of each node's own model" in capsys.readouterr().out
    assert "figures are of each node's own model" in (tmp_path / "MODEL_CARD.md").read_text("utf-8")
    assert "The line is each node’s own model" in (tmp_path / "report.html").read_text("utf-8")
    nodes = json.loads((tmp_path / "data.json").read_text("utf-8"))["nodes"]
    without = evaluate_run(tmp_path, "digits")
    assert "none of a node's own" in without["personal"]
    for name in nodes:
        own = evaluate_run(tmp_path, "digits", name)
        assert own["personal"] == "this node's own, as its last applied round left it"
        classes = set(np.flatnonzero(nodes[name]["classes"]))
        predicted = {place for place, row in enumerate(zip(*own["metrics"]["confusion"], strict=True)) if sum(row)}
        assert predicted <= classes, "a node's own head answers with the classes that it saw"
    with pytest.raises(UsageError, match="has no node nobody; it has "):
        evaluate_run(tmp_path, "digits", "nobody")
