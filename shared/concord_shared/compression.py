"""Fewer bytes of an Update, whatever the strategy: steps 5 and 6 of the walk with less to send.

    fp16, int8   every coordinate, with fewer bits: the collector sums the ring integers that they stand for, exactly
    rand-k       one coordinate of `one_in`, drawn for each round from the plan's seed, the same for all nodes
    narrow       every coordinate, in a ring of 16 bits

What a node leaves out of one round it adds to the next (error feedback: Seide et al. 2014; Karimireddy et al. 2019), so
that nothing is lost for good. rand-k and narrow are sums in a ring as before, so masks fit them; fp16 and int8 are not.

int8: groups of coordinates share a power of two, so that what is decoded is an integer of the ring, the same on every
machine.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.blocks import Block, EncodedUpdate, example_weight
from concord_shared.errors import UpdateRefusedError
from concord_shared.plan.schema import Plan
from concord_shared.quantiser import clip_to_bound, dequantise, extent_of, levels_of
from concord_shared.seeds import derive_seed

__all__ = ["compressed_blocks", "expanded", "left_over", "packed", "places", "selected", "unpacked", "wire_of"]

Integers = NDArray[np.signedinteger[Any]]
GROUP = 1024
"""Coordinates that share one power of two: one byte more for so many."""
RESIDUAL = "residual."


def compressed_blocks(plan: Plan, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """The blocks as they travel and are summed; integer blocks stay as they are."""
    wanted = plan.compression
    if wanted is None:
        return blocks

    def smaller(block: Block) -> Block:
        match wanted.kind:
            case "rand-k":
                return replace(block, size=-(-block.size // wanted.one_in))
            case "narrow":
                return replace(block, ring_bits=16)
            case kind:
                return replace(block, wire=kind)

    return tuple(block if block.weight == "none" else smaller(block) for block in blocks)


def places(plan: Plan, round_number: int, size: int) -> NDArray[np.int64] | None:
    """Which coordinates of `size` a round sends, in order; None for all. One of each `one_in` that follow each other.

    From the raw numbers of PCG64, which numpy promises never to change: all parties must draw the same.
    """
    wanted = plan.compression
    if wanted is None or wanted.kind != "rand-k":
        return None
    starts = np.arange(0, size, wanted.one_in)
    widths = np.minimum(wanted.one_in, size - starts)
    drawn = np.random.PCG64(derive_seed(plan.seed, "rand-k", round_number)).random_raw(len(starts))
    chosen: NDArray[np.int64] = starts + (drawn % widths.astype(np.uint64)).astype(np.int64)
    return chosen


def selected(
    plan: Plan,
    blocks: tuple[Block, ...],
    round_number: int,
    vectors: Mapping[str, NDArray[Any]],
    state: Mapping[str, Any],
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """What a node would send, and what of that is sent in this round.

    blocks: as the strategy declares them. state: what stays at the node, where the last round's rest lies.
    """
    if plan.compression is None:
        return dict(vectors), dict(vectors)
    whole, part = dict(vectors), dict(vectors)
    for block in blocks:
        if block.weight != "none":
            rest = state.get(RESIDUAL + block.name)
            whole[block.name] = vectors[block.name] if rest is None else vectors[block.name] + rest
            chosen = places(plan, round_number, block.size)
            part[block.name] = whole[block.name] if chosen is None else whole[block.name][chosen]
    return whole, part


def left_over(
    plan: Plan,
    blocks: tuple[Block, ...],
    round_number: int,
    whole: Mapping[str, NDArray[Any]],
    sent: EncodedUpdate,
    rows: int,
    nodes_max: int,
) -> dict[str, NDArray[np.float32]]:
    """What this round did not send of what it would, `(size,) float32` by its name in the node's state.

    What was beyond the block's bound is not kept: clipping is meant to lose it.
    """
    if plan.compression is None:
        return {}
    found = {}
    for before, block in zip(blocks, compressed_blocks(plan, blocks), strict=True):
        if block.weight == "none":
            continue
        chosen = places(plan, round_number, before.size)
        rest = whole[block.name].astype(np.float32)
        part = rest if chosen is None else rest[chosen]
        weight = example_weight(rows, plan.rounds.weight_cap) if block.weight == "examples" else 1.0
        arrived = dequantise(sent.blocks[block.name], weight, block.bound, block.ring_bits, nodes_max, block.levels)
        kept = (clip_to_bound(part, block.bound)[0] - arrived).astype(np.float32)
        if chosen is None:
            rest = kept
        else:
            rest[chosen] = kept
        found[RESIDUAL + block.name] = rest
    return found


def expanded(
    plan: Plan, blocks: tuple[Block, ...], round_number: int, means: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """The decoded means in the size that the strategy knows: 0 where nobody sent anything."""
    found = dict(means)
    for block in blocks:
        chosen = None if block.weight == "none" else places(plan, round_number, block.size)
        if chosen is not None:
            found[block.name] = np.zeros(block.size)
            found[block.name][chosen] = means[block.name]
    return found


# How a block travels


def wire_of(block: Block) -> tuple[np.dtype[Any], int]:
    """dtype and length of the array that carries a block."""
    if block.wire == "fp16":
        return np.dtype("<f2"), block.size
    if block.wire == "int8":
        return np.dtype("u1"), block.size + -(-block.size // GROUP)
    return block.dtype, block.size


def packed(blocks: tuple[Block, ...], sent: EncodedUpdate, nodes_max: int) -> dict[str, NDArray[Any]]:
    """The arrays that travel; `sent.blocks` become what the other side will read from them.

    Nowhere longer than the integers that they stand for, so that no bound is passed by rounding.
    """
    arrays: dict[str, NDArray[Any]] = dict(sent.blocks)
    for block in blocks:
        if not block.wire:
            continue
        values = sent.blocks[block.name]
        longest = extent_of(values)[1] * (1 + 1e-6)
        for towards_0 in (False, True):
            array = (
                _to_half(values, block, nodes_max, towards_0) if block.wire == "fp16" else _to_bytes(values, towards_0)
            )
            arrays[block.name], sent.blocks[block.name] = array, unpacked(block, array, nodes_max)
            if extent_of(sent.blocks[block.name])[1] <= longest:
                break
    return arrays


def unpacked(block: Block, array: NDArray[Any], nodes_max: int) -> Integers:
    """The ring integers `(size,)` that an array of `wire_of` stands for.

    Raises:
        UpdateRefusedError: it stands for none.
    """
    if not block.wire:
        return array
    if block.wire == "fp16":
        if not np.isfinite(array).all():
            raise UpdateRefusedError("layout", f"block {block.name} holds NaN or Inf")
        whole: Integers = np.rint(array.astype(np.float64) * _half_unit(block, nodes_max)).astype(block.dtype)
        return whole
    groups = -(-block.size // GROUP)
    shifts, codes = array[:groups], array[groups:].view(np.int8)
    if int(shifts.max(initial=0)) > block.ring_bits - 9:
        raise UpdateRefusedError("layout", f"block {block.name} has a scale that the ring does not hold")
    spread = np.repeat(shifts, GROUP)[: block.size].astype(block.dtype)
    decoded: Integers = np.left_shift(codes.astype(block.dtype), spread)
    return decoded


def _half_unit(block: Block, nodes_max: int) -> float:
    """A power of two: the greatest integer of one node is below 2**15 of it, where float16 is at its widest."""
    levels = block.levels or levels_of(block.ring_bits, nodes_max)
    return float(2.0 ** max(0, levels.bit_length() - 15))


def _to_half(values: Integers, block: Block, nodes_max: int, towards_0: bool) -> NDArray[np.float16]:
    exact = values / _half_unit(block, nodes_max)
    near = exact.astype("<f2")
    if not towards_0:
        return near
    far = np.abs(near.astype(np.float64)) > np.abs(exact)
    return np.where(far, np.nextafter(near, np.float16(0)), near).astype("<f2")


def _to_bytes(values: Integers, towards_0: bool) -> NDArray[np.uint8]:
    """Shifts of the groups, then a signed byte for each coordinate."""
    groups = -(-len(values) // GROUP)
    padded = np.zeros(groups * GROUP, np.int64)
    padded[: len(values)] = values
    rows = padded.reshape(groups, GROUP)
    largest = np.abs(rows).max(axis=1)
    shifts = np.maximum(0, np.ceil(np.log2(np.maximum(1, largest) / 127))).astype(np.int64)
    scaled = rows / np.exp2(shifts)[:, None]
    codes = np.trunc(scaled) if towards_0 else np.rint(scaled)
    codes = np.clip(codes, -127, 127).astype(np.int8).reshape(-1)[: len(values)]
    return np.concatenate([shifts.astype(np.uint8), codes.view(np.uint8)])
