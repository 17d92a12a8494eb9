"""Dense models: linear and logistic regression are the ones without a hidden layer."""

import math

from torch import nn

__all__ = ["mlp", "nothing"]


def nothing() -> nn.Module:
    """Of a plan that trains no model: no parameters."""
    return nn.Identity()


def mlp(shape: tuple[int, ...], hidden: tuple[int, ...], outputs: int, batch_norm: bool = False) -> nn.Module:
    """Dense layers with ReLU between them, over flattened inputs; batch_norm: before each ReLU, for FedBN."""
    layers: list[nn.Module] = [nn.Flatten()]
    size = math.prod(shape)
    for width in hidden:
        layers += [nn.Linear(size, width), *([nn.BatchNorm1d(width)] if batch_norm else []), nn.ReLU()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, outputs))
