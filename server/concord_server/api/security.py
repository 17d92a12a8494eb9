"""Who is asking, and whether they may. Every route has exactly one of the policies of this module; a test walks them.

    public           anyone
    signed_in        a person with a valid token
    allow(*roles)    a person who holds one of the roles, somewhere
    node_caller      a node, by its certificate

People: `Authorization: Bearer TOKEN`. A token is stored as its SHA-256; it expires, can be revoked, and its scopes say
what it may do: `read`, `write`, or either for one noun only, such as `runs:write`.
Nodes: mTLS. The certificate's name and key must be those of the roster, and the node not be revoked, at every request.
"""

import contextlib
import datetime
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from cryptography import x509
from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from sqlalchemy import update
from sqlmodel import Session, col, select

from concord_server.api.state import CurrentDatabase, CurrentState, State
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.nodes.tables import Node
from concord_server.people.tables import ApiToken, Person, RoleGrant
from concord_shared.certificates import spiffe_of
from concord_shared.documents import NodeState
from concord_shared.errors import ConcordError, NotAllowedError, NotSignedInError, UnavailableError
from concord_shared.signing import fingerprint

__all__ = [
    "ROLES",
    "Caller",
    "CurrentNode",
    "NodeCaller",
    "Role",
    "SignedIn",
    "allow",
    "node_caller",
    "public",
    "signed_in",
    "token_digest",
]

Role = Literal["federation-admin", "org-admin", "data-steward", "researcher", "auditor"]
ROLES: tuple[Role, ...] = get_args(Role)
USED_EVERY = datetime.timedelta(minutes=1)
"""How exactly the last use of a token is kept."""

bearer = HTTPBearer(auto_error=False, description="A token of `concord token create`.")


@dataclass(frozen=True)
class Caller:
    """A person who is signed in. grants: (role, organisation), the latter "" for the whole federation."""

    person: str
    organisation: str | None
    roles: frozenset[str]
    scopes: frozenset[str]
    grants: frozenset[tuple[str, str]] = frozenset()

    @property
    def actor(self) -> str:
        """As the audit log writes it."""
        return f"person:{self.person}"

    def may(self, organisation: str, *roles: Role) -> bool:
        """Whether the caller holds one of the roles for that organisation. A federation-admin may everything."""
        held = {(role, place) for role in roles for place in ("", organisation)}
        return "federation-admin" in self.roles or bool(held & self.grants)

    def check(self, organisation: str, *roles: Role) -> None:
        """Raises: NotAllowedError."""
        if not self.may(organisation, *roles):
            where = organisation or "the whole federation"
            raise NotAllowedError(f"this needs the role {' or '.join(roles)} of {where}; ask an admin")


@dataclass(frozen=True)
class NodeCaller:
    """A node that belongs to the federation. Keys are as in documents (`read_public_text`)."""

    name: str
    organisation: str
    state: NodeState
    flower_key: str
    identity_key: str

    @property
    def actor(self) -> str:
        return f"node:{self.name}"


def token_digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def public() -> None:
    """Marks a route that anyone may use."""


def signed_in(request: Request, database: CurrentDatabase, _: Annotated[object, Depends(bearer)] = None) -> Caller:
    """The person whose token came with the request. Raises: NotSignedInError, NotAllowedError."""
    scheme, _sep, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise NotSignedInError("this needs a token: `concord login`, or the header `Authorization: Bearer TOKEN`")
    now = utc_now()
    with database.reading() as session:
        caller, stale = _caller(session, token.strip(), now)
    _check_scope(caller, request)
    if stale:
        with contextlib.suppress(UnavailableError), database.session() as session:
            found = update(ApiToken).where(col(ApiToken.digest) == token_digest(token.strip()))
            session.execute(found.values(last_used_at=now))
    return caller


SignedIn = Annotated[Caller, Depends(signed_in)]


def allow(*roles: Role) -> Callable[..., Caller]:
    """A policy: the caller holds one of these roles, in the federation or in some organisation.

    Where a role holds for one organisation only, the route's service checks it against the object (`Caller.check`).
    """
    assert roles, "a policy names its roles"

    def allowed(caller: SignedIn) -> Caller:
        if "federation-admin" not in caller.roles and not caller.roles & set(roles):
            raise NotAllowedError(f"this needs one of the roles federation-admin, {', '.join(roles)}; ask an admin")
        return caller

    allowed.policy = roles  # type: ignore[attr-defined]  # what the walk over all routes reads
    return allowed


