"""`/api/v1/datasets` for people, `/api/node/cards` for nodes."""

from typing import Annotated

from fastapi import APIRouter, Query
from sqlmodel import col, select

from concord_server.api.bodies import Signed
from concord_server.api.paging import Listing, Page, paged
from concord_server.api.security import CurrentNode, SignedIn
from concord_server.api.state import CurrentDatabase
from concord_server.datasets import service
from concord_server.datasets.service import DatasetDetail, DatasetView
from concord_server.datasets.tables import DatasetCardRow
from concord_shared.plan.schema import Name

__all__ = ["router"]

router = APIRouter(prefix="/api")


@router.get("/v1/datasets", tags=["datasets"])
def list_all(
    _: SignedIn, database: CurrentDatabase, page: Page, organisation: Annotated[Name | None, Query()] = None
) -> Listing[DatasetView]:
    """What nodes published of their datasets, for everyone in the federation."""
    query = select(DatasetCardRow)
    if organisation is not None:
        query = query.where(DatasetCardRow.organisation == organisation)
    with database.reading() as session:
        return paged(session, query, col(DatasetCardRow.name), page, service.view)


@router.get("/v1/datasets/{node}/{dataset}", tags=["datasets"])
def show(node: Name, dataset: Name, _: SignedIn, database: CurrentDatabase) -> DatasetDetail:
    with database.reading() as session:
        return service.detail(service.find(session, f"{node}/{dataset}"))


@router.post("/node/cards", status_code=204, tags=["node channel"])
def publish(body: Signed, node: CurrentNode, database: CurrentDatabase) -> None:
    """Takes a DatasetCard, or a CardWithdrawal, signed by the node's identity key."""
    with database.session() as session:
        service.publish(session, node, body)
