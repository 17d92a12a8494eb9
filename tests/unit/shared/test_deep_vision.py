"""ResNets and EfficientNet: shapes, sizes, starts, gradients, and a round that learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from concord_client.data import Split, read_data
from concord_client.trainer import Workbench
from concord_local import simulate
from concord_local.federation import Federation
from concord_shared.errors import PlanError, UsageError
from concord_shared.models import build_model, layout_of, new_vector
from concord_shared.models.efficientnet import MBConv
from concord_shared.models.resnet import Residual
from concord_shared.plan import Plan, load_plan
from concord_shared.plan.sizes import parameters
from helpers import IMAGES, TABLE, plan_of

NARROW = {
    "resnet-18": "model={name='resnet-18', width=0.125}",
    "resnet-34": "model={name='resnet-34', width=0.125, stem='stride-2'}",
    "resnet-50": "model={name='resnet-50', width=0.125, stem='imagenet'}",
    "efficientnet-b0": "model={name='efficientnet-b0', width=0.25, stochastic_depth=0.2}",
}
SIDE = 20


def narrow(name: str, *overrides: str) -> Plan:
    return plan_of(IMAGES, f"data.shape=[3, {SIDE}, {SIDE}]", NARROW[name], *overrides)


def on_imagenet(model: str) -> Plan:
    classes = [str(label) for label in range(1000)]
    return plan_of(IMAGES, "data.shape=[3, 224, 224]", f"data.classes={classes}", f"model={model}")


def test_on_imagenet_they_have_the_published_sizes() -> None:
    """Those of torchvision's models, which its documentation states: a BatchNorm has as many as a GroupNorm."""
    published = {
        "{name='resnet-18', stem='imagenet'}": 11_689_512,
        "{name='resnet-34', stem='imagenet'}": 21_797_672,
        "{name='resnet-50', stem='imagenet'}": 25_557_032,
        "{name='efficientnet-b0', stem='stride-2'}": 5_288_548,
    }
    for model, size in published.items():
        plan = on_imagenet(model)
        with torch.device("meta"):
            assert layout_of(plan, build_model(plan)).size == size
        assert parameters(plan) == size


@pytest.mark.parametrize("name", NARROW)
def test_arithmetic_counts_what_is_built_at_every_width(name: str) -> None:
    for width in (0.01, 0.3, 0.77, 1.5):
        plan = narrow(name, f"model.width={width}")
        with torch.device("meta"):
            assert layout_of(plan, build_model(plan)).size == parameters(plan)


@pytest.mark.parametrize(
    ("model", "smallest"),
    [
        ("{name='resnet-18', stem='stride-1', width=0.1}", 5),
        ("{name='resnet-18', stem='stride-2', width=0.1}", 9),
        ("{name='resnet-50', stem='imagenet', width=0.1}", 17),
        ("{name='efficientnet-b0', stem='stride-1', width=0.1}", 9),
        ("{name='efficientnet-b0', stem='stride-2', width=0.1}", 17),
    ],
)
def test_an_image_below_the_smallest_side_is_refused_by_name(model: str, smallest: int) -> None:
    fits = plan_of(IMAGES, f"data.shape=[1, {smallest}, 40]", f"model={model}")
    assert build_model(fits)(torch.zeros(2, 1, smallest, 40)).shape == (2, 3)
    small = plan_of(IMAGES, f"data.shape=[1, 40, {smallest - 1}]", f"model={model}")
    with pytest.raises(UsageError, match=f"with stem .* needs images of at least {smallest}×{smallest}"):
        build_model(small)


@pytest.mark.parametrize("name", NARROW)
def test_they_read_images_only(name: str) -> None:
    with pytest.raises(PlanError, match="reads images"):
        plan_of(TABLE, NARROW[name])


@pytest.mark.parametrize("wrong", ["width=0.0", "width=4.1", "stem='stride-3'", "norm='layer'"])
def test_what_no_such_model_has_is_refused(wrong: str) -> None:
    with pytest.raises(PlanError, match=wrong.partition("=")[0]):
        plan_of(IMAGES, f"model={{name='resnet-18', {wrong}}}")


@pytest.mark.parametrize("name", NARROW)
def test_batch_norm_is_refused_where_its_statistics_cannot_be_averaged(name: str) -> None:
    with pytest.raises(UsageError, match="buffers"):
        new_vector(narrow(name, "model.norm='batch'"))


