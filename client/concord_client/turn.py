"""A node's turn at a bench: the plan's local training on its rows, as a strategy asks for it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from concord_client.batches import Rows
from concord_client.state import PERSONAL
from concord_client.trainer import Workbench
from concord_shared.errors import ArtefactError
from concord_shared.strategies.base import Adjust, Part, State
from concord_shared.tensors import Float32Vector

__all__ = ["Turn", "personal_of"]


@dataclass
class Turn:
    """theta: the model that was sent. personal: the node's own part, which each training moves on; None: at its seeded
    start. rows: made when training first asks for them.
    """

    bench: Workbench
    theta: Float32Vector
    personal: Float32Vector | None
    prepare: Callable[[], Rows]
    learning_rate: float
    seed: int
    before_batch: Callable[[], None] | None = None

    @cached_property
    def rows(self) -> Rows:
        return self.prepare()

    def train(
        self, adjust: Adjust | None, start: Float32Vector | None = None, part: Part = "all", epochs: int = 0
    ) -> tuple[Float32Vector, int]:
        """As `strategies.base.Train`."""
        rows = self.rows
        self.bench.load(self.theta if start is None else start, self.personal)
        steps = self.bench.train(
            rows, self.learning_rate, self.seed, adjust, before_batch=self.before_batch, part=part, epochs=epochs
        )
        theta = self.bench.read()
        self.personal = self.bench.read_personal()
        return theta, steps

    def kept(self, node_state: State) -> State:
        """What stays at the node after a round: what the strategy keeps, and the personal part where there is one."""
        if self.personal is None or not len(self.personal):
            return node_state
        return {**node_state, PERSONAL: self.personal}


def personal_of(bench: Workbench, node_state: State) -> Float32Vector | None:
    """The node's personal part, None where it has none yet.

    Raises:
        ArtefactError: it is of another model.
    """
    found = node_state.get(PERSONAL)
    if found is None:
        return None
    if found.shape != (bench.partition.personal.size,) or found.dtype != np.float32:
        raise ArtefactError("the personal parameters that this node kept are of another model; begin a new run")
    return found
