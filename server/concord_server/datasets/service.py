"""Dataset cards: published and withdrawn by their node, read by all people of the federation."""

import json
from contextlib import suppress

from pydantic import BaseModel
from sqlmodel import Session

from concord_server.api.security import NodeCaller
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.datasets.catalogue import indexed
from concord_server.datasets.tables import DatasetCardRow
from concord_server.studies.envelopes import check_issued, document_of, envelope_of, keep
from concord_shared.cards import CARD_BYTES_MAX
from concord_shared.documents import CardColumn, DatasetCard, DataTerms, Quality
from concord_shared.errors import ApiError, ConflictError, NotAllowedError, NotFoundError
from concord_shared.licences import read_licence
from concord_shared.protocol import CardWithdrawal
from concord_shared.signing import Envelope, open_envelope, read_public_text
from concord_shared.text import printable

__all__ = ["DatasetDetail", "DatasetView", "detail", "find", "publish", "view"]


class DatasetView(BaseModel):
    """name: `node/dataset`. version: the content hash that the node registered.

    rows: as rows_told says: "" for the exact number, "about", or "fewer" for fewer than these.
    """

    name: str
    node: str
    dataset: str
    organisation: str
    title: str
    version: str
    rows: int
    rows_told: str
    input: str
    licence: str
    keywords: list[str]
    languages: list[str]
    updated_at: str


class DatasetDetail(DatasetView):
    """card: as the node signed it."""

    description: str
    columns: list[str]
    details: list[CardColumn]
    quality: Quality | None
    terms: DataTerms | None
    card: Envelope


def publish(session: Session, node: NodeCaller, envelope: Envelope) -> None:
    """Stores a card, or forgets a withdrawn one, after these checks: the node itself signed it, it is about a dataset
    of its own, it has a size and a licence as cards have, it is not older than the card before. The same again changes
    nothing.
    """
    if _schema(envelope) == CardWithdrawal.SCHEMA:
        _withdraw(session, node, envelope)
        return
    given = open_envelope(envelope, DatasetCard, [read_public_text(node.identity_key)])
    _check_own(node, given)
    if len(envelope.bytes) > CARD_BYTES_MAX:
        raise ApiError(f"a card has at most {CARD_BYTES_MAX} bytes, got {len(envelope.bytes)}; tell of fewer columns")
    read_licence(given.licence)
    name = f"{given.node}/{given.dataset}"
    before = session.get(DatasetCardRow, name)
    if before is not None and envelope_of(before.envelope).bytes == envelope.bytes:
        return
    if before is not None and given.issued_at < before.issued_at:
        raise ConflictError(f"a newer card of {name} is here already; publish the dataset again")
    row = DatasetCardRow(
        name=name,
        node=given.node,
        dataset=given.dataset,
        organisation=given.organisation,
        title=printable(given.title),
        version=given.dataset_version,
        issued_at=given.issued_at,
        **indexed(given),
        envelope=keep(envelope),
    )
    session.merge(row)
    record(session, node.actor, "dataset:publish", name, version=given.dataset_version, rows=given.rows)


def _withdraw(session: Session, node: NodeCaller, envelope: Envelope) -> None:
    """The audit log keeps what the card was."""
    given = open_envelope(envelope, CardWithdrawal, [read_public_text(node.identity_key)])
    _check_own(node, given)
    name = f"{given.node}/{given.dataset}"
    row = session.get(DatasetCardRow, name)
    if row is None:
        return
    if given.issued_at < row.issued_at:
        raise ConflictError(f"a newer card of {name} is here; withdraw that one")
    session.delete(row)
    digest = envelope_of(row.envelope).digest
    record(session, node.actor, "dataset:withdraw", name, version=row.version, card=digest, withdrawal=given.digest)


def _schema(envelope: Envelope) -> str:
    """What a document says that it is, unverified."""
    with suppress(ValueError, RecursionError, AttributeError):
        return str(json.loads(envelope.bytes).get("schema"))
    return ""


def _check_own(node: NodeCaller, given: DatasetCard | CardWithdrawal) -> None:
    if (given.node, given.organisation) != (node.name, node.organisation):
        raise NotAllowedError(
            f"a node publishes cards of its own datasets: expected {node.organisation}/{node.name}, "
            f"got {given.organisation}/{given.node}"
        )
    check_issued(given.issued_at, int(utc_now().timestamp()))


def find(session: Session, name: str) -> DatasetCardRow:
    """Raises: NotFoundError."""
    row = session.get(DatasetCardRow, name)
    if row is None:
        raise NotFoundError(f"no dataset {name[:140]!r}; list them with: concord dataset list")
    return row


def view(row: DatasetCardRow) -> DatasetView:
    return DatasetView(
        name=row.name,
        node=row.node,
        dataset=row.dataset,
        organisation=row.organisation,
        version=row.version,
        input=row.input,
        licence=row.licence,
        updated_at=row.updated_at.isoformat(),
        **row.told,
    )


def detail(row: DatasetCardRow) -> DatasetDetail:
    card = document_of(row.envelope, DatasetCard)
    told = view(row).model_dump()
    return DatasetDetail(
        **told,
        description=card.description,
        columns=list(card.columns),
        details=list(card.details),
        quality=card.quality,
        terms=card.terms,
        card=envelope_of(row.envelope),
    )
