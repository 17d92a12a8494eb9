"""Puts together the capsule of a run that ended (`concord_shared.evidence.capsule`)."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqlmodel import Session, col, select

from concord_server.api.security import Caller
from concord_server.audit import service as audit
from concord_server.audit.tables import AuditEvent
from concord_server.database import utc_now
from concord_server.models.tables import ModelVersion, ReleaseRow
from concord_server.nodes.tables import RosterVersion
from concord_server.pki import Authority
from concord_server.plans.service import plan_of
from concord_server.plans.tables import PlanRow
from concord_server.runs import receipts
from concord_server.runs.approvals import begun_with
from concord_server.runs.course import manifest_of
from concord_server.runs.leases import records_after
from concord_server.runs.states import ENDED
from concord_server.runs.tables import Run
from concord_shared import __version__
from concord_shared.documents import RunManifest
from concord_shared.errors import ArtefactError, ConflictError, NotAllowedError
from concord_shared.evidence.capsule import MODEL, CapsuleIndex, write_capsule
from concord_shared.evidence.log import GENESIS
from concord_shared.files import file_digest
from concord_shared.model_card import model_card
from concord_shared.plan.schema import Plan
from concord_shared.signing import Envelope, PrivateKey

__all__ = ["check_export", "export"]


def check_export(session: Session, caller: Caller, run: Run) -> None:
    """The organisation that started a run may export it, and its auditors; once its model is released, everybody who
    may know of the run.

    Raises:
        NotAllowedError. ConflictError: the run has not ended.
    """
    if run.state not in ENDED:
        raise ConflictError(f"the run {run.id} is {run.state}; a capsule is made of a run that ended")
    released = session.exec(select(ReleaseRow.run).where(ReleaseRow.run == run.id)).first() is not None
    if not released and not caller.may(run.organisation, "researcher", "org-admin", "auditor"):
        raise NotAllowedError(f"the model of this run is not released; ask {run.organisation} for its capsule")


def export(session: Session, home: Path, run: Run, authority: Authority, signer: PrivateKey, to: Path) -> None:
    """Writes the capsule of a run that ended.

    Raises:
        ArtefactError: a file of the run is missing or damaged, or the disk refuses.
    """
    manifest, row = manifest_of(run), session.get_one(PlanRow, run.plan_digest)
    plan, summary = plan_of(row), run.summary or {}
    private = plan.privacy.mode == "private"
    records = [each.record for each in records_after(session, run.id)]
    members: dict[str, Any] = {
        "keys.json": _keys(session, manifest, authority),
        "manifest.json": run.manifest,
        "plan.json": row.document,
        "approvals.json": _approvals(session, run, private),
        "environment.json": _environment(manifest, plan),
        "rounds.json": records,
        "metrics.json": summary,
        "updates.json": [receipts.evidence(each) for each in receipts.of_run(session, run.id)],
        "audit.json": _audit(session, run, authority.federation, signer),
    }
    if summary.get("guarantee") is not None:
        members["guarantee.json"] = summary["guarantee"]
    release = session.exec(select(ReleaseRow).where(ReleaseRow.run == run.id)).first()
    if release is not None:
        members["release.json"] = release.envelope
    content: dict[str, bytes | Path] = {name: _bytes(value) for name, value in members.items()}
    model = session.exec(select(ModelVersion).where(ModelVersion.run == run.id, col(ModelVersion.final))).first()
    if model is not None:
        content[MODEL] = _model_file(home, model)
        content["model-card.md"] = _card(plan, manifest, model, summary.get("personal", False)).encode()
    index = CapsuleIndex(
        federation=authority.federation,
        run=run.id,
        state=run.state,  # type: ignore[arg-type]  # one of ENDED
        files=(),
        issued_at=int(utc_now().timestamp()),
    )
    write_capsule(to, index, content, signer)


def _card(plan: Plan, manifest: RunManifest, model: ModelVersion, personal: bool) -> str:
    return model_card(
        plan,
        {
            "nodes": len(manifest.participants),
            "rounds": plan.rounds.count,
            "personal": personal,
            "metrics": model.metrics,
            "worst_node": None,
            "plan_digest": plan.digest,
            "model_digest": model.digest,
            "deterministic": plan.training.deterministic,
        },
    )


def _keys(session: Session, manifest: RunManifest, authority: Authority) -> dict[str, Any]:
    """As of the roster that the manifest names: keys that signed then, whoever left or came since."""
    return {
        "root_certificate": authority.root_pem,
        "membership_certificate": authority.membership_pem,
        "roster": session.get_one(RosterVersion, manifest.roster_version).envelope,
    }


def _approvals(session: Session, run: Run, private: bool) -> list[dict[str, Any]]:
    found = []
    for row in begun_with(session, run):
        digest = Envelope.model_validate_json(json.dumps(row.envelope)).digest
        found.append({"node": row.node, "digest": digest} if private else row.envelope)
    return found


def _environment(manifest: RunManifest, plan: Plan) -> dict[str, Any]:
    """What the run was asked and driven with; what each node trained on, it knows itself."""
    packages = {name: version(name) for name in ("torch", "numpy", "flwr")}
    return {
        "schema": "concord/environment/1",
        "submitted_with": manifest.versions,
        "coordinator": {"concord": __version__, "python": platform.python_version()} | packages,
        "machine": platform.machine(),
        "deterministic": plan.training.deterministic,
        "plan_digest": plan.digest,
    }


def _audit(session: Session, run: Run, federation: str, signer: PrivateKey) -> dict[str, Any]:
    head, envelope = audit.signed_head(session, federation, signer)
    rows = session.exec(select(AuditEvent).where(AuditEvent.subject == run.id).order_by(col(AuditEvent.id))).all()
    told = [row for row in rows if row.action.startswith(("run:", "reply:", "quarantine:"))]
    return {"head": envelope.model_dump(mode="json"), "entries": [_entry(session, row, head.size) for row in told]}


def _entry(session: Session, row: AuditEvent, size: int) -> dict[str, Any]:
    before = session.get(AuditEvent, row.id - 1)
    return {
        "body": audit.entry_of(row).canonical.decode("utf-8"),
        "before": GENESIS.hex() if before is None else before.hash,
        "proof": list(audit.proof_of(session, row.id, size)),
    }


def _model_file(home: Path, model: ModelVersion) -> Path:
    path = home / model.path
    try:
        sound = file_digest(path) == model.sha256
    except OSError as error:
        raise ArtefactError(f"the run's model is missing at the coordinator ({model.path})") from error
    if not sound:
        raise ArtefactError(f"the run's model has changed since it was stored ({model.path}); restore it from a backup")
    return path


def _bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1).encode("utf-8", "replace")
