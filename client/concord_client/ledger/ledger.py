"""The privacy ledger's file: SQLite, append-only, each entry chained to the one before by its hash.

What a method returned from survives a power cut: the write-ahead log is synchronised with the disk at each commit. Safe
for several processes: each method is one transaction, which begins by reading what others added meanwhile.
"""

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from concord_client.ledger.books import Books
from concord_client.ledger.marks import BEGINNING, Mark, read_mark, write_mark
from concord_client.ledger.words import OWNERS, Cap, Charge, Closing, Entry, Gap, Opened, Release, Reservation, Word
from concord_shared.errors import (
    ArtefactError,
    BudgetRefusedError,
    ConflictError,
    DocumentRefusedError,
    LedgerDamagedError,
)
from concord_shared.files import sync_directory
from concord_shared.signing import PrivateKey

__all__ = ["PrivacyLedger"]

BUSY_TIMEOUT_S = 30.0
SCHEMA = """
CREATE TABLE entries (sequence INTEGER PRIMARY KEY, body BLOB NOT NULL, hash TEXT NOT NULL);
CREATE TRIGGER entries_are_never_changed BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries of a privacy ledger are never changed'); END;
CREATE TRIGGER entries_are_never_removed BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries of a privacy ledger are never removed'); END;
CREATE TRIGGER entries_are_only_added BEFORE INSERT ON entries
    WHEN NEW.sequence != (SELECT COALESCE(MAX(sequence), 0) + 1 FROM entries)
    BEGIN SELECT RAISE(ABORT, 'entries of a privacy ledger are only added'); END;
"""
REPAIR = "Restore the newer ledger. If it is lost, count all budgets as spent with: concord-node ledger repair"


