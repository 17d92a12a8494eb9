"""The node's database: what it holds, decided, received and sent. SQLite, shared by the daemon and the commands.

Everything in `documents` was verified before it was put there (`sync.py`). Transactions are short and durable:
what a method returned from survives a power cut.
"""

import contextlib
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from concord_client import audit_log
from concord_client.schema import DatasetSchema
from concord_shared.documents import Agreement, Approval, Release, Roster, RunManifest, Study
from concord_shared.errors import ArtefactError
from concord_shared.evidence.heads import TreeHead
from concord_shared.evidence.log import Entry
from concord_shared.evidence.merkle import consistency_proof, inclusion_proof, root_of
from concord_shared.evidence.receipts import Receipt
from concord_shared.plan.schema import Plan, parse_plan_document
from concord_shared.preflight import PreflightReport, PreflightRequest
from concord_shared.signing import Document, Envelope

__all__ = ["Dataset", "Egress", "NodeStore", "Pending", "Posted", "Refused", "Request", "Stored"]

SCHEMA_VERSION = 3
BUSY_TIMEOUT_S = 10.0
ROSTERS_MAX = 20
"""Newest rosters that are kept whole; of an older one the digest is, unless a manifest names it."""
REFUSED_MAX = 200
REFUSED_BODY_BYTES_MAX = 256 << 10
SCHEMA = """
CREATE TABLE datasets (
    name TEXT PRIMARY KEY, version TEXT NOT NULL, spec TEXT NOT NULL, title TEXT NOT NULL, description TEXT NOT NULL,
    rows INTEGER NOT NULL, input TEXT NOT NULL, columns TEXT NOT NULL, licence TEXT NOT NULL,
    registered_at INTEGER NOT NULL, published INTEGER NOT NULL, files TEXT NOT NULL);
CREATE TABLE documents (
    kind TEXT NOT NULL, id TEXT NOT NULL, state TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (kind, id));
CREATE TABLE organisation_keys (organisation TEXT PRIMARY KEY, key TEXT NOT NULL);
CREATE TABLE approvals (
    study TEXT NOT NULL, plan_digest TEXT NOT NULL, dataset TEXT NOT NULL, sequence INTEGER NOT NULL,
    decision TEXT NOT NULL, not_after INTEGER NOT NULL, envelope TEXT NOT NULL,
    PRIMARY KEY (study, plan_digest, dataset, sequence));
CREATE TABLE outbox (id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, subject TEXT NOT NULL,
    envelope TEXT NOT NULL);
CREATE TABLE refused (id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, kind TEXT NOT NULL,
    subject TEXT NOT NULL, reason TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE journal (
    run TEXT NOT NULL, kind TEXT NOT NULL, round_number INTEGER NOT NULL, attempt INTEGER NOT NULL,
    PRIMARY KEY (run, kind, round_number, attempt));
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
EVIDENCE = (
    *audit_log.TABLES,
    "CREATE TABLE receipts (run TEXT NOT NULL, kind TEXT NOT NULL, round_number INTEGER NOT NULL, "
    "attempt INTEGER NOT NULL, envelope TEXT NOT NULL, PRIMARY KEY (run, kind, round_number, attempt))",
)
"""Since version 2."""
SCHEMAS = "ALTER TABLE datasets ADD COLUMN schema TEXT NOT NULL DEFAULT ''"
"""Since version 3."""
Kind = Literal["roster", "study", "agreement", "plan", "request", "manifest", "release", "run", "preflight"]
Doc = TypeVar("Doc", bound=Document)


@dataclass(frozen=True)
class Dataset:
    """spec, files and schema stay at the node. files: for each, by a hash of its name, its size and time of change at
    registration.

    schema: of a table, as inferred and corrected, without a value of it; None where there is none.
    """

    name: str
    version: str
    spec: str
    title: str
    description: str
    rows: int
    input: Literal["image", "table", "text", "array"]
    columns: tuple[str, ...]
    licence: str
    registered_at: int
    published: bool = False
    files: Mapping[str, tuple[int, int]] | None = None
    schema: DatasetSchema | None = None


@dataclass(frozen=True)
class Stored:
    """A verified document: an Envelope's fields, or a plan's document, or a request."""

    kind: str
    id: str
    state: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Request:
    """A plan that someone asks this node to run for a study."""

    study: str
    plan_digest: str
    requested_by: str
    received_at: int


@dataclass(frozen=True)
class Pending:
    """What waits for a decision: a request on one dataset that an agreement of its study names."""

    study: str
    plan_digest: str
    dataset: str
    requested_by: str
    received_at: int


@dataclass(frozen=True)
class Posted:
    """A signed document of this node that the coordinator has not taken yet."""

    id: int
    kind: str
    subject: str
    envelope: Envelope


@dataclass(frozen=True)
class Refused:
    """Something that arrived and was not believed. body: to try again with; None if it was too large to keep."""

    id: int
    at: int
    kind: str
    subject: str
    reason: str
    body: dict[str, Any] | None


@dataclass(frozen=True)
class Egress:
    """One thing that left this machine."""

    at: float
    to: str
    kind: str
    subject: str
    bytes: int
    sha256: str


class NodeStore:
    """Safe for several processes and threads; each method is one transaction."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Raises: ArtefactError: it cannot be opened, or is of another version."""
        self.path, self._clock = path, clock
        self._lock = threading.RLock()
        with _translated(path):
            self._connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        try:
            self._prepare()
        except ArtefactError:
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Datasets

    def put_dataset(self, dataset: Dataset) -> None:
        files = {name: list(found) for name, found in (dataset.files or {}).items()}
        with self._write() as db:
            db.execute(
                "INSERT OR REPLACE INTO datasets VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    dataset.name,
                    dataset.version,
                    dataset.spec,
                    dataset.title,
                    dataset.description,
                    dataset.rows,
                    dataset.input,
                    json.dumps(dataset.columns),
                    dataset.licence,
                    dataset.registered_at,
                    int(dataset.published),
                    json.dumps(files),
                    dataset.schema.without_values().model_dump_json() if dataset.schema else "",
                ),
            )
            self._log(db, "owner", "dataset:register", dataset.name, version=dataset.version, rows=dataset.rows)

    def dataset(self, name: str) -> Dataset | None:
        return next(iter(self._datasets("WHERE name = ?", name)), None)

    def datasets(self) -> list[Dataset]:
        return self._datasets("ORDER BY name")

    def remove_dataset(self, name: str) -> None:
        with self._write() as db:
            db.execute("DELETE FROM datasets WHERE name = ?", (name,))
            self._log(db, "owner", "dataset:remove", name)

    def _datasets(self, where: str, *values: str) -> list[Dataset]:
        return [
            _dataset(row)
            for row in self._read(f"SELECT * FROM datasets {where}", *values)  # noqa: S608 - constants of this class
        ]

    # Verified documents

    def put(self, kind: Kind, id: str, body: Envelope | Mapping[str, Any], state: str = "") -> None:
        text = body.model_dump_json() if isinstance(body, Envelope) else json.dumps(body)
        with self._write() as db:
            held = db.execute("SELECT state, body FROM documents WHERE kind = ? AND id = ?", (kind, id)).fetchone()
            if held != (state, text):
                db.execute("INSERT OR REPLACE INTO documents VALUES (?,?,?,?)", (kind, id, state, text))
                sha256 = hashlib.sha256(text.encode()).hexdigest()
                self._log(db, "coordinator", f"{kind}:accept", id, sha256=sha256, state=state)
        if kind == "roster":
            self._shorten_rosters()

    def _shorten_rosters(self) -> None:
        """The coordinator makes as many as it likes; what one was can be proven by its digest."""
        whole = sorted(
            (stored for stored in self.all("roster") if stored.state != "digest"), key=lambda it: -int(it.id)
        )
        if len(whole) <= ROSTERS_MAX:
            return
        named = {str(_open(stored, RunManifest).roster_version) for stored in self.all("manifest")}
        with self._write() as db:
            for stored in whole[ROSTERS_MAX:]:
                if stored.id not in named:
                    text = json.dumps({"digest": _open(stored, Roster).digest})
                    where = "WHERE kind = 'roster' AND id = ?"
                    db.execute(f"UPDATE documents SET state = 'digest', body = ? {where}", (text, stored.id))  # noqa: S608

    def usage(self, kind: Kind, but: str) -> tuple[int, int]:
        """How many documents of a kind are here beside that one, and their bytes together."""
        statement = "SELECT COUNT(*), COALESCE(SUM(LENGTH(body)), 0) FROM documents WHERE kind = ? AND id != ?"
        [(count, size)] = self._read(statement, kind, but)
        return int(count), int(size)

    def get(self, kind: Kind, id: str) -> Stored | None:
        rows = self._read("SELECT * FROM documents WHERE kind = ? AND id = ?", kind, id)
        return _stored(rows[0]) if rows else None

    def all(self, kind: Kind) -> list[Stored]:
        return [_stored(row) for row in self._read("SELECT * FROM documents WHERE kind = ? ORDER BY id", kind)]

    def roster(self) -> Roster | None:
        """The newest."""
        version = self.fact("roster")
        return None if version is None else self._document("roster", version, Roster)

    def study(self, study: str) -> Study | None:
        return self._document("study", study, Study)

    def agreement(self, agreement: str) -> Agreement | None:
        """In any state; `admitting` knows which ones count."""
        return self._document("agreement", agreement, Agreement)

    def manifest(self, run: str) -> RunManifest | None:
        return self._document("manifest", run, RunManifest)

    def release(self, model_digest: str) -> Release | None:
        return self._document("release", model_digest, Release)

    def plan(self, digest: str) -> Plan | None:
        stored = self.get("plan", digest)
        return None if stored is None else parse_plan_document(stored.body)

    def requests(self) -> list[Request]:
        return [Request(**stored.body) for stored in self.all("request")]

    def admitting(self, study: str, dataset: str, now: float) -> Agreement | None:
        """The agreement under which this study may use `dataset` ("node/dataset") now; the one that ends last.

        It is agreed, not over, and about the study as it stands.
        """
        purpose = self.study(study)
        agreed = [_open(stored, Agreement) for stored in self.all("agreement") if stored.state == "agreed"]
        fitting = [
            agreement
            for agreement in agreed
            if purpose is not None
            and (agreement.study, agreement.study_digest) == (study, purpose.digest)
            and dataset in agreement.datasets
            and now < agreement.terms.not_after
        ]
        return max(fitting, key=lambda agreement: (agreement.terms.not_after, agreement.agreement), default=None)

    def _document(self, kind: Kind, id: str, of: type[Doc]) -> Doc | None:
        stored = self.get(kind, id)
        return None if stored is None else _open(stored, of)

    # Keys of organisations, as first seen or as a person confirmed

    def organisation_key(self, organisation: str) -> str | None:
        rows = self._read("SELECT key FROM organisation_keys WHERE organisation = ?", organisation)
        return str(rows[0][0]) if rows else None

    def organisations_known(self) -> int:
        return int(self._read("SELECT COUNT(*) FROM organisation_keys")[0][0])

    def pin_organisation(self, organisation: str, key: str) -> None:
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO organisation_keys VALUES (?,?)", (organisation, key))
            self._log(db, "node", "organisation-key:pin", organisation, key=key)

    # This node's approvals, and what is to be sent

    def put_approval(self, approval: Approval, envelope: Envelope) -> bool:
        """Stores the decision and posts it, in one transaction; False if another one has its sequence."""
        text = envelope.model_dump_json()
        with self._write() as db:
            cursor = db.execute(
                "INSERT OR IGNORE INTO approvals VALUES (?,?,?,?,?,?,?)",
                (
                    approval.study,
                    approval.plan_digest,
                    approval.dataset,
                    approval.sequence,
                    approval.decision,
                    approval.not_after,
                    text,
                ),
            )
            if cursor.rowcount == 1:
                db.execute(
                    "INSERT INTO outbox (kind, subject, envelope) VALUES ('approval',?,?)",
                    (f"{approval.study}/{approval.plan_digest}/{approval.dataset}", text),
                )
                self._log(
                    db,
                    "owner",
                    f"approval:{approval.decision}",
                    f"{approval.study}/{approval.plan_digest}/{approval.dataset}",
                    digest=approval.digest,
                    sequence=approval.sequence,
                    decided_by=approval.decided_by,
                    until=approval.not_after,
                )
            return cursor.rowcount == 1

    def last_approval(self, study: str, plan_digest: str, dataset: str) -> Approval | None:
        """The last decision, whatever it was and whether or not it is still valid."""
        rows = self._read(
            "SELECT envelope FROM approvals WHERE study = ? AND plan_digest = ? AND dataset = ? "
            "ORDER BY sequence DESC LIMIT 1",
            *(study, plan_digest, dataset),
        )
        return _approval(rows[0][0]) if rows else None

    def current_approval(self, study: str, plan_digest: str, dataset: str, now: float) -> Approval | None:
        """The last decision, if it is a yes that has not expired."""
        last = self.last_approval(study, plan_digest, dataset)
        return last if last is not None and last.decision == "approved" and now < last.not_after else None

    def approved_plans(self) -> list[Plan]:
        """Every plan that was ever approved here, also where the yes was taken back or has expired."""
        rows = self._read("SELECT DISTINCT plan_digest FROM approvals WHERE decision = 'approved'")
        return [plan for row in rows if (plan := self.plan(row[0])) is not None]

    def approvals(self) -> list[Approval]:
        """Every decision ever made here, oldest first."""
        return [_approval(row[0]) for row in self._read("SELECT envelope FROM approvals ORDER BY rowid")]

    def approval_envelopes(self) -> list[Envelope]:
        return [
            Envelope.model_validate_json(row[0]) for row in self._read("SELECT envelope FROM approvals ORDER BY rowid")
        ]

    def pending(self, node: str, now: float) -> list[Pending]:
        """What waits for a decision: no answer yet, or one that expired. `node`: this node's name."""
        found = []
        for request in self.requests():
            for dataset in self.datasets():
                if self.admitting(request.study, f"{node}/{dataset.name}", now) is None:
                    continue
                last = self.last_approval(request.study, request.plan_digest, dataset.name)
                if last is None or (last.decision == "approved" and last.not_after <= now):
                    found.append(
                        Pending(
                            request.study, request.plan_digest, dataset.name, request.requested_by, request.received_at
                        )
                    )
        return found

    def post(self, kind: str, subject: str, envelope: Envelope) -> None:
        with self._write() as db:
            db.execute(
                "INSERT INTO outbox (kind, subject, envelope) VALUES (?,?,?)",
                (kind, subject, envelope.model_dump_json()),
            )

    def outbox(self) -> list[Posted]:
        """Oldest first."""
        return [
            Posted(id, kind, subject, Envelope.model_validate_json(text))
            for id, kind, subject, text in self._read("SELECT * FROM outbox ORDER BY id")
        ]

    def delivered(self, id: int) -> None:
        with self._write() as db:
            db.execute("DELETE FROM outbox WHERE id = ?", (id,))

    # Preflights: a request is a document in the state "asked", then "answered", until it has expired

    def preflights(self, state: str = "asked") -> list[PreflightRequest]:
        return [_open(stored, PreflightRequest) for stored in self.all("preflight") if stored.state == state]

    def answer_preflight(
        self, asked: PreflightRequest, report: PreflightReport, envelope: Envelope, action: str
    ) -> None:
        """Posts the report and marks its request as answered, in one transaction. action: of the audit log."""
        text = envelope.model_dump_json()
        where = "WHERE kind = 'preflight' AND id = ? AND state = 'asked'"
        with self._write() as db:
            found = db.execute(f"UPDATE documents SET state = 'answered' {where}", (report.preflight,))  # noqa: S608
            if found.rowcount != 1:
                return
            subject = f"{asked.study}/{asked.preflight}"
            db.execute("INSERT INTO outbox (kind, subject, envelope) VALUES ('preflight',?,?)", (subject, text))
            told = {check.name: check.status for check in report.checks}
            about = {"by": asked.organisation, "plan": asked.plan_digest, "dataset": report.dataset}
            self._log(db, "node", action, subject, digest=report.digest, **about, checks=told)

    def forget_preflights(self, now: float) -> None:
        """Those that have expired: sent again, they would be refused for that."""
        gone = [each.preflight for state in ("asked", "answered") for each in self.preflights(state)
                if each.not_after <= now]  # fmt: skip
        with self._write() as db:
            for id in gone:
                db.execute("DELETE FROM documents WHERE kind = 'preflight' AND id = ?", (id,))

    def preflight_entries(self) -> list[Entry]:
        """What the audit log says of preflights: answered, declined and refused; oldest first."""
        where = "WHERE action IN ('preflight:answer', 'preflight:decline', 'preflight:refuse')"
        with self._lock, _translated(self.path):
            return [entry for entry, _ in audit_log.read_entries(self._connection, where)]

    def happened(self, action: str, within: str, last_s: float) -> int:
        """How often, in the last `last_s`, the audit log has an action on a subject that begins with `within`."""
        moment = datetime.fromtimestamp(self._clock() - last_s, UTC).isoformat(timespec="microseconds")
        statement = "SELECT COUNT(*) FROM audit WHERE action = ? AND substr(subject, 1, ?) = ? AND at >= ?"
        return int(self._read(statement, action, len(within), within, moment)[0][0])

    # What was not believed

    def refuse(self, at: float, kind: str, subject: str, reason: str, body: Mapping[str, Any]) -> None:
        """Notes it; the oldest are forgotten, so that nobody can fill the disk with refusals."""
        text = json.dumps(body)
        kept = text if len(text) <= REFUSED_BODY_BYTES_MAX else ""
        with self._write() as db:
            db.execute("DELETE FROM refused WHERE kind = ? AND subject = ? AND body = ?", (kind, subject, kept))
            db.execute(
                "INSERT INTO refused (at, kind, subject, reason, body) VALUES (?,?,?,?,?)",
                (int(at), kind, subject[:300], reason[:2000], kept),
            )
            db.execute(
                "DELETE FROM refused WHERE id NOT IN (SELECT id FROM refused ORDER BY id DESC LIMIT ?)", (REFUSED_MAX,)
            )

    def refused(self) -> list[Refused]:
        """Oldest first."""
        return [
            Refused(id, at, kind, subject, reason, json.loads(body) if body else None)
            for id, at, kind, subject, reason, body in self._read("SELECT * FROM refused ORDER BY id")
        ]

    def accept_refused(self, id: int) -> None:
        """Forgets a refusal: the thing was believed later, or is of no more interest."""
        with self._write() as db:
            db.execute("DELETE FROM refused WHERE id = ?", (id,))

    # The audit log: what was decided, received and sent. Nothing of it is ever forgotten

    def record(self, actor: str, action: str, subject: str, **detail: Any) -> None:
        """actor: `owner`, `node` or `coordinator`; action: `subject:verb`."""
        with self._write() as db:
            self._log(db, actor, action, subject, **detail)

    def log_egress(self, at: float, to: str, kind: str, subject: str, size: int, sha256: str, **detail: Any) -> None:
        """What leaves this machine, before it does."""
        with self._write() as db:
            told = {"to": to, "bytes": size, "sha256": sha256, **detail}
            audit_log.append(db, at, "node", f"egress:{kind}", subject, told)

    def egress(self, limit: int | None = None) -> list[Egress]:
        """Oldest first; with a limit, the last ones."""
        rows = self._read(
            "SELECT at, action, subject, detail FROM audit WHERE action >= 'egress:' AND action < 'egress;' "
            "ORDER BY id DESC LIMIT ?",
            -1 if limit is None else limit,
        )
        return [_egress(*row) for row in reversed(rows)]

    def has_sent(self, kind: str, subject: str, sha256: str) -> bool:
        """Whether the log says that these bytes left under this name."""
        rows = self._read("SELECT detail FROM audit WHERE action = ? AND subject = ?", f"egress:{kind}", subject)
        return any(json.loads(detail)["sha256"] == sha256 for (detail,) in rows)

    def log_entries(self, first: int = 1, limit: int = -1) -> list[tuple[Entry, bytes]]:
        """Entries with their hashes, oldest first."""
        with self._lock, _translated(self.path):
            found = audit_log.read_entries(
                self._connection, "WHERE id IN (SELECT id FROM audit WHERE id >= ? ORDER BY id LIMIT ?)", first, limit
            )
            return list(found)

    def log_size(self) -> int:
        with self._lock, _translated(self.path):
            return audit_log.size_of(self._connection)

    def log_head(self, log: str, size: int | None = None) -> TreeHead:
        """The head of the first `size` entries; of all, where no size is given."""
        with self._lock, _translated(self.path):
            count = audit_log.size_of(self._connection) if size is None else size
            root = root_of(count, audit_log.subtrees(self._connection)).hex()
        return TreeHead(log=log, size=count, root=root, issued_at=int(self._clock()))

    def log_grown(self, since: int, now: int) -> tuple[str, ...]:
        """The proof that the first `now` entries begin with the `since` first ones."""
        with self._lock, _translated(self.path):
            proof = consistency_proof(since, now, audit_log.subtrees(self._connection))
        return tuple(part.hex() for part in proof)

    def log_proof(self, sequence: int, size: int) -> tuple[str, ...]:
        """The proof that entry `sequence` is among the first `size`."""
        with self._lock, _translated(self.path):
            proof = inclusion_proof(sequence - 1, size, audit_log.subtrees(self._connection))
        return tuple(part.hex() for part in proof)

    # Receipts of the coordinator, verified

    def put_receipt(self, receipt: Receipt, envelope: Envelope) -> bool:
        """False where one for this step is here already."""
        step = (receipt.run, receipt.kind, receipt.round_number, receipt.attempt)
        with self._write() as db:
            cursor = db.execute(
                "INSERT OR IGNORE INTO receipts VALUES (?,?,?,?,?)", (*step, envelope.model_dump_json())
            )
            if cursor.rowcount == 1:
                self._log(db, "coordinator", "receipt:take", receipt.step, digest=receipt.digest, sent=receipt.sent)
            return cursor.rowcount == 1

    def receipts(self, run: str | None = None) -> list[Envelope]:
        """In the order of their arrival."""
        rows = self._read("SELECT envelope FROM receipts WHERE ? IS NULL OR run = ? ORDER BY rowid", run, run)
        return [Envelope.model_validate_json(row[0]) for row in rows]

    # What was answered

    def answered(self, run: str, kind: str, round_number: int, attempt: int) -> bool:
        """Marks a step as answered; False if it already was."""
        with self._write() as db:
            cursor = db.execute("INSERT OR IGNORE INTO journal VALUES (?,?,?,?)", (run, kind, round_number, attempt))
            return cursor.rowcount == 1

    def has_answered(self, run: str, kind: str, round_number: int, attempt: int) -> bool:
        where = "run = ? AND kind = ? AND round_number = ? AND attempt = ?"
        return bool(self._read(f"SELECT 1 FROM journal WHERE {where}", run, kind, round_number, attempt))  # noqa: S608

    # Single facts: the cursor, the node's state, the newest roster's version

    @property
    def cursor(self) -> int:
        """Up to where the coordinator's updates were read."""
        return int(self.fact("cursor") or 0)

    @cursor.setter
    def cursor(self, value: int) -> None:
        self.set_fact("cursor", str(value))

    def fact(self, name: str) -> str | None:
        rows = self._read("SELECT value FROM facts WHERE name = ?", name)
        return str(rows[0][0]) if rows else None

    def facts(self, prefix: str) -> dict[str, str]:
        rows = self._read("SELECT name, value FROM facts WHERE substr(name, 1, ?) = ?", len(prefix), prefix)
        return {str(name): str(value) for name, value in rows}

    def drop_fact(self, name: str) -> None:
        with self._write() as db:
            db.execute("DELETE FROM facts WHERE name = ?", (name,))

    def set_fact(self, name: str, value: str) -> None:
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?,?)", (name, value))

    # Transactions

    def _log(self, db: sqlite3.Connection, actor: str, action: str, subject: str, **detail: Any) -> None:
        audit_log.append(db, self._clock(), actor, action, subject, detail)

    def _read(self, statement: str, *values: Any) -> list[Any]:
        with self._lock, _translated(self.path):
            return self._connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._lock, _translated(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _prepare(self) -> None:
        with _translated(self.path):
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")  # a decision survives a power cut
        with self._write() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in range(SCHEMA_VERSION + 1):
                raise ArtefactError(
                    f"{self.path} is of version {version}, this concord-node reads version {SCHEMA_VERSION}. "
                    "Install the version that wrote it"
                )
            for statement in SCHEMA.split(";") if version == 0 else ():
                db.execute(statement)
            for statement in EVIDENCE if version < 2 else ():
                db.execute(statement)
            if version == 1:
                audit_log.move_egress(db)
            if version < 3:
                db.execute(SCHEMAS)
            if version != SCHEMA_VERSION:
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise ArtefactError(f"the node's database {path}: {error}. Nothing was changed; {_advice(error)}") from error


def _advice(error: sqlite3.Error) -> str:
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith("SQLITE_FULL"):
        return "free some space on the disk and try again"
    if name.startswith("SQLITE_BUSY"):
        return "another concord-node holds it; try again, or end that one"
    if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
        return "check that the directory is there and yours to write"
    return "restore it from a backup if it is damaged"


def _dataset(row: Any) -> Dataset:
    name, version, spec, title, description, rows, input, columns, licence, registered_at, published, files, schema = (
        row
    )
    return Dataset(
        *(name, version, spec, title, description, rows, input, tuple(json.loads(columns)), licence),
        registered_at=registered_at,
        published=bool(published),
        files={file: (size, changed) for file, (size, changed) in json.loads(files).items()},
        schema=DatasetSchema.model_validate_json(schema) if schema else None,
    )


def _egress(at: str, action: str, subject: str, detail: str) -> Egress:
    told = json.loads(detail)
    moment = datetime.fromisoformat(at).timestamp()
    return Egress(moment, told["to"], action.removeprefix("egress:"), subject, told["bytes"], told["sha256"])


def _stored(row: Any) -> Stored:
    return Stored(row[0], row[1], row[2], json.loads(row[3]))


def _open(stored: Stored, of: type[Doc]) -> Doc:
    """Verified when it was put there: read without its signatures."""
    return of.from_canonical(Envelope.model_validate_json(json.dumps(stored.body)).bytes)


def _approval(text: str) -> Approval:
    return Approval.from_canonical(Envelope.model_validate_json(text).bytes)