def node_caller(request: Request, state: CurrentState) -> NodeCaller:
    """The node whose certificate the connection showed, after these checks:

    1. the connection showed a certificate (TLS has verified it up to the root, and that it is valid now)
    2. its name is one of this federation's nodes
    3. its key is the one that this node enrolled with, or renewed to
    4. the node is not revoked

    Raises:
        NotSignedInError: which check failed is in the audit log, not in the answer.
    """
    raw = request.scope.get("extensions", {}).get("tls.peer")
    if raw is None:
        state.refusals.note(_address(request), request.url.path, "no certificate")
        raise NotSignedInError("this needs a node's certificate: `concord-node enrol`")
    try:
        certificate = x509.load_der_x509_certificate(raw)
        name = spiffe_of(certificate)
        key = fingerprint(certificate.public_key())  # type: ignore[arg-type]  # any other kind has no such row
    except (ValueError, ConcordError) as error:
        raise NotSignedInError("the certificate of this connection is not that of a node") from error
    now = utc_now()
    with state.database.reading() as session:
        node = _node(session, state, name)
        refused = _refusal(node, key, certificate, now)
    if node is not None and not refused and key == node.tls_key_next:
        _promote_key(state, node.name, key)
    if node is None or refused:
        _audit_refused(state, request, name, refused or "unknown node")
        raise NotSignedInError("this node's certificate does not admit it (any more); ask the coordinator's people")
    request.state.node = node.name
    return NodeCaller(node.name, node.organisation, node.state, node.flower_key, node.identity_key)  # type: ignore[arg-type]


CurrentNode = Annotated[NodeCaller, Depends(node_caller)]


def _caller(session: Session, token: str, now: datetime.datetime) -> tuple[Caller, bool]:
    """The caller, and whether the token's last use should be written down."""
    digest = token_digest(token)
    found = session.exec(select(ApiToken, Person).join(Person).where(ApiToken.digest == digest)).first()
    if found is None or not holds(found[0], now):
        raise NotSignedInError("the token is unknown, expired or revoked; ask an admin for a new one")
    row, person = found
    grants = frozenset(
        (grant.role, grant.organisation)
        for grant in session.exec(select(RoleGrant).where(RoleGrant.person == person.id))
    )
    caller = Caller(
        person=person.name,
        organisation=person.organisation,
        roles=frozenset(role for role, _ in grants),
        scopes=frozenset(row.scopes),
        grants=grants,
    )
    return caller, row.last_used_at is None or now - row.last_used_at > USED_EVERY


def holds(token: ApiToken, now: datetime.datetime) -> bool:
    """Neither revoked nor expired."""
    return token.revoked_at is None and token.expires_at > now


def _check_scope(caller: Caller, request: Request) -> None:
    verb = "read" if request.method in ("GET", "HEAD") else "write"
    noun = request.url.path.removeprefix("/api/v1/").partition("/")[0]
    if not caller.scopes & {verb, f"{noun}:{verb}"}:
        raise NotAllowedError(f"this token is not for that: it lacks the scope {noun}:{verb}")


def _node(session: Session, state: State, spiffe: str) -> Node | None:
    """The node of that name, if all of the name is right: federation, organisation and node."""
    federation, organisation, name = [*spiffe.removeprefix("spiffe://").split("/"), "", ""][:3]
    node = session.get(Node, name) if federation == state.home.settings.federation else None
    fits = node is not None and spiffe == f"spiffe://{federation}/{node.organisation}/{node.name}"
    return node if fits and node is not None and node.organisation == organisation else None


def _refusal(node: Node | None, key: str, certificate: x509.Certificate, now: datetime.datetime) -> str:
    if node is None:
        return "unknown node"
    if key not in (node.tls_key, node.tls_key_next):
        return "foreign key"
    if node.state == "revoked":
        return "revoked"
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        return "expired certificate"
    return ""


def _promote_key(state: State, name: str, key: str) -> None:
    """The node has its renewed certificate: from now on the key before it is refused."""
    with state.database.session() as session:
        node = session.get(Node, name)
        if node is not None and node.tls_key_next == key:
            node.tls_key, node.tls_key_next = key, None
            session.add(node)
            record(session, f"node:{name}", "node:use-renewed", name, tls_key=key)


def _address(request: Request) -> str:
    """An actor of the audit log that is nobody known."""
    return f"address:{request.client.host if request.client else 'unknown'}"


def _audit_refused(state: State, request: Request, name: str, reason: str) -> None:
    with state.database.session() as session:
        record(session, _address(request), "node:connect-refused", name[:300], reason=reason)
