"""LoRA: the base is frozen and never travels, the start is the base itself, and what is learned is small."""

import numpy as np
import pytest
import torch

from concord_client.trainer import Workbench
from concord_shared.errors import PlanError
from concord_shared.models import build_model, new_model, new_vector, partition_of
from concord_shared.plan import Plan, load_plan
from concord_shared.plan.sizes import check_size, parameters
from helpers import LANGUAGE, TOPICS, plan_of

CPU = torch.device("cpu")
ALL = "model.lora={rank=3, alpha=6.0, targets=['query_key_value', 'attended', 'widen', 'narrow']}"


def lora_plan(text: str, *overrides: str) -> Plan:
    return plan_of(text, "model.lora={rank=2}", *overrides)


@pytest.mark.parametrize("text", [LANGUAGE, TOPICS])
def test_only_adapters_and_the_head_travel(text: str) -> None:
    plan = lora_plan(text)
    parts = partition_of(plan, build_model(plan))
    names = [name for name, _ in parts.shared.entries]
    assert names
    assert all(name.startswith("head") or name.endswith((".down", ".up")) for name in names)
    assert "embedding.tokens.weight" in parts.frozen
    assert "blocks.0.query_key_value.base.weight" in parts.frozen


@pytest.mark.parametrize("text", [LANGUAGE, TOPICS])
@pytest.mark.parametrize("lora", ["model.lora={rank=2}", ALL])
def test_the_size_of_what_travels_follows_from_the_plan(text: str, lora: str) -> None:
    plan = plan_of(text, lora)
    assert parameters(plan) == new_vector(plan)[0].size


def test_what_lies_under_the_adapters_counts_where_a_node_says_how_much_it_holds() -> None:
    plan, wide = lora_plan(LANGUAGE), lora_plan(LANGUAGE, "model.layers=48", "model.width=8192", "model.heads=8")
    whole = parameters(plan) + parameters(plan_of(LANGUAGE))
    check_size(plan, whole, 10)
    with pytest.raises(PlanError, match=str(whole)):
        check_size(plan, whole - 1, 10)
    assert parameters(wide) < 4_000_000
    with pytest.raises(PlanError, match="parameters_max"):
        check_size(wide, 1_000_000_000, 10)


def test_an_adapter_is_hu_and_others_equation_3() -> None:
    """W x + b + (alpha / rank) B A x, by hand; before training B is 0 and nothing is added."""
    layer = new_model(lora_plan(LANGUAGE, "model.lora.alpha=6.0")).blocks[0].query_key_value  # type: ignore[index,union-attr]
    x = torch.randn(4, 16)
    plain = x @ layer.base.weight.T + layer.base.bias
    assert torch.allclose(layer(x), plain, atol=1e-6)
    with torch.no_grad():
        layer.up.fill_(0.5)
    assert torch.allclose(layer(x), plain + 3.0 * (x @ layer.down.T @ layer.up.T), atol=1e-5)


def test_training_changes_what_travels_and_never_the_base() -> None:
    plan = lora_plan(TOPICS, "training={optimiser='adam', learning_rate=0.02, local_steps=60}")
    bench = Workbench(plan, CPU)
    bench.load(new_vector(plan)[1])
    rows = bench.rows(np.random.default_rng(0).integers(2, 60, (12, 8)), np.arange(12) % 3)
    base = {name: p.detach().clone() for name, p in bench.model.named_parameters() if not p.requires_grad}
    before = bench.evaluate(rows).figures()["loss"]
    bench.train(rows, 0.02, 0)
    assert bench.evaluate(rows).figures()["loss"] < 0.9 * before  # type: ignore[operator]
    assert all(torch.equal(p, base[name]) for name, p in bench.model.named_parameters() if name in base)


def test_the_frozen_base_is_the_same_wherever_it_is_built() -> None:
    one, two = (Workbench(lora_plan(LANGUAGE), CPU).model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one if "base" in name or "embedding" in name)


def test_a_plan_without_adapters_keeps_its_digest() -> None:
    assert "lora" not in plan_of(LANGUAGE).document()["model"]


@pytest.mark.parametrize("lora", ["{rank=0}", "{targets=[]}", "{targets=['head']}", "{targets=['widen', 'widen']}"])
def test_adapters_that_cannot_be_are_refused(lora: str) -> None:
    with pytest.raises(PlanError, match="lora"):
        plan_of(TOPICS, f"model.lora={lora}")


def test_less_than_a_fortieth_travels() -> None:
    """Of the encoder of sentiment-encoder, whose words are most of it."""
    whole, small = (parameters(load_plan("sentiment-encoder", extra).plan) for extra in ([], ["model.lora={rank=8}"]))
    assert whole > 40 * small
