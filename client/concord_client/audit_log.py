"""This node's own audit log, in its database: what was decided, received and sent, in one chain that only grows.

Called within a transaction of the store, so that an entry is there exactly if what it tells of is. Triggers refuse any
change of what is written; whoever goes around them breaks the chain, which heads that others hold will show.
"""

import json
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from concord_shared.evidence.log import GENESIS, Entry, chained, plain_detail
from concord_shared.evidence.merkle import Read

__all__ = ["TABLES", "append", "move_egress", "read_entries", "size_of", "subtrees"]

TABLES = (
    "CREATE TABLE audit (id INTEGER PRIMARY KEY, at TEXT NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL, "
    "subject TEXT NOT NULL, detail TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE INDEX audit_action ON audit (action, subject)",
    "CREATE TABLE audit_subtree (level INTEGER NOT NULL, place INTEGER NOT NULL, hash TEXT NOT NULL, "
    "PRIMARY KEY (level, place))",
    *(
        f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table} "
        "BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END"
        for table in ("audit", "audit_subtree")
        for verb in ("UPDATE", "DELETE")
    ),
)


def append(db: sqlite3.Connection, at: float, actor: str, action: str, subject: str, detail: dict[str, Any]) -> None:
    """at: seconds of Unix time. actor: `owner`, `node` or `coordinator`; action: `subject:verb`. detail: never data."""
    last = db.execute("SELECT id, hash FROM audit ORDER BY id DESC LIMIT 1").fetchone()
    sequence, before = (last[0] + 1, bytes.fromhex(last[1])) if last else (1, GENESIS)
    actor, action, subject, detail = plain_detail((actor, action, subject, detail))
    moment = datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds")
    entry = Entry(sequence=sequence, at=moment, actor=actor, action=action, subject=subject, detail=detail)
    found, above = chained(entry, before, subtrees(db))
    row = (sequence, moment, actor, action, subject, json.dumps(detail), found.hex())
    db.execute("INSERT INTO audit VALUES (?,?,?,?,?,?,?)", row)
    for level, place, full in above:
        db.execute("INSERT INTO audit_subtree VALUES (?,?,?)", (level, place, full.hex()))


def size_of(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT COALESCE(MAX(id), 0) FROM audit").fetchone()[0])


def subtrees(db: sqlite3.Connection) -> Read:
    def read(level: int, index: int) -> bytes:
        if level == 0:
            row = db.execute("SELECT hash FROM audit WHERE id = ?", (index + 1,)).fetchone()
        else:
            row = db.execute("SELECT hash FROM audit_subtree WHERE level = ? AND place = ?", (level, index)).fetchone()
        if row is None:
            raise sqlite3.DatabaseError("a part of the audit log is missing; `concord-node audit verify` says which")
        return bytes.fromhex(row[0])

    return read


def read_entries(db: sqlite3.Connection, where: str = "", *values: Any) -> Iterator[tuple[Entry, bytes]]:
    """Entries with their hashes, oldest first; where: a constant of the caller's."""
    for sequence, at, actor, action, subject, detail, found in db.execute(
        f"SELECT * FROM audit {where} ORDER BY id",  # noqa: S608 - constants of this package
        values,
    ):
        entry = Entry(sequence=sequence, at=at, actor=actor, action=action, subject=subject, detail=json.loads(detail))
        yield entry, bytes.fromhex(found)


def move_egress(db: sqlite3.Connection) -> None:
    """What left before this node had a log of this kind: a table of its own until then."""
    rows = db.execute("SELECT at, receiver, kind, subject, bytes, sha256 FROM egress ORDER BY id").fetchall()
    for at, receiver, kind, subject, size, sha256 in rows:
        append(db, at, "node", f"egress:{kind}", subject, {"to": receiver, "bytes": size, "sha256": sha256})
    db.execute("DROP TABLE egress")
