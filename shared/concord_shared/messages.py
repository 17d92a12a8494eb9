"""The messages of a round as Flower messages: an Offer to a node, a Reply to the coordinator.

Tensors travel as little-endian bytes whose dtype and shape the receiver already knows from the plan; nothing
of a received header decides how much memory is taken. A reply repeats what it answers (run, step, round,
attempt, plan, model, layout), so that a late, foreign or replayed one can be told and refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, Metadata, RecordDict
from numpy.typing import NDArray

from concord_shared.canonical import canonical_digest
from concord_shared.errors import ConsentRefusedError

__all__ = [
    "COORDINATOR",
    "RAW",
    "RING",
    "Offer",
    "StepKind",
    "answer",
    "array_of",
    "bytes_of",
    "decline",
    "model_record",
    "offer_message",
    "read_array",
    "read_offer",
    "ring_blocks",
    "with_metadata",
]

StepKind = Literal["statistics", "train", "evaluate"]
RAW = "concord.raw/1"
RING = "concord.ring/1"
COORDINATOR = 1
TTL_S = 7 * 24 * 3600.0

MESSAGE_TYPES: dict[StepKind, str] = {
    "statistics": "query.statistics",
    "train": "train",
    "evaluate": "evaluate",
}


@dataclass(frozen=True)
class Offer:
    """What a node is asked to do.

    round_number: 1… for train and evaluate; the stage (1, 2) for statistics.
    nodes_max: the size of the cohort, which the ring must be able to sum.
    rows_max: an upper bound on all nodes' rows together, which fixed-point statistics must be able to sum.
    applied_round: the last round that was applied with this node's Update in it; 0 for none.
    preprocessing: the fitted preprocessing's document (or what the first statistics stage gave), as JSON.
    stage: of a masked step (`concord_shared.masking`); "" where the step is one plain request.
    """

    run: str
    kind: StepKind
    round_number: int
    attempt: int
    node: str
    plan_digest: str
    model_digest: str
    layout_digest: str
    nodes_max: int
    rows_max: int
    applied_round: int = 0
    evaluate_incoming: bool = False
    preprocessing: str = ""
    stage: str = ""

    @property
    def message_id(self) -> str:
        """The id of the message that carries this offer; a reply names it."""
        named = f"{self.run}/{self.kind}/{self.round_number}/{self.attempt}/{self.node}"
        return f"{named}/{self.stage}" if self.stage else named

    @property
    def question(self) -> str:
        """Digest of what the step asks about. Every attempt of it asks about the same: else one approval would answer
        any number of questions of the coordinator's choice.
        """
        return canonical_digest([self.model_digest, self.preprocessing, self.rows_max, self.nodes_max])

    @property
    def binding(self) -> dict[str, str | int]:
        """The fields that a reply repeats."""
        names = (
            "run",
            "kind",
            "round_number",
            "attempt",
            "node",
            "plan_digest",
            "model_digest",
            "layout_digest",
            "stage",
        )
        return {name: getattr(self, name) for name in names}


def array_of(values: NDArray[Any], stype: str) -> Array:
    """A Flower array that holds the plain little-endian bytes of `values`."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return Array(values.dtype.name, tuple(values.shape), stype, little.tobytes())


def read_array(array: Array, dtype: np.dtype[Any], shape: tuple[int, ...], stype: str) -> NDArray[Any]:
    """A read-only view of an array's bytes, if it is exactly what was expected.

    Raises:
        ValueError: stype, dtype, shape or the number of bytes differ.
    """
    if array.stype != stype or array.dtype != dtype.name or tuple(array.shape) != shape:
        raise ValueError(
            f"expected {stype} {dtype.name} {list(shape)}, got {array.stype} {array.dtype} {list(array.shape)}"
        )
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if len(array.data) != size:
        raise ValueError(f"expected {size} bytes, got {len(array.data)}")
    return np.frombuffer(array.data, dtype.newbyteorder("<")).reshape(shape)


