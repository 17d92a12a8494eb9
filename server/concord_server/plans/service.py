"""Plans: submitted to studies, and sent to every node whose data serve the study. A plan is data; nothing of it runs
here.
"""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError
from sqlmodel import Session, col, select

from concord_server.api.security import Caller
from concord_server.audit.service import record
from concord_server.nodes.service import notify
from concord_server.plans.tables import PlanRow, StudyPlan
from concord_server.settings import Settings
from concord_server.studies import service as studies
from concord_server.studies.reach import in_reach
from concord_shared.documents import Id
from concord_shared.errors import ApiError, NotFoundError, PlanError
from concord_shared.guarantee import guarantee_of
from concord_shared.models.plugins import fault_of
from concord_shared.plan.models import PluginModel, PretrainedModel
from concord_shared.plan.schema import Plan, parse_plan_document
from concord_shared.plan.section import Name
from concord_shared.plan.sizes import check_size
from concord_shared.pretrained import store as pretrained

__all__ = ["NewPlan", "PlanDetail", "PlanView", "detail", "find", "in_studies", "plan_of", "send_all", "submit", "view"]

FAULTS_SHOWN_MAX = 20


class NewPlan(BaseModel, extra="forbid"):
    """document: `Plan.document()`. organisation: on whose behalf; the caller's own by default."""

    study: Id
    document: dict[str, Any]
    organisation: Name | None = None


class PlanView(BaseModel):
    digest: str
    name: str
    model: str
    rounds: int
    created_at: str


class Submission(BaseModel):
    study: str
    requested_by: str
    created_at: str


class PlanDetail(PlanView):
    """document: every default written out. studies: those that the caller may know of. guarantee: of differential
    privacy, where the plan has it.
    """

    document: dict[str, Any]
    guarantee: dict[str, Any] | None
    studies: list[Submission]


def submit(session: Session, caller: Caller, new: NewPlan, settings: Settings) -> PlanRow:
    """Attaches a plan to a study, and tells the nodes. The same plan again changes nothing.

    Raises:
        PlanError: not a plan, one that no node would run, or one that is larger than the settings allow.
    """
    study, organisation = studies.find(session, caller, new.study).study, new.organisation or caller.organisation
    if organisation is None:
        raise ApiError("say on whose behalf: give the organisation")
    caller.check(organisation, "researcher", "org-admin")
    studies.check_member(session, study, organisation)
    plan = _parsed(new.document)
    _check_plugin(plan, settings)
    _check_pretrained(plan)
    check_size(plan, settings.parameters_max, settings.metrics_max)
    row = session.get(PlanRow, plan.digest)
    if row is None:
        row = PlanRow(digest=plan.digest, name=plan.name, document=plan.document())
        session.add(row)
        session.flush()
    if session.get(StudyPlan, (study, plan.digest)) is None:
        attached = StudyPlan(study=study, plan_digest=plan.digest, requested_by=organisation)
        session.add(attached)
        _send(session, row, attached, studies.agreed_nodes(session, study))
        record(session, caller.actor, "plan:submit", plan.digest, study=study, organisation=organisation)
    return row


def find(session: Session, caller: Caller, digest: str) -> PlanRow:
    """Raises: NotFoundError: there is none, or none that the caller may know of."""
    row = session.exec(select(PlanRow).where(PlanRow.digest == digest, in_studies(caller))).first()
    if row is None:
        raise NotFoundError(f"no plan {digest[:80]!r}; list them with: concord plan list")
    return row


def plan_of(row: PlanRow) -> Plan:
    return parse_plan_document(row.document)


def in_studies(caller: Caller, study: str | None = None) -> Any:
    """A condition: the plan is in this study, or in any, that the caller may know of."""
    reached = select(StudyPlan.plan_digest).where(in_reach(caller, StudyPlan.study))
    return col(PlanRow.digest).in_(reached if study is None else reached.where(StudyPlan.study == study))


def view(row: PlanRow) -> PlanView:
    plan = plan_of(row)
    return PlanView(
        digest=row.digest,
        name=row.name,
        model=plan.model.name,
        rounds=plan.rounds.count,
        created_at=row.created_at.isoformat(),
    )


def detail(session: Session, caller: Caller, row: PlanRow) -> PlanDetail:
    query = select(StudyPlan).where(StudyPlan.plan_digest == row.digest, in_reach(caller, StudyPlan.study))
    return PlanDetail(
        **view(row).model_dump(),
        document=row.document,
        guarantee=guarantee.document() if (guarantee := guarantee_of(parse_plan_document(row.document))) else None,
        studies=[
            Submission(study=each.study, requested_by=each.requested_by, created_at=each.created_at.isoformat())
            for each in session.exec(query.order_by(col(StudyPlan.study)))
        ],
    )


def send_all(session: Session, study: str, nodes: Iterable[str], digest: str | None = None) -> None:
    """Tells nodes of the plans that are in a study already, or of one of them."""
    told = list(nodes)
    query = select(PlanRow, StudyPlan).join(StudyPlan, col(StudyPlan.plan_digest) == col(PlanRow.digest))
    query = query.where(StudyPlan.study == study)
    if digest is not None:
        query = query.where(PlanRow.digest == digest)
    for row, attached in session.exec(query.order_by(col(StudyPlan.created_at))):
        _send(session, row, attached, told)


def _send(session: Session, row: PlanRow, attached: StudyPlan, nodes: Iterable[str]) -> None:
    body = {"study": attached.study, "document": row.document, "requested_by": attached.requested_by}
    for node in nodes:
        notify(session, node, "plan", row.digest, body)


def _parsed(document: dict[str, Any]) -> Plan:
    try:
        plan = parse_plan_document(document)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)]
        raise PlanError("; ".join(faults[:FAULTS_SHOWN_MAX])) from error
    if plan.model.name == "own":
        raise PlanError("model.name = own is for simulation alone; every node refuses such a plan. Name a built-in one")
    return plan


def _check_plugin(plan: Plan, settings: Settings) -> None:
    """Raises: PlanError: its model is of a wheel that this coordinator does not allow, or has not installed so."""
    model = plan.model
    if not isinstance(model, PluginModel):
        return
    if settings.plugins.get(model.package) != model.sha256:
        raise PlanError(
            f"the wheel {model.package} with this code is none of the coordinator's plugins; its administrator adds it "
            "to settings.toml"
        )
    if fault := fault_of(model):
        raise PlanError(fault)


def _check_pretrained(plan: Plan) -> None:
    """Raises: PlanError: its model's weights are not on this machine, which makes the first model of a run."""
    if isinstance(plan.model, PretrainedModel) and (fault := pretrained.fault_of(plan.model)):
        raise PlanError(f"the coordinator: {fault}")
