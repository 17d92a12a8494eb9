"""The durable side of a coordinator's run: tensors in files, everything else in the database, a step a transaction."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from concord_server.checkpoints import Checkpoint, TensorFiles
from concord_server.database import Database
from concord_server.models.tables import ModelVersion
from concord_server.runs import receipts, service
from concord_shared.errors import ArtefactError
from concord_shared.files import explain
from concord_shared.signed_rounds import Sent
from concord_shared.signing import PrivateKey
from concord_shared.tensors import Layout

__all__ = ["DatabaseStepStore"]


class DatabaseStepStore:
    """A `StepStore` for the run `view`, leased to `owner`. Tensors lie in home/runs/<run>/.

    signer: the coordinator's key, for receipts.
    """

    def __init__(self, database: Database, home: Path, view: service.RunView, owner: str, signer: PrivateKey) -> None:
        self._database, self._view, self._owner, self._signer = database, view, owner, signer
        self._sent: Mapping[str, Sent] = {}
        self._folder = home / "runs" / view.id
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ArtefactError(f"cannot make {self._folder}: {explain(error)}") from error
        self._tensors = TensorFiles(self._folder)
        self._relative = f"runs/{view.id}"
        self._records = [dict(record) for record in view.records]
        self._pending: dict[str, Any] | None = None
        self._version = 0

    @property
    def folder(self) -> Path:
        return self._folder

    def lifted(self) -> Mapping[str, str]:
        with self._database.reading() as session:
            return service.lifted(session, self._view.id)

    def load(self, plan_digest: str, layout: Layout) -> Checkpoint | None:
        if self._view.checkpoint is None:
            return None
        where = f"the checkpoint of run {self._view.id}"
        checkpoint = self._tensors.read(self._view.checkpoint, where, plan_digest, layout)
        self._version = checkpoint.version
        return checkpoint

    def records(self) -> list[dict[str, Any]]:
        return self._records

    def append(self, record: Mapping[str, Any], sent: Mapping[str, Sent] | None = None) -> None:
        self._pending, self._sent = dict(record), sent or {}

    def save(self, checkpoint: Checkpoint) -> None:
        """Raises: ConflictError: the run is leased to another worker by now; its state is that one's to say."""
        assert self._pending is not None, "a step is saved with its record"
        document = self._tensors.write(checkpoint)
        model = self._model(checkpoint, document) if checkpoint.version != self._version else None
        with self._database.session() as session:
            taken = {name: sent.digest for name, sent in self._sent.items()}
            service.save_step(session, self._view.id, self._owner, self._pending, document, model, taken)
            step = (self._pending["kind"], self._pending["round"], checkpoint.attempt)
            receipts.store(session, self._view.manifest, step, self._sent, self._signer)
        self._version, self._pending = checkpoint.version, None

    def save_last_words(self) -> None:
        """Stores the record of a step that ended the run, and so was followed by no checkpoint."""
        if self._pending is not None:
            with self._database.session() as session:
                service.save_step(session, self._view.id, self._owner, self._pending, None, None)
            self._pending = None

    def _model(self, checkpoint: Checkpoint, document: Mapping[str, Any]) -> ModelVersion:
        assert self._pending is not None
        return ModelVersion(
            digest=document["model_digest"],
            run=self._view.id,
            plan_digest=checkpoint.plan_digest,
            round=checkpoint.version,
            path=f"{self._relative}/{document['tensors']}",
            sha256=document["tensors_sha256"],
            size=(self._folder / document["tensors"]).stat().st_size,
            metrics={key: value for key, value in self._pending.get("metrics", {}).items() if key != "confusion"},
        )
