"""Dataset cards: published by their node, read by all people of the federation."""

from pydantic import BaseModel
from sqlmodel import Session

from concord_server.api.security import NodeCaller
from concord_server.audit.service import record
from concord_server.database import utc_now
from concord_server.datasets.tables import DatasetCardRow
from concord_server.studies.envelopes import check_issued, document_of, envelope_of, keep
from concord_shared.documents import DatasetCard
from concord_shared.errors import ConflictError, NotAllowedError, NotFoundError
from concord_shared.signing import Envelope, open_envelope, read_public_text

__all__ = ["DatasetDetail", "DatasetView", "detail", "find", "publish", "view"]


class DatasetView(BaseModel):
    """name: `node/dataset`. version: the content hash that the node registered."""

    name: str
    node: str
    dataset: str
    organisation: str
    title: str
    version: str
    rows: int
    input: str
    licence: str
    updated_at: str


class DatasetDetail(DatasetView):
    """card: as the node signed it."""

    description: str
    columns: list[str]
    card: Envelope


def publish(session: Session, node: NodeCaller, envelope: Envelope) -> None:
    """Stores a card, after these checks: the node itself signed it, it is about a dataset of its own, it is not older
    than the one before. The same card again changes nothing.
    """
    given = open_envelope(envelope, DatasetCard, [read_public_text(node.identity_key)])
    if (given.node, given.organisation) != (node.name, node.organisation):
        raise NotAllowedError(
            f"a node publishes cards of its own datasets: expected {node.organisation}/{node.name}, "
            f"got {given.organisation}/{given.node}"
        )
    check_issued(given.issued_at, int(utc_now().timestamp()))
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
        title=given.title,
        version=given.dataset_version,
        issued_at=given.issued_at,
        envelope=keep(envelope),
    )
    session.merge(row)
    record(session, node.actor, "dataset:publish", name, version=given.dataset_version, rows=given.rows)


def find(session: Session, name: str) -> DatasetCardRow:
    """Raises: NotFoundError."""
    row = session.get(DatasetCardRow, name)
    if row is None:
        raise NotFoundError(f"no dataset {name[:140]!r}; list them with: concord dataset list")
    return row


def view(row: DatasetCardRow) -> DatasetView:
    card = document_of(row.envelope, DatasetCard)
    return DatasetView(
        name=row.name,
        node=row.node,
        dataset=row.dataset,
        organisation=row.organisation,
        title=row.title,
        version=row.version,
        rows=card.rows,
        input=card.input,
        licence=card.licence,
        updated_at=row.updated_at.isoformat(),
    )


def detail(row: DatasetCardRow) -> DatasetDetail:
    card = document_of(row.envelope, DatasetCard)
    told = view(row).model_dump()
    return DatasetDetail(
        **told, description=card.description, columns=list(card.columns), card=envelope_of(row.envelope)
    )
