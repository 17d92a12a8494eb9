"""The card beside a model says of which model its figures are, and what its file holds."""

from typing import Any

import pytest

from concord_shared.model_card import model_card
from helpers import IMAGES, plan_of


def card(strategy: str, **changes: Any) -> str:
    plan = plan_of(IMAGES, "model={name='mlp', hidden=[4]}", f"strategy.name={strategy}")
    summary = {
        "nodes": 5,
        "rounds": 3,
        "personal": False,
        "metrics": {"rows": 30, "accuracy": 0.3733},
        "worst_node": {"node": "north"},
        "plan_digest": plan.digest,
        "model_digest": "b" * 64,
        "deterministic": True,
    }
    return " ".join(model_card(plan, summary | changes).split())


@pytest.mark.parametrize(
    ("strategy", "own"),
    [
        ("ditto", "a whole model near the shared one, which stayed at the node"),
        ("fedrep", "the shared part with what stayed at the node"),
        ("fedavg", "the shared part with what stayed at the node"),
    ],
)
def test_figures_of_nodes_own_models_are_not_said_of_the_shared_one(strategy: str, own: str) -> None:
    """fedavg: where the model itself declares personal parameters."""
    text = card(strategy, personal=True)
    assert "| figure of each node's own model on its test rows | | |---|---| | accuracy | 0.3733 |" in text
    assert f"The figures are of each node's own model: {own}." in text
    assert "`model.safetensors` holds the shared part alone" in text
    assert "holds the weights" not in text
    for command in ("concord evaluate RUN --data SPEC --node NAME", "concord predict RUN --data SPEC --node NAME"):
        assert f"`{command}`" in text
    assert "`concord-node models evaluate`" in text


def test_a_shared_models_card_says_nothing_of_nodes_own() -> None:
    text = card("fedavg")
    assert "| figure on the nodes' test rows | |" in text
    assert "`model.safetensors` holds the weights" in text
    assert "own model" not in text
    assert "--node" not in text
