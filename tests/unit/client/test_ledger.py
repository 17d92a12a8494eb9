"""The privacy ledger's file: append-only, chained, durable, and never younger than it was known to be."""

import contextlib
import ctypes
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ledgers
from concord_client.ledger.filter import conversion
from concord_client.ledger.marks import Mark
from concord_client.ledger.words import Entry
from concord_shared.errors import ArtefactError, BudgetRefusedError, ConflictError, LedgerDamagedError
from ledgers import COST, cap, open_ledger, reservation

ROOM = conversion(8.0, 1e-5) + 0.105
"""The ε of ten rounds and a half."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a ledger with one entry of each kind."""
    with open_ledger(tmp_path) as ledger:
        ledger.set_cap(cap(ROOM))
        ledger.reserve(reservation("run-1", 5))
        ledger.charge("run-1", 1)
        ledger.release("run-1", 1, "c" * 64)
        ledger.charge("run-1", 2)
        ledger.close_run("run-1", "enough")
    return tmp_path


@pytest.fixture
def forger(folder: Path) -> Iterator[sqlite3.Connection]:
    """Somebody with the file in hand, and without the triggers."""
    connection = sqlite3.connect(folder / "ledger.db", isolation_level=None)
    connection.execute("PRAGMA synchronous=OFF")
    for name in ("changed", "removed"):
        connection.execute(f"DROP TRIGGER entries_are_never_{name}")
    connection.execute("DROP TRIGGER entries_are_only_added")
    yield connection
    connection.close()


def damaged(folder: Path, words: str) -> None:
    with pytest.raises(LedgerDamagedError, match=words), open_ledger(folder):
        pass


class TestAppending:
    def test_an_attempt_more_of_a_round_costs_nothing_more(self, folder: Path) -> None:
        with open_ledger(folder) as ledger:
            ledger.reserve(reservation("run-2", 3))
            assert ledger.charge("run-2", 1)
            before = ledger.head
            assert not ledger.charge("run-2", 1)
            assert not ledger.reserve(reservation("run-2", 3))
            assert ledger.head == before

    def test_another_reservation_of_a_run_is_refused(self, folder: Path) -> None:
        with open_ledger(folder) as ledger, pytest.raises(ConflictError, match="already"):
            ledger.reserve(reservation("run-1", 6))

    def test_a_refusal_leaves_no_trace(self, folder: Path) -> None:
        with open_ledger(folder) as ledger:
            before = ledger.head
            for refused in (lambda: ledger.reserve(reservation("run-2", 11)), lambda: ledger.charge("run-9", 1)):
                with pytest.raises(BudgetRefusedError):
                    refused()
            assert ledger.verify() == before

    def test_what_was_written_is_read_again(self, folder: Path) -> None:
        with open_ledger(folder) as ledger:
            standing = ledger.books().standings["run-1"]
            assert (standing.charged, standing.released, standing.closed) == ({1, 2}, {1}, True)
            assert standing.word.rdp == COST
            assert [each.word.kind for each in ledger.entries()] == [
                "opened",
                "cap",
                "reservation",
                "charge",
                "release",
                "charge",
                "closing",
            ]

    @pytest.mark.parametrize(
        "statement",
        [
            "DELETE FROM entries WHERE sequence = 4",
            "UPDATE entries SET body = body WHERE sequence = 4",
            "UPDATE entries SET hash = '' WHERE sequence = 4",
            "INSERT INTO entries VALUES (99, '', '')",
            "INSERT OR REPLACE INTO entries SELECT 4, body, hash FROM entries WHERE sequence = 5",
        ],
    )
    def test_the_database_itself_lets_nothing_be_changed(self, folder: Path, statement: str) -> None:
        with sqlite3.connect(folder / "ledger.db") as db, pytest.raises(sqlite3.IntegrityError, match="privacy ledger"):
            db.execute(statement)
        with open_ledger(folder) as ledger:
            ledger.verify()

    def test_what_another_process_added_counts_at_once(self, folder: Path) -> None:
        with open_ledger(folder) as one, open_ledger(folder) as other:
            one.reserve(reservation("run-2", 5))
            with pytest.raises(BudgetRefusedError):
                other.reserve(reservation("run-3", 4))
            assert other.charge("run-2", 1)
            assert not one.charge("run-2", 1)

    def test_a_full_disk_is_said_and_spends_nothing(self, folder: Path) -> None:
        with open_ledger(folder) as ledger:
            ledger._db.execute("PRAGMA max_page_count=1")
            costless = {"rdp": (0.0, 0.0, 0.0)}

            def fill() -> None:
                for number in range(2, 100):
                    ledger.reserve(reservation(f"run-{number}", 1, **costless))

            with pytest.raises(ArtefactError, match="Nothing was spent"):
                fill()
            ledger.verify()


