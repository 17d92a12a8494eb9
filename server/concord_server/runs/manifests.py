"""The checks that a manifest must pass before its run is started."""

from datetime import datetime

from sqlmodel import Session, select

from concord_server.models.tables import ModelVersion
from concord_server.nodes.service import current_roster
from concord_server.plans.service import plan_of
from concord_server.plans.tables import PlanRow, StudyPlan
from concord_server.runs.states import nodes_needed
from concord_server.runs.tables import Run
from concord_server.settings import Settings
from concord_server.studies import service as studies
from concord_server.studies.envelopes import CLOCK_SKEW_S
from concord_shared.documents import Participant, RunManifest
from concord_shared.errors import ApiError, ConflictError
from concord_shared.plan.privacy import Robust
from concord_shared.plan.rounds import share_of
from concord_shared.plan.schema import Plan
from concord_shared.plan.sizes import parameters
from concord_shared.seeds import derive_seed

__all__ = ["check_manifest", "minimum_cohort"]

ROSTER_VERSIONS_MAX = 20
LASTS_MAX_S = 366 * 86_400


def check_manifest(session: Session, manifest: RunManifest, now: datetime, settings: Settings) -> None:
    """Raises an `ApiError` unless all of these hold:

    1. its organisation is a member of the study, and the plan is one of the study's
    2. it may begin now, and ends after now
    3. its roster is the current one, or one of the few before
    4. the participants are active nodes, one dataset each, with agreed datasets in their current versions
    5. the plan fits the terms of every agreement, which last as long as the manifest
    6. the cohort seed is the plan's, and there are nodes enough for quorum, cohort and minimum cohort
    7. in robust mode, a round's table of Updates is within the coordinator's quota
    8. the model to start from exists and is of the same kind
    """
    studies.check_member(session, manifest.study, manifest.organisation)
    row = session.get(PlanRow, manifest.plan_digest)
    if row is None or session.get(StudyPlan, (manifest.study, manifest.plan_digest)) is None:
        raise ConflictError(
            f"the study {manifest.study} has no plan {manifest.plan_digest[:16]}…; submit it first: concord plan submit"
        )
    plan, seconds = plan_of(row), int(now.timestamp())
    _check_times(manifest, seconds)
    _check_roster(session, manifest)
    _check_participants(session, manifest, plan, seconds)
    if manifest.cohort_seed != derive_seed(plan.seed, "cohort"):
        raise ApiError("cohort_seed is not the one that follows from the plan's seed; make the manifest anew")
    nodes_needed(plan, len(manifest.participants), minimum_cohort(session, manifest, seconds))
    _check_table(plan, len(manifest.participants), settings.table_quota_mb)
    _check_start(session, manifest, plan)


def minimum_cohort(session: Session, manifest: RunManifest, now: int) -> int:
    """The largest that an agreement over a participant's dataset asks for."""
    agreed = studies.agreed_datasets(session, manifest.study, now)
    names = (f"{each.node}/{each.dataset}" for each in manifest.participants)
    return max((agreed[name].agreement.terms.minimum_cohort for name in names if name in agreed), default=1)


def _check_times(manifest: RunManifest, now: int) -> None:
    if manifest.not_before > now + CLOCK_SKEW_S:
        raise ApiError(f"not_before is {manifest.not_before - now} s in the future; start the run when it may begin")
    if not now < manifest.not_after <= now + LASTS_MAX_S:
        raise ApiError(
            f"not_after: expected a time within the next {LASTS_MAX_S // 86_400} days, got one "
            f"{manifest.not_after - now} s from now; check the clock of the machine that signed the manifest"
        )


def _check_roster(session: Session, manifest: RunManifest) -> None:
    current = current_roster(session).version
    if not current - ROSTER_VERSIONS_MAX <= manifest.roster_version <= current:
        raise ConflictError(
            f"the manifest names version {manifest.roster_version} of the roster, which is at {current}; make it anew"
        )


def _check_participants(session: Session, manifest: RunManifest, plan: Plan, now: int) -> None:
    names = [each.node for each in manifest.participants]
    if len(set(names)) != len(names):
        raise ApiError("a node takes part in a run with one dataset; name each node once")
    agreed = studies.agreed_datasets(session, manifest.study, now)
    for each in manifest.participants:
        name = f"{each.node}/{each.dataset}"
        if name not in agreed:
            raise ConflictError(f"no agreement opens {name} to the study {manifest.study}; see: concord agreement list")
        _check_participant(each, agreed[name])
        _check_terms(manifest, plan, name, agreed[name])


def _check_participant(each: Participant, agreed: studies.AgreedDataset) -> None:
    if agreed.node.state != "active":
        raise ConflictError(f"{each.node} is {agreed.node.state}; only active nodes take part")
    if each.organisation != agreed.card.organisation:
        raise ApiError(f"{each.node} is a node of {agreed.card.organisation}, not of {each.organisation}")
    if each.dataset_version != agreed.card.version:
        raise ConflictError(
            f"{agreed.card.name} is at version {agreed.card.version[:16]}…, the manifest names "
            f"{each.dataset_version[:16]}…; make it anew"
        )


def _check_terms(manifest: RunManifest, plan: Plan, name: str, agreed: studies.AgreedDataset) -> None:
    terms = agreed.agreement.terms
    told = f"the agreement {agreed.agreement.agreement} over {name}"
    if plan.rounds.count > terms.rounds_max:
        raise ConflictError(f"{told} allows {terms.rounds_max} rounds; the plan has {plan.rounds.count}")
    if terms.models and plan.kind == "train" and plan.model.name not in terms.models:
        raise ConflictError(f"{told} allows the models {', '.join(terms.models)}; the plan's is {plan.model.name}")
    if manifest.not_after > terms.not_after:
        raise ConflictError(f"{told} ends before the manifest does; choose an earlier end, or renew the agreement")


def _check_table(plan: Plan, participants: int, quota_mb: int) -> None:
    if not isinstance(plan.privacy, Robust):
        return
    cohort = share_of(plan.rounds.cohort, participants)
    size = cohort * parameters(plan) * plan.rounds.ring_bits // 8
    if size > quota_mb * 1_000_000:
        raise ConflictError(
            f"a robust round of {cohort} nodes takes {size / 1e6:.0f} MB of the coordinator's disk, which allows "
            f"{quota_mb} (table_quota_mb); ask fewer nodes in a round (rounds.cohort), or choose a smaller model"
        )


def _check_start(session: Session, manifest: RunManifest, plan: Plan) -> None:
    """Equal data contract, preprocessing and model make equal layouts, and inputs that mean the same."""
    if manifest.start_model is None:
        return
    query = (
        select(PlanRow)
        .join(ModelVersion)
        .join(Run)
        .where(ModelVersion.digest == manifest.start_model, Run.study == manifest.study, ModelVersion.path != "")
    )
    found = [plan_of(row) for row in session.exec(query)]
    if not found:
        raise ConflictError(f"the study {manifest.study} has no model {manifest.start_model[:16]}… to start from")
    if not any(
        (each.data, each.preprocessing, each.model) == (plan.data, plan.preprocessing, plan.model) for each in found
    ):
        raise ConflictError(
            f"model {manifest.start_model[:16]}… is of another kind: a run starts from one whose plan has the same "
            "data, preprocessing and model"
        )
