"""DP-SGD: what one row can change, and what hides it."""

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from concord_client import private_training
from concord_client.private_training import clipped_gradients, private_layers, train_privately
from concord_client.trainer import Workbench
from concord_shared.accounting import Sampling
from concord_shared.errors import UsageError
from concord_shared.models import build_model, new_vector
from concord_shared.noise import SecretStream
from concord_shared.plan import Plan
from helpers import IMAGES, plan_of

CLIP = 0.1
ROWS = 24


def losses_of(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


def plan_for(model: str, *overrides: str) -> Plan:
    dp = f"privacy={{mode='plain', dp={{unit='record', epsilon=3.0, delta=1e-5, clip={CLIP}}}}}"
    return plan_of(IMAGES, "data.shape=[1, 28, 28]", f"model.name={model}", dp, *overrides)


def group_norm_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 5, stride=3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 3))


def some_rows(count: int = ROWS) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 28, 28, generator=chance), torch.randint(0, 3, (count,), generator=chance)


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = group_norm_cnn() if name == "group-norm" else build_model(plan_for(name))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model(some_rows(2)[0])
    return model


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def summed(model: nn.Module, inputs: Tensor, targets: Tensor, clip: float = CLIP) -> Tensor:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    clipped_gradients(model, private_layers(model), losses_of, inputs, targets, clip)
    return flat(model).clone()


MODELS = ["logistic-regression", "2nn", "seed-cnn", "niid-cnn", "tanh-cnn", "mcmahan-cnn", "group-norm"]


@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_that_of_gradients_clipped_one_by_one(name: str) -> None:
    model, (inputs, targets) = model_of(name), some_rows(6)
    one_by_one = torch.zeros_like(summed(model, inputs, targets))
    for row in range(len(targets)):
        model.zero_grad()
        losses_of(model(inputs[row : row + 1]), targets[row : row + 1]).sum().backward()
        gradient = flat(model)
        one_by_one += gradient * min(1.0, CLIP / float(gradient.norm()))
    torch.testing.assert_close(summed(model, inputs, targets), one_by_one, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_one_extreme_row_more_or_less_moves_the_sum_by_at_most_the_clip(name: str) -> None:
    model, (inputs, targets) = model_of(name), some_rows()
    inputs[0] *= 1e4
    targets[0] = model(inputs[:1]).argmin()  # as wrong as can be
    moved = summed(model, inputs, targets) - summed(model, inputs[1:], targets[1:])
    assert 0.5 * CLIP < float(moved.norm()) <= CLIP * (1 + 1e-5)


def test_without_clipping_the_same_row_would_move_it_by_far_more() -> None:
    model, (inputs, targets) = model_of("tanh-cnn"), some_rows()
    inputs[0] *= 1e4
    targets[0] = model(inputs[:1]).argmin()  # as wrong as can be
    moved = summed(model, inputs, targets, 1e9) - summed(model, inputs[1:], targets[1:], 1e9)
    assert float(moved.norm()) > 5 * CLIP


# Refusals


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False, track_running_stats=False), nn.Bilinear(2, 2, 2)],
    ids=["BatchNorm", "BatchNorm without parameters", "Bilinear"],
)
def test_a_layer_that_mixes_rows_or_that_nobody_knows_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(UsageError, match=type(layer).__name__):
        private_layers(nn.Sequential(nn.Conv2d(1, 8, 3), layer))


def test_a_layer_that_is_used_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, given: Tensor) -> Tensor:
            return torch.as_tensor(self.layer(self.layer(given)))

    model = Twice()
    with pytest.raises(UsageError, match="uses a layer twice"):
        clipped_gradients(model, private_layers(model), losses_of, torch.ones(2, 4), torch.zeros(2).long(), CLIP)


