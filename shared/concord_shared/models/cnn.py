"""Convolutional models, in channels-last order.

Pooling comes before ReLU: both orders give the same values and gradients (max and ReLU commute), and a
quarter of the elements pass through ReLU. Flattening keeps height, width, channels, as Keras does: no copy
in channels-last memory.
"""

from torch import Tensor, nn

__all__ = ["mcmahan_cnn", "niid_cnn", "seed_cnn", "tanh_cnn"]

Shape = tuple[int, ...]


class FlattenChannelsLast(nn.Module):
    """`(n, c, h, w)` to `(n, h·w·c)`."""

    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 2, 3, 1).flatten(1)


def seed_cnn(shape: Shape, outputs: int) -> nn.Module:
    """Conv 32 3×3, max-pool 2, ReLU, dense 128, ReLU, dense: 693,962 parameters on 28×28×1."""
    channels, height, width = shape
    features = 32 * ((height - 2) // 2) * ((width - 2) // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.MaxPool2d(2),
        nn.ReLU(),
        FlattenChannelsLast(),
        nn.Linear(features, 128),
        nn.ReLU(),
        nn.Linear(128, outputs),
    )


def mcmahan_cnn(shape: Shape, outputs: int) -> nn.Module:
    """McMahan et al. 2017, section 3: two 5×5 convolutions (32, 64), each with 2×2 max-pool; dense 512.

    1,663,370 parameters on 28×28×1, so the convolutions keep the size.
    """
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        FlattenChannelsLast(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
        nn.Linear(512, outputs),
    )


def niid_cnn(shape: Shape, outputs: int) -> nn.Module:
    """NIID-Bench's simple CNN (Li et al. 2021): two 5×5 convolutions (6, 16) with max-pool; dense 120, 84."""
    channels, height, width = shape
    features = 16 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(6, 16, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        FlattenChannelsLast(),
        nn.Linear(features, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, outputs),
    )


def tanh_cnn(shape: Shape, outputs: int) -> nn.Module:
    """For DP-SGD: Papernot et al. 2021, table 1, with each image, and each layer of it, normalised by itself.

    Tanh keeps activations, and with them gradients, within bounds. Conv 16 8×8 and conv 32 4×4, both stride 2 and with
    a max-pool of 2 that moves by 1; dense 32. 26,010 parameters on 28×28×1: each of them gets noise.
    """
    channels, height, width = shape
    features = 32 * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2)
    return nn.Sequential(
        nn.GroupNorm(1, channels, affine=False),
        nn.Conv2d(channels, 16, 8, stride=2, padding=2),
        nn.GroupNorm(4, 16, affine=False),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.GroupNorm(4, 32, affine=False),
        nn.Tanh(),
        nn.MaxPool2d(2, stride=1),
        FlattenChannelsLast(),
        nn.Linear(features, 32),
        nn.Tanh(),
        nn.Linear(32, outputs),
    )