class TestDurability:
    def test_the_connection_in_use_is_synchronous(self, folder: Path) -> None:
        with open_ledger(folder) as ledger:
            assert ledger.synchronous == ("wal", 2)

    def test_nothing_waits_in_memory_when_a_charge_returns(self, folder: Path) -> None:
        """What the system has not written to the disk yet is lost in a power cut."""
        with open_ledger(folder) as ledger:
            ledger.reserve(reservation("run-2", 2))
            ledger.charge("run-2", 1)
            if _unwritten(folder / "ledger.db-wal") is None:
                pytest.skip("this system does not say what of a file is on the disk")
            assert _unwritten(folder / "ledger.db-wal") == 0
            assert _unwritten(folder / "ledger.mark") == 0
            ledger._db.execute("PRAGMA synchronous=NORMAL")
            ledger.charge("run-2", 2)
            if not _unwritten(folder / "ledger.db-wal"):
                pytest.skip("this file system is in memory, so nothing is shown by it")

    def test_the_mark_is_written_after_the_entry(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The other way round, a crash in between would make an honest ledger look rolled back."""
        with open_ledger(folder) as ledger:
            ledger.reserve(reservation("run-2", 2))

            def dies(*_: Any) -> None:
                raise OSError("the machine stops here")

            monkeypatch.setattr("concord_client.ledger.ledger.write_mark", dies)
            with pytest.raises(OSError, match="stops here"):
                ledger.charge("run-2", 1)
        monkeypatch.undo()
        with open_ledger(folder) as ledger:
            assert not ledger.charge("run-2", 1)


class TestTampering:
    def test_every_byte_of_every_entry(self, folder: Path, forger: sqlite3.Connection) -> None:
        rows = forger.execute("SELECT sequence, body, hash FROM entries").fetchall()
        with open_ledger(folder) as ledger:
            for sequence, body, digest in rows:
                for column, original in (("body", bytes(body)), ("hash", digest.encode())):
                    for place in range(len(original)):
                        changed = original[:place] + bytes([original[place] ^ 1]) + original[place + 1 :]
                        value: Any = changed if column == "body" else changed.decode()
                        forger.execute(f"UPDATE entries SET {column} = ? WHERE sequence = ?", (value, sequence))
                        with pytest.raises(LedgerDamagedError, match=f"entry {sequence} of the privacy ledger"):
                            ledger.verify()
                    kept: Any = original if column == "body" else digest
                    forger.execute(f"UPDATE entries SET {column} = ? WHERE sequence = ?", (kept, sequence))
            ledger.verify()

    @pytest.mark.parametrize("sequence", range(1, 7))
    def test_every_deletion(self, folder: Path, forger: sqlite3.Connection, sequence: int) -> None:
        forger.execute("DELETE FROM entries WHERE sequence = ?", (sequence,))
        damaged(folder, f"entry {sequence + 1} .* not in its place")

    @pytest.mark.parametrize("sequence", range(1, 7))
    def test_a_deletion_with_the_others_moved_up(self, folder: Path, forger: sqlite3.Connection, sequence: int) -> None:
        forger.execute("DELETE FROM entries WHERE sequence = ?", (sequence,))
        forger.execute("UPDATE entries SET sequence = sequence - 1 WHERE sequence > ?", (sequence,))
        damaged(folder, f"entry {sequence} of the privacy ledger was altered")

    @pytest.mark.parametrize("sequence", range(1, 7))
    def test_every_adjacent_swap(self, folder: Path, forger: sqlite3.Connection, sequence: int) -> None:
        for before, after in ((sequence, -1), (sequence + 1, sequence), (-1, sequence + 1)):
            forger.execute("UPDATE entries SET sequence = ? WHERE sequence = ?", (after, before))
        damaged(folder, f"entry {sequence} of the privacy ledger was altered")

    @pytest.mark.parametrize("sequence", range(1, 7))
    def test_every_truncation(self, folder: Path, forger: sqlite3.Connection, sequence: int) -> None:
        forger.execute("DELETE FROM entries WHERE sequence > ?", (sequence,))
        damaged(folder, f"stands at entry {sequence}, and once held entry 7")

    def test_a_chain_made_anew_without_a_charge(self, folder: Path, forger: sqlite3.Connection) -> None:
        """All hashes are right; only the mark knows."""
        rows = [Entry.from_canonical(bytes(row[0])) for row in forger.execute("SELECT body FROM entries")]
        forger.execute("DELETE FROM entries")
        previous = "0" * 64
        for sequence, entry in enumerate([each for each in rows[:-1] if each.word.kind != "release"], 1):
            made = entry.model_copy(update={"sequence": sequence, "previous": previous})
            previous = made.digest
            forger.execute("INSERT INTO entries VALUES (?,?,?)", (sequence, made.canonical, made.digest))
        damaged(folder, "rolled back|not signed")

    def test_a_cap_that_the_owner_never_signed(self, folder: Path, forger: sqlite3.Connection) -> None:
        with open_ledger(folder) as ledger:
            head, old = ledger.head, ledger.entries()[1]
        for signature in ("", old.signature):
            forged = Entry(sequence=8, at=0, previous=head.hash, word=cap(1e6), by="owner", signature=signature)
            forger.execute("INSERT OR REPLACE INTO entries VALUES (8,?,?)", (forged.canonical, forged.digest))
            damaged(folder, "entry 8 .* not signed by this node's owner")

    def test_a_charge_that_was_never_reserved(self, folder: Path, forger: sqlite3.Connection) -> None:
        from concord_client.ledger.words import Charge

        with open_ledger(folder) as ledger:
            head = ledger.head
        forged = Entry(sequence=8, at=0, previous=head.hash, word=Charge(run="run-9", round_number=1))
        forger.execute("INSERT INTO entries VALUES (8,?,?)", (forged.canonical, forged.digest))
        damaged(folder, "entry 8 .* no reservation")

    def test_an_open_ledger_notices_that_its_file_was_rolled_back(
        self, folder: Path, forger: sqlite3.Connection
    ) -> None:
        with open_ledger(folder) as ledger:
            forger.execute("DELETE FROM entries WHERE sequence > 3")
            with pytest.raises(LedgerDamagedError, match="replaced while in use"):
                ledger.charge("run-1", 3)

    def test_no_database_at_all(self, folder: Path) -> None:
        (folder / "ledger.db").write_bytes(b"no database " * 1000)
        (folder / "ledger.db-wal").unlink(missing_ok=True)
        damaged(folder, "damaged")

    def test_a_mark_that_cannot_be_read(self, folder: Path) -> None:
        (folder / "ledger.mark").write_text("{")
        damaged(folder, "ledger.mark is damaged")
        with open_ledger(folder, repairing=True) as ledger:
            ledger.repair(ledger.noted())
        with open_ledger(folder) as ledger:
            assert ledger.verify().sequence == 8


class TestRollback:
    @pytest.fixture
    def restored(self, folder: Path) -> Path:
        """A backup of the ledger of before two charges, put in its place."""
        backup = folder / "backup"
        backup.mkdir()
        shutil.copy(folder / "ledger.db", backup)
        with open_ledger(folder) as ledger:
            ledger.reserve(reservation("run-2", 2))
            ledger.charge("run-2", 1)
            ledger.charge("run-2", 2)
        for name in ("ledger.db-wal", "ledger.db-shm"):
            (folder / name).unlink(missing_ok=True)
        shutil.copy(backup / "ledger.db", folder)
        return folder

    def test_it_is_refused_and_says_what_to_do(self, restored: Path) -> None:
        damaged(restored, r"rolled back: it stands at entry 7, and once held entry 10 .* concord-node ledger repair")

    def test_a_ledger_that_is_gone_is_not_begun_anew(self, folder: Path) -> None:
        for file in folder.glob("ledger.db*"):
            file.unlink()
        damaged(folder, "is gone, and once held 7 entries")

    def test_a_restored_home_with_an_old_mark_is_known_by_what_the_coordinator_was_told(self, folder: Path) -> None:
        with open_ledger(folder) as ledger:
            ledger.check_mark(ledger.head)
            with pytest.raises(LedgerDamagedError, match="once held entry 10"):
                ledger.check_mark(Mark(10, "d" * 64))
            with pytest.raises(LedgerDamagedError, match="once held entry 5"):
                ledger.check_mark(Mark(5, "d" * 64))

    def test_repaired_it_goes_on_with_nothing_left(self, restored: Path) -> None:
        with open_ledger(restored, repairing=True) as ledger:
            ledger.repair(ledger.noted())
        with open_ledger(restored) as ledger:
            assert ledger.verify().sequence == 8
            ledger.check_mark(Mark(9, "d" * 64))
            with pytest.raises(LedgerDamagedError):
                ledger.check_mark(Mark(11, "d" * 64))
            with pytest.raises(BudgetRefusedError):
                ledger.reserve(reservation("run-3", 1))
            ledger.set_cap(cap(ROOM + 0.01))
            ledger.reserve(reservation("run-3", 1))

    def test_an_altered_entry_cannot_be_repaired(self, folder: Path, forger: sqlite3.Connection) -> None:
        forger.execute("UPDATE entries SET hash = 'x' WHERE sequence = 3")
        with pytest.raises(LedgerDamagedError, match="entry 3"):
            open_ledger(folder, repairing=True)


class TestAtOnce:
    def test_threads_of_one_process(self, folder: Path) -> None:
        with open_ledger(folder) as ledger:
            _race(lambda number: ledger.reserve(reservation(f"other-{number}", 1)), 20)
            budget = ledger.books().budgets["patients"]
            assert ledger.books().committed(budget) <= budget.cap
            assert len(ledger.books().standings) == 1 + 8

    def test_threads_with_a_connection_each(self, folder: Path) -> None:
        """As the daemon's two channels have: both note where the ledger stands."""
        failed: list[Exception] = []

        def work(number: int) -> None:
            try:
                with open_ledger(folder) as ledger:
                    for step in range(5):
                        ledger.reserve(reservation(f"other-{number}-{step}", 1, rdp=(0.0, 0.0, 0.0)))
            except Exception as error:
                failed.append(error)

        _race(work, 6)
        assert failed == []
        with open_ledger(folder) as ledger:
            assert ledger.noted() == ledger.head

    def test_two_processes(self, folder: Path) -> None:
        program = (
            "import sys; from pathlib import Path; from ledgers import *\n"
            "from concord_shared.errors import BudgetRefusedError\n"
            "done = 0\n"
            "with open_ledger(Path(sys.argv[1])) as ledger:\n"
            "    for number in range(12):\n"
            "        try:\n"
            "            ledger.reserve(reservation(f'run-{sys.argv[2]}-{number}', 1))\n"
            "            done += ledger.charge(f'run-{sys.argv[2]}-{number}', 1)\n"
            "        except BudgetRefusedError: pass\n"
            "print(done)"
        )
        environment = os.environ | {"PYTHONPATH": str(Path(ledgers.__file__).parent)}
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(folder), name], stdout=subprocess.PIPE, text=True, env=environment
            )
            for name in ("a", "b")
        ]
        assert sum(int(worker.communicate(timeout=60)[0]) for worker in workers) == 8
        with open_ledger(folder) as ledger:
            ledger.verify()


