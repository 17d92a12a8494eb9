"""Approvals as nodes send them, and what they mean for a run."""

from datetime import datetime, timedelta

from sqlmodel import Session, col, select

from concord_server.api.security import NodeCaller
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.datasets.tables import DatasetCardRow
from concord_server.nodes.tables import Node
from concord_server.plans.tables import StudyPlan
from concord_server.runs.states import Word
from concord_server.runs.tables import ApprovalRow, Run
from concord_server.studies.envelopes import check_issued, document_of, envelope_of, keep
from concord_shared.cards import most_rows
from concord_shared.documents import Approval, DatasetCard, Participant, RunManifest
from concord_shared.errors import ConflictError, NotAllowedError
from concord_shared.signing import Envelope, open_envelope, read_public_text

__all__ = ["admitted", "begun_with", "take_approval", "words"]

OFFLINE_AFTER = timedelta(seconds=60)
ROWS_MAX = 1 << 31
"""Of one dataset, whatever its card says: from the sum of all, the fixed point of everyone's statistics follows."""
Latest = dict[tuple[str, str], ApprovalRow]


def take_approval(session: Session, node: NodeCaller, envelope: Envelope) -> Approval | None:
    """Stores a node's word, after these checks: the node signed it, it is about its own dataset and a plan of the
    study, of no more rows than the dataset has, and it follows the words before. None: it is here already, and nothing
    was changed.
    """
    given = open_envelope(envelope, Approval, [read_public_text(node.identity_key)])
    if (given.node, given.organisation) != (node.name, node.organisation):
        raise NotAllowedError(
            f"a node decides for itself alone: expected {node.organisation}/{node.name}, "
            f"got {given.organisation}/{given.node}"
        )
    check_issued(given.issued_at, int(utc_now().timestamp()))
    if session.get(StudyPlan, (given.study, given.plan_digest)) is None:
        raise ConflictError(f"the study {given.study} has no plan {given.plan_digest[:16]}…; nothing was approved")
    subject = f"{given.node}/{given.dataset}"
    card = session.get(DatasetCardRow, subject)
    if card is None:
        raise ConflictError(f"no card of {subject} is here; publish the dataset first")
    if _known(session, given, envelope):
        return None
    _check_rows(given, card)
    session.add(
        ApprovalRow(
            node=given.node,
            dataset=given.dataset,
            study=given.study,
            plan_digest=given.plan_digest,
            sequence=given.sequence,
            decision=given.decision,
            dataset_version=given.dataset_version,
            rows=given.rows,
            evaluation_rows=given.evaluation_rows,
            not_after=given.not_after,
            envelope=keep(envelope),
        )
    )
    session.flush()
    detail = {"study": given.study, "plan": given.plan_digest, "decision": given.decision, "sequence": given.sequence}
    record(session, node.actor, "approval:record", subject, **detail, digest=given.digest)
    return given


def _check_rows(given: Approval, card: DatasetCardRow) -> None:
    """Raises: ConflictError: more rows than the card of the same content has, or than any dataset may have."""
    same = given.dataset_version == card.version
    rows_max = min(most_rows(document_of(card.envelope, DatasetCard)), ROWS_MAX) if same else ROWS_MAX
    if given.rows + given.evaluation_rows > rows_max:
        raise ConflictError(
            f"the approval is of {given.rows} rows for training and {given.evaluation_rows} for evaluation, expected "
            f"at most {rows_max} together of {card.name}; publish the dataset again, then approve again"
        )


def words(session: Session, manifest: RunManifest, now: datetime) -> tuple[Word, ...]:
    """What each participant has said of this run's plan, as far as it holds now."""
    latest = _latest(session, manifest)
    names = [participant.node for participant in manifest.participants]
    nodes = {node.name: node for node in session.exec(select(Node).where(col(Node.name).in_(names)))}
    query = select(DatasetCardRow).where(col(DatasetCardRow.node).in_(names))
    versions = {(card.node, card.dataset): card.version for card in session.exec(query)}
    found = []
    for participant in manifest.participants:
        key = (participant.node, participant.dataset)
        changed = versions.get(key) != participant.dataset_version
        found.append(_word(participant, nodes.get(participant.node), latest.get(key), changed, now))
    return tuple(found)


def admitted(session: Session, manifest: RunManifest, approved: frozenset[str]) -> list[ApprovalRow]:
    """The approvals of these nodes that a run begins with, by node name."""
    latest = _latest(session, manifest)
    chosen = (latest[each.node, each.dataset] for each in manifest.participants if each.node in approved)
    return sorted(chosen, key=lambda row: row.node)


def begun_with(session: Session, run: Run) -> list[ApprovalRow]:
    """Those that a run began with, in node order: the same when it is resumed, whatever was said since."""
    same = {"study": run.study, "plan_digest": run.plan_digest}
    return [session.get_one(ApprovalRow, each | same) for each in run.admitted]


def _word(participant: Participant, node: Node | None, row: ApprovalRow | None, changed: bool, now: datetime) -> Word:
    name = participant.node
    if node is None or node.state == "revoked":
        return Word(name, "revoked")
    if changed:
        return Word(name, "changed")
    if row is not None and row.dataset_version == participant.dataset_version:
        if row.decision in ("rejected", "withdrawn"):
            return Word(name, "rejected" if row.decision == "rejected" else "withdrawn")
        if row.not_after > now.timestamp() and node.state == "active":
            return Word(name, "approved")
    if node.state == "suspended":
        return Word(name, "suspended")
    online = node.last_seen_at is not None and now - node.last_seen_at < OFFLINE_AFTER
    return Word(name, "approval" if online else "offline")


def _latest(session: Session, manifest: RunManifest) -> Latest:
    """The word of the highest sequence for each (node, dataset)."""
    query = select(ApprovalRow).where(
        ApprovalRow.study == manifest.study, ApprovalRow.plan_digest == manifest.plan_digest
    )
    return {(row.node, row.dataset): row for row in session.exec(query.order_by(col(ApprovalRow.sequence)))}


def _known(session: Session, given: Approval, envelope: Envelope) -> bool:
    """Whether it is here already. Raises: ConflictError: a later word is, or another with this number."""
    of_this = (
        ApprovalRow.node == given.node,
        ApprovalRow.dataset == given.dataset,
        ApprovalRow.study == given.study,
        ApprovalRow.plan_digest == given.plan_digest,
    )
    same = session.exec(select(ApprovalRow).where(*of_this, ApprovalRow.sequence == given.sequence)).first()
    if same is not None and envelope_of(same.envelope).bytes == envelope.bytes:
        return True
    newest = session.exec(select(ApprovalRow).where(*of_this).order_by(col(ApprovalRow.sequence).desc())).first()
    if newest is not None and given.sequence <= newest.sequence:
        raise ConflictError(
            f"expected an approval of sequence {newest.sequence + 1} or later, got {given.sequence}; "
            "an older word does not replace a newer one"
        )
    return False
