"""What may happen to nodes, and what the others are told of it.

    invited → enrolled → active ⇄ suspended → revoked        revoked may be invited anew, with new keys

Every change is a new version of the roster, which goes to every node that is not revoked. A suspended node keeps its
certificate and is told what happens; it takes part in nothing.
"""

import datetime
import json
from typing import Any, cast, get_args

from pydantic import BaseModel, Field
from sqlalchemy import delete, func
from sqlmodel import Session, col, select

from concord_server.api.security import Caller
from concord_server.audit.service import record
from concord_server.database import Database, lock, utc_now
from concord_server.nodes.tables import Node, NodeUpdate, RosterVersion
from concord_server.organisations.tables import Organisation
from concord_server.pki import Authority
from concord_shared.documents import NodeState, Roster, RosterNode, RosterOrganisation
from concord_shared.errors import ConflictError, NotFoundError, NotSignedInError
from concord_shared.protocol import UPDATES_MAX, Update, UpdateKind, Updates
from concord_shared.signing import Envelope, fingerprint, read_public_text, seal

__all__ = [
    "Activation",
    "NodeView",
    "Reason",
    "activate",
    "current_roster",
    "current_roster_envelope",
    "find",
    "manageable",
    "notify",
    "publish_roster",
    "revoke",
    "suspend",
    "updates",
    "view",
]

OUTBOX = "node-updates"
ROSTER = "roster"
SEEN_EVERY = datetime.timedelta(seconds=30)
DELIVERED_KEPT = datetime.timedelta(days=7)


class Activation(BaseModel, extra="forbid"):
    """fingerprint: of the node's identity key, as its owner read it to you."""

    fingerprint: str = Field(min_length=16, max_length=100)


class Reason(BaseModel, extra="forbid"):
    reason: str = Field("", max_length=1000)


class NodeView(BaseModel):
    """fingerprint: of the identity key, shown on both sides for people to compare."""

    name: str
    organisation: str
    state: str
    fingerprint: str
    certificate_serial: str
    certificate_not_after: str
    enrolled_at: str
    last_seen_at: str | None


def view(row: Node) -> NodeView:
    return NodeView(
        name=row.name,
        organisation=row.organisation,
        state=row.state,
        fingerprint=_fingerprint(row),
        certificate_serial=row.certificate_serial,
        certificate_not_after=row.certificate_not_after.isoformat(),
        enrolled_at=row.enrolled_at.isoformat(),
        last_seen_at=row.last_seen_at.isoformat() if row.last_seen_at else None,
    )


def find(session: Session, name: str) -> Node:
    """Raises: NotFoundError."""
    row = session.get(Node, name)
    if row is None:
        raise NotFoundError(f"there is no node {name}; see: concord node list")
    return row


def activate(session: Session, caller: Caller, name: str, activation: Activation, signer: Authority) -> Node:
    """Admits an enrolled or suspended node.

    Raises:
        ConflictError: another fingerprint than the node's, or the node is revoked.
    """
    node = manageable(session, caller, name)
    if activation.fingerprint.replace(":", "").replace(" ", "").lower() != _fingerprint(node):
        raise ConflictError(
            f"the fingerprint is not that of {name}: someone else may have enrolled in its place. Compare again what "
            "`concord-node doctor` shows there with `concord node show` here; if they differ, revoke the node"
        )
    return _move(session, caller.actor, node, "active", ("enrolled", "suspended"), signer)


def suspend(session: Session, caller: Caller, name: str, reason: str, signer: Authority) -> Node:
    """Raises: ConflictError: the node is not active."""
    return _move(session, caller.actor, manageable(session, caller, name), "suspended", ("active",), signer, reason)


def revoke(session: Session, actor: str, node: Node, reason: str, signer: Authority) -> Node:
    """Ends a node's membership. Its certificate and keys are refused from now on."""
    return _move(session, actor, node, "revoked", ("enrolled", "active", "suspended"), signer, reason)


def manageable(session: Session, caller: Caller, name: str) -> Node:
    """A node of an organisation that the caller administers. Raises: NotFoundError, NotAllowedError."""
    node = find(session, name)
    caller.check(node.organisation, "org-admin")
    return node


def notify(session: Session, node: str, kind: UpdateKind, subject: str, body: dict[str, Any]) -> None:
    """Appends to what a node is to be told; it arrives in this order, once this transaction is stored."""
    assert kind in get_args(UpdateKind)
    lock(session, OUTBOX)  # a number is never stored after a higher one was read
    session.add(NodeUpdate(node=node, kind=kind, subject=subject, body=body, created_at=utc_now()))
    session.flush()


