"""Which step of a run follows which, and who is asked: public functions of plan and roster."""

from dataclasses import dataclass

from concord_shared.cohorts import cohort_of
from concord_shared.errors import UsageError
from concord_shared.fitting import programme_of
from concord_shared.masking.attempt import STAGES
from concord_shared.masking.thresholds import Thresholds, thresholds_of
from concord_shared.messages import StepKind
from concord_shared.plan.privacy import Private, Robust, robust_problem
from concord_shared.plan.rounds import share_of
from concord_shared.plan.schema import Plan

__all__ = ["Schedule", "Stage", "Step"]


@dataclass(frozen=True)
class Stage:
    """One request of a step: a plain step has one, without a name. needed: how many must answer it."""

    name: str
    needed: int


@dataclass(frozen=True)
class Step:
    """What a cohort is asked, in one request or under masks in several. number: the round, or the pass of statistics.

    quorum: how many Updates must come; masks: the thresholds where they come masked.
    absent: of the cohort, who is not asked: participants of a masked run that take no part.
    """

    kind: StepKind
    number: int
    cohort: tuple[str, ...]
    quorum: int
    grace_s: float
    deadline_s: float
    masks: Thresholds | None = None
    absent: frozenset[str] = frozenset()

    @property
    def stages(self) -> tuple[Stage, ...]:
        if self.masks is None:
            return (Stage("", self.quorum),)
        few, enough, opening = self.masks.survivors, max(self.masks.survivors, self.quorum), self.masks.opening
        return tuple(map(Stage, STAGES, (few, few, enough, opening, opening)))


@dataclass(frozen=True)
class Schedule:
    """The steps of a plan over named nodes: statistics 1, statistics 2, train 1, evaluate 1, train 2, …

    absent: those of the nodes that are not asked. Under masks those who did not come: who is counted there is who the
    signed manifest names. In robust mode those in quarantine.
    """

    plan: Plan
    nodes: tuple[str, ...]
    absent: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        rounds, total = self.plan.rounds, len(self.nodes)
        cohort = share_of(rounds.cohort, total)
        if cohort > total:
            raise UsageError(f"rounds.cohort = {cohort} asks for more nodes than there are ({total}); lower it")
        quorum = share_of(rounds.quorum, cohort)
        if quorum > cohort:
            raise UsageError(f"rounds.quorum = {quorum} is above the cohort of {cohort} nodes; lower it")
        for size in {cohort, total}:
            self._masks(size)
        if isinstance(privacy := self.plan.privacy, Robust) and (problem := robust_problem(privacy, cohort, "a round")):
            raise UsageError(problem)

    def first(self) -> Step:
        return self._step("statistics", 1) if self.plan.needs_statistics else self._step("train", 1)

    def after(self, step: Step) -> Step | None:
        """The next step, or None after the last: an evaluate round always ends a run."""
        if step.kind == "statistics":
            if step.number < programme_of(self.plan).stages:
                return self._step("statistics", step.number + 1)
            return None if self.plan.kind == "statistics" else self._step("train", 1)
        if step.kind == "train" and self.plan.evaluates_after(step.number):
            return self._step("evaluate", step.number)
        return self._step("train", step.number + 1) if step.number < self.plan.rounds.count else None

    def step(self, kind: StepKind, number: int) -> Step:
        """A step by its name, as a checkpoint stores it."""
        return self._step(kind, number)

    def _step(self, kind: StepKind, number: int) -> Step:
        rounds = self.plan.rounds
        cohort = cohort_of(self.plan, self.nodes, kind, number)
        quorum = min(share_of(rounds.quorum, len(cohort)), len(cohort))
        if isinstance(self.plan.privacy, Robust) and kind == "train":
            quorum = max(quorum, 2 * self.plan.privacy.attackers + 1)
        masks, absent = self._masks(len(cohort)), self.absent & set(cohort)
        return Step(kind, number, cohort, quorum, rounds.grace_s, rounds.deadline_s, masks, absent)

    def _masks(self, cohort: int) -> Thresholds | None:
        privacy = self.plan.privacy
        return thresholds_of(privacy, cohort) if isinstance(privacy, Private) else None
