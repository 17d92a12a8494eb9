"""For load tests: answers without data and without training. Consent, signing and the egress log stay as they are.

Node k's update is the same step in coordinate k, and nothing elsewhere: so the model of a run of n rounds tells how
often each node was counted.
"""

import logging
from dataclasses import dataclass

import numpy as np
from flwr.app import Message

from concord_client.training_job import Job
from concord_shared.blocks import encode_update, lanes_of
from concord_shared.errors import ConsentRefusedError
from concord_shared.messages import RAW, answer, read_array, read_offer
from concord_shared.metrics import no_sums
from concord_shared.strategies import strategy_for
from concord_shared.tensors import Layout

__all__ = ["ENVIRONMENT", "FixedUpdate"]

log = logging.getLogger(__name__)

ENVIRONMENT = "CONCORD_NODE_FIXED_UPDATE"
"""The coordinate k, as a whole number."""
STEP = 2.0**-7


@dataclass(frozen=True)
class FixedUpdate:
    """A `Responder`. coordinate: where the step is."""

    coordinate: int

    def __post_init__(self) -> None:
        log.critical(
            "THIS NODE DOES NOT TRAIN: %s is set, every update is a fixed one. For load tests only", ENVIRONMENT
        )

    def respond(self, job: Job, message: Message, deadline_s: float) -> Message:
        offer = read_offer(message)
        lanes = lanes_of(job.rows, job.plan.rounds.weight_cap)
        if offer.kind == "evaluate":
            return answer(message, offer, {"metrics": no_sums(job.plan.data).vector, "lanes": lanes}, {})
        if offer.kind == "statistics":
            raise ConsentRefusedError("a fixed update has no statistics; use a plan without fitted preprocessing")
        record = message.content.array_records.get("model")
        if record is None or "theta" not in record:
            raise ConsentRefusedError("the message carries no model")
        size = len(record["theta"].data) // 4
        try:
            read_array(record["theta"], np.dtype(np.float32), (size,), RAW)
        except ValueError as error:
            raise ConsentRefusedError(f"the message's model does not fit: {error}") from error
        blocks = strategy_for(job.plan).blocks(job.plan, Layout.of({"model": (size,)}))
        vectors = {block.name: np.zeros(block.size, np.float32) for block in blocks}
        vectors[blocks[0].name][self.coordinate % size] = STEP
        update = encode_update(blocks, vectors, job.rows, job.plan.rounds.weight_cap, offer.nodes_max)
        metrics = {"metrics": no_sums(job.plan.data).vector} if offer.evaluate_incoming else {}
        return answer(message, offer, update.blocks | metrics, {"rows": job.rows, "steps": 0, "norms": update.norms})

    def rest(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing goes on."""
