"""Images: lone black and white pixels replaced by their neighbours' median, and training images in other positions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.plan.preparation import Augmentation
from concord_shared.plan.schema import Plan
from concord_shared.seeds import derive_seed

__all__ = ["augmented", "denoised", "for_training", "noise_share"]

Images = NDArray[np.uint8]
DIFFERENCE_MIN = 64
"""Of a black or white pixel from the median of its 3×3 neighbourhood, to count as noise."""
NOISE_SHARE_MIN = 0.06
"""Of noise among an image's pixels, to be cleaned at all: of Fashion-MNIST's images less than 1 in 1,000 have more; of
the same with 20 % salt and pepper less than 1 in 1,000 have less."""
NETWORK = (
    *((0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (0, 3)),
    *((5, 8), (4, 7), (3, 6), (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2)),
)
"""Compare and exchange until the fourth of nine is their median (Smith 1996; Devillard 1998, opt_med9)."""


def denoised(images: Images) -> Images:
    """`(n, c, h, w) uint8` with the noise of noisy images replaced; the others are as they were."""
    median = _median(images)
    noise = _noise(images, median)
    noise &= _share(noise)[:, None, None, None] >= NOISE_SHARE_MIN
    return np.where(noise, median, images)


def for_training(plan: Plan, images: NDArray[Any], round_number: int, node: str) -> NDArray[Any]:
    """Raw training rows in the positions of this round, where the plan augments; never rows to evaluate or predict."""
    wanted = plan.preprocessing.augment
    return (
        images if wanted is None else augmented(images, wanted, derive_seed(plan.seed, "augment", round_number, node))
    )


def noise_share(images: Images) -> NDArray[np.float64]:
    """Of each image `(n,)`: how much of it looks like salt and pepper."""
    return _share(_noise(images, _median(images)))


def augmented(images: NDArray[Any], wanted: Augmentation, seed: int) -> NDArray[Any]:
    """A copy of `(n, c, h, w)`: half of the images mirrored, each moved by up to `shift` pixels; black comes in."""
    chance = np.random.default_rng(seed)
    out = images.copy()
    if wanted.flip:
        mirrored = chance.random(len(out)) < 0.5
        out[mirrored] = out[mirrored, :, :, ::-1]
    if wanted.shift:
        height, width = out.shape[2:]
        side = wanted.shift
        padded = np.pad(out, ((0, 0), (0, 0), (side, side), (side, side)))
        tops, lefts = chance.integers(0, 2 * side + 1, (2, len(out)))
        rows = tops[:, None] + np.arange(height)
        columns = lefts[:, None] + np.arange(width)
        which = np.arange(len(out))[:, None, None]
        out = padded.transpose(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].transpose(0, 3, 1, 2)
    return np.ascontiguousarray(out)


def _noise(images: Images, median: Images) -> NDArray[np.bool_]:
    extreme = (images == 0) | (images == 255)
    noise: NDArray[np.bool_] = extreme & (np.maximum(images, median) - np.minimum(images, median) >= DIFFERENCE_MIN)
    return noise


def _share(noise: NDArray[np.bool_]) -> NDArray[np.float64]:
    return noise.reshape(len(noise), -1).mean(1) if len(noise) else np.zeros(0)


def _median(images: Images) -> Images:
    """Of each pixel and its eight neighbours; the border is its own neighbour."""
    height, width = images.shape[2:]
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    nine = [padded[:, :, top : top + height, left : left + width] for top in range(3) for left in range(3)]
    for low, high in NETWORK:
        nine[low], nine[high] = np.minimum(nine[low], nine[high]), np.maximum(nine[low], nine[high])
    return nine[4]
