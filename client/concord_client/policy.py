"""The owner's rules, in policy.toml: what a plan may ask of this node at all, and what needs no person.

A plan outside of them is refused, whatever was signed by whom. Unless a rule says otherwise, every plan needs a
person's approval.
"""

import datetime
import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from concord_client.home import read_settings
from concord_client.store import NodeStore
from concord_shared.cards import beyond_terms
from concord_shared.documents import Agreement, DataTerms, Study
from concord_shared.errors import ConcordError, MaskingRefusedError
from concord_shared.files import file_digest, write_atomically
from concord_shared.masking.thresholds import NODES_MAX, Thresholds, thresholds_of
from concord_shared.plan.models import PluginModel, PretrainedModel
from concord_shared.plan.privacy import PrivacySection, Private
from concord_shared.plan.rounds import share_of
from concord_shared.plan.schema import Plan
from concord_shared.plan.section import Name

__all__ = ["DEFAULT", "Policy", "Resources", "Rule", "Verdict", "note_policy", "write_default"]

PIN = r"^[a-z0-9][a-z0-9-]{0,62}(:[0-9a-f]{64})?$"
COUNT_MAX = 512
"""Of minimum_count: what the sketches of rows can tell apart."""
HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
DEFAULT = """\
# What this node may be asked to do. Yours to edit; `concord-node policy check` reads it as the node does.
# Everything here only ever narrows what an agreement and an approval allow.

models = []                  # names that plans may use; empty: any that this node has installed
plugins = {}                 # wheels whose models plans may use, each with its hash: `concord-node policy plugins`
pretrained = {}              # weights that plans may begin from, each with its hash: `concord-node pretrained list`
kinds = ["train", "statistics"] # kinds of plans
minimum_cohort = 2           # nodes in a round, at least
rounds_max = 1000
local_epochs_max = 100       # work between two messages
local_steps_max = 100000
deterministic = true         # false: refuse plans that train with one thread, so as to be repeatable

[privacy]
modes = ["plain", "private", "robust"] # ["private"]: never let the coordinator see this node's own update
minimum_cohort = 3           # under masks: updates in a sum, at least. With two, the other partner can work yours out
minimum_count = 5            # statistics: smaller counts are never told, and earlier answers differ in so many rows
collusion = 0                # under masks: refuse plans that reckon with fewer nodes in league with the coordinator
pinned = []                  # "name:fingerprint" of nodes that you know: minimum_cohort then counts these only

[data]
roots = []                   # directories that data may be read from, links followed; empty: whatever you register

[resources]
device = "auto"              # auto, cpu, cuda or mps
devices = []                 # several that train together, instead of device: ["cuda:0", "cuda:1"]
threads = 0                  # 0: torch's choice
memory_mb = 0                # of each process; 0: any. Holds on the CPU under Linux; elsewhere the log says that not
working_hours = ""           # "22:00-06:00", this machine's time; empty: always

[evidence]
on_fork = "stop"             # where a log was cut or rewritten: "stop" all rounds until you have looked, or "warn"

[preflight]
per_day = 20                 # questions of one study, whether a plan could run here, that are answered; 0: none
dry_round = true             # two batches to measure time and memory, thrown away; false: only of what is approved

[approvals]
days = 30                    # an approval expires, and can be given again

# Every plan needs a person's approval, unless a rule says otherwise. A rule holds where all that it names fits:
# [[approvals.automatic]]
# study = "heart-2026"
# requester = "charite"
# model = "logistic-regression"
# dataset = "patients"
"""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Resources(_Section):
    """threads, memory_mb: 0 for no limit. devices: several that train together, instead of `device`. working_hours:
    `22:00-06:00` in local time, empty for always.
    """

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    devices: tuple[Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")], ...] = Field((), max_length=64)
    threads: int = Field(0, ge=0, le=4096)
    memory_mb: int = Field(0, ge=0)
    working_hours: str = ""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.working_hours and not HOURS.fullmatch(self.working_hours):
            raise ValueError('working_hours: expected "HH:MM-HH:MM", for example "22:00-06:00", or nothing for always')
        return self

    def works_at(self, moment: datetime.datetime) -> bool:
        """Whether local time `moment` is within the working hours; they may go over midnight."""
        match = HOURS.fullmatch(self.working_hours)
        if match is None:
            return True
        begin, end = (int(match[i]) * 60 + int(match[i + 1]) for i in (1, 3))
        minute = moment.hour * 60 + moment.minute
        return begin <= minute < end if begin < end else minute >= begin or minute < end


class PrivacyRules(_Section):
    """minimum_cohort, collusion, pinned: of masked steps. minimum_count: of statistics. The coordinator cannot lower
    any of them.
    """

    modes: tuple[Literal["plain", "private", "robust"], ...] = ("plain", "private", "robust")
    minimum_cohort: int = Field(3, ge=2, le=NODES_MAX)
    minimum_count: int = Field(5, ge=1, le=COUNT_MAX)
    collusion: int = Field(0, ge=0, le=NODES_MAX)
    pinned: tuple[Annotated[str, Field(pattern=PIN)], ...] = Field((), max_length=NODES_MAX)

    def reasons(self, privacy: PrivacySection, cohort: int | None) -> tuple[str, ...]:
        """Why a plan is not allowed; cohort: how many nodes a step asks, where it is known."""
        if privacy.mode not in self.modes:
            return (f"privacy.mode {privacy.mode}: the policy allows {', '.join(self.modes) or 'none'}",)
        if not isinstance(privacy, Private) or cohort is None:
            return ()
        try:
            self.check(thresholds_of(privacy, cohort))
        except ConcordError as error:
            return (str(error),)
        return ()

    def check(self, needed: Thresholds) -> None:
        """Raises: MaskingRefusedError: a masked step under these thresholds protects less than the owner asks for."""
        if needed.survivors < self.minimum_cohort:
            raise MaskingRefusedError(
                "policy", f"sums of {needed.survivors} updates: the policy asks for at least {self.minimum_cohort}"
            )
        if needed.collusion < self.collusion:
            raise MaskingRefusedError(
                "policy",
                f"safe against {needed.collusion} nodes in league with the coordinator: the policy asks for "
                f"{self.collusion}",
            )


class DataRules(_Section):
    """roots: below which every file that is read must lie, links followed. None: whatever the owner registers."""

    roots: tuple[str, ...] = Field((), max_length=1000)

    @field_validator("roots")
    @classmethod
    def _absolute(cls, roots: tuple[str, ...]) -> tuple[str, ...]:
        if any(not Path(root).expanduser().is_absolute() for root in roots):
            raise ValueError("expected absolute paths of directories")
        return roots


class EvidenceRules(_Section):
    """on_fork: what happens where the coordinator's log, or this node's own, is not the one of before."""

    on_fork: Literal["stop", "warn"] = "stop"


class PreflightRules(_Section):
    """What is answered before anything is approved. An answer says whether data fit a contract, so many answers about
    many contracts would tell more: per_day bounds them, for each study.
    """

    per_day: int = Field(20, ge=0, le=10_000)
    dry_round: bool = True


class Rule(_Section):
    """Approves by itself where everything that it names fits."""

    study: str | None = None
    requester: Name | None = None
    model: str | None = None
    dataset: Name | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model_dump(exclude_none=True) == {}:
            raise ValueError("a rule names at least one of study, requester, model and dataset")
        return self

    def fits(self, **asked: str) -> bool:
        return all(asked[name] == wanted for name, wanted in self.model_dump(exclude_none=True).items())


class Approvals(_Section):
    days: int = Field(30, ge=1, le=3660)
    automatic: tuple[Rule, ...] = Field((), max_length=1000)


class Verdict(_Section):
    """reasons: why not, one a line; none when allowed. automatic: a rule approves it without a person."""

    allowed: bool
    reasons: tuple[str, ...] = ()
    automatic: bool = False


class Policy(_Section):
    models: tuple[str, ...] = ()
    plugins: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field({}, max_length=1000)
    pretrained: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field({}, max_length=1000)
    kinds: tuple[Literal["train", "evaluate", "statistics"], ...] = ("train", "statistics")
    minimum_cohort: Annotated[int, Field(ge=1)] = 2
    rounds_max: Annotated[int, Field(ge=1)] = 1000
    local_epochs_max: Annotated[int, Field(ge=1)] = 100
    local_steps_max: Annotated[int, Field(ge=1)] = 100_000
    deterministic: bool = True
    privacy: PrivacyRules = PrivacyRules()
    data: DataRules = DataRules()
    resources: Resources = Resources()
    evidence: EvidenceRules = EvidenceRules()
    preflight: PreflightRules = PreflightRules()
    approvals: Approvals = Approvals()

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """The file, or the strict default where there is none.

        Raises:
            UsageError: not valid, with one line for each mistake. Nothing is done under a policy that cannot be read.
        """
        return read_settings(path, cls) if path.exists() else cls()

    def verdict(
        self,
        plan: Plan,
        study: Study,
        agreement: Agreement,
        participants: int | None = None,
        dataset: str = "",
        requester: str = "",
        ceiling: DataTerms | None = None,
        starter: str = "",
    ) -> Verdict:
        """Whether this policy, the agreement's terms and the terms of the dataset's card allow a plan.

        participants: the nodes of a run; None while there is none yet. dataset, requester: what automatic rules look
        at. ceiling: the card's terms, as the owner has them at this node. starter: who signed the run's manifest.
        """
        reasons = (
            *self.reasons(plan, participants),
            *_terms_reasons(plan, agreement, participants),
            *_ceiling_reasons(plan, agreement, ceiling, starter),
        )
        asked = {"study": study.study, "requester": requester, "model": plan.model.name, "dataset": dataset}
        automatic = not reasons and any(rule.fits(**asked) for rule in self.approvals.automatic)
        return Verdict(allowed=not reasons, reasons=reasons, automatic=automatic)

    def reasons(self, plan: Plan, participants: int | None = None) -> tuple[str, ...]:
        """Why this policy alone does not allow a plan; none where it does."""
        found = []
        if self.models and plan.kind == "train" and plan.model.name not in self.models:
            found.append(f"model {plan.model.name}: the policy allows {', '.join(self.models)}")
        if plan.model.name == "own":
            found.append("the plan names a person's own code; a node runs only models that it has installed")
        found += self._plugin_reasons(plan) + self._pretrained_reasons(plan)
        if plan.kind not in self.kinds:
            allowed = ", ".join(self.kinds) or "none"
            found.append(f'kind {plan.kind}: the policy allows {allowed}; its owner adds "{plan.kind}" to kinds')
        fewest = self.privacy.minimum_count
        if plan.statistics is not None and plan.statistics.minimum_count < fewest:
            found.append(f"counts from {plan.statistics.minimum_count} on: the policy tells none below {fewest}")
        limits = {
            "rounds": (plan.rounds.count, self.rounds_max),
            "local epochs": (plan.training.local_epochs, self.local_epochs_max),
            "local steps": (plan.training.local_steps, self.local_steps_max),
        }
        found += [f"{count} {what}: the policy allows {most}" for what, (count, most) in limits.items() if count > most]
        if plan.training.deterministic and not self.deterministic:
            found.append("deterministic training: the policy does not allow it")
        found += _cohort_reasons(plan, participants, self.minimum_cohort, "the policy")
        found += self.privacy.reasons(plan.privacy, _asked(plan, participants))
        return tuple(found)

    def _plugin_reasons(self, plan: Plan) -> tuple[str, ...]:
        """The owner named the wheel by its hash, and it is here as it was named."""
        model = plan.model
        if not isinstance(model, PluginModel):
            return ()
        from concord_shared.models.plugins import fault_of  # every command reads the policy, and few meet a wheel

        allowed = self.plugins.get(model.package)
        if allowed is None:
            return (f"the wheel {model.package}: the policy's plugins do not name it",)
        if allowed != model.sha256:
            return (f"the wheel {model.package}: the policy allows other code than the plan names",)
        return (fault,) if (fault := fault_of(model)) else ()

    def _pretrained_reasons(self, plan: Plan) -> tuple[str, ...]:
        """As of plugins: who chose the weights can make updates tell more of the rows (Feng and Tramèr 2024)."""
        model = plan.model
        if not isinstance(model, PretrainedModel):
            return ()
        from concord_shared.pretrained.store import fault_of

        if self.pretrained.get(model.package) != model.sha256:
            return (
                f"the pretrained model {model.package}: the policy's pretrained do not name it. Once you trust who "
                f'made its weights: pretrained = {{"{model.package}" = "{model.sha256}"}}',
            )
        return (fault,) if (fault := fault_of(model)) else ()


def write_default(path: Path) -> None:
    """The strict default with its comments, where there is no policy yet."""
    if not path.exists():
        write_atomically(path, DEFAULT)


def _terms_reasons(plan: Plan, agreement: Agreement, participants: int | None) -> tuple[str, ...]:
    terms = agreement.terms
    found = []
    if terms.models and plan.kind == "train" and plan.model.name not in terms.models:
        found.append(f"model {plan.model.name}: the agreement allows {', '.join(terms.models)}")
    if plan.rounds.count > terms.rounds_max:
        found.append(f"{plan.rounds.count} rounds: the agreement allows {terms.rounds_max}")
    found += _cohort_reasons(plan, participants, terms.minimum_cohort, "the agreement")
    return tuple(found)


def _ceiling_reasons(plan: Plan, agreement: Agreement, ceiling: DataTerms | None, starter: str) -> tuple[str, ...]:
    """The owner may have narrowed the terms since the agreement was signed, so that it is looked at again. Within them
    its own cohort and end are at least as strict.
    """
    if ceiling is None:
        return ()
    found = list(beyond_terms(ceiling, agreement))
    if ceiling.who and starter and starter not in ceiling.who:
        found.append(f"run started by {starter}: the dataset's terms allow {', '.join(ceiling.who)}")
    if ceiling.epsilon:
        dp = plan.privacy.dp
        if dp is None or plan.noise == "central":
            found.append(
                f"no differential privacy of this node's own: the dataset's terms ask for an epsilon of at most "
                f"{ceiling.epsilon}"
            )
        elif Decimal(repr(dp.epsilon)) > Decimal(ceiling.epsilon):
            found.append(f"epsilon {dp.epsilon:g}: the dataset's terms allow {ceiling.epsilon}")
    return tuple(found)


def _cohort_reasons(plan: Plan, participants: int | None, minimum: int, whose: str) -> list[str]:
    """Who is asked in a round: known for a run, or where the plan says a number."""
    asked = _asked(plan, participants)
    if asked is None or asked >= minimum:
        return []
    return [f"{asked} nodes in a round: {whose} asks for at least {minimum}"]


def _asked(plan: Plan, participants: int | None) -> int | None:
    """How many nodes a round asks, where it is known."""
    cohort = plan.rounds.cohort
    if participants is not None:
        return min(share_of(cohort, participants), participants)
    return cohort if isinstance(cohort, int) else None


def note_policy(path: Path, store: NodeStore) -> None:
    """Enters in the audit log that the owner's rules are other ones than when they were last read."""
    try:
        sha256 = file_digest(path) if path.exists() else ""
    except OSError:
        return  # whoever reads it next says why it cannot be
    if store.fact("policy") != sha256:
        store.record("owner", "policy:change", path.name, sha256=sha256)
        store.set_fact("policy", sha256)
