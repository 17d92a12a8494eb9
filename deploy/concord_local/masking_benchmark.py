"""`concord bench masking`: what masks cost a node and the coordinator, without a network between them.

One step of n nodes: all exchange keys and shares; one masks an Update of d parameters on one core; the others' masked
Updates are taken as zeros, for what they hold costs nothing and changes no time. Then nodes are lost, and the
coordinator takes the masks off.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from concord_client.masked_step import Journal, MaskedStep
from concord_server.collector import RingSum
from concord_server.unmasking import MaskedCollection
from concord_shared.blocks import LANES, Block, encode_update
from concord_shared.masking.attempt import STAGES, MaskedAttempt
from concord_shared.masking.stream import add_masks
from concord_shared.masking.thresholds import thresholds_for
from concord_shared.messages import Offer, answer, bytes_of, offer_message

__all__ = ["bench_masking", "show_masking"]


def bench_masking(nodes: int, parameters: int, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` steps of seconds at one node and at the coordinator; bytes of one node's step."""
    found = [_step(nodes, parameters, attempt + 1) for attempt in range(repeats)]
    medians = {name: round(statistics.median(each[name] for each in found), 4) for name in found[0]}
    plain = 4 * parameters
    return {
        "nodes": nodes,
        "parameters": parameters,
        "node_s": medians["keys"] + medians["shares"] + medians["masked"] + medians["consent"] + medians["open"],
        "stages_s": {stage: medians[stage] for stage in STAGES},
        "lost": found[0]["lost"],
        "unmask_s": medians["unmask"],
        "stream_gb_s": round(_stream_rate(parameters), 2),
        "bytes_beyond_fp32": int(medians["bytes"]) - plain,
        "bytes_ratio": round(medians["bytes"] / plain, 4),
        "repeats": repeats,
    }


def show_masking(result: dict[str, Any]) -> None:
    from rich.console import Console

    stages = ", ".join(f"{name} {seconds:.3f}" for name, seconds in result["stages_s"].items())
    Console().print(
        f"{result['nodes']} nodes, {result['parameters']:,} parameters: a masked step costs a node "
        f"{result['node_s']:.3f} s on one core ({stages}), and the coordinator {result['unmask_s']:.2f} s with "
        f"{result['lost']:.0f} nodes lost; mask stream {result['stream_gb_s']} GB/s; {result['bytes_ratio']} of the "
        "bytes of a plain fp32 update"
    )


def _step(nodes: int, parameters: int, number: int) -> dict[str, float]:
    blocks = (Block("delta", parameters), LANES)
    names = [f"node-{index:03d}" for index in range(nodes)]
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    needed = thresholds_for(nodes, None, 2)
    offers = {name: _offer(name, nodes, number) for name in names}
    identities = tuple((name, key.public_key()) for name, key in keys.items())
    attempts = {name: MaskedAttempt(offer, identities, needed, weight_cap=1000) for name, offer in offers.items()}
    watched, vector = names[0], np.random.default_rng(0).standard_normal(parameters, np.float32) * np.float32(1e-4)

    def quantised() -> dict[str, Any]:
        return encode_update(blocks[:1], {"delta": vector}, 1000, 1000, nodes).blocks

    steps = {
        name: MaskedStep(
            attempts[name],
            name,
            keys[name],
            Journal(),
            quantised if name == watched else lambda: {"lanes": np.zeros(LANES.size, LANES.dtype)},
        )
        for name in names
    }
    collection, total = MaskedCollection(attempts[watched]), RingSum(blocks)
    zeros = np.zeros(parameters, np.int32)
    seconds: dict[str, float] = {"bytes": 0.0, "lost": float(needed.losses)}
    alive = names
    for stage in STAGES:
        collection.begin(stage, alive)
        if stage == "masked":
            alive = names[: needed.survivors]
        for name in alive:
            records = collection.request(stage, name)
            began = time.perf_counter()
            back, masked = steps[name].answer(stage, records)
            if name == watched:
                seconds[stage] = time.perf_counter() - began
                request = offer_message(offers[name], None, 2, time.time(), records)
                seconds["bytes"] += bytes_of(request) + _reply_bytes(request, offers[name], masked, back)
            collection.accept(stage, name, back)
            if stage == "masked":
                total.add(name, {"delta": zeros, **masked})
    seconds["unmask"] = _timed(lambda: collection.open(total.sums()))
    return seconds


def _offer(node: str, nodes: int, number: int) -> Offer:
    return Offer("bench", "train", 1, number, node, "p", "m", "l", nodes, 1 << 20)


def _reply_bytes(request: Message, offer: Offer, blocks: dict[str, Any], records: dict[str, Any]) -> int:
    return bytes_of(answer(request, offer, blocks, {}, records))


def _stream_rate(parameters: int) -> float:
    """GB of mask, expanded and added, a second: over ten keys, as a node does with nine peers."""
    words, keys = np.zeros(parameters, "<u4"), [bytes([index]) * 32 for index in range(10)]
    return len(keys) * words.nbytes / _timed(lambda: add_masks(words, keys, [])) / 1e9


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
