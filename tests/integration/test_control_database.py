"""The database: migrations up and down, foreign schemas, locks and losses, on SQLite and on a real PostgreSQL."""

import sqlite3
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text
from sqlmodel import Session, select

from concord_server.audit.service import record
from concord_server.audit.tables import AuditEvent
from concord_server.database import Database, all_tables, utc_now
from concord_server.nodes.service import notify
from concord_server.nodes.tables import Node, NodeUpdate
from concord_server.organisations.tables import Organisation
from concord_shared.errors import ApiError, ArtefactError, ConflictError, UnavailableError, UsageError
from coordinators import Coordinator, make_coordinator


def test_migrations_make_the_schema_of_the_code(database_url: str) -> None:
    database = Database(database_url)
    database.upgrade()
    database.check()
    with database._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, all_tables()) == []
    database.close()


def test_migrations_go_down_and_up_again(database_url: str) -> None:
    database = Database(database_url)
    database.upgrade()
    database.downgrade("base")
    with database._engine.connect() as connection:
        assert set(inspect(connection).get_table_names()) <= {"alembic_version", "sqlite_sequence"}
    with pytest.raises(ArtefactError, match="no schema"):
        database.check()
    database.upgrade()
    database.check()
    database.close()


def test_a_schema_that_is_not_known_is_refused(database_url: str) -> None:
    database = Database(database_url)
    database.upgrade()
    with database.session() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ArtefactError, match="9999"):
        database.check()
    database.close()


def test_a_database_without_schema_names_the_command(database_url: str) -> None:
    database = Database(database_url)
    if database_url.startswith("sqlite"):
        Path(database_url.removeprefix("sqlite:///")).touch()
    with pytest.raises(ArtefactError, match="concord server upgrade DIR"):
        database.check()
    with pytest.raises(UnavailableError), database.session() as session:
        session.exec(select(AuditEvent)).all()
    database.close()


def _record_and_fail(session: Session) -> None:
    record(session, "coordinator", "test:begin", "x")
    session.flush()
    _ = 1 / 0


def test_a_session_is_whole_or_nothing(database_url: str) -> None:
    database = Database(database_url)
    database.upgrade()
    with pytest.raises(ZeroDivisionError), database.session() as session:
        _record_and_fail(session)
    with database.reading() as session:
        assert session.exec(select(AuditEvent)).all() == []
    database.close()


def test_times_come_back_in_utc(database_url: str) -> None:
    database = Database(database_url)
    database.upgrade()
    now = utc_now()
    with database.session() as session:
        session.add(Organisation(name="a", title="A", created_at=now))
    with database.reading() as session:
        assert session.get(Organisation, "a").created_at == now  # type: ignore[union-attr]
    database.close()


def test_what_does_not_fit_is_a_conflict(database_url: str) -> None:
    database = Database(database_url)
    database.upgrade()
    with database.session() as session:
        session.add(Organisation(name="a", title="A", created_at=utc_now()))
    with pytest.raises(ConflictError), database.session() as session:
        session.add(Organisation(name="a", title="B", created_at=utc_now()))
    with pytest.raises(ConflictError), database.session() as session:
        notify(session, "nobody", "plan", "x", {})
    with pytest.raises(ApiError) as caught, database.session() as session:
        session.execute(text("INSERT INTO node_update (sequence) VALUES (:n)"), {"n": 1 << 70})
    assert caught.value.status < 500
    database.close()


def test_numbers_of_the_outbox_are_stored_in_order(database_url: str) -> None:
    """A reader that saw number n never finds a lower one later, however many write."""
    database = Database(database_url)
    database.upgrade()
    with database.session() as session:
        session.add(Organisation(name="a", title="A", created_at=utc_now()))
        session.flush()
        session.add(
            Node(
                name="n",
                organisation="a",
                state="active",
                identity_key="i",
                flower_key="f",
                tls_key="t",
                certificate_serial="1",
                certificate_not_after=utc_now(),
                enrolled_at=utc_now(),
            )
        )
    done, missed = threading.Event(), []

    def write() -> None:
        for _ in range(20):
            with database.session() as session:
                notify(session, "n", "plan", "x", {})
                notify(session, "n", "plan", "y", {})

    def read() -> None:
        seen: set[int] = set()
        while not done.is_set():
            with database.reading() as session:
                now = set(session.exec(select(NodeUpdate.sequence)).all())
            missed.extend(each for each in now - seen if seen and each < max(seen))  # type: ignore[operator,type-var]
            seen |= now  # type: ignore[arg-type]

    reader, writers = threading.Thread(target=read), [threading.Thread(target=write) for _ in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert missed == []
    with database.reading() as session:
        assert len(session.exec(select(NodeUpdate)).all()) == 160
    database.close()


def test_the_whole_walk_on_each_database(tmp_path: Path, database_url: str) -> None:
    coordinator = make_coordinator(tmp_path / "c", database_url)
    _, node = coordinator.enrol("ward-1", "hospital-a")
    assert node.get("/api/node/updates").json()["state"] == "active"
    assert coordinator.admin.get("/api/v1/audit", params={"limit": 1}).json()["next"] is not None
    assert coordinator.admin.post("/api/v1/organisations", json={"name": "hospital-b"}).status_code == 409
    coordinator.close()


def test_a_locked_database_is_a_problem_and_no_trace(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("concord_server.database.PRAGMAS", ("journal_mode=WAL", "foreign_keys=ON", "busy_timeout=100"))
    coordinator.database.close()
    with sqlite3.connect(coordinator.home.database_file, isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        answer = coordinator.admin.post("/api/v1/organisations", json={"name": "hospital-c"})
        other.execute("ROLLBACK")
    assert answer.status_code == 503
    assert answer.json()["code"] == "unavailable"
    assert "sqlite" not in answer.text.lower()
    assert coordinator.admin.post("/api/v1/organisations", json={"name": "hospital-c"}).status_code == 201


def test_what_was_told_to_a_node_survives_a_power_cut(coordinator: Coordinator) -> None:
    """Each transaction is on the disk before its answer leaves; else the audit log could lose a head's last entries."""
    with coordinator.database.session() as session:
        kept = [session.exec(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")]  # type: ignore[call-overload]
    assert kept == ["wal", 2]


def test_a_vanished_database_is_a_problem_and_is_not_made_anew(coordinator: Coordinator) -> None:
    file = coordinator.home.database_file
    coordinator.database.close()
    file.rename(file.with_suffix(".away"))
    assert coordinator.admin.get("/api/v1/me").status_code == 503
    assert coordinator.anyone.get("/api/health").status_code == 503
    assert not file.exists()
    file.with_suffix(".away").rename(file)
    assert coordinator.admin.get("/api/v1/me").status_code == 200


def test_a_damaged_database_is_a_problem(coordinator: Coordinator) -> None:
    coordinator.database.close()
    coordinator.home.database_file.write_bytes(b"not a database at all, but long enough to be one" * 100)
    assert coordinator.admin.get("/api/v1/me").status_code == 503


@pytest.mark.parametrize("url", ["mysql://x/y", "nonsense", "sqlite://", "postgresql+nothing://x/y"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="database_url"):
        Database(url)


def test_an_unreachable_postgresql_is_a_problem() -> None:
    database = Database("postgresql://nobody@127.0.0.1:1/nothing")
    with pytest.raises(UnavailableError), database.session() as session:
        session.execute(text("SELECT 1"))
