"""Which step of a run follows which, and who is asked: public functions of plan and roster."""

from dataclasses import dataclass

import numpy as np

from concord_shared.errors import UsageError
from concord_shared.messages import StepKind
from concord_shared.plan.schema import Plan, share_of
from concord_shared.seeds import derive_seed

__all__ = ["Schedule", "Step"]


@dataclass(frozen=True)
class Step:
    """One request to a cohort and its answers. number: the round, or for statistics the stage (1, 2)."""

    kind: StepKind
    number: int
    cohort: tuple[str, ...]
    quorum: int
    grace_s: float
    deadline_s: float


@dataclass(frozen=True)
class Schedule:
    """The steps of a plan over named nodes: statistics 1, statistics 2, train 1, evaluate 1, train 2, …"""

    plan: Plan
    nodes: tuple[str, ...]

    def __post_init__(self) -> None:
        rounds, total = self.plan.rounds, len(self.nodes)
        cohort = share_of(rounds.cohort, total)
        if cohort > total:
            raise UsageError(f"rounds.cohort = {cohort} asks for more nodes than there are ({total}); lower it")
        quorum = share_of(rounds.quorum, cohort)
        if quorum > cohort:
            raise UsageError(f"rounds.quorum = {quorum} is above the cohort of {cohort} nodes; lower it")

    def first(self) -> Step:
        return self._step("statistics", 1) if self.plan.needs_statistics else self._step("train", 1)

    def after(self, step: Step) -> Step | None:
        """The next step, or None after the last: an evaluate round always ends a run."""
        if step.kind == "statistics":
            return self._step("statistics", 2) if step.number == 1 else self._step("train", 1)
        if step.kind == "train" and self.plan.evaluates_after(step.number):
            return self._step("evaluate", step.number)
        return self._step("train", step.number + 1) if step.number < self.plan.rounds.count else None

    def step(self, kind: StepKind, number: int) -> Step:
        """A step by its name, as a checkpoint stores it."""
        return self._step(kind, number)

    def _step(self, kind: StepKind, number: int) -> Step:
        rounds = self.plan.rounds
        cohort = self._cohort(number) if kind == "train" else self.nodes
        quorum = share_of(rounds.quorum, len(cohort))
        return Step(kind, number, cohort, min(quorum, len(cohort)), rounds.grace_s, rounds.deadline_s)

    def _cohort(self, number: int) -> tuple[str, ...]:
        """Names for round `number`, sorted: a seeded sample without replacement."""
        size = share_of(self.plan.rounds.cohort, len(self.nodes))
        if size == len(self.nodes):
            return self.nodes
        chance = np.random.default_rng(derive_seed(derive_seed(self.plan.seed, "cohort"), "cohort", number))
        return tuple(sorted(chance.choice(np.array(sorted(self.nodes), object), size, replace=False)))
