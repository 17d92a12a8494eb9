"""Where nodes' privacy ledgers stand, by their own signed word: kept in the audit log, so that a node which lost a part
of its ledger can be told. The coordinator decides nothing by it.
"""

from sqlmodel import Session, col, select

from concord_server.api.security import NodeCaller
from concord_server.audit.service import record
from concord_server.audit.tables import AuditEvent
from concord_server.database import utc_now
from concord_server.studies.envelopes import check_issued, envelope_of, keep
from concord_shared.errors import NotAllowedError
from concord_shared.protocol import LedgerHead
from concord_shared.signing import Envelope, open_envelope, read_public_text

__all__ = ["newest", "take"]

ACTION = "ledger:note"


def take(session: Session, node: NodeCaller, envelope: Envelope) -> None:
    """Notes a node's word, if the node itself signed it and it is further than the one before; else nothing changes.

    Raises:
        DocumentRefusedError, NotAllowedError: another's word, or another's ledger.
    """
    given = open_envelope(envelope, LedgerHead, [read_public_text(node.identity_key)])
    if (given.node, given.organisation) != (node.name, node.organisation):
        raise NotAllowedError(f"a node speaks of its own ledger alone: expected {node.name}, got {given.node}")
    check_issued(given.issued_at, int(utc_now().timestamp()))
    before = newest(session, node)
    if before is None or LedgerHead.from_canonical(before.bytes).sequence < given.sequence:
        record(session, node.actor, ACTION, node.name, sequence=given.sequence, envelope=keep(envelope))


def newest(session: Session, node: NodeCaller) -> Envelope | None:
    """What was noted last of a node that has this identity key."""
    query = select(AuditEvent).where(
        AuditEvent.actor == node.actor, AuditEvent.action == ACTION, AuditEvent.subject == node.name
    )
    event = session.exec(query.order_by(col(AuditEvent.id).desc()).limit(1)).first()
    return None if event is None else envelope_of(event.detail["envelope"])
