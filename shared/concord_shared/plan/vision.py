"""Deep image models by arithmetic: their tables, widths and sizes. No torch is imported.

`models/resnet.py` and `models/efficientnet.py` build what these tables say. Every number of channels is a multiple of
8, so that normalisation in groups divides it.
"""

from collections.abc import Iterator
from typing import NamedTuple

from concord_shared.plan.models import EfficientNet, ResNet

__all__ = [
    "EFFICIENTNET_HEAD",
    "EFFICIENTNET_STEM",
    "RESNETS",
    "Block",
    "channels_of",
    "efficientnet_blocks",
    "efficientnet_parameters",
    "resnet_blocks",
    "resnet_parameters",
    "smallest_side",
]

RESNETS: dict[str, tuple[tuple[int, int, int, int], int]] = {
    "resnet-18": ((2, 2, 2, 2), 1),
    "resnet-34": ((3, 4, 6, 3), 1),
    "resnet-50": ((3, 4, 6, 3), 4),
}
"""He et al. 2016, table 1: blocks of each stage, and how much wider a block's output is than its inside."""


class Stage(NamedTuple):
    """expansion: how much wider the inside of a block is than its input. kernel: side of the depthwise convolution."""

    expansion: int
    kernel: int
    stride: int
    channels: int
    blocks: int


EFFICIENTNET_STEM, EFFICIENTNET_HEAD = 32, 1280
EFFICIENTNET_STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)
"""Tan and Le 2019, table 1: B0; the strides of the authors' code, where a stage's first block halves the side."""


class Block(NamedTuple):
    """One residual block: channels before, inside and after it."""

    before: int
    inside: int
    after: int
    kernel: int
    stride: int


def channels_of(channels: int, width: float) -> int:
    """`channels` times `width`, to the nearest multiple of 8, at least 8."""
    return max(8, 8 * int(channels * width / 8 + 0.5))


def smallest_side(model: ResNet | EfficientNet) -> int:
    """Of an image: below it, a stage would halve a single pixel."""
    if isinstance(model, EfficientNet):
        return {"stride-1": 9, "stride-2": 17}[model.stem]
    return {"stride-1": 5, "stride-2": 9, "imagenet": 17}[model.stem]


def resnet_blocks(model: ResNet) -> Iterator[Block]:
    """In order; each stage after the first halves the side."""
    depths, expansion = RESNETS[model.name]
    before = channels_of(64, model.width)
    for stage, depth in enumerate(depths):
        inside = channels_of(64 << stage, model.width)
        for index in range(depth):
            yield Block(before, inside, inside * expansion, 3, 2 if stage and not index else 1)
            before = inside * expansion


def efficientnet_blocks(model: EfficientNet) -> Iterator[Block]:
    """In order; `inside` is what the depthwise convolution sees."""
    before = channels_of(EFFICIENTNET_STEM, model.width)
    for stage in EFFICIENTNET_STAGES:
        after = channels_of(stage.channels, model.width)
        for index in range(stage.blocks):
            yield Block(before, before * stage.expansion, after, stage.kernel, 1 if index else stage.stride)
            before = after


def resnet_parameters(model: ResNet, inputs: int, outputs: int) -> int:
    """d, with inputs channels of an image; a norm has a scale and a shift a channel, of either kind."""
    stem = channels_of(64, model.width)
    size = inputs * stem * (49 if model.stem == "imagenet" else 9) + 2 * stem
    after = stem
    for block in resnet_blocks(model):
        before, inside, after = block.before, block.inside, block.after
        if model.name == "resnet-50":
            size += before * inside + 9 * inside * inside + inside * after + 2 * (inside + inside + after)
        else:
            size += 9 * (before * inside + inside * after) + 2 * (inside + after)
        if block.stride > 1 or before != after:
            size += before * after + 2 * after
    return size + after * outputs + outputs


def efficientnet_parameters(model: EfficientNet, inputs: int, outputs: int) -> int:
    """As `resnet_parameters`."""
    stem, head = channels_of(EFFICIENTNET_STEM, model.width), channels_of(EFFICIENTNET_HEAD, model.width)
    size, after = 9 * inputs * stem + 2 * stem, stem
    for before, inside, after, kernel, _ in efficientnet_blocks(model):
        squeezed = max(1, before // 4)
        if inside != before:
            size += before * inside + 2 * inside
        size += kernel * kernel * inside + 2 * inside
        size += 2 * inside * squeezed + squeezed + inside
        size += inside * after + 2 * after
    return size + after * head + 2 * head + head * outputs + outputs