def model_record(theta: NDArray[np.float32], broadcast: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """The model `(d,)` and the broadcast parts of the state, all float32; made once a round, shared by its offers."""
    arrays = {"theta": array_of(theta, RAW)}
    return ArrayRecord(arrays | {f"state.{name}": array_of(value, RAW) for name, value in broadcast.items()})


def offer_message(
    offer: Offer,
    model: ArrayRecord | None,
    node_id: int,
    now_s: float,
    records: Mapping[str, ConfigRecord] = MappingProxyType({}),
) -> Message:
    """The Flower message that carries `offer`; `now_s` is Unix time; `records`: of a masked step's stage."""
    config = ConfigRecord({name: getattr(offer, name) for name in Offer.__dataclass_fields__})
    content = RecordDict({"offer": config, **records})
    if model is not None:
        content["model"] = model
    metadata = Metadata(
        run_id=0,
        message_id=offer.message_id,
        src_node_id=COORDINATOR,
        dst_node_id=node_id,
        reply_to_message_id="",
        group_id=str(offer.round_number),
        created_at=now_s,
        ttl=TTL_S,
        message_type=MESSAGE_TYPES[offer.kind],
    )
    return with_metadata(content, metadata)


def with_metadata(content: RecordDict, metadata: Metadata) -> Message:
    """A message outside a Flower task, where Flower cannot fill in the metadata itself."""
    message: Message = Message(content=content, metadata=metadata)  # type: ignore[call-overload]
    return message


def read_offer(message: Message) -> Offer:
    """The offer of a message, each field with exactly the expected type.

    Raises:
        ConsentRefusedError: something is missing, unknown or of another type.
    """
    config = message.content.config_records.get("offer")
    fields = Offer.__dataclass_fields__
    if config is None or set(config) != set(fields):
        raise ConsentRefusedError("the message carries no offer of this version of concord")
    for name, value in config.items():
        expected = fields[name].type if fields[name].type in (int, bool) else str
        if type(value) is not expected or (isinstance(value, int) and not 0 <= value < 1 << 62):
            raise ConsentRefusedError(f"offer.{name}: expected {expected}, got {type(value).__name__}")
    if message.metadata.message_type != {str(kind): name for kind, name in MESSAGE_TYPES.items()}.get(
        str(config["kind"])
    ):
        raise ConsentRefusedError(f"an offer of kind {config['kind']!r} came as {message.metadata.message_type!r}")
    return Offer(**config)  # type: ignore[arg-type]


def answer(
    message: Message,
    offer: Offer,
    blocks: Mapping[str, NDArray[Any]],
    notes: Mapping[str, Any],
    records: Mapping[str, ConfigRecord] = MappingProxyType({}),
) -> Message:
    """A reply: ring integers by block, bound to the offer; `notes` are the node's own remarks, as JSON."""
    arrays = ArrayRecord({name: array_of(values, RING) for name, values in blocks.items()})
    content = RecordDict(
        {
            **({"blocks": arrays} if blocks else {}),
            "binding": ConfigRecord(dict(offer.binding)),
            "notes": ConfigRecord({"json": json.dumps(dict(notes))}),
            **records,
        }
    )
    return Message(content, reply_to=message)


def ring_blocks(reply: Message) -> dict[str, NDArray[np.signedinteger[Any]]]:
    """The blocks of a reply of this program's own training; those of another party are read with `read_array`."""
    record = reply.content.array_records["blocks"]
    return {name: np.frombuffer(array.data, np.dtype(array.dtype).newbyteorder("<")) for name, array in record.items()}


def decline(message: Message, reason: str) -> Message:
    """A reply that says why there is none."""
    return Message(Error(code=1, reason=reason), reply_to=message)


def bytes_of(message: Message) -> int:
    """Payload bytes of a message, as they would travel."""
    if message.has_error():
        return len(message.error.reason or "")
    arrays = sum(len(array.data) for record in message.content.array_records.values() for array in record.values())
    return arrays + sum(
        len(value if isinstance(value, bytes) else str(value))
        for record in message.content.config_records.values()
        for value in record.values()
    )
