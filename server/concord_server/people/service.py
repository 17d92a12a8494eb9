"""What may happen to people, their roles and their tokens.

Nobody gives what they don't have: an org-admin acts on people of the own organisation only, grants roles within it
only, and makes no token for someone who may more than that.
"""

import datetime
import secrets
from typing import Annotated

from pydantic import BaseModel, Field
from sqlmodel import Session, col, select

from concord_server.api.security import Caller, Role, token_digest
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.organisations.service import find as find_organisation
from concord_server.people.tables import ApiToken, Person, RoleGrant
from concord_shared.errors import ConflictError, NotAllowedError, NotFoundError, UsageError
from concord_shared.plan.section import Name

__all__ = [
    "Grant",
    "NewPerson",
    "NewToken",
    "PersonView",
    "TokenMade",
    "TokenView",
    "add_grant",
    "create",
    "create_token",
    "find",
    "issue_token",
    "remove_grant",
    "revoke_token",
    "token_view",
    "view",
]

DAYS_MAX = 365
Scope = Annotated[str, Field(pattern=r"^([a-z]+:)?(read|write)$")]


class Grant(BaseModel, extra="forbid"):
    """organisation: where the role holds; null for the whole federation."""

    role: Role
    organisation: Name | None = None


class NewPerson(BaseModel, extra="forbid"):
    name: Name
    organisation: Name | None = None
    roles: list[Grant] = Field([], max_length=20)


class PersonView(BaseModel):
    name: str
    organisation: str | None
    roles: list[Grant]
    created_at: str


class NewToken(BaseModel, extra="forbid"):
    """person: for whom; the caller, if left out."""

    person: Name | None = None
    title: str = Field("", max_length=300)
    days: int = Field(90, ge=1, le=DAYS_MAX)
    scopes: list[Scope] = Field(["read", "write"], min_length=1, max_length=50)


class TokenView(BaseModel):
    id: str
    person: str
    title: str
    scopes: list[str]
    created_at: str
    expires_at: str
    revoked_at: str | None
    last_used_at: str | None


class TokenMade(TokenView):
    """token: shown this once; the coordinator keeps only its digest."""

    token: str


def view(session: Session, row: Person) -> PersonView:
    grants = session.exec(select(RoleGrant).where(RoleGrant.person == row.id).order_by(RoleGrant.role))
    return PersonView(
        name=row.name,
        organisation=row.organisation,
        roles=[Grant.model_validate({"role": each.role, "organisation": each.organisation or None}) for each in grants],
        created_at=row.created_at.isoformat(),
    )


def token_view(row: ApiToken, person: str) -> TokenView:
    return TokenView(
        id=row.id,
        person=person,
        title=row.title,
        scopes=row.scopes,
        created_at=row.created_at.isoformat(),
        expires_at=row.expires_at.isoformat(),
        revoked_at=row.revoked_at.isoformat() if row.revoked_at else None,
        last_used_at=row.last_used_at.isoformat() if row.last_used_at else None,
    )


def find(session: Session, name: str) -> Person:
    """Raises: NotFoundError."""
    row = session.exec(select(Person).where(Person.name == name)).first()
    if row is None:
        raise NotFoundError(f"there is no person {name}; see: concord person list")
    return row


def create(session: Session, caller: Caller, new: NewPerson) -> Person:
    """Raises: ConflictError: the name is taken. NotAllowedError: not the caller's organisation, or roles."""
    caller.check(new.organisation or "", "org-admin")
    if new.organisation is not None:
        find_organisation(session, new.organisation)
    row = add_person(session, caller.actor, new.name, new.organisation)
    for grant in new.roles:
        add_grant(session, caller, row, grant)
    return row


def add_person(session: Session, actor: str, name: str, organisation: str | None) -> Person:
    if session.exec(select(Person).where(Person.name == name)).first() is not None:
        raise ConflictError(f"the person {name} exists already; choose another name")
    row = Person(id=secrets.token_hex(8), name=name, organisation=organisation, created_at=utc_now())
    session.add(row)
    record(session, actor, "person:create", name, organisation=organisation)
    session.flush()
    return row


