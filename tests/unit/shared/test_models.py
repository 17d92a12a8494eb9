import numpy as np
import pytest
import torch
from torch import nn

from concord_shared.errors import UsageError
from concord_shared.models import MODELS, build_model, input_shape, layout_of, new_vector
from concord_shared.plan import Plan
from concord_shared.plan.models import PRETRAINED_MODELS
from helpers import IMAGES, REGRESSION, TABLE, plan_of

MNIST = ["data.shape=[1, 28, 28]", f"data.classes={[str(c) for c in range(10)]}"]


def image_plan(model: str, *overrides: str) -> Plan:
    return plan_of(IMAGES, *MNIST, f"model.name={model}", *overrides)


COUNTS = {
    "seed-cnn": 693_962,
    "mcmahan-cnn": 1_663_370,
    "niid-cnn": 44_426,  # 156 + 2,416 + 30,840 + 10,164 + 850
    "tanh-cnn": 26_010,  # Papernot et al. 2021, table 1: 1,040 + 8,224 + 16,416 + 330
    # of torchvision's on ImageNet: a stem of 9 and not 147 weights a channel, 10 classes and not 1000
    "resnet-18": 11_689_512 - 64 * 138 - 990 * 513,
    "resnet-34": 21_797_672 - 64 * 138 - 990 * 513,
    "resnet-50": 25_557_032 - 64 * 138 - 990 * 2049,
    "efficientnet-b0": 5_288_548 - 32 * 18 - 990 * 1281,
    "2nn": 199_210,  # McMahan et al. 2017, section 3
    "logistic-regression": 7_850,
}


@pytest.mark.parametrize(("name", "parameters"), COUNTS.items())
def test_number_of_parameters_on_mnist(name: str, parameters: int) -> None:
    plan = image_plan(name)
    model = build_model(plan)
    assert layout_of(plan, model).size == parameters
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    "name",
    [
        *("seed-cnn", "mcmahan-cnn", "niid-cnn", "tanh-cnn", "resnet-18", "resnet-50", "efficientnet-b0"),
        *("2nn", "mlp", "logistic-regression"),
    ],
)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 29, 31)])
def test_fits_other_shapes(name: str, shape: tuple[int, ...]) -> None:
    plan = image_plan(name, f"data.shape={list(shape)}")
    assert build_model(plan)(torch.zeros(2, *shape)).shape == (2, 10)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("name", "side"), [("niid-cnn", 8), ("tanh-cnn", 15), ("mcmahan-cnn", 3), ("seed-cnn", 2)])
def test_an_image_too_small_for_the_model_is_refused(name: str, side: int) -> None:
    with pytest.raises(UsageError):
        build_model(image_plan(name, f"data.shape=[1, {side}, {side}]"))


def test_mlp_has_the_layers_of_the_plan() -> None:
    model = build_model(image_plan("mlp", "model.hidden=[7, 5]"))
    assert [tuple(p.shape) for p in model.parameters()] == [(7, 784), (7,), (5, 7), (5,), (10, 5), (10,)]


def test_a_table_has_one_input_a_feature() -> None:
    plan = plan_of(TABLE)
    assert input_shape(plan) == (4,)
    assert build_model(plan)(torch.zeros(3, 4)).shape == (3, 2)
    assert build_model(plan_of(REGRESSION))(torch.zeros(3, 3)).shape == (3, 1)


def test_linear_regression_is_linear() -> None:
    plan = plan_of(REGRESSION)
    model = build_model(plan)
    weight, bias = (dict(model.named_parameters())[name] for name in ("1.weight", "1.bias"))
    inputs = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.allclose(model(inputs), inputs @ weight.T + bias)


def test_flattening_is_channels_last() -> None:
    flatten = next(m for m in build_model(image_plan("seed-cnn")) if type(m).__name__ == "FlattenChannelsLast")
    images = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2)
    assert flatten(images)[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


class TestStart:
    def test_is_seeded_by_the_plan_alone(self) -> None:
        torch.manual_seed(1)
        _, first = new_vector(image_plan("seed-cnn"))
        torch.manual_seed(2)
        _, again = new_vector(image_plan("seed-cnn"))
        _, other = new_vector(image_plan("seed-cnn", "seed=1"))
        assert first.tobytes() == again.tobytes()
        assert not np.array_equal(first, other)
        assert np.isfinite(first).all()
        assert first.std() > 0

    def test_leaves_the_global_generator_as_it_was(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        new_vector(image_plan("logistic-regression"))
        assert torch.equal(torch.rand(3), expected)

    def test_lies_as_the_layout_says(self) -> None:
        plan = image_plan("seed-cnn")
        layout, vector = new_vector(plan, lambda _: nn.Linear(2, 1))
        assert layout.entries == (("bias", (1,)), ("weight", (1, 2)))
        assert vector.shape == (3,)


def test_refuses_running_statistics() -> None:
    with pytest.raises(UsageError, match=r"buffers 1\.running_mean, .*use GroupNorm"):
        layout_of(image_plan("mlp"), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_refuses_other_precision() -> None:
    with pytest.raises(UsageError, match="expected float32 parameters, got others in weight, bias"):
        layout_of(image_plan("mlp"), nn.Linear(2, 2).double())


def test_refuses_a_persons_own_model() -> None:
    digest = "0" * 64
    plan = plan_of(IMAGES, f"model={{name='own', source='m.py:f', sha256='{digest}'}}")
    with pytest.raises(UsageError, match="a person's own code"):
        build_model(plan)


def test_every_model_that_a_plan_may_name_is_listed() -> None:
    others = {"mlp", "linear-regression", "matrix-factorisation", "neural-cf", "gpt-mini", "text-encoder"}
    assert set(MODELS) == {*COUNTS, *others, *PRETRAINED_MODELS}
