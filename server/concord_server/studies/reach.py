"""What a caller may know of: the studies of the organisations that they belong to, or hold a role for.

Everything else is a `NotFoundError`, so that an id tells nothing to those whom it does not concern.
"""

from typing import Any

from sqlalchemy import ColumnElement, true
from sqlmodel import col, or_, select

from concord_server.api.security import Caller
from concord_server.studies.tables import AgreementRow, StudyMember

__all__ = ["in_reach", "organisations_of"]


def organisations_of(caller: Caller) -> frozenset[str] | None:
    """None: all of them, for those who hold a role in the whole federation."""
    if any(place == "" for _, place in caller.grants):
        return None
    own = {caller.organisation} if caller.organisation else set()
    return frozenset(own | {place for _, place in caller.grants})


def in_reach(caller: Caller, study: Any, *, agreed: bool = False) -> ColumnElement[bool]:
    """A condition on the column `study`: its members see it, and the owners whose datasets it has asked for.

    agreed: of the owners only those whose data serve it; for what comes out of a study.
    """
    organisations = organisations_of(caller)
    if organisations is None:
        return true()
    member = select(StudyMember.study).where(col(StudyMember.organisation).in_(organisations))
    owner = select(AgreementRow.study).where(col(AgreementRow.owner).in_(organisations))
    if agreed:
        owner = owner.where(AgreementRow.state == "agreed")
    return or_(col(study).in_(member), col(study).in_(owner))
