"""DP-SGD (Abadi et al. 2016): step 3 of the walk where a plan's [privacy.dp] has the unit record.

    each step   every row joins by its own secret chance q (Poisson)
                each row's gradient is scaled down to the clip
                their sum + N(0, (multiplier · clip)²) in every coordinate, over the expected number of rows: q · n

One backward pass (Bu et al. 2022, "book-keeping"): it brings what each layer saw and the slope at its output, from
which come the rows' norms and then the sum of their clipped gradients. A dense layer's rows are never stored one by one
(ghost clipping); other layers use Opacus' rules. Sampling and noise come from one `SecretStream`; neither plan nor
message has a say in it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from concord_shared.accounting import Sampling
from concord_shared.errors import UsageError
from concord_shared.noise import SecretStream

__all__ = ["clipped_gradients", "private_layers", "train_privately"]

ROWS_AT_ONCE = 256
"""Rows whose gradients of convolutions are in memory together."""
BELOW = 1 - 1e-5
"""Rounding in float32 never lifts a clipped gradient above the clip."""

Losses = Callable[[Tensor, Tensor], Tensor]
"""Outputs and targets to one loss a row, `(n,)`."""


def train_privately(
    model: nn.Module,
    losses_of: Losses,
    inputs: Tensor,
    targets: Tensor,
    optimiser: torch.optim.Optimizer,
    sampling: Sampling,
    multiplier: float,
    clip: float,
    adjust: Callable[[], None] | None = None,
    before_batch: Callable[[], None] | None = None,
) -> int:
    """`sampling.steps` steps from the model as it is; returns them.

    Args:
        multiplier: standard deviation of the noise over `clip`.
        adjust: changes the noised gradients before each step, without looking at rows. before_batch: raises to stop.

    Raises:
        UsageError: the model has a layer whose rows cannot be told apart.
    """
    model.train()
    layers = private_layers(model)
    stream = SecretStream()
    torch.manual_seed(int(stream.words(1)[0] >> np.uint64(1)))  # dropout: foreseen, it would tie rows to each other
    for _ in range(sampling.steps):
        if before_batch:
            before_batch()
        chosen = torch.from_numpy(np.flatnonzero(stream.uniforms(len(targets)) < sampling.rate)).to(inputs.device)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for part in torch.split(chosen, ROWS_AT_ONCE):
            if len(part):  # nobody may have been chosen: then noise alone, and the step counts all the same
                clipped_gradients(model, layers, losses_of, inputs[part], targets[part], clip)
        for parameter in model.parameters():
            _add_noise(parameter, multiplier * clip, sampling.rate * len(targets), stream)
        if adjust:
            with torch.no_grad():
                adjust()
        optimiser.step()
    return sampling.steps


def private_layers(model: nn.Module) -> list[nn.Module]:
    """The layers with parameters, all of which treat every row by itself.

    Raises:
        UsageError: one does not, as BatchNorm, or nobody knows how to tell its rows apart; or two share a parameter.
    """
    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    unfit = [layer for layer in layers if type(layer) not in GradSampleModule.GRAD_SAMPLERS]
    unfit += [each for each in model.modules() if isinstance(each, _BatchNorm)]  # even where it has no parameters
    if unfit:
        names = ", ".join(sorted({type(layer).__name__ for layer in unfit}))
        raise UsageError(
            f'privacy.dp.unit = "record" cannot train a model with {names}: each row must have its own gradient, '
            "whatever the other rows are. Use GroupNorm instead of BatchNorm, and layers of torch.nn"
        )
    owned = [id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)]
    if len(set(owned)) != len(owned):  # each layer's part of a row's gradient is measured by itself
        raise UsageError('privacy.dp.unit = "record" cannot train a model whose layers share a parameter')
    return layers


def clipped_gradients(
    model: nn.Module, layers: list[nn.Module], losses_of: Losses, inputs: Tensor, targets: Tensor, clip: float
) -> None:
    """Adds to each parameter's `grad` the sum of the rows' gradients, each scaled down to the L2 norm `clip`."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda layer, given, output: seen.append((layer, given[0], output)))
        for layer in layers
    ]
    try:
        losses = losses_of(model(inputs), targets)
    finally:
        for hook in hooks:
            hook.remove()
    if len({layer for layer, _, _ in seen}) != len(seen):
        raise UsageError('privacy.dp.unit = "record" cannot train a model that uses a layer twice')
    if any(each.shape[:1] != inputs.shape[:1] for _, given, output in seen for each in (given, output)):
        raise UsageError(  # its norms would be of parts of rows, and a row could move the sum by many times the clip
            'privacy.dp.unit = "record" cannot train a model that does not hand each row by itself, in the first axis, '
            "to every layer with parameters"
        )
    slopes = torch.autograd.grad(losses.sum(), [output for _, _, output in seen])
    with torch.no_grad():
        rules = [
            _Dense(*each, slope) if _is_dense(each) else _Other(*each, slope)
            for each, slope in zip(seen, slopes, strict=True)
        ]
        norms = torch.stack([rule.squares() for rule in rules]).sum(0).sqrt()
        factors = BELOW * clip / norms.clamp(min=clip)
        for rule in rules:
            rule.add(factors)


class _Dense:
    """A dense layer's row gradient is the outer product of slope and input: its norm is that of both, multiplied."""

    def __init__(self, layer: nn.Module, given: Tensor, output: Tensor, slope: Tensor) -> None:
        self._layer, self._given, self._slope = layer, given, slope

    def squares(self) -> Tensor:
        ones = 0.0 if self._layer.bias is None else 1.0
        return self._slope.square().sum(1) * (self._given.square().sum(1) + ones)

    def add(self, factors: Tensor) -> None:
        scaled: Any = self._slope * factors[:, None]
        weight: Any = self._layer.weight
        weight.grad.addmm_(scaled.T, self._given)
        if self._layer.bias is not None:
            self._layer.bias.grad += scaled.sum(0)


class _Other:
    """Any other layer's row gradients, by Opacus' rule."""

    def __init__(self, layer: nn.Module, given: Tensor, output: Tensor, slope: Tensor) -> None:
        rule = GradSampleModule.GRAD_SAMPLERS[type(layer)]
        # unfolding reads memory as it lies: in channels-last order it would mix the channels up
        self._rows: dict[nn.Parameter, Tensor] = rule(layer, [given.contiguous()], slope.contiguous())

    def squares(self) -> Tensor:
        return torch.stack([rows.flatten(1).square().sum(1) for rows in self._rows.values()]).sum(0)

    def add(self, factors: Tensor) -> None:
        for parameter, rows in self._rows.items():
            assert parameter.grad is not None
            parameter.grad += (factors @ rows.flatten(1)).view_as(parameter)


def _is_dense(seen: tuple[nn.Module, Tensor, Tensor]) -> bool:
    layer, given, _ = seen
    return type(layer) is nn.Linear and given.dim() == 2


def _add_noise(parameter: nn.Parameter, deviation: float, rows: float, stream: SecretStream) -> None:
    """rows: the denominator, expected and not chosen: how many were chosen is nobody's business."""
    summed: Any = parameter.grad
    noise = torch.from_numpy(stream.normals(summed.numel()) * deviation).to(summed).view_as(summed)
    parameter.grad = (summed + noise) / rows
