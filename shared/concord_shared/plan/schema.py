"""The plan itself: its sections together, its document and its digest."""

import json
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from concord_shared.canonical import canonical_bytes, canonical_digest
from concord_shared.errors import PlanError
from concord_shared.plan.checks import check_sections
from concord_shared.plan.data import DataContract
from concord_shared.plan.models import Model
from concord_shared.plan.preparation import Preprocessing
from concord_shared.plan.privacy import Plain, PrivacySection
from concord_shared.plan.rounds import Compression, Evaluation, Rounds
from concord_shared.plan.section import Name, Section, is_empty
from concord_shared.plan.statistics import StatisticsSection
from concord_shared.plan.strategies import FedAvg, StrategySection
from concord_shared.plan.training import Training

__all__ = ["PLAN_SCHEMA", "About", "Plan", "SimulateDefaults", "completed", "parse_plan_document"]

PLAN_SCHEMA = "concord/plan/1"
TRAINING_SECTIONS = ("model", "preprocessing", "training", "strategy", "evaluation")
"""What a plan of kind statistics does not have."""


class Plan(Section):
    """One immutable description of a computation. Equal plans have equal digests, wherever they run."""

    name: Name
    kind: Literal["train", "statistics"] = "train"
    seed: int = Field(0, ge=0, lt=1 << 63)
    data: DataContract
    preprocessing: Preprocessing = Preprocessing()
    model: Model
    training: Training = Training()
    strategy: StrategySection = FedAvg()
    rounds: Rounds = Rounds()
    evaluation: Evaluation = Evaluation()
    privacy: PrivacySection = Plain()
    compression: Compression | None = Field(None, exclude_if=is_empty)
    statistics: StatisticsSection | None = Field(None, exclude_if=is_empty)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_sections(self)
        return self

    @cached_property
    def canonical(self) -> bytes:
        return canonical_bytes(self.document())

    @cached_property
    def digest(self) -> str:
        return canonical_digest(self.document())

    def document(self) -> dict[str, Any]:
        """The plan with every default written out."""
        fields = self.model_dump(mode="json")
        if fields["privacy"]["dp"] is None:
            del fields["privacy"]["dp"]  # plans without it keep the digest that they had before there was any
        if self.kind == "statistics":
            for section in TRAINING_SECTIONS:
                del fields[section]
        return {"schema": PLAN_SCHEMA, **fields}

    @property
    def noise(self) -> Literal["none", "dp-sgd", "tallies", "distributed", "central"]:
        """Where the noise of differential privacy is added: to each step, by each node to its statistics, by nodes to a
        sum, or by the coordinator."""
        if self.privacy.dp is None:
            return "none"
        if self.kind == "statistics":
            return "tallies"
        if self.privacy.dp.unit == "record":
            return "dp-sgd"
        return "distributed" if self.privacy.mode == "private" else "central"

    @property
    def is_repeatable(self) -> bool:
        """Whether equal runs end with equal digests: noise is never seeded."""
        return self.training.deterministic and self.noise == "none"

    @property
    def needs_statistics(self) -> bool:
        """Whether nodes sum statistics: before the first training round, or at all."""
        return self.kind == "statistics" or (self.preprocessing.scope == "federated" and self.fits_something)

    @property
    def fits_something(self) -> bool:
        """Whether anything is learned from rows before training, where the scope is not none."""
        return self.preprocessing.text is not None or self.preprocessing.fits_numbers

    def check_trains(self, what: str) -> None:
        """Raises: PlanError: this plan has no model; what: of which a person asks for something."""
        if self.kind != "train":
            raise PlanError(f"{what} is for plans that train a model; {self.name} is of kind {self.kind}")

    def evaluates_after(self, round_number: int) -> bool:
        """Whether an evaluate round over all nodes follows this round: every k-th, and always the last."""
        every = self.evaluation.every
        return round_number == self.rounds.count or (every > 0 and round_number % every == 0)

    def with_changes(self, **changes: Any) -> "Plan":
        """Another plan, checked as one from a file; its digest is its own."""
        return parse_plan_document(self.document() | changes)

    def with_seed(self, seed: int) -> "Plan":
        return self.with_changes(seed=seed)


class SimulateDefaults(Section):
    """`[simulate]`: defaults of `concord simulate` for this plan. Not part of the plan or its digest.

    side_by_side: how many nodes are trained at once, as one batched computation; 0: each by itself.
    """

    data: str = "digits"
    nodes: int = Field(10, ge=1)
    partition: str = "iid"
    side_by_side: int = Field(0, ge=0, le=10_000)


class About(Section):
    """`[about]`: what `concord plans` says of a plan. Not part of the plan or its digest."""

    title: str = ""
    title_zh: str = ""
    family: str = ""
    data: str = ""
    target: str = ""
    needs: tuple[str, ...] = ()


def completed(given: dict[str, Any], source: str = "the plan") -> dict[str, Any]:
    """A plan's sections with those that its kind settles: one of statistics trains nothing, and asks once.

    Raises:
        PlanError: it has a section of another kind.
    """
    if given.get("kind") != "statistics":
        return given
    for section in TRAINING_SECTIONS:
        if section in given:
            raise PlanError(f'{source}: [{section}] belongs to kind = "train"; leave it out of a plan of statistics')
    rounds = given.get("rounds", {})
    if isinstance(rounds, dict):
        rounds = {"count": 1, **rounds}
    return {"statistics": {}, **given, "rounds": rounds, "model": {"name": "none"}}


def parse_plan_document(document: dict[str, Any]) -> Plan:
    """The inverse of `Plan.document`.

    Raises:
        PlanError: it is not a plan of this version.
        ValueError: a key of it is not valid.
    """
    if document.get("schema") != PLAN_SCHEMA:
        raise PlanError(f"expected a document of schema {PLAN_SCHEMA}, got {document.get('schema')!r}")
    fields = completed({key: value for key, value in document.items() if key != "schema"})
    return Plan.model_validate_json(json.dumps(fields))
