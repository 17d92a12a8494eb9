"""`/api/v1/datasets` for people, `/api/node/cards` for nodes."""

from fastapi import APIRouter
from sqlmodel import col
from starlette.responses import JSONResponse, Response

from concord_server.api.bodies import Signed
from concord_server.api.paging import Listing, Page, paged
from concord_server.api.security import CurrentNode, SignedIn
from concord_server.api.state import CurrentDatabase
from concord_server.datasets import service
from concord_server.datasets.catalogue import Wanted, found_by
from concord_server.datasets.service import DatasetDetail, DatasetView
from concord_server.datasets.tables import DatasetCardRow
from concord_server.studies.envelopes import document_of
from concord_shared.croissant import croissant_text
from concord_shared.documents import DatasetCard
from concord_shared.plan.section import Name

__all__ = ["router"]

router = APIRouter(prefix="/api")


class JsonLd(JSONResponse):
    """A card as JSON-LD that may also stand in a page."""

    media_type = "application/ld+json"

    def render(self, content: DatasetCard) -> bytes:
        return croissant_text(content).encode()


@router.get("/v1/datasets", tags=["datasets"])
def list_all(_: SignedIn, database: CurrentDatabase, page: Page, wanted: Wanted) -> Listing[DatasetView]:
    """The catalogue: what nodes published of their datasets, for everyone in the federation; all, or what fits."""
    with database.reading() as session:
        return paged(session, found_by(wanted), col(DatasetCardRow.name), page, service.view)


@router.get("/v1/datasets/{node}/{dataset}", tags=["datasets"])
def show(node: Name, dataset: Name, _: SignedIn, database: CurrentDatabase) -> DatasetDetail:
    with database.reading() as session:
        return service.detail(service.find(session, f"{node}/{dataset}"))


@router.get("/v1/datasets/{node}/{dataset}/croissant", tags=["datasets"], response_class=JsonLd)
def croissant(node: Name, dataset: Name, _: SignedIn, database: CurrentDatabase) -> Response:
    """A dataset's card as Croissant JSON-LD, its terms as an ODRL offer. It cannot be downloaded by it."""
    with database.reading() as session:
        return JsonLd(document_of(service.find(session, f"{node}/{dataset}").envelope, DatasetCard))


@router.post("/node/cards", status_code=204, tags=["node channel"])
def publish(body: Signed, node: CurrentNode, database: CurrentDatabase) -> None:
    """Takes a DatasetCard, or a CardWithdrawal, signed by the node's identity key."""
    with database.session() as session:
        service.publish(session, node, body)
