"""ResNet-18, -34 and -50 (He et al. 2016), for images of any size.

Halving is in a bottleneck's 3×3 convolution, not in its first 1×1 (Goyal et al. 2017); both have as many parameters.
"""

from torch import Tensor, nn

from concord_shared.models.norms import Norm, new_norm
from concord_shared.plan.models import ResNet
from concord_shared.plan.vision import Block, channels_of, resnet_blocks

__all__ = ["resnet"]


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x))."""

    is_block = True

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.relu = nn.ReLU()

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.relu(self.branch(images) + self.shortcut(images))
        return made


def resnet(model: ResNet, inputs: int, outputs: int) -> nn.Module:
    """`(n, inputs, h, w)` to `(n, outputs)`. On ImageNet (3 channels, 1000 classes) 11,689,512, 21,797,672 and
    25,557,032 parameters, those of torchvision's models.
    """
    blocks = list(resnet_blocks(model))
    make = _bottleneck if model.name == "resnet-50" else _basic
    built = nn.Sequential(
        *_stem(model, inputs),
        *(Residual(make(block, model.norm), _shortcut(block, model.norm)) for block in blocks),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(blocks[-1].after, outputs),
    )
    _initialise(built)
    return built


def _stem(model: ResNet, inputs: int) -> list[nn.Module]:
    channels = channels_of(64, model.width)
    if model.stem == "imagenet":
        first = nn.Conv2d(inputs, channels, 7, 2, 3, bias=False)
        return [first, new_norm(model.norm, channels), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    stride = 2 if model.stem == "stride-2" else 1
    return [nn.Conv2d(inputs, channels, 3, stride, 1, bias=False), new_norm(model.norm, channels), nn.ReLU()]


def _basic(block: Block, norm: Norm) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(block.before, block.inside, 3, block.stride, 1, bias=False),
        new_norm(norm, block.inside),
        nn.ReLU(),
        nn.Conv2d(block.inside, block.after, 3, 1, 1, bias=False),
        new_norm(norm, block.after),
    )


def _bottleneck(block: Block, norm: Norm) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(block.before, block.inside, 1, bias=False),
        new_norm(norm, block.inside),
        nn.ReLU(),
        nn.Conv2d(block.inside, block.inside, 3, block.stride, 1, bias=False),
        new_norm(norm, block.inside),
        nn.ReLU(),
        nn.Conv2d(block.inside, block.after, 1, bias=False),
        new_norm(norm, block.after),
    )


def _shortcut(block: Block, norm: Norm) -> nn.Module:
    if block.stride == 1 and block.before == block.after:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(block.before, block.after, 1, block.stride, bias=False), new_norm(norm, block.after))


def _initialise(model: nn.Module) -> None:
    """He et al. 2015 for convolutions. Goyal et al. 2017, section 5.1: the last norm of each branch begins at 0, so
    that a block begins as its shortcut, and the last layer with a deviation of 0.01.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Residual):
            assert isinstance(module.branch, nn.Sequential)
            last = module.branch[-1]
            assert isinstance(last, nn.GroupNorm | nn.BatchNorm2d)
            nn.init.zeros_(last.weight)
