"""Transformers see what they may see, and no more."""

import numpy as np
import pytest
import torch

from concord_client.trainer import Workbench
from concord_shared.models import build_model, example_inputs, new_vector
from concord_shared.plan import load_plan
from helpers import LANGUAGE, TOPICS, plan_of

CPU = torch.device("cpu")


def test_the_decoder_never_looks_ahead() -> None:
    torch.manual_seed(0)
    model = build_model(plan_of(LANGUAGE)).eval()
    first = torch.randint(2, 11, (1, 8))
    second = first.clone()
    second[0, 5] = 2 + (first[0, 5] - 1) % 9
    before, after = model(first), model(second)
    assert before.shape == (1, 11, 8)
    assert torch.equal(before[..., :5], after[..., :5])
    assert not torch.equal(before[..., 5:], after[..., 5:])


def test_the_decoder_looks_back() -> None:
    torch.manual_seed(0)
    model = build_model(plan_of(LANGUAGE)).eval()
    rows = torch.tensor([[3, 4, 5, 6], [9, 4, 5, 6]])
    out = model(rows)
    assert not torch.allclose(out[0, :, 3], out[1, :, 3])


def test_padding_changes_nothing_of_what_the_encoder_says() -> None:
    torch.manual_seed(0)
    model = build_model(plan_of(TOPICS)).eval()
    text = torch.tensor([[5, 6, 7, 0, 0, 0, 0, 0]])
    assert torch.allclose(model(text), model(text[:, :3]), atol=1e-6)
    assert not torch.allclose(model(text), model(torch.tensor([[7, 6, 5, 0, 0, 0, 0, 0]])))


def test_an_empty_text_is_a_number_too() -> None:
    assert torch.isfinite(build_model(plan_of(TOPICS)).eval()(torch.zeros(2, 8, dtype=torch.int64))).all()


def test_gpt_mini_is_as_large_as_it_says() -> None:
    assert new_vector(load_plan("shakespeare-gpt").plan)[0].size == 826_624


def test_targets_are_the_next_tokens_and_padding_is_none() -> None:
    bench = Workbench(plan_of(LANGUAGE), CPU)
    rows = bench.rows(np.array([[3, 4, 5, 6, 7, 8, 9, 10, 2], [3, 4, 5, 0, 0, 0, 0, 0, 0]]), np.zeros(2))
    assert rows.inputs.shape == rows.targets.shape == (2, 8)
    assert rows.targets[0].tolist() == [4, 5, 6, 7, 8, 9, 10, 2]
    figures = bench.evaluate(rows).figures()
    assert figures["rows"] == 2
    assert figures["tokens"] == 10
    assert figures["loss"] == pytest.approx(np.log(figures["perplexity"]))  # type: ignore[arg-type]


def test_the_loss_of_a_batch_is_its_mean_over_tokens() -> None:
    bench = Workbench(plan_of(LANGUAGE), CPU)
    rows = bench.rows(np.array([[3, 4, 5, 6, 7, 8, 9, 10, 2], [3, 4, 5, 0, 0, 0, 0, 0, 0]]), np.zeros(2))
    outputs = bench.model(rows.inputs).detach()
    told = [
        -float(outputs[row, :, place].log_softmax(0)[rows.targets[row, place]])
        for row, length in ((0, 8), (1, 2))
        for place in range(length)
    ]
    assert float(bench.task.loss(outputs, rows.targets)) == pytest.approx(np.mean(told), rel=1e-5)
    assert bench.evaluate(rows).figures()["loss"] == pytest.approx(np.mean(told), rel=1e-5)
    each = bench.task.loss(outputs, rows.targets, "none")
    assert each.tolist() == pytest.approx([np.mean(told[:8]), np.mean(told[8:])], rel=1e-5)


def test_texts_of_one_token_are_no_reason_to_diverge() -> None:
    bench = Workbench(plan_of(LANGUAGE), CPU)
    rows = bench.rows(np.array([[3, 0, 0, 0, 0, 0, 0, 0, 0]] * 2), np.zeros(2))
    bench.train(rows, 0.1, 0)
    bench.read()
    assert bench.evaluate(rows).figures() == {"rows": 2, "tokens": 0}


@pytest.mark.parametrize("text", [LANGUAGE, TOPICS])
def test_training_lowers_the_loss(text: str) -> None:
    plan = plan_of(text, "training={optimiser='adam', learning_rate=0.01, local_steps=40}")
    bench = Workbench(plan, CPU)
    chance = np.random.default_rng(0)
    rows = np.tile(chance.integers(2, 11, (4, example_inputs(plan, 1).shape[1])), (4, 1))
    prepared = bench.rows(rows, np.arange(16) % 3 if plan.data.classes else np.zeros(16, np.int64))
    if plan.data.classes:
        prepared = bench.rows(rows, np.tile([0, 1, 2, 1], 4))
    bench.load(new_vector(plan)[1])
    before = bench.evaluate(prepared).figures()["loss"]
    bench.train(prepared, 0.01, 0)
    assert bench.evaluate(prepared).figures()["loss"] < 0.7 * before  # type: ignore[operator]


def test_predicting_tells_how_unlikely_each_text_is() -> None:
    bench = Workbench(plan_of(LANGUAGE), CPU)
    rows = bench.rows(np.array([[3, 4, 5, 6, 7, 8, 9, 10, 2], [3, 4, 5, 0, 0, 0, 0, 0, 0]]), np.zeros(2))
    bench.load(new_vector(bench.plan)[1])
    told = bench.predict(rows)
    assert told.shape == (2,)
    whole = (8 * told[0] + 2 * told[1]) / 10
    assert bench.evaluate(rows).figures()["loss"] == pytest.approx(whole, rel=1e-5)


def test_dropout_is_for_training_alone_and_no_key_of_a_plan_without_it() -> None:
    plan = plan_of(LANGUAGE, "model.dropout=0.5")
    bench = Workbench(plan, CPU)
    tokens = bench.rows(np.array([[3, 4, 5, 6, 7, 8, 9, 10, 2]]), np.zeros(1)).inputs
    bench.model.eval()
    assert torch.equal(bench.model(tokens), bench.model(tokens))
    bench.model.train()
    assert not torch.equal(bench.model(tokens), bench.model(tokens))
    assert "dropout" not in plan_of(LANGUAGE).document()["model"]
