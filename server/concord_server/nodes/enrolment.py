"""How a node comes to belong: invited by a person, enrolled with keys that never left it, renewed in time.

An invitation's token is random, shown once, stored as its digest, and admits one node once. What enrols proves that it
holds three keys: TLS (by the certificate request), identity and Flower (by the claim's signatures).
"""

import datetime
import secrets

from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, Field
from sqlalchemy import CursorResult, delete, update
from sqlmodel import Session, col, select

from concord_server.api.security import Caller, token_digest
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.nodes.service import current_roster_envelope, publish_roster
from concord_server.nodes.tables import Invitation, Node, NodeUpdate
from concord_server.organisations.service import find as find_organisation
from concord_server.pki import Authority, Leaf, read_request
from concord_shared.documents import EnrolmentClaim
from concord_shared.errors import ApiError, ConflictError, DocumentRefusedError, NotAllowedError, NotFoundError
from concord_shared.plan.section import Name
from concord_shared.protocol import Certificate, EnrolRequest, EnrolResponse, InvitationLine
from concord_shared.signing import PublicKey, fingerprint, open_envelope, public_text, read_public_text

__all__ = [
    "InvitationMade",
    "InvitationView",
    "NewInvitation",
    "check_clock",
    "enrol",
    "invitation_view",
    "invite",
    "renew",
    "withdraw",
]

HOURS_MAX = 24
SKEW_S = 600


class NewInvitation(BaseModel, extra="forbid"):
    node: Name
    organisation: Name
    hours: int = Field(24, ge=1, le=HOURS_MAX)


class InvitationView(BaseModel):
    id: str
    organisation: str
    node: str
    created_by: str
    created_at: str
    expires_at: str
    used_at: str | None


class InvitationMade(InvitationView):
    """line: all that the partner needs, shown this once; to be handed over on a way that others can't read."""

    line: str


def invitation_view(row: Invitation) -> InvitationView:
    return InvitationView(
        id=row.id,
        organisation=row.organisation,
        node=row.node,
        created_by=row.created_by,
        created_at=row.created_at.isoformat(),
        expires_at=row.expires_at.isoformat(),
        used_at=row.used_at.isoformat() if row.used_at else None,
    )


def invite(
    session: Session, caller: Caller, new: NewInvitation, signer: Authority, host: str, port: int
) -> InvitationMade:
    """Raises: NotAllowedError; ConflictError: a node of this name belongs already, perhaps to another organisation."""
    caller.check(new.organisation, "org-admin")
    find_organisation(session, new.organisation)
    _refuse_taken(session, new.node, new.organisation)
    token, now = secrets.token_urlsafe(32), utc_now()
    row = Invitation(
        id=secrets.token_hex(8),
        organisation=new.organisation,
        node=new.node,
        token_digest=token_digest(token),
        created_by=caller.person,
        created_at=now,
        expires_at=now + datetime.timedelta(hours=new.hours),
    )
    session.add(row)
    record(session, caller.actor, "invitation:create", row.id, node=new.node, organisation=new.organisation)
    session.flush()
    line = InvitationLine(host, port, new.organisation, new.node, signer.root_fingerprint, token)
    return InvitationMade(**invitation_view(row).model_dump(), line=str(line))


def withdraw(session: Session, caller: Caller, invitation_id: str) -> InvitationView:
    """Raises: NotFoundError; ConflictError: it was used."""
    row = session.get(Invitation, invitation_id)
    if row is None or not caller.may(row.organisation, "org-admin"):
        raise NotFoundError(f"there is no invitation {invitation_id}; see: concord invitation list")
    if row.used_at is not None:
        raise ConflictError("the invitation was used; revoke the node instead")
    row.expires_at = min(row.expires_at, utc_now())
    session.add(row)
    record(session, caller.actor, "invitation:withdraw", row.id, node=row.node)
    session.flush()
    return invitation_view(row)


def enrol(session: Session, request: EnrolRequest, signer: Authority, days: int) -> EnrolResponse:
    """Admits a node as `enrolled`, after these checks:

    1. the token is one of ours, not used, not expired
    2. the claim is canonical and of now, as both clocks see it
    3. it is signed by the identity key and by the Flower key that it names, and they are of the right kinds
    4. federation, organisation, node and token are those of the invitation
    5. the certificate request is signed by the TLS key that the claim names
    6. no other node has one of the keys
    7. the token was not used meanwhile: one statement decides

    Raises:
        ApiError: with the check that failed; nothing was changed, the token still holds where it did.
    """
    now = utc_now()
    invitation = _invitation(session, request.token, now)
    claim = EnrolmentClaim.from_canonical(request.claim.bytes)
    check_clock(claim.issued_at, now)
    identity, flower = _proven_keys(request, claim)
    _check_names(claim, invitation, signer)
    tls = read_request(request.request)
    if public_text(tls) != claim.tls_key:
        raise DocumentRefusedError("the certificate request is for another key than the claim names")
    _refuse_taken(session, invitation.node, invitation.organisation)
    _use(session, invitation, now)
    leaf = signer.node(invitation.organisation, invitation.node, tls, days, now)
    _store(session, invitation, public_text(identity), public_text(flower), fingerprint(tls), leaf, now)
    record(
        session,
        f"node:{invitation.node}",
        "node:enrol",
        invitation.node,
        organisation=invitation.organisation,
        invitation=invitation.id,
        fingerprint=fingerprint(identity),
    )
    publish_roster(session, signer)
    roster = current_roster_envelope(session)
    return EnrolResponse(certificate=Certificate(chain=leaf.chain), roster=roster, state="enrolled")


