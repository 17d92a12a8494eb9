"""What may happen to organisations."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import BaseModel, Field
from sqlmodel import Session

from concord_server.api.security import Caller
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.organisations.tables import Organisation
from concord_shared.errors import ConflictError, NotAllowedError, NotFoundError
from concord_shared.plan.section import Name
from concord_shared.signing import PublicKey, fingerprint, read_public_text

__all__ = ["NewOrganisation", "OrganisationView", "create", "find", "key_of", "register_key", "view"]


class NewOrganisation(BaseModel, extra="forbid"):
    name: Name
    title: str = Field("", max_length=300)


class NewKey(BaseModel, extra="forbid"):
    """key: base64 of an Ed25519 SubjectPublicKeyInfo, as in organisation.pub. replace: in the place of another one."""

    key: str = Field(min_length=16, max_length=400)
    replace: bool = False


class OrganisationView(BaseModel):
    """fingerprint: of its key, for people to compare; null until a key is registered."""

    name: str
    title: str
    key: str | None
    fingerprint: str | None
    created_at: str


def view(row: Organisation) -> OrganisationView:
    return OrganisationView(
        name=row.name,
        title=row.title,
        key=row.key,
        fingerprint=None if row.key is None else fingerprint(read_public_text(row.key)),
        created_at=row.created_at.isoformat(),
    )


def create(session: Session, actor: str, new: NewOrganisation) -> Organisation:
    """Raises: ConflictError: the name is taken, or is the coordinator's own."""
    if new.name == "coordinator" or session.get(Organisation, new.name) is not None:
        raise ConflictError(f"the organisation {new.name} exists already; choose another name")
    row = Organisation(name=new.name, title=new.title or new.name, created_at=utc_now())
    session.add(row)
    record(session, actor, "organisation:create", new.name)
    session.flush()
    return row


def find(session: Session, name: str) -> Organisation:
    """Raises: NotFoundError."""
    row = session.get(Organisation, name)
    if row is None:
        raise NotFoundError(f"there is no organisation {name}; see: concord org list")
    return row


def key_of(session: Session, name: str) -> PublicKey:
    """The key that this organisation signs with. Raises: NotFoundError, ConflictError: it registered none yet."""
    row = find(session, name)
    if row.key is None:
        raise ConflictError(f"{name} has registered no key yet; its org-admin runs: concord keys init DIR, then "
                            f"concord org key {name} DIR/organisation.pub")  # fmt: skip
    return read_public_text(row.key)


def register_key(session: Session, caller: Caller, name: str, new: NewKey) -> Organisation:
    """Only the organisation's own org-admin may: a federation-admin must not be able to speak for a member.

    Raises:
        ConflictError: it has another key, and `replace` was not asked for.
        DocumentRefusedError: not an Ed25519 public key.
    """
    row = find(session, name)
    if ("org-admin", name) not in caller.grants:
        raise NotAllowedError(f"only an org-admin of {name} itself registers its key")
    key = read_public_text(new.key)
    if not isinstance(key, Ed25519PublicKey):
        raise ConflictError("an organisation's key is Ed25519; make one with: concord keys init DIR")
    if row.key not in (None, new.key) and not new.replace:
        raise ConflictError(
            f"{name} has another key already. With --replace, nodes refuse what the old key signed: studies, "
            "agreements and releases must be signed again"
        )
    row.key = new.key
    session.add(row)
    record(session, caller.actor, "organisation:register-key", name, fingerprint=fingerprint(key))
    session.flush()
    return row