@pytest.mark.parametrize("first", [True, False], ids=["parts of rows", "another axis"])
def test_a_layer_that_sees_anything_but_whole_rows_in_turn_is_refused(first: bool) -> None:
    """It would be clipped part by part: a row of eight parts moved the sum by eight times the clip."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2, bias=False)

        def forward(self, given: Tensor) -> Tensor:
            parts = given.reshape(len(given), 8, 4)
            seen = parts.reshape(-1, 4) if first else parts.transpose(0, 1)
            made = torch.as_tensor(self.layer(seen))
            return made.reshape(len(given), 8, 2).sum(1) if first else made.sum(0)

    model = Parts()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(UsageError, match="each row by itself"):
        clipped_gradients(model, private_layers(model), losses_of, torch.ones(1, 32), torch.zeros(1).long(), CLIP)


def test_two_layers_that_share_a_parameter_are_refused() -> None:
    """A row would move it twice: by √2 · clip at worst, as each layer's part is measured by itself."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(UsageError, match="share a parameter"):
        private_layers(model)


# Noise and samples


def one_step(
    sampling: Sampling,
    multiplier: float,
    rows: int = 1,
    seen: Callable[[int], None] = lambda rows: None,
    size: int = 10_000,
) -> Tensor:
    """The gradient that a step of 2 · size parameters uses; all rows have the gradient 0."""

    def no_losses(outputs: Tensor, targets: Tensor) -> Tensor:
        seen(len(targets))
        return outputs.sum(1) * 0

    model = nn.Linear(1, size)
    optimiser = torch.optim.SGD(model.parameters(), 0.0)
    inputs, targets = torch.ones(rows, 1), torch.zeros(rows)
    assert train_privately(model, no_losses, inputs, targets, optimiser, sampling, multiplier, CLIP) == sampling.steps
    return flat(model)


def test_noise_has_the_deviation_that_was_accounted_for_in_every_coordinate() -> None:
    noise = one_step(Sampling(0.25, 1), 4.0, rows=8).double() / (4.0 * CLIP / 2)
    assert abs(float(noise.mean())) < 5 / math.sqrt(len(noise))
    assert float(noise.var()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / len(noise)))
    counts, _ = np.histogram(noise.numpy(), [-np.inf, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, np.inf])
    shares = np.diff([0, *(0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in (-1.5, -1, -0.5, 0, 0.5, 1, 1.5)), 1])
    chi_square = float(((counts - shares * len(noise)) ** 2 / (shares * len(noise))).sum())
    assert chi_square < 35  # 7 degrees of freedom: above once in 10⁵


def test_noise_is_never_the_same_twice_whatever_torch_and_numpy_are_seeded_with() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        np.random.seed(7)
        found.append(one_step(Sampling(1.0, 1), 1.0))
    assert not torch.equal(*found)
    assert abs(float(torch.corrcoef(torch.stack(found))[0, 1])) < 0.05


def test_noise_rests_on_the_operating_system_and_on_opacus_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's chance nailed down noise repeats, so nothing else goes into it."""
    monkeypatch.setattr(os, "urandom", lambda size: b"k" * size)
    assert torch.equal(one_step(Sampling(0.5, 2), 1.0, rows=9), one_step(Sampling(0.5, 2), 1.0, rows=9))


def test_no_function_of_noise_takes_a_seed() -> None:
    with pytest.raises(TypeError):
        SecretStream(b"key")  # type: ignore[call-arg]
    names = train_privately.__code__.co_varnames[: train_privately.__code__.co_argcount]
    assert not {"seed", "generator", "key", "stream"} & set(names)


def test_each_row_joins_each_step_by_its_own_chance() -> None:
    sizes: list[int] = []
    one_step(Sampling(0.3, 200), 1.0, rows=100, seen=sizes.append, size=1)
    assert len(set(sizes)) > 10, "a batch of fixed size is no Poisson sample"
    assert np.mean(sizes) == pytest.approx(30, abs=5 * math.sqrt(21 / 200))
    assert np.var(sizes) == pytest.approx(21, rel=0.6)


