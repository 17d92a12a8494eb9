"""What the coordinator remembers of each node's log, so that no node can rewrite what it did.

A head that does not follow from the one before is an alarm: it is recorded, shown, and kept beside the one before, for
both are signed by the node. It stays until a person accepts the node's new log.
"""

from pydantic import BaseModel
from sqlmodel import Session, col, select

from concord_server.api.security import Caller, NodeCaller
from concord_server.audit.service import record
from concord_server.audit.tables import NodeHead
from concord_server.database import utc_now
from concord_server.studies.envelopes import check_issued, document_of, envelope_of, keep
from concord_shared.errors import ConflictError, DocumentRefusedError, LogForkedError, NotFoundError
from concord_shared.evidence.heads import TreeHead, check_grown, node_log
from concord_shared.protocol import HeadSent
from concord_shared.signing import Envelope, open_envelope, read_public_text

__all__ = ["HeadView", "accept", "remembered", "take", "view", "views"]


class HeadView(BaseModel):
    """size, root: of the node's log, as last proven. alarm: "" where all is well."""

    node: str
    size: int
    root: str
    received_at: str
    alarm: str


def remembered(session: Session, node: NodeCaller) -> Envelope | None:
    """The node's last head that was taken; none of an earlier life with other keys."""
    row = session.get(NodeHead, node.name)
    return None if row is None or row.identity_key != node.identity_key else envelope_of(row.head)


def take(session: Session, node: NodeCaller, sent: HeadSent, federation: str) -> str:
    """Remembers a node's head after these checks: the node signed it, it is of its own log, and it follows from the
    one before. Returns why it does not follow; "" where it does.

    Raises:
        DocumentRefusedError: not a head of this node's log.
    """
    given = open_envelope(sent.head, TreeHead, [read_public_text(node.identity_key)])
    if given.log != node_log(federation, node.organisation, node.name):
        raise DocumentRefusedError(f"{node.name} cannot send a head of the log {given.log}")
    now = utc_now()
    check_issued(given.issued_at, int(now.timestamp()))
    row = session.get(NodeHead, node.name)
    if row is None or row.identity_key != node.identity_key:
        fresh = NodeHead(
            node=node.name,
            identity_key=node.identity_key,
            head=keep(sent.head),
            received_at=now,
            alarm="",
            offered=None,
        )
        session.merge(fresh)
        return ""
    try:
        check_grown(document_of(row.head, TreeHead), given, sent.proof)
    except LogForkedError as error:
        if not row.alarm:
            record(session, node.actor, "log:grow-refused", node.name, reason=str(error))
        row.alarm, row.offered = str(error), keep(sent.head)
        session.add(row)
        return row.alarm
    row.head, row.received_at = keep(sent.head), now
    session.add(row)
    return row.alarm


def accept(session: Session, caller: Caller, node: str, reason: str) -> HeadView:
    """A person looked: the node's log as it is now is the one to go on from. Raises: NotFoundError, ConflictError."""
    row = session.get(NodeHead, node)
    if row is None:
        raise NotFoundError(f"no head of {node}'s log is remembered")
    if row.offered is None:
        raise ConflictError(f"there is no alarm about {node}'s log; nothing was changed")
    record(session, caller.actor, "log:accept", node, reason=reason, alarm=row.alarm)
    row.head, row.offered, row.alarm = row.offered, None, ""
    session.add(row)
    return view(row)


def views(session: Session) -> list[HeadView]:
    return [view(row) for row in session.exec(select(NodeHead).order_by(col(NodeHead.node)))]


def view(row: NodeHead) -> HeadView:
    found = document_of(row.head, TreeHead)
    return HeadView(
        node=row.node, size=found.size, root=found.root, received_at=row.received_at.isoformat(), alarm=row.alarm
    )
