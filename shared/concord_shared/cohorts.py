"""Who is asked in a step: a public function of plan and participants, so that every node can compute it."""

from collections.abc import Iterable

import numpy as np

from concord_shared.messages import StepKind
from concord_shared.plan.rounds import share_of
from concord_shared.plan.schema import Plan
from concord_shared.seeds import derive_seed

__all__ = ["cohort_of"]


def cohort_of(plan: Plan, nodes: Iterable[str], kind: StepKind, number: int) -> tuple[str, ...]:
    """Names, sorted: everybody, or for a train round a seeded sample without replacement."""
    names = tuple(sorted(nodes))
    size = share_of(plan.rounds.cohort, len(names))
    if kind != "train" or size == len(names):
        return names
    chance = np.random.default_rng(derive_seed(derive_seed(plan.seed, "cohort"), "cohort", number))
    return tuple(sorted(chance.choice(np.array(names, object), size, replace=False)))
