"""A masked step in memory: nodes and coordinator, stage by stage, with nodes lost wherever a test wants."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from concord_client.masked_step import Journal, MaskedStep
from concord_server.collector import RingSum
from concord_server.unmasking import MaskedCollection
from concord_shared.blocks import LANES, Block
from concord_shared.errors import MaskingRefusedError
from concord_shared.masking.attempt import STAGES, MaskedAttempt
from concord_shared.masking.thresholds import thresholds_for
from concord_shared.messages import Offer

BLOCKS = (Block("delta", 37, bound=1.0), LANES)
Records = dict[str, Any]
Meddle = Callable[[str, str, Records], Records]
"""(stage, node, records) → records: a hostile coordinator between the nodes."""


def honest(stage: str, node: str, records: Records) -> Records:
    return records


def names_of(count: int) -> list[str]:
    return [f"node-{index:03d}" for index in range(count)]


@dataclass
class World:
    """count nodes; `keys` are their identities; `updates` what each contributes."""

    count: int
    collusion: int | None = None
    minimum: int = 3
    blocks: tuple[Block, ...] = BLOCKS
    attempt_number: int = 1
    run: str = "run-1"
    round_number: int = 1
    journals: dict[str, Journal] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = names_of(self.count)
        self.keys = {name: Ed25519PrivateKey.generate() for name in self.names}
        self.needed = thresholds_for(self.count, self.collusion, self.minimum)
        for name in self.names:
            self.journals.setdefault(name, Journal())
        chance = np.random.default_rng(self.count)
        self.updates = {name: self.update(chance) for name in self.names}

    def update(self, chance: np.random.Generator) -> dict[str, Any]:
        most = {32: 1 << 23, 64: 1 << 50}
        return {
            block.name: chance.integers(-most[block.ring_bits], most[block.ring_bits], block.size).astype(block.dtype)
            for block in self.blocks
        }

    def attempt(self, node: str, **changes: Any) -> MaskedAttempt:
        offer = Offer(
            run=self.run,
            kind="train",
            round_number=self.round_number,
            attempt=self.attempt_number,
            node=node,
            plan_digest="a" * 64,
            model_digest="b" * 64,
            layout_digest="c" * 64,
            nodes_max=self.count,
            rows_max=1024,
        )
        identities = tuple((name, self.keys[name].public_key()) for name in self.names)
        made = MaskedAttempt(offer, identities, self.needed, weight_cap=100, manifest="d" * 64)
        in_offer = {name: value for name, value in changes.items() if name in Offer.__dataclass_fields__}
        rest = {name: value for name, value in changes.items() if name not in in_offer}
        return replace(made, offer=replace(offer, **in_offer), **rest)

    def step(self, node: str, **changes: Any) -> MaskedStep:
        return MaskedStep(
            self.attempt(node, **changes), node, self.keys[node], self.journals[node], lambda: self.updates[node]
        )

    def steps(self) -> dict[str, MaskedStep]:
        return {name: self.step(name) for name in self.names}


@dataclass
class Outcome:
    sums: Mapping[str, Any] | None
    survivors: tuple[str, ...]
    refusals: dict[str, MaskingRefusedError]
    collection: MaskedCollection


def play(
    world: World,
    lost: Mapping[str, set[str]] | None = None,
    meddle: Meddle = honest,
    answers: Meddle = honest,
    steps: dict[str, MaskedStep] | None = None,
    until: str = "open",
) -> Outcome:
    """One attempt. lost: by stage, who gives no answer to it (or later); refusals: why nodes said no.

    sums is None where a stage brought fewer answers than are needed.
    """
    steps = steps or world.steps()
    collection, total = MaskedCollection(world.attempt(world.names[0])), RingSum(world.blocks)
    alive, refusals, survivors, gone = (
        list(world.names),
        dict[str, MaskingRefusedError](),
        tuple[str, ...](),
        set[str](),
    )
    for stage in STAGES:
        collection.begin(stage, alive)
        gone |= (lost or {}).get(stage, set())
        answered = []
        for name in alive:
            if name in gone:
                continue
            records = meddle(stage, name, dict(collection.request(stage, name)))
            try:
                back, blocks = steps[name].answer(stage, records)
            except MaskingRefusedError as error:
                refusals[name] = error
                continue
            collection.accept(stage, name, answers(stage, name, dict(back)))
            if stage == "masked":
                total.add(name, blocks)
            answered.append(name)
        least = world.needed.opening if stage in ("consent", "open") else world.needed.survivors
        alive = answered
        if stage == "masked":
            survivors = tuple(alive)
        if len(alive) < least:
            return Outcome(None, survivors, refusals, collection)
        if stage == until:
            break
    sums = total.sums()
    if until == "open":
        collection.open(sums)
    return Outcome(sums, survivors, refusals, collection)


def expected(world: World, survivors: tuple[str, ...]) -> dict[str, Any]:
    """The plain sum in the ring."""
    total = RingSum(world.blocks)
    for name in survivors:
        total.add(name, world.updates[name])
    return total.sums()


def assert_exact(world: World, outcome: Outcome) -> None:
    assert outcome.sums is not None, outcome.refusals
    for name, plain in expected(world, outcome.survivors).items():
        assert np.array_equal(plain, outcome.sums[name]), name
