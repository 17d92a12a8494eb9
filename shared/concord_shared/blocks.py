"""Named blocks of an Update: what a strategy declares, nodes encode and the collector sums.

A block is a vector with a rule. `examples` and `uniform` blocks are real numbers: clipped to their L2 bound,
scaled by the node's weight, rounded into a ring of signed integers; the coordinator decodes their weighted
mean. `none` blocks are exact integers already (metrics, counts, statistics); their sum is the result.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from concord_shared.errors import TrainingDivergedError, UsageError
from concord_shared.quantiser import clip_to_bound, dequantise, quantise

__all__ = ["LANES", "Block", "EncodedUpdate", "decode_means", "encode_update", "example_weight", "lanes_of"]

Integers = NDArray[np.signedinteger[Any]]
Reals = NDArray[np.floating[Any]]
Rounding = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Block:
    """A named part of an Update.

    `over` says what happens to a vector longer than `bound`: scaled down and counted, or refused at the node.
    `rows_first`: the first integer is a number of rows, which the node's registered rows bound.
    `wire`: how it travels, where not as the integers that are summed: see `compression`.
    `levels`: of a block that is noised as integers, how many stand for `bound`; 0: the finest that the ring holds.
    """

    name: str
    size: int
    weight: Literal["examples", "uniform", "none"] = "examples"
    bound: float = 1.0
    ring_bits: Literal[16, 32, 64] = 32
    over: Literal["scale", "refuse"] = "scale"
    rows_first: bool = False
    levels: int = 0
    wire: Literal["", "fp16", "int8"] = ""

    @property
    def dtype(self) -> np.dtype[np.signedinteger[Any]]:
        return np.dtype(f"<i{self.ring_bits // 8}")


LANES = Block("lanes", 4, "none", ring_bits=64)
"""Weight (rows up to the weight cap, exact), one for the node, scaled-down blocks, rows above the weight cap."""


@dataclass(frozen=True)
class EncodedUpdate:
    """Ring integers by block name, lanes included; the norm of each real block before it was clipped, where no noise is
    to hide it.
    """

    blocks: dict[str, Integers]
    norms: dict[str, float]


def example_weight(rows: int, weight_cap: int) -> float:
    """min(rows, cap) / cap, in (0, 1]: FSA-1's weight rule, in plain mode too."""
    return min(rows, weight_cap) / weight_cap


def lanes_of(rows: int, weight_cap: int, scaled: int = 0) -> Integers:
    return np.array([min(rows, weight_cap), 1, scaled, max(0, rows - weight_cap)], "<i8")


def encode_update(
    blocks: tuple[Block, ...],
    vectors: Mapping[str, NDArray[Any]],
    rows: int,
    weight_cap: int,
    nodes_max: int,
    by_chance: Rounding = np.rint,
) -> EncodedUpdate:
    """Steps 5 and 6 of the walk: clip, then quantise, each block by its own rule.

    Args:
        blocks: what the strategy declared; `vectors` holds exactly their names, each `(size,)`.
        rows: training rows of the node.
        nodes_max: the size of the cohort, which the ring must be able to sum.
        by_chance: how a block with `levels` is rounded. How long it was, and whether scaled down, is not told of it.

    Raises:
        TrainingDivergedError: a value is NaN or Inf.
        UsageError: a block that must not be scaled is longer than its bound.
    """
    encoded: dict[str, Integers] = {}
    norms: dict[str, float] = {}
    scaled = 0
    for block in blocks:
        vector = vectors[block.name]
        assert vector.shape == (block.size,), f"block {block.name}: {vector.shape} is not ({block.size},)"
        if block.weight == "none":
            encoded[block.name] = vector.astype(block.dtype)
            continue
        clipped, norm = clip_to_bound(vector, block.bound)
        if not np.isfinite(norm):
            raise TrainingDivergedError(f"block {block.name} holds NaN or Inf; try a lower training.learning_rate")
        if norm > block.bound:
            if block.over == "refuse":
                raise UsageError(
                    f"block {block.name} has the norm {norm:.3g}, above its bound {block.bound:.3g}, and must not be "
                    "scaled; raise the bound in the plan's [strategy]"
                )
            scaled += not block.levels
        weight = example_weight(rows, weight_cap) if block.weight == "examples" else 1.0
        if not block.levels:
            norms[block.name] = norm
        rounded: Rounding = by_chance if block.levels else np.rint
        encoded[block.name] = quantise(clipped, weight, block.bound, block.ring_bits, nodes_max, block.levels, rounded)
    encoded[LANES.name] = lanes_of(rows, weight_cap, scaled)
    return EncodedUpdate(encoded, norms)


def decode_means(
    blocks: tuple[Block, ...], sums: Mapping[str, Integers], nodes_max: int, weight_cap: int
) -> dict[str, NDArray[np.float64] | Integers]:
    """The weighted means `(size,) float64` of real blocks; the sums of integer blocks.

    Precondition: the sums are of at least one node; the round machine settles nothing below its quorum.
    """
    weight_sum, count = int(sums[LANES.name][0]), int(sums[LANES.name][1])
    assert min(weight_sum, count) > 0
    means: dict[str, NDArray[np.float64] | Integers] = {}
    for block in blocks:
        total = sums[block.name]
        if block.weight == "none":
            means[block.name] = total
        else:
            share = weight_sum / weight_cap if block.weight == "examples" else count
            means[block.name] = dequantise(total, share, block.bound, block.ring_bits, nodes_max, block.levels)
    return means