def test_the_plans_seed_does_not_choose_the_rows() -> None:
    found = []
    for _ in range(2):
        sizes: list[int] = []
        torch.manual_seed(3)
        one_step(Sampling(0.5, 20), 1.0, rows=1000, seen=sizes.append, size=1)
        found.append(sizes)
    assert found[0] != found[1]


def test_the_denominator_is_the_expected_number_of_rows_whoever_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows have the gradient 1; with none, half or all of them chosen the sum is divided by the same number."""
    for chosen in (0, 50, 100):
        low = np.where(np.arange(100) < chosen, 0.0, 1.0)
        monkeypatch.setattr(SecretStream, "uniforms", lambda self, count, low=low: low[:count])
        monkeypatch.setattr(SecretStream, "normals", lambda self, count: np.zeros(count))
        model = nn.Linear(1, 1, bias=False)
        optimiser = torch.optim.SGD(model.parameters(), 0.0)
        train_privately(
            model, lambda outputs, targets: outputs[:, 0], torch.ones(100, 1), torch.zeros(100), optimiser,
            Sampling(0.2, 1), 1.0, 1.0,
        )  # fmt: skip
        assert float(flat(model)) == pytest.approx(chosen / 20, rel=1e-4)


def test_a_whole_step_goes_no_further_than_its_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row pulls a hundred times as far as the clip, all in one direction."""
    monkeypatch.setattr(SecretStream, "normals", lambda self, count: np.zeros(count))
    model = nn.Linear(1, 1, bias=False)
    optimiser = torch.optim.SGD(model.parameters(), 0.0)
    inputs, targets = torch.full((50, 1), 100 * CLIP), torch.zeros(50)
    train_privately(
        model, lambda outputs, targets: outputs[:, 0], inputs, targets, optimiser, Sampling(1.0, 1), 1.0, CLIP
    )
    assert float(flat(model)) == pytest.approx(CLIP, rel=1e-3)


def test_a_step_in_which_nobody_is_chosen_still_adds_noise() -> None:
    assert float(one_step(Sampling(1e-9, 1), 1.0, rows=3).std()) == pytest.approx(CLIP / 3e-9, rel=0.05)


# In a node's training


@pytest.mark.parametrize("model", ["tanh-cnn", "mlp", "logistic-regression"])
def test_a_bench_trains_privately_where_its_plan_says_so(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(private_training, "train_privately", lambda *given: (asked.append(given), given[5].steps)[1])
    plan = plan_for(model, "training.batch_size=6", "training.local_epochs=2", "rounds.count=3")
    bench = Workbench(plan, torch.device("cpu"))
    inputs, targets = some_rows()
    assert bench.train(bench.rows(inputs.numpy(), targets.numpy()), 0.1, 1) == 8
    _, _, _, _, _, sampling, multiplier, clip, _, _ = asked[0]
    assert (sampling, clip) == (Sampling(0.25, 8), CLIP)
    assert multiplier > 1


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox"])
def test_training_learns_in_spite_of_the_noise(strategy: str) -> None:
    plan = plan_of(
        IMAGES, "privacy={mode='plain', dp={unit='record', epsilon=8.0, delta=1e-5, clip=1.0}}",
        "training.batch_size=200", "training.local_steps=30", "rounds.count=1", f"strategy.name={strategy}",
    )  # fmt: skip
    chance = np.random.default_rng(0)
    targets = chance.integers(0, 3, 600)
    inputs = chance.random((600, 1, 8, 8), np.float32) * 0.5
    inputs[np.arange(600), 0, targets * 2, :] += 1
    bench = Workbench(plan, torch.device("cpu"))
    bench.load(new_vector(plan)[1])
    rows = bench.rows(inputs, targets)
    bench.train(rows, 1.0, 0, (lambda parameters, start: None) if strategy == "fedprox" else None)
    figures: Any = bench.evaluate(rows).figures()
    assert figures["accuracy"] > 0.9
