"""`/api/v1/models` for people, `/api/node/models` for nodes."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi import Path as InPath
from fastapi.responses import FileResponse
from sqlmodel import col, select

from concord_server.api.bodies import Signed
from concord_server.api.paging import Listing, Page, paged
from concord_server.api.security import Caller, CurrentNode, SignedIn, allow
from concord_server.api.state import CurrentDatabase, CurrentHome
from concord_server.models import service
from concord_server.models.service import Files, Lineage, ModelView
from concord_server.models.tables import ModelVersion
from concord_server.runs.tables import Run
from concord_server.studies.reach import in_reach
from concord_shared.documents import Digest, Id

__all__ = ["router"]

router = APIRouter(prefix="/api")
FileName = Annotated[str, InPath(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
OfRun = Annotated[Id | None, Query(description="Where several runs ended with the same model.")]
MEDIA_TYPE = "application/octet-stream"


@router.get("/v1/models", tags=["models"])
def list_all(
    caller: SignedIn,
    database: CurrentDatabase,
    page: Page,
    run: Annotated[Id | None, Query()] = None,
    study: Annotated[Id | None, Query()] = None,
    final: Annotated[bool, Query(description="Only the last of each run.")] = False,
) -> Listing[ModelView]:
    """Models of the caller's studies, the newest first."""
    query = select(ModelVersion).join(Run).where(in_reach(caller, Run.study, agreed=True))
    if run is not None:
        query = query.where(Run.id == run)
    if study is not None:
        query = query.where(Run.study == study)
    if final:
        query = query.where(col(ModelVersion.final).is_(True))
    with database.reading() as session:

        def view(model: ModelVersion) -> ModelView:
            return service.view(session, Lineage(model, session.get_one(Run, model.run)))

        return paged(session, query, col(ModelVersion.id), page, view, newest_first=True)


@router.get("/v1/models/{digest}", tags=["models"])
def show(digest: Digest, caller: SignedIn, database: CurrentDatabase, run: OfRun = None) -> ModelView:
    with database.reading() as session:
        return service.view(session, service.find(session, caller, digest, run))


@router.get("/v1/models/{digest}/files", tags=["models"])
def list_files(
    digest: Digest, caller: SignedIn, database: CurrentDatabase, home: CurrentHome, run: OfRun = None
) -> Files:
    """The files of a run's last model with their digests, as they are now: what a Release is made from."""
    with database.reading() as session:
        found = service.find(session, caller, digest, run)
        service.check_download(session, caller, found)
    return service.files_view(home.path, found)


@router.get("/v1/models/{digest}/files/{name}", response_class=FileResponse, tags=["models"])
def download(
    digest: Digest, name: FileName, caller: SignedIn, database: CurrentDatabase, home: CurrentHome, run: OfRun = None
) -> FileResponse:
    with database.reading() as session:
        found = service.find(session, caller, digest, run)
        service.check_download(session, caller, found)
    return FileResponse(service.file_of(home.path, found.model, name), media_type=MEDIA_TYPE, filename=name)


@router.post("/v1/models/{digest}/release", tags=["models"])
def release(
    digest: Digest,
    body: Signed,
    caller: Annotated[Caller, Depends(allow("researcher", "org-admin"))],
    database: CurrentDatabase,
    home: CurrentHome,
) -> ModelView:
    """Takes a Release, signed by the organisation of the run; the study's nodes may then download the model."""
    with database.session() as session:
        row = service.release(session, home.path, caller, digest, body)
        return service.view(session, service.find(session, caller, digest, row.run))


@router.get("/node/models/{digest}/{name}", response_class=FileResponse, tags=["node channel"])
def download_released(
    digest: Digest, name: FileName, node: CurrentNode, database: CurrentDatabase, home: CurrentHome, run: OfRun = None
) -> FileResponse:
    """A file of a released model, for the nodes of the study's organisations."""
    with database.reading() as session:
        path = service.file_for_node(session, home.path, node, digest, name, run)
    return FileResponse(path, media_type=MEDIA_TYPE, filename=name)