def renew(session: Session, name: str, request: str, signer: Authority, days: int) -> Certificate:
    """A new certificate, for the same key or for a new one; the old one holds until the new one is used.

    Raises:
        DocumentRefusedError: the request is not signed by its key. ConflictError: another node has that key.
    """
    tls, now = read_request(request), utc_now()
    node = session.get(Node, name)
    if node is None or node.state == "revoked":
        raise NotAllowedError("this node does not belong to the federation any more")
    leaf = signer.node(node.organisation, node.name, tls, days, now)
    mine = fingerprint(tls)
    node.tls_key_next = None if mine == node.tls_key else mine
    node.certificate_serial, node.certificate_not_after = leaf.serial, leaf.not_after
    session.add(node)
    record(session, f"node:{name}", "node:renew", name, serial=leaf.serial, tls_key=mine)
    session.flush()
    return Certificate(chain=leaf.chain)


def check_clock(issued_at: int, now: datetime.datetime) -> None:
    """Raises: ApiError: made at another time than now, by more than ten minutes."""
    if abs(issued_at - now.timestamp()) > SKEW_S:
        theirs = f"{datetime.datetime.fromtimestamp(issued_at, datetime.UTC):%Y-%m-%d %H:%M:%S}"
        error = ApiError(
            f"the clocks differ by more than {SKEW_S // 60} minutes: yours says {theirs} UTC, the coordinator's "
            f"{now:%Y-%m-%d %H:%M:%S} UTC. Set the wrong one right and try again"
        )
        error.code = "clock"
        raise error


def _invitation(session: Session, token: str, now: datetime.datetime) -> Invitation:
    row = session.exec(select(Invitation).where(Invitation.token_digest == token_digest(token))).first()
    if row is None:
        raise _not_admitted("unknown", "the invitation is not one of this coordinator's, or was mistyped")
    if row.used_at is not None:
        raise _not_admitted(
            "used", "the invitation was used already. If that was not you, tell the coordinator's people"
        )
    if row.expires_at <= now:
        raise _not_admitted("expired", f"the invitation expired at {row.expires_at:%Y-%m-%d %H:%M} UTC")
    return row


def _not_admitted(why: str, message: str) -> NotAllowedError:
    error = NotAllowedError(f"{message}; ask for a new one: concord invite NODE --organisation NAME")
    error.code = f"invitation-{why}"
    return error


def _proven_keys(request: EnrolRequest, claim: EnrolmentClaim) -> tuple[PublicKey, PublicKey]:
    identity, flower = read_public_text(claim.identity_key), read_public_text(claim.flower_key)
    if not isinstance(identity, Ed25519PublicKey):
        raise DocumentRefusedError("a node's identity key is Ed25519")
    if not isinstance(flower, EllipticCurvePublicKey) or not isinstance(flower.curve, SECP384R1):
        raise DocumentRefusedError("a node's Flower key is on the curve P-384")
    open_envelope(request.claim, EnrolmentClaim, [identity, flower])
    return identity, flower


def _check_names(claim: EnrolmentClaim, invitation: Invitation, signer: Authority) -> None:
    expected = {
        "federation": signer.federation,
        "organisation": invitation.organisation,
        "node": invitation.node,
        "token_digest": invitation.token_digest,
    }
    for name, value in expected.items():
        if getattr(claim, name) != value:
            shown = "" if name == "token_digest" else f": {value} is invited, the claim says {getattr(claim, name)}"
            raise DocumentRefusedError(f"the claim's {name} is not the invitation's{shown}")


def _refuse_taken(session: Session, node: str, organisation: str) -> None:
    there = session.get(Node, node)
    if there is not None and (there.organisation != organisation or there.state not in ("enrolled", "revoked")):
        raise ConflictError(f"there is a node {node} already ({there.state}); choose another name, or revoke it first")


def _use(session: Session, invitation: Invitation, now: datetime.datetime) -> None:
    query = update(Invitation).where(col(Invitation.id) == invitation.id, col(Invitation.used_at).is_(None))
    result = session.execute(query.values(used_at=now))
    assert isinstance(result, CursorResult)
    if result.rowcount != 1:
        raise _not_admitted("used", "the invitation was used already")


def _store(
    session: Session,
    invitation: Invitation,
    identity_key: str,
    flower_key: str,
    tls_key: str,
    leaf: Leaf,
    now: datetime.datetime,
) -> None:
    """A new row, or that of a node that left and comes back with new keys: what it was told before is void."""
    session.execute(delete(NodeUpdate).where(col(NodeUpdate.node) == invitation.node))
    node = Node(
        name=invitation.node,
        organisation=invitation.organisation,
        state="enrolled",
        identity_key=identity_key,
        flower_key=flower_key,
        tls_key=tls_key,
        certificate_serial=leaf.serial,
        certificate_not_after=leaf.not_after,
        enrolled_at=now,
    )
    session.merge(node)
    session.flush()
