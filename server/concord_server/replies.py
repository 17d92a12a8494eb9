"""Step 10's door: every reply is hostile until it has passed this list, and nothing is summed before.

  1. it is an answer, not an error
  2. it repeats run, step, round, attempt, node, plan, model and layout of the offer: not late, foreign or
     replayed
  3. exactly the declared blocks, each with its dtype, shape and number of bytes; nothing is allocated from
     its header
  4. the weight is positive and not above the node's registered rows; it counts itself once
  5. every real block is within its norm bound, every coordinate within the ring's share of one node
  6. counts are not negative, and not above what the registered rows allow

Ring integers cannot be NaN or Inf: a float block is refused by (3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, Message
from numpy.typing import NDArray

from concord_shared.accounting import noise_multiplier
from concord_shared.blocks import LANES, Block
from concord_shared.compression import unpacked, wire_of
from concord_shared.errors import UpdateRefusedError
from concord_shared.fitting import AnyProgramme
from concord_shared.messages import RING, Offer, read_array
from concord_shared.metrics import metric_sums
from concord_shared.noise import TAILS, widest
from concord_shared.plan.data import DataContract
from concord_shared.plan.schema import Plan
from concord_shared.quantiser import extent_of, levels_of
from concord_shared.statistics import Programme
from concord_shared.transport import NodeEntry

__all__ = ["Expectation", "accept_binding", "accept_masked", "accept_reply", "norm_problem", "statistics_slack"]

Integers = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class Expectation:
    """What an honest reply of `node` to `offer` must look like. `blocks` include the lanes; `programme` is
    what checks those of statistics, `slack` how far their noise may reach."""

    offer: Offer
    node: NodeEntry
    blocks: tuple[Block, ...]
    weight_cap: int
    contract: DataContract
    programme: AnyProgramme | None = None
    slack: NDArray[np.float64] | None = None


def statistics_slack(plan: Plan, stage: int, rows_max: int, nodes: int) -> NDArray[np.float64] | None:
    """`(size,)`: how far the noise of so many nodes may move each sum of a stage; None where there is none."""
    if plan.noise != "tallies":
        return None
    slack: NDArray[np.float64] = Programme.of(plan).deviations(stage, rows_max, noise_multiplier(plan, 1))
    slack *= TAILS * nodes**0.5
    return slack


def accept_reply(message: Message, expected: Expectation) -> dict[str, Integers]:
    """The blocks of a reply, after every check.

    Raises:
        UpdateRefusedError: with the check that it failed.
    """
    accept_binding(message, expected)
    blocks = _read_blocks(message, expected)
    _check_weight(blocks, expected)
    for block in expected.blocks:
        if block.weight == "none":
            _check_counts(block, blocks[block.name], expected)
        else:
            _check_norm(block, blocks, expected)
    return blocks


def accept_masked(message: Message, expected: Expectation) -> dict[str, Integers]:
    """The masked blocks of a reply: checks 1 to 3. What they hold, nobody can see.

    Raises:
        UpdateRefusedError: with the check that it failed.
    """
    accept_binding(message, expected)
    return _read_blocks(message, expected)


def accept_binding(message: Message, expected: Expectation) -> None:
    """Checks 1 and 2: an answer, to this very offer. Raises: UpdateRefusedError."""
    if message.has_error():
        raise UpdateRefusedError("declined", str(message.error.reason)[:500])
    binding: Mapping[str, Any] = message.content.config_records.get("binding") or {}
    for name, value in expected.offer.binding.items():
        if binding.get(name) != value:
            raise UpdateRefusedError("foreign", f"{name} is {str(binding.get(name))[:80]!r}, expected {value!r}")


def _read_blocks(message: Message, expected: Expectation) -> dict[str, Integers]:
    record = message.content.array_records.get("blocks")
    names = {block.name for block in expected.blocks}
    if record is None or set(record) != names:
        got = sorted(record) if record is not None else []
        raise UpdateRefusedError("layout", f"expected the blocks {sorted(names)}, got {got[:20]}")
    try:
        return {
            block.name: _read_block(record[block.name], block, expected.offer.nodes_max) for block in expected.blocks
        }
    except ValueError as error:
        raise UpdateRefusedError("layout", str(error)) from error


def _read_block(array: Array, block: Block, nodes_max: int) -> Integers:
    dtype, size = wire_of(block)
    return unpacked(block, read_array(array, dtype, (size,), RING), nodes_max)


def _check_weight(blocks: Mapping[str, Integers], expected: Expectation) -> None:
    weight, count, scaled, over_cap = (int(value) for value in blocks[LANES.name])
    most = max(1, min(expected.node.rows, expected.weight_cap))
    if not 0 < weight <= most:
        raise UpdateRefusedError("weight", f"{weight} is outside 1…{most}, the weight of its registered rows")
    if count != 1 or not 0 <= scaled <= len(expected.blocks) or not 0 <= over_cap <= max(1, expected.node.rows):
        raise UpdateRefusedError("weight", f"lanes {[count, scaled, over_cap]} are not those of one node")


def _check_norm(block: Block, blocks: Mapping[str, Integers], expected: Expectation) -> None:
    share = int(blocks[LANES.name][0]) / expected.weight_cap if block.weight == "examples" else 1.0
    if problem := norm_problem(block, blocks[block.name], share, expected.offer.nodes_max, 1):
        raise UpdateRefusedError("bound", problem)


def norm_problem(
    block: Block, values: Integers, share: float, nodes_max: int, nodes: int, deviation: float = 0.0
) -> str:
    """What is wrong with the real block of one node, or with the sum of several; "" where nothing is.

    share: their weights together. deviation: of the noise that is in `values`.
    """
    largest, norm = extent_of(values)
    levels = block.levels or levels_of(block.ring_bits, nodes_max)
    if largest > nodes * levels + widest(deviation):
        return f"block {block.name} has a coordinate above the {levels} levels of one node, times {nodes}"
    off = 1.0 if block.levels else 0.5  # rounding by chance: up to a level a coordinate; to the nearest: half of one
    most = share * levels * (1 + 1e-4) + nodes * (off * block.size**0.5 + 1)
    most += deviation * block.size**0.5 + widest(deviation)
    return f"block {block.name} has the norm {norm:.4g}, above {most:.4g}" if norm > most else ""


def _check_counts(block: Block, values: Integers, expected: Expectation) -> None:
    """Integer blocks: sums of the cohort must stay within 63 bits, and rows within what the node registered."""
    offer, node = expected.offer, expected.node
    share = node.rows / offer.rows_max if block.name == "statistics" else 1 / offer.nodes_max
    most = int((1 << 62) * min(1.0, share)) + 1
    if len(values) and not -most <= int(values.min()) <= int(values.max()) <= most:
        raise UpdateRefusedError("counts", f"block {block.name} has a value above {most:.3g}, the share of one node")
    if block.name == "statistics":
        assert expected.programme is not None
        if problem := expected.programme.problem(offer.round_number, values, node.rows, offer.rows_max, expected.slack):
            raise UpdateRefusedError("counts", f"statistics: {problem}")
    elif block.name == "metrics":
        problem = metric_sums(expected.contract, values).problem(node.evaluation_rows)
        if problem:
            raise UpdateRefusedError("counts", f"metrics: {problem}")
    elif block.rows_first and not 0 <= int(values[0]) <= node.rows:
        raise UpdateRefusedError("counts", f"block {block.name} claims {int(values[0])} rows of {node.rows} registered")