def current_roster(session: Session) -> Roster:
    """The latest roster. Raises: NotFoundError: there is none yet."""
    return Roster.from_canonical(current_roster_envelope(session).bytes)


def current_roster_envelope(session: Session) -> Envelope:
    row = session.exec(select(RosterVersion).order_by(col(RosterVersion.version).desc()).limit(1)).first()
    if row is None:
        raise NotFoundError("there is no roster yet")
    return Envelope.model_validate_json(json.dumps(row.envelope))


def publish_roster(session: Session, signer: Authority) -> Roster:
    """The next version of the roster, as the tables now have it; sealed, and sent to every node that is not revoked."""
    session.flush()
    lock(session, ROSTER)
    now = utc_now()
    last = session.exec(select(func.max(RosterVersion.version))).one()
    roster = Roster(
        federation=signer.federation,
        version=(last or 0) + 1,
        issued_at=int(now.timestamp()),
        coordinator_key=signer.coordinator_key,
        organisations=tuple(
            RosterOrganisation(name=each.name, key=each.key)
            for each in session.exec(select(Organisation).order_by(Organisation.name))
        ),
        nodes=tuple(_row(each) for each in session.exec(select(Node).order_by(Node.name))),
    )
    envelope = seal(roster, signer.key).model_dump(mode="json")
    session.add(RosterVersion(version=roster.version, envelope=envelope, issued_at=now))
    for node in roster.nodes:
        if node.state != "revoked":
            notify(session, node.name, "roster", str(roster.version), {})
    return roster


def updates(database: Database, name: str, after: int) -> Updates:
    """What a node has not received yet; `after` says what it has.

    Raises:
        NotSignedInError: the node is gone.
    """
    now = utc_now()
    with database.reading() as session:
        node = session.get(Node, name)
        if node is None:
            raise NotSignedInError("this node does not belong to the federation any more")
        rows = [] if node.state == "revoked" else _pending(session, name, after)
        found = tuple(_update(session, each) for each in rows)
        stale = node.last_seen_at is None or now - node.last_seen_at > SEEN_EVERY or node.delivered < after
    if stale:
        _mark_seen(database, name, after, now)
    cursor = found[-1].sequence if found else after
    return Updates(updates=found, cursor=cursor, state=cast("NodeState", node.state), now=int(now.timestamp()))


def _pending(session: Session, name: str, after: int) -> list[NodeUpdate]:
    query = select(NodeUpdate).where(NodeUpdate.node == name, col(NodeUpdate.sequence) > after)
    return list(session.exec(query.order_by(col(NodeUpdate.sequence)).limit(UPDATES_MAX)))


def _update(session: Session, row: NodeUpdate) -> Update:
    assert row.sequence is not None, "a stored update has its number"
    body = row.body
    if row.kind == "roster":
        version = session.get(RosterVersion, int(row.subject))
        assert version is not None, "a roster that was sent is kept"
        body = version.envelope
    return Update(sequence=row.sequence, kind=cast("UpdateKind", row.kind), body=body)


def _mark_seen(database: Database, name: str, after: int, now: datetime.datetime) -> None:
    with database.session() as session:
        node = session.get(Node, name)
        if node is None:
            return
        node.last_seen_at = now
        newest = session.exec(select(func.max(NodeUpdate.sequence)).where(NodeUpdate.node == name)).one() or 0
        node.delivered = max(node.delivered, min(after, newest))
        session.add(node)
        session.execute(
            delete(NodeUpdate).where(
                col(NodeUpdate.node) == name,
                col(NodeUpdate.sequence) < node.delivered,
                col(NodeUpdate.created_at) < now - DELIVERED_KEPT,
            )
        )


def _move(
    session: Session,
    actor: str,
    node: Node,
    state: NodeState,
    possible: tuple[NodeState, ...],
    signer: Authority,
    reason: str = "",
) -> Node:
    if node.state == state:
        return node  # the same word twice
    if node.state not in possible:
        raise ConflictError(f"{node.name} is {node.state}; only what is {' or '.join(possible)} can become {state}")
    verb = {"active": "activate", "suspended": "suspend", "revoked": "revoke"}[state]
    record(session, actor, f"node:{verb}", node.name, before=node.state, reason=reason)
    node.state = state
    session.add(node)
    publish_roster(session, signer)
    return node


def _fingerprint(node: Node) -> str:
    return fingerprint(read_public_text(node.identity_key))


def _row(node: Node) -> RosterNode:
    return RosterNode(
        name=node.name,
        organisation=node.organisation,
        state=cast("NodeState", node.state),
        identity_key=node.identity_key,
        flower_key=node.flower_key,
    )
