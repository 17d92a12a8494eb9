"""Attacks on purpose: `--attack scale:-10 --attackers 3` lets three of a simulation's nodes work against the others.

    label-flip   trains on wrong labels: class c becomes C-1-c (a target is mirrored in its range)
    sign-flip    sends the opposite of its honest Update
    scale:X      sends X times its honest Update
    alie[:Z]     all attackers send the mean of their honest Updates less Z deviations, coordinate by coordinate: small
                 enough to hide among the others (Baruch et al. 2019, "A Little Is Enough"); Z = 1 unless said
    free-rider   does no work: sends an Update of zeros
    nan          sends NaN in the place of integers; a coordinator that takes it loses its model

Who attacks is drawn by the plan's seed, so a drill can be repeated. Whatever they send has passed the bound on an
Update's length, as a coordinator refuses anything longer. Attackers evaluate honestly. No node that a partner runs
contains any of this.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from numpy.typing import NDArray

from concord_client.data import NodeDataset, Split
from concord_client.node import Node
from concord_shared.errors import UsageError
from concord_shared.messages import RING, Offer, array_of
from concord_shared.plan.privacy import Robust
from concord_shared.plan.schema import Plan
from concord_shared.seeds import derive_seed
from concord_shared.strategies.base import LocalResult, LocalWork, State
from concord_shared.tensors import Float32Vector

__all__ = ["Attack", "HostileNode", "flipped"]

KINDS = ("label-flip", "sign-flip", "scale", "alie", "free-rider", "nan")
VALUES = {"scale": -10.0, "alie": 1.0}
EXPECTED = "label-flip, sign-flip, scale:-10, alie, free-rider or nan"
Vectors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Attack:
    """kind: one of `KINDS`. value: of scale and alie. nodes: who attacks, in name order."""

    kind: str
    value: float
    nodes: tuple[str, ...]

    @classmethod
    def of(cls, text: str, attackers: int | None, names: Sequence[str], plan: Plan) -> "Attack | None":
        """attackers: by default as many as a robust plan tolerates, else one. None for no text.

        Raises:
            UsageError: no such attack, or not so many nodes.
        """
        if not text:
            if attackers is not None:
                raise UsageError(f"--attackers {attackers}: say what they do with --attack, one of {EXPECTED}")
            return None
        kind, value = cls._parse(text)
        if kind == "nan" and plan.privacy.mode == "private":
            raise UsageError("--attack nan: under masks everything that leaves a node is a ring integer; try scale:-10")
        if kind == "label-flip" and plan.data.task == "ranking":
            raise UsageError("--attack label-flip: a ranking has no labels; try scale:-10")
        count = (
            attackers if attackers is not None else plan.privacy.attackers if isinstance(plan.privacy, Robust) else 1
        )
        if not 1 <= count < len(names):
            raise UsageError(f"--attackers {count}: expected 1 to {len(names) - 1}, fewer than the {len(names)} nodes")
        chance = np.random.default_rng(derive_seed(plan.seed, "attackers"))
        return cls(kind, value, tuple(sorted(chance.permutation(sorted(names))[:count].tolist())))

    @staticmethod
    def _parse(text: str) -> tuple[str, float]:
        kind, colon, number = text.partition(":")
        try:
            value = float(number) if colon else VALUES.get(kind, 0.0)
        except ValueError as error:
            raise UsageError(f"--attack {text}: expected {EXPECTED}") from error
        if kind not in KINDS or (colon and kind not in VALUES) or not np.isfinite(value):
            raise UsageError(f"--attack {text}: expected {EXPECTED}")
        return kind, value

    def document(self) -> dict[str, Any]:
        value = {"value": self.value} if self.kind in VALUES else {}
        return {"kind": self.kind, **value, "nodes": list(self.nodes), "chosen": "by the plan's seed"}


def flipped(dataset: NodeDataset, plan: Plan) -> NodeDataset:
    """The same rows, those for training with wrong labels."""
    contract, rows, targets = plan.data, dataset.rows[Split.TRAIN], np.array(dataset.targets)
    if contract.task == "own":
        targets[rows] = np.random.default_rng(0).permutation(targets[rows])
    elif contract.task == "classification":
        targets[rows] = len(contract.classes) - 1 - targets[rows]
    else:
        assert contract.target_range is not None
        targets[rows] = sum(contract.target_range) - targets[rows]
    return replace(dataset, targets=targets)


@dataclass
class HostileNode(Node):
    """A node that attacks. mates: all attackers' nodes as they would be if they were honest, for those who collude."""

    attack: Attack = Attack("free-rider", 0.0, ())
    mates: tuple[Node, ...] = ()

    def respond(self, message: Message) -> Message:
        reply = super().respond(message)
        if self.attack.kind == "nan" and message.metadata.message_type == "train":
            blocks = reply.content.array_records["blocks"]
            spoilt = {
                name: array_of(np.full(array.shape, np.nan, np.float32), RING) if name != "lanes" else array
                for name, array in blocks.items()
            }
            reply.content["blocks"] = ArrayRecord(spoilt)
        return reply

    def _train(
        self, offer: Offer, theta: Float32Vector, broadcast: State
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        honest = self.strategy

        def encode(work: LocalWork, result: LocalResult) -> Vectors:
            if self.attack.kind == "alie":
                return self._hidden([_honest(mate, offer, theta, broadcast) for mate in self.mates])
            return self._changed(honest.encode(work, result))

        self.strategy = replace(honest, encode=encode)
        try:
            return super()._train(offer, theta, broadcast)
        finally:
            self.strategy = honest

    def _changed(self, vectors: Vectors) -> Vectors:
        factor = {"sign-flip": -1.0, "scale": self.attack.value, "free-rider": 0.0}.get(self.attack.kind, 1.0)
        return {name: (vector * factor).astype(vector.dtype) for name, vector in vectors.items()}

    def _hidden(self, known: Sequence[Vectors]) -> Vectors:
        """Of what the attackers know, the mean less some deviations; the same whoever of them computes it."""
        hidden = {}
        for name, first in known[0].items():
            stacked = np.stack([vectors[name] for vectors in known]).astype(np.float64)
            hidden[name] = (stacked.mean(0) - self.attack.value * stacked.std(0)).astype(first.dtype)
        return hidden


def _honest(node: Node, offer: Offer, theta: Float32Vector, broadcast: State) -> Vectors:
    """What a node would send if it were honest."""
    work, _ = node._work(offer, theta, broadcast)
    return node.strategy.encode(work, node.strategy.local(work))