class TestDeaths:
    def deaths(self, folder: Path, *words: str) -> dict[str, Any]:
        """In a process of its own: it forks."""
        folder.mkdir()
        command = [sys.executable, ledgers.__file__, str(folder), *words]
        return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=600).stdout))

    def sound(self, found: dict[str, Any]) -> None:
        assert found["uncharged"] == 0, "every answer that left has its charge"
        assert not found["overspent"]
        assert 0 < found["releases"] <= found["charges"] <= found["capacity"]
        assert found["kills_at_work"] > found["kills"] // 10, "the workers were at work when they were killed"

    def test_fifty_kills_overspend_nothing(self, tmp_path: Path) -> None:
        self.sound(self.deaths(tmp_path / "ledger", "50", "sound", "1"))

    def test_a_node_that_releases_before_it_charges_is_caught(self, tmp_path: Path) -> None:
        """Within some hundred kills: no single one has to fall between the two."""
        assert any(self.deaths(tmp_path / str(seed), "50", "broken", str(seed))["uncharged"] for seed in range(10))

    @pytest.mark.slow
    def test_a_thousand_kills_overspend_nothing(self, tmp_path: Path) -> None:
        """Twenty ledgers, each to the end of its budget."""
        found = [self.deaths(tmp_path / str(seed), "50", "sound", str(seed)) for seed in range(20)]
        for each in found:
            self.sound(each)
        sys.stderr.write(json.dumps({key: sum(each[key] for each in found) for key in found[0]}) + "\n")


def _race(work: Any, count: int) -> None:
    def attempt(number: int) -> None:
        with contextlib.suppress(BudgetRefusedError):
            work(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _unwritten(file: Path) -> int | None:
    """Pages of a file that are in memory and not on the disk yet (cachestat, Linux 6.5); None where nobody says."""

    class Range(ctypes.Structure):
        _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))

    class Pages(ctypes.Structure):
        _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "written", "evicted", "recent"))

    if sys.platform != "linux":
        return None
    descriptor, pages = os.open(file, os.O_RDONLY), Pages()
    try:
        failed = ctypes.CDLL(None).syscall(451, descriptor, ctypes.byref(Range(0, 0)), ctypes.byref(pages), 0)
    finally:
        os.close(descriptor)
    return None if failed else int(pages.dirty)
