"""EfficientNet-B0 (Tan and Le 2019): inverted bottlenecks (Sandler et al. 2018) with squeeze-excite (Hu et al.)."""

import math

import torch
from torch import Tensor, nn

from concord_shared.models.norms import Norm, new_norm
from concord_shared.plan.models import EfficientNet
from concord_shared.plan.vision import EFFICIENTNET_HEAD, EFFICIENTNET_STEM, Block, channels_of, efficientnet_blocks

__all__ = ["efficientnet"]


class Excite(nn.Module):
    """Channels weighted by what the whole image shows: mean, 1×1 to `squeezed`, SiLU, 1×1 back, sigmoid."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.SiLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = images * self.weigh(images)
        return made


class MBConv(nn.Module):
    """x + branch(x) where shapes agree, else branch(x). In training a share `skipped` of rows has x alone (Huang et al.
    2016), and the others count as much more.
    """

    is_block = True

    def __init__(self, branch: nn.Module, is_residual: bool, skipped: float) -> None:
        super().__init__()
        self.branch = branch
        self.is_residual = is_residual
        self.skipped = skipped

    def forward(self, images: Tensor) -> Tensor:
        made: Tensor = self.branch(images)
        if not self.is_residual:
            return made
        if self.training and self.skipped:
            kept = torch.rand(len(made), 1, 1, 1, device=made.device) >= self.skipped
            made = made * (kept / (1 - self.skipped))
        return images + made


def efficientnet(model: EfficientNet, inputs: int, outputs: int) -> nn.Module:
    """`(n, inputs, h, w)` to `(n, outputs)`. On ImageNet (3 channels, 1000 classes) 5,288,548 parameters, those of
    torchvision's model.
    """
    blocks = list(efficientnet_blocks(model))
    stem, head = channels_of(EFFICIENTNET_STEM, model.width), channels_of(EFFICIENTNET_HEAD, model.width)
    stride = 2 if model.stem == "stride-2" else 1
    built = nn.Sequential(
        nn.Conv2d(inputs, stem, 3, stride, 1, bias=False),
        new_norm(model.norm, stem),
        nn.SiLU(),
        *(
            _block(block, model.norm, model.stochastic_depth * index / len(blocks))
            for index, block in enumerate(blocks, 1)
        ),
        nn.Conv2d(blocks[-1].after, head, 1, bias=False),
        new_norm(model.norm, head),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(model.dropout),
        nn.Linear(head, outputs),
    )
    _initialise(built)
    return built


def _block(block: Block, norm: Norm, skipped: float) -> nn.Module:
    before, inside, after, kernel, stride = block
    widen = [nn.Conv2d(before, inside, 1, bias=False), new_norm(norm, inside), nn.SiLU()] if inside != before else []
    branch = nn.Sequential(
        *widen,
        nn.Conv2d(inside, inside, kernel, stride, kernel // 2, groups=inside, bias=False),
        new_norm(norm, inside),
        nn.SiLU(),
        Excite(inside, max(1, before // 4)),
        nn.Conv2d(inside, after, 1, bias=False),
        new_norm(norm, after),
    )
    return MBConv(branch, stride == 1 and before == after, skipped)


def _initialise(model: nn.Module) -> None:
    """As the authors' code: He et al. 2015 by outputs for convolutions. Not as theirs: a residual block begins as its
    shortcut, and the last layer with a deviation of 0.01, as in ResNets; uniform within 1/√outputs is far too much of
    ten.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, MBConv) and module.is_residual:
            assert isinstance(module.branch, nn.Sequential)
            last = module.branch[-1]
            assert isinstance(last, nn.GroupNorm | nn.BatchNorm2d)
            nn.init.zeros_(last.weight)