class PrivacyLedger:
    """One node's. Its owner's words are signed with `key`, the node's identity key."""

    def __init__(
        self,
        path: Path,
        node: str,
        key: PrivateKey,
        orders: tuple[float, ...],
        clock: Callable[[], float] = time.time,
        by: str = "owner",
        repairing: bool = False,
    ) -> None:
        """Opens it, or begins it where there never was one; reads and verifies every entry.

        orders: of Rényi divergence, for a new ledger; an old one keeps its own. by: whose word an owner's word is.
        repairing: for `repair` alone: an earlier state than a noted one is let pass.

        Raises:
            LedgerDamagedError: an entry was altered, removed or added by others, or the ledger was rolled back.
            ArtefactError: it cannot be opened.
        """
        self.path, self._key, self._clock, self._by = path, key, clock, by
        self._mark_file = path.with_suffix(".mark")
        self._lock = threading.RLock()
        self._books, self._head = Books(), BEGINNING
        noted = BEGINNING if repairing else read_mark(self._mark_file)
        if noted.sequence and not path.exists():
            raise LedgerDamagedError(f"{path} is gone, and once held {noted.sequence} entries. {REPAIR}")
        with self._translated():
            self._db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(Opened(node=node, orders=orders))
            if not repairing:
                self.check_mark(noted)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What stands

    @property
    def head(self) -> Mark:
        """The newest entry that this object has read."""
        return self._head

    def books(self) -> Books:
        """All entries added up, as of now. Not to be changed."""
        with self._reading():
            return self._books

    def entries(self) -> list[Entry]:
        """Raises: LedgerDamagedError: one is not what it was."""
        with self._reading() as db:
            return [_entry(*row) for row in db.execute("SELECT sequence, body, hash FROM entries ORDER BY sequence")]

    def verify(self) -> Mark:
        """Reads every entry anew from the file: chain, signatures, rules and what was noted elsewhere.

        Raises:
            LedgerDamagedError: naming the first entry that is not what it was.
        """
        with self._lock:
            self._books, self._head = Books(), BEGINNING
            with self._reading():
                self.check_mark(read_mark(self._mark_file))
                return self._head

    def check_mark(self, mark: Mark) -> None:
        """Raises: LedgerDamagedError: this ledger does not hold an entry that it once held."""
        with self._reading() as db:
            row = db.execute("SELECT hash FROM entries WHERE sequence = ?", (mark.sequence,)).fetchone()
            if mark == BEGINNING or (row is not None and row[0] == mark.hash):
                return
            if any(mark.sequence <= gap.known_sequence for gap in self._books.gaps):
                return  # of what the owner declared lost
            raise LedgerDamagedError(
                f"{self.path} was rolled back: it stands at entry {self._head.sequence}, and once held entry "
                f"{mark.sequence} ({mark.hash[:12]}). {REPAIR}"
            )

    @property
    def synchronous(self) -> tuple[str, int]:
        """How durable this very connection is: SQLite's journal mode, and 2 for FULL."""
        with self._translated():
            mode, level = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous"))
        return str(mode), int(level)

    # What the node says

    def reserve(self, word: Reservation) -> bool:
        """Sets the cost of a whole run aside; False if this very reservation stands already.

        Raises:
            BudgetRefusedError: it does not fit.
            ConflictError: the run has another reservation.
        """
        with self._writing():
            standing = self._books.standings.get(word.run)
            if standing is not None and standing.word == word:
                return False
            self._append(word)
            return True

    def charge(self, run: str, round_number: int) -> bool:
        """Spends one round; durable when it returns. False if it was charged before: another attempt costs no more.

        Raises:
            BudgetRefusedError: no reservation, no such round, closed by the owner, or a lowered cap.
        """
        with self._writing():
            standing = self._books.standings.get(run)
            if standing is not None and round_number in standing.charged:
                return False
            self._append(Charge(run=run, round_number=round_number))
            return True

    def charge_of(self, run: str, round_number: int) -> str | None:
        """The digest of the round's charge; None where there is none."""
        with self._reading() as db:
            standing = self._books.standings.get(run)
            if standing is None or round_number not in standing.charged:
                return None
            for body, digest in db.execute("SELECT body, hash FROM entries ORDER BY sequence DESC"):
                word = Entry.from_canonical(body).word
                if isinstance(word, Charge) and (word.run, word.round_number) == (run, round_number):
                    return str(digest)
        raise AssertionError("the books hold what the entries say")

    def release(self, run: str, round_number: int, sha256: str) -> bool:
        """Marks that the round's answer leaves; False if an answer of it left before."""
        with self._writing():
            standing = self._books.standings.get(run)
            if standing is not None and round_number in standing.released:
                return False
            self._append(Release(run=run, round_number=round_number, sha256=sha256))
            return True

    # What only the owner says, by commands

    def set_cap(self, word: Cap) -> None:
        """Raises: ConflictError: it would take back what an earlier cap promised."""
        with self._writing():
            self._append(word)

    def close_run(self, run: str, reason: str = "") -> None:
        """No round of the run is charged any more; what it reserved and never charged is free again.

        Raises:
            BudgetRefusedError: the run has no reservation.
            ConflictError: it is closed already.
        """
        with self._writing():
            self._append(Closing(run=run, reason=reason))

    def repair(self, known: Mark) -> None:
        """Goes on from an earlier state than the one that was noted: every budget counts as spent, to the last bit."""
        with self._writing():
            self._append(Gap(known_sequence=known.sequence, known_hash=known.hash))

    def noted(self) -> Mark:
        """Where this ledger once stood, as the file beside it says; where that is damaged, where it stands."""
        try:
            return read_mark(self._mark_file)
        except LedgerDamagedError:
            return self._head

    # Transactions

    def _append(self, word: Word) -> None:
        """Checked against the books first: a refusal leaves no trace."""
        self._books.check(word)
        entry = Entry(sequence=self._head.sequence + 1, at=int(self._clock()), previous=self._head.hash, word=word)
        if isinstance(word, OWNERS):
            entry = entry.model_copy(update={"by": self._by}).signed(self._key)
        self._db.execute("INSERT INTO entries VALUES (?,?,?)", (entry.sequence, entry.canonical, entry.digest))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated():
            nested = self._db.in_transaction
            if not nested:
                self._db.execute("BEGIN")
            try:
                self._catch_up()
                yield self._db
            finally:
                if not nested:
                    self._db.execute("ROLLBACK")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Under the write lock: what others added is read first, what is added is on the disk at the end."""
        with self._lock, self._translated():
            before = self._db.total_changes
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._catch_up()
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            if self._db.total_changes != before:
                self._note()

    def _note(self) -> None:
        """After the commit, lest it be ahead of the ledger; under its lock, lest an older mark replace a newer one."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._catch_up()
            write_mark(self._mark_file, self._head)
        finally:
            self._db.execute("ROLLBACK")

    def _catch_up(self) -> None:
        """Verifies and adds up what came since; a failure leaves the books as they were."""
        head = self._head
        if head != BEGINNING:
            row = self._db.execute("SELECT hash FROM entries WHERE sequence = ?", (head.sequence,)).fetchone()
            if row is None or row[0] != head.hash:
                raise LedgerDamagedError(
                    f"{self.path} was replaced while in use: entry {head.sequence} is not there. {REPAIR}"
                )
        rows = self._db.execute(
            "SELECT sequence, body, hash FROM entries WHERE sequence > ? ORDER BY sequence", (head.sequence,)
        )
        for sequence, body, digest in rows:
            entry = _entry(sequence, body, digest)
            try:
                if (sequence, entry.previous) != (self._head.sequence + 1, self._head.hash):
                    raise DocumentRefusedError(f"it does not follow entry {self._head.sequence}")
                entry.check_signature(self._key.public_key())
                self._books.add(entry.word)
            except (DocumentRefusedError, BudgetRefusedError, ConflictError) as error:
                raise LedgerDamagedError(
                    f"entry {sequence} of {self.path} is not in its place: {error}. {REPAIR}"
                ) from error
            self._head = Mark(sequence, digest)

    def _prepare(self, opened: Opened) -> None:
        with self._translated():
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")  # a charge survives a power cut
            self._db.execute("PRAGMA fullfsync=ON")  # macOS: through the disk's own cache
            self._db.execute("BEGIN IMMEDIATE")
            try:
                if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'entries'").fetchone():
                    for statement in _statements(SCHEMA):
                        self._db.execute(statement)
                self._catch_up()
                if self._head == BEGINNING:
                    self._append(opened)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            sync_directory(self.path.parent)
        with self._reading():
            pass

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            name = getattr(error, "sqlite_errorname", "") or ""
            if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
                raise LedgerDamagedError(f"the privacy ledger {self.path} is damaged: {error}. {REPAIR}") from error
            raise ArtefactError(f"the privacy ledger {self.path}: {error}. Nothing was spent; try again") from error


def _entry(sequence: int, body: Any, digest: str) -> Entry:
    try:
        entry = Entry.from_canonical(bytes(body))
    except (DocumentRefusedError, TypeError) as error:
        raise LedgerDamagedError(f"entry {sequence} of the privacy ledger was altered: {error}. {REPAIR}") from error
    if (entry.sequence, entry.digest) != (sequence, digest):
        raise LedgerDamagedError(f"entry {sequence} of the privacy ledger was altered: its hash is another. {REPAIR}")
    return entry


def _statements(script: str) -> Iterator[str]:
    """Of an SQL script, also those that hold semicolons."""
    text = ""
    for line in script.splitlines():
        text += line + "\n"
        if sqlite3.complete_statement(text):
            yield text
            text = ""
