"""Trained models: where they come from, who may have their files, and their release for use."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import true
from sqlmodel import Session, col, or_, select

from concord_server.api.security import Caller, NodeCaller
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.models.tables import ModelVersion, ReleaseRow
from concord_server.nodes.service import notify
from concord_server.plans import service as plans
from concord_server.runs.service import manifest_of
from concord_server.runs.tables import Run
from concord_server.studies import service as studies
from concord_server.studies.envelopes import check_issued, document_of, envelope_of, keep, open_signed
from concord_server.studies.reach import in_reach
from concord_server.studies.tables import AgreementRow, StudyMember, StudyRow
from concord_shared.documents import ModelFile, Release
from concord_shared.errors import ApiError, ArtefactError, ConflictError, NotAllowedError, NotFoundError
from concord_shared.files import explain, file_digest
from concord_shared.signing import Envelope

__all__ = [
    "FILES",
    "Files",
    "Lineage",
    "ModelView",
    "check_download",
    "file_for_node",
    "file_of",
    "files_of",
    "files_view",
    "find",
    "metric_lines",
    "release",
    "release_of",
    "view",
]

FILES = ("model.safetensors", "plan.json", "summary.json")
"""What models/<digest>/<run>/ holds."""
FIGURES_MAX = 100


class ModelView(BaseModel):
    """final: the last of its run, which alone has files and can be released. metrics: of the whole federation."""

    digest: str
    run: str
    plan_digest: str
    study: str
    organisation: str
    round: int
    final: bool
    released: bool
    size: int
    sha256: str
    metrics: dict[str, Any]
    created_at: str


class Files(BaseModel):
    """What a Release is made from. metrics: as it tells them."""

    model_digest: str
    run: str
    plan_digest: str
    study: str
    organisation: str
    files: list[ModelFile]
    metrics: dict[str, str]


@dataclass(frozen=True)
class Lineage:
    """A model and the run that it is of."""

    model: ModelVersion
    run: Run


def find(session: Session, caller: Caller, digest: str, run: str | None = None) -> Lineage:
    """A model by its digest; of several runs that ended with it the one that is asked for, or the newest.

    Raises:
        NotFoundError: there is none, or none that the caller may know of.
    """
    query = (
        select(ModelVersion, Run)
        .join(Run)
        .where(ModelVersion.digest == digest, in_reach(caller, Run.study, agreed=True))
        .where(true() if run is None else Run.id == run)
        .order_by(col(ModelVersion.final).desc(), col(ModelVersion.id).desc())
    )
    found = session.exec(query).first()
    if found is None:
        raise NotFoundError(f"no model {digest[:80]!r}; list them with: concord model list")
    return Lineage(*found)


def view(session: Session, found: Lineage) -> ModelView:
    model, run = found.model, found.run
    return ModelView(
        digest=model.digest,
        run=run.id,
        plan_digest=model.plan_digest,
        study=run.study,
        organisation=run.organisation,
        round=model.round,
        final=model.final,
        released=release_of(session, model) is not None,
        size=model.size,
        sha256=model.sha256,
        metrics=model.metrics,
        created_at=model.created_at.isoformat(),
    )


def release_of(session: Session, model: ModelVersion) -> ReleaseRow | None:
    return session.get(ReleaseRow, (model.digest, model.run))


def metric_lines(metrics: Mapping[str, Any]) -> dict[str, str]:
    """A release's metrics: every figure that is one number, as text."""
    numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float)) and key.isprintable()}
    return {key: format(value, ".6g") for key, value in sorted(numbers.items())[:FIGURES_MAX]}


# Files


def files_view(home: Path, found: Lineage) -> Files:
    return Files(
        model_digest=found.model.digest,
        run=found.run.id,
        plan_digest=found.run.plan_digest,
        study=found.run.study,
        organisation=found.run.organisation,
        files=list(files_of(home, found.model)),
        metrics=metric_lines(found.model.metrics),
    )


def files_of(home: Path, model: ModelVersion) -> tuple[ModelFile, ...]:
    """Raises: ConflictError: not the final model of a run. ArtefactError: its files are gone or cannot be read."""
    folder = _folder(home, model)
    try:
        found = [folder / name for name in FILES if (folder / name).is_file()]
        files = tuple(ModelFile(name=path.name, sha256=file_digest(path), size=path.stat().st_size) for path in found)
    except OSError as error:
        raise ArtefactError(f"cannot read {folder}: {explain(error)}") from error
    if not any((file.name, file.sha256) == (FILES[0], model.sha256) for file in files):
        raise ArtefactError(f"{folder / FILES[0]} is not the file that was stored; restore it from a backup")
    return files


def check_download(session: Session, caller: Caller, lineage: Lineage) -> None:
    """Before its release a model is its organisation's alone; then everyone's who may know of the run.

    Raises:
        NotAllowedError.
    """
    if release_of(session, lineage.model) is None:
        lineage_of = lineage.run.organisation
        if not caller.may(lineage_of, "researcher", "org-admin"):
            raise NotAllowedError(f"this model is not released; ask {lineage_of} for it: concord model release")


def file_of(home: Path, model: ModelVersion, name: str) -> Path:
    """A file for a person. Raises: NotFoundError: it has no such file."""
    path = _folder(home, model) / name
    if name not in FILES or not path.is_file():
        raise NotFoundError(f"the model has no file {name[:80]!r}; it has {', '.join(FILES)}")
    if name == FILES[0]:
        _check_bytes(path, model.sha256)
    return path


