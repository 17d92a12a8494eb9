"""The table of dataset cards: what nodes publish, as they signed it."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger
from sqlmodel import Field

from concord_server.database import Table, UtcDateTime, utc_now

__all__ = ["DatasetCardRow"]


class DatasetCardRow(Table, table=True):
    """The current card of a dataset; a later card (by its issued_at) replaces it. name: `node/dataset`.

    What the catalogue is searched by is written out beside the card, as `catalogue.indexed` makes it: words, columns
    and purposes are folded text, the latter two one a line. told: what a list shows of the card, so that it need not be
    opened.
    """

    __tablename__ = "dataset_card"
    name: str = Field(primary_key=True)
    node: str = Field(index=True, foreign_key="node.name")
    dataset: str
    organisation: str = Field(index=True, foreign_key="organisation.name")
    title: str
    version: str
    issued_at: int = Field(sa_type=BigInteger)
    rows: int = Field(sa_type=BigInteger)
    input: str
    licence: str
    words: str
    columns: str
    purposes: str
    told: dict[str, Any] = Field(sa_type=JSON)
    envelope: dict[str, Any] = Field(sa_type=JSON)
    updated_at: datetime = Field(default_factory=utc_now, sa_type=UtcDateTime)