@pytest.mark.parametrize("name", NARROW)
def test_every_block_begins_as_its_shortcut(name: str) -> None:
    images = torch.rand(2, 3, SIDE, SIDE)
    model = build_model(narrow(name)).eval()
    shorter = build_model(narrow(name)).eval()
    shorter.load_state_dict(model.state_dict())
    for module in shorter.modules():
        if isinstance(module, Residual) or (isinstance(module, MBConv) and module.is_residual):
            module.branch = nn.Sequential(module.branch, nn.Threshold(1e9, 0.0))
    assert torch.equal(model(images), shorter(images))
    assert model(images).std() > 0


@pytest.mark.parametrize("name", NARROW)
def test_gradients_are_finite_and_reach_every_parameter(name: str) -> None:
    """Where the last norm of a branch is 0, its inside learns from the second step on: so it is set to 1 here."""
    torch.manual_seed(0)
    model = build_model(narrow(name, *(["model.stochastic_depth=0.0"] if name == "efficientnet-b0" else []))).train()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    images = torch.rand(8, 3, SIDE, SIDE) * 255
    nn.functional.cross_entropy(model(images), torch.arange(8) % 3).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", NARROW)
def test_a_row_is_normalised_by_itself(name: str) -> None:
    model = build_model(narrow(name)).eval()
    images = torch.rand(4, 3, SIDE, SIDE)
    assert torch.allclose(model(images)[1:2], model(images[1:2]), atol=1e-5)


def test_skipped_blocks_keep_the_mean_and_are_whole_in_evaluation() -> None:
    block = MBConv(nn.Identity(), True, 0.25)
    torch.manual_seed(0)
    rows = torch.ones(20_000, 1, 1, 1)
    trained = block.train()(rows)
    assert trained.unique().tolist() == pytest.approx([1, 1 + 1 / 0.75])
    assert float(trained.mean()) == pytest.approx(2, abs=0.02)
    assert torch.equal(block.eval()(rows), 2 * rows)


@pytest.mark.parametrize("name", NARROW)
def test_training_twice_gives_the_same_bits(name: str) -> None:
    plan = narrow(name, "training.batch_size=8", "training.learning_rate=0.05")
    chance = np.random.default_rng(0)
    data = chance.random((24, 3, SIDE, SIDE), np.float32), chance.integers(0, 3, 24)
    start = new_vector(plan)[1]
    made = []
    for _ in range(2):
        bench = Workbench(plan, torch.device("cpu"))
        bench.load(start)
        bench.train(bench.rows(*data), 0.05, 7)
        made.append(bench.read())
    assert made[0].tobytes() == made[1].tobytes()
    assert made[0].tobytes() != start.tobytes()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 of scikit-learn's digits, each pixel four: 16×16."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.kron(found.images[:300], np.ones((1, 2, 2))) * 15
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, x=images.astype(np.uint8), y=found.target[:300])
    return path


ROUND = [
    *("data.shape=[1, 16, 16]", "rounds.count=1", "rounds.update_bound=100.0", "training.batch_size=16"),
    *("training.optimiser=adam", "training.momentum=0.0", "training.learning_rate=0.002", "training.local_epochs=4"),
]


@pytest.mark.parametrize("name", ["resnet-34", "resnet-50", "efficientnet-b0"])
def test_one_round_of_a_narrow_one_lowers_the_loss(name: str, digits: Path, tmp_path: Path) -> None:
    overrides = [*ROUND, NARROW[name].replace("imagenet", "stride-1")]
    plan = load_plan("digits-cnn", overrides).plan
    nodes = Federation.of(read_data(f"npz:{digits}", plan), plan, "iid", 3)
    bench = Workbench(plan, torch.device("cpu"))
    bench.load(new_vector(plan)[1])
    inputs, targets = nodes.all_rows().take(Split.TEST)
    before = bench.evaluate(bench.rows((inputs / 255).astype(np.float32), targets)).figures()["loss"]
    result = simulate(
        "digits-cnn", data=f"npz:{digits}", nodes=3, partition="iid", workers=1, out=tmp_path, overrides=overrides
    )
    assert result.metrics["rows"] == len(targets)
    assert result.metrics["loss"] < before - 0.05
