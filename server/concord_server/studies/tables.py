"""The tables of studies, their members, and the agreements that open datasets to them."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON
from sqlmodel import Field

from concord_server.database import Table, UtcDateTime, utc_now

__all__ = ["AgreementDataset", "AgreementRow", "StudyMember", "StudyRow"]


class StudyRow(Table, table=True):
    __tablename__ = "study"
    study: str = Field(primary_key=True)
    organisation: str = Field(index=True, foreign_key="organisation.name")
    title: str
    digest: str
    envelope: dict[str, Any] = Field(sa_type=JSON)
    created_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)


class StudyMember(Table, table=True):
    """An organisation that may see a study and start runs in it; the study's own organisation is one."""

    __tablename__ = "study_member"
    study: str = Field(primary_key=True, foreign_key="study.study")
    organisation: str = Field(primary_key=True, index=True)


class AgreementRow(Table, table=True):
    """state: requested | offered | agreed | withdrawn. envelope: the document in force, with the signatures it has.

    withdrawal: the owner's signed word, once withdrawn.
    """

    __tablename__ = "agreement"
    agreement: str = Field(primary_key=True)
    study: str = Field(index=True, foreign_key="study.study")
    requester: str = Field(index=True, foreign_key="organisation.name")
    owner: str = Field(index=True, foreign_key="organisation.name")
    state: str
    envelope: dict[str, Any] = Field(sa_type=JSON)
    withdrawal: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    created_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)
    updated_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)


class AgreementDataset(Table, table=True):
    """A dataset of the document in force: to find the nodes and agreements of a study by."""

    __tablename__ = "agreement_dataset"
    agreement: str = Field(primary_key=True, foreign_key="agreement.agreement")
    node: str = Field(primary_key=True, foreign_key="node.name")
    dataset: str = Field(primary_key=True)