def add_grant(session: Session, caller: Caller, person: Person, grant: Grant) -> None:
    """Raises: UsageError, NotAllowedError."""
    _check_grantable(caller, person, grant)
    if grant.organisation is not None:
        find_organisation(session, grant.organisation)
    write_grant(session, caller.actor, person, grant)


def write_grant(session: Session, actor: str, person: Person, grant: Grant) -> None:
    key = (person.id, grant.role, grant.organisation or "")
    if session.get(RoleGrant, key) is None:
        session.add(RoleGrant(person=key[0], role=key[1], organisation=key[2]))
        record(session, actor, "person:grant", person.name, role=grant.role, organisation=grant.organisation)
        session.flush()


def remove_grant(session: Session, caller: Caller, person: Person, grant: Grant) -> None:
    """Raises: NotFoundError; ConflictError: the federation would have no admin; NotAllowedError."""
    _check_grantable(caller, person, grant)
    row = session.get(RoleGrant, (person.id, grant.role, grant.organisation or ""))
    if row is None:
        raise NotFoundError(f"{person.name} does not hold that role; see: concord person list")
    if grant.role == "federation-admin":
        admins = session.exec(select(RoleGrant).where(RoleGrant.role == "federation-admin")).all()
        if len(admins) == 1:
            raise ConflictError("the last federation-admin stays; grant the role to someone else first")
    session.delete(row)
    record(
        session, caller.actor, "person:withdraw-grant", person.name, role=grant.role, organisation=grant.organisation
    )
    session.flush()


def create_token(session: Session, caller: Caller, new: NewToken) -> TokenMade:
    """Raises: NotAllowedError: for someone who may more than the caller, or with more scope than the caller's token."""
    person = find(session, new.person or caller.person)
    if person.name != caller.person:
        _check_above(session, caller, person)
    wider = [scope for scope in new.scopes if not caller.scopes & {scope, scope.rpartition(":")[2]}]
    if wider:
        raise NotAllowedError(f"a token gives no more than it has: yours lacks {', '.join(wider)}")
    return issue_token(session, caller.actor, person, new)


def issue_token(session: Session, actor: str, person: Person, new: NewToken) -> TokenMade:
    token = f"concord_{secrets.token_urlsafe(32)}"
    now = utc_now()
    row = ApiToken(
        id=secrets.token_hex(8),
        person=person.id,
        digest=token_digest(token),
        title=new.title,
        scopes=sorted(set(new.scopes)),
        created_at=now,
        expires_at=now + datetime.timedelta(days=new.days),
    )
    session.add(row)
    record(session, actor, "token:create", row.id, person=person.name, scopes=row.scopes)
    session.flush()
    return TokenMade(**token_view(row, person.name).model_dump(), token=token)


def revoke_token(session: Session, caller: Caller, token_id: str) -> TokenView:
    """Raises: NotFoundError: no such token, or one of someone that is not the caller's to manage."""
    row = session.get(ApiToken, token_id)
    person = session.get(Person, row.person) if row is not None else None
    if row is None or person is None:
        raise NotFoundError(f"there is no token {token_id}; see: concord token list")
    if person.name != caller.person:
        try:
            _check_above(session, caller, person)
        except NotAllowedError as error:
            raise NotFoundError(f"there is no token {token_id}; see: concord token list") from error
    if row.revoked_at is None:
        row.revoked_at = utc_now()
        session.add(row)
        record(session, caller.actor, "token:revoke", row.id, person=person.name)
    session.flush()
    return token_view(row, person.name)


def _check_grantable(caller: Caller, person: Person, grant: Grant) -> None:
    if grant.organisation is None:
        caller.check("", "federation-admin")
        return
    if grant.role == "federation-admin":
        raise UsageError("federation-admin is a role in the whole federation; leave the organisation out")
    caller.check(grant.organisation, "org-admin")
    if person.organisation != grant.organisation:
        caller.check("", "federation-admin")


def _check_above(session: Session, caller: Caller, person: Person) -> None:
    """That the caller could have granted whatever this person holds."""
    caller.check(person.organisation or "", "org-admin")
    for grant in session.exec(select(RoleGrant).where(col(RoleGrant.person) == person.id)):
        if grant.organisation == "":
            caller.check("", "federation-admin")
        else:
            caller.check(grant.organisation, "org-admin")