def file_for_node(
    session: Session, home: Path, node: NodeCaller, digest: str, name: str, run: str | None = None
) -> Path:
    """A file of a released model, for a node whose organisation is in the study, as the release names it: that of
    `run`, or the newest, which is the one that a node keeps.

    Raises:
        NotAllowedError: the node is not active.
        NotFoundError: no such release, none that concerns the node, or no such file in it.
        ArtefactError: the file is gone, or not the one that was released.
    """
    if node.state != "active":
        raise NotAllowedError(f"this node is {node.state}; only active nodes download models")
    query = select(ReleaseRow).where(
        ReleaseRow.model_digest == digest, true() if run is None else ReleaseRow.run == run
    )
    rows = session.exec(query.order_by(col(ReleaseRow.created_at))).all()
    releases = [document_of(row.envelope, Release) for row in rows if _concerns(session, row, node)]
    newest = max(releases, key=lambda each: each.issued_at, default=None)
    files = {file.name: file for file in newest.files} if newest else {}
    if newest is None or name not in files:
        raise NotFoundError("no such file of a released model")
    of_run = (ModelVersion.digest == digest, ModelVersion.run == newest.run)
    path = _folder(home, session.exec(select(ModelVersion).where(*of_run)).one()) / name
    _check_bytes(path, files[name].sha256)
    return path


def _folder(home: Path, model: ModelVersion) -> Path:
    if not model.final:
        raise ConflictError(
            f"model {model.digest[:16]}… is the model after round {model.round}; only the last of a run has files"
        )
    assert re.fullmatch(r"models/[0-9a-f]{64}(/[a-z0-9-]+)?/model\.safetensors", model.path), model.path
    return (home / model.path).parent


def _check_bytes(path: Path, sha256: str) -> None:
    try:
        found = file_digest(path)
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {explain(error)}") from error
    if found != sha256:
        raise ArtefactError(f"{path} has changed since it was stored; restore it from a backup")


def _concerns(session: Session, row: ReleaseRow, node: NodeCaller) -> bool:
    """Whether the node's organisation is a member of the study, or opened data to it."""
    member = select(StudyMember.study).where(
        StudyMember.study == row.study, StudyMember.organisation == node.organisation
    )
    owner = select(AgreementRow.study).where(
        AgreementRow.study == row.study, AgreementRow.owner == node.organisation, AgreementRow.state == "agreed"
    )
    query = select(StudyRow).where(or_(col(StudyRow.study).in_(member), col(StudyRow.study).in_(owner)))
    return session.exec(query).first() is not None


# Release


def release(session: Session, home: Path, caller: Caller, digest: str, envelope: Envelope) -> ReleaseRow:
    """Clears a model for use, after these checks: the organisation of its run signed the release, which names this
    model, its files as they are, and its figures. The same release again changes nothing.
    """
    given = Release.from_canonical(envelope.bytes)
    found = find(session, caller, digest, given.run)
    model, run = found.model, found.run
    caller.check(run.organisation, "researcher", "org-admin")
    open_signed(session, envelope, Release, run.organisation)
    check_issued(given.issued_at, int(utc_now().timestamp()))
    before = release_of(session, model)
    if before is not None:
        if envelope_of(before.envelope).bytes == envelope.bytes:
            return before
        raise ConflictError(f"model {digest[:16]}… is released already")
    _check(home, given, model, run)
    _check_outputs(session, run)
    row = ReleaseRow(
        model_digest=digest, run=run.id, study=run.study, organisation=run.organisation, envelope=keep(envelope)
    )
    session.add(row)
    session.flush()
    record(session, caller.actor, "model:release", digest, run=run.id, digest=given.digest)
    _tell(session, run, row)
    return row


def _check(home: Path, given: Release, model: ModelVersion, run: Run) -> None:
    said = (given.model_digest, given.plan_digest, given.study, given.organisation)
    if said != (model.digest, run.plan_digest, run.study, run.organisation):
        raise ApiError(f"the release is not of model {model.digest[:16]}… of the run {run.id}; make it anew")
    files = files_of(home, model)
    if sorted(given.files, key=lambda file: file.name) != sorted(files, key=lambda file: file.name):
        raise ApiError("the release names other files than the model has; make it anew")
    if given.metrics != metric_lines(model.metrics):
        raise ApiError("the release tells other figures than those of the run; make it anew")


def _check_outputs(session: Session, run: Run) -> None:
    """Of each dataset that took part an agreement of the study allows a release. Raises: ConflictError: none does."""
    for participant in manifest_of(run).participants:
        name = f"{participant.node}/{participant.dataset}"
        outputs = [given.terms.outputs for given in studies.agreements_over(session, run.study, name)]
        if outputs and not any(each is None or "release" in each for each in outputs):
            raise ConflictError(f"the agreement over {name} allows no release of a model that learned from it")


def _tell(session: Session, run: Run, row: ReleaseRow) -> None:
    """Nodes of members that hold none of the study's data learn of study and plan first: they verify all of it."""
    taking_part = {each.node for each in manifest_of(run).participants}
    agreed = set(studies.agreed_nodes(session, run.study))
    others = set(studies.member_nodes(session, run.study)) - agreed
    study = session.get_one(StudyRow, run.study)
    for node in sorted(others):
        notify(session, node, "study", run.study, study.envelope)
    plans.send_all(session, run.study, sorted(others), run.plan_digest)
    for node in sorted(agreed | others | (taking_part & (agreed | others))):
        notify(session, node, "release", row.model_digest, row.envelope)
