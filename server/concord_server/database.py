"""The coordinator's database: SQLite by default, PostgreSQL by its URL, one schema for both.

A session is one transaction: what happened in it is stored whole or not at all. Nothing of a database's own errors
leaves this module; a caller learns whether to try again or to ask for something else.
"""

import contextlib
import importlib
import importlib.util
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import DateTime, Dialect, Engine, MetaData, create_engine, event, text
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.types import TypeDecorator
from sqlmodel import Session, SQLModel

from concord_shared.errors import ApiError, ArtefactError, ConflictError, UnavailableError, UsageError

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["Database", "Table", "UtcDateTime", "all_tables", "at_the_end", "lock", "utc_now"]

NOUNS = (
    "api",
    "audit",
    "people",
    "organisations",
    "nodes",
    "datasets",
    "studies",
    "plans",
    "preflights",
    "runs",
    "models",
)
"""Folders of this package with a tables.py."""

PRAGMAS = ("journal_mode=WAL", "foreign_keys=ON", "busy_timeout=5000", "synchronous=FULL")
"""FULL: a power cut must not take back what a node holds a signed head of: to every node the log would look cut."""
AT_THE_END = "at-the-end"
MIGRATIONS = Path(__file__).parent / "migrations"
NAMES = {
    "ix": "ix_%(column_0_N_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Table(SQLModel):
    """Base of all tables. Constraints have names, so that a migration can speak of them on every database."""

    metadata: ClassVar[MetaData] = MetaData(naming_convention=NAMES)


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC; SQLite keeps no time zone, so it is put on again when read."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        assert value is None or value.tzinfo is not None, "a time without its zone"
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def utc_now() -> datetime:
    return datetime.now(UTC)


def all_tables() -> MetaData:
    """The schema as the code has it."""
    for noun in NOUNS:
        importlib.import_module(f"concord_server.{noun}.tables")
    return Table.metadata


class Database:
    """url: as SQLAlchemy writes it, e.g. `sqlite:////srv/concord/concord.db`, `postgresql+psycopg://user@host/name`.

    Raises:
        UsageError: the URL is not one of SQLite or PostgreSQL.
    """

    def __init__(self, url: str) -> None:
        self._file, self._engine = _connect(url)
        self._reading = self._engine.execution_options(reading=True)

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction that may write; commits at the end, rolls back on any error.

        Raises:
            ConflictError: what was written does not fit what is stored.
            UnavailableError: the database is locked, gone, or not of this schema.
        """
        yield from self._transaction(self._engine)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """One transaction that only reads: it waits for no writer.

        Raises:
            UnavailableError: the database is gone, or not of this schema.
        """
        yield from self._transaction(self._reading)

    def _transaction(self, engine: Engine) -> Iterator[Session]:
        with _translated():
            self._refuse_vanished()
            with Session(engine, expire_on_commit=False) as session, session.begin():
                yield session
                for action in session.info.pop(AT_THE_END, {}).values():
                    action(session)

    def _refuse_vanished(self) -> None:
        """An open SQLite connection would go on writing into a deleted file."""
        if self._file is not None and not self._file.exists():
            self._engine.dispose()
            raise UnavailableError(f"the database {self._file.name} is gone; put it back, or restore a backup")

    def upgrade(self, revision: str = "head") -> None:
        """Brings the schema to `revision`; makes the database if it is not there."""
        from alembic import command

        if self._file is not None and not self._file.exists():
            self._file.touch(mode=0o600)
        with self._migrating() as config:
            command.upgrade(config, revision)

    def downgrade(self, revision: str) -> None:
        """Takes the schema back; what only the newer one can hold is lost."""
        from alembic import command

        with self._migrating() as config:
            command.downgrade(config, revision)

    def check(self) -> None:
        """Raises: ArtefactError: the schema is not exactly that of this version of concord."""
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory

        with _translated():
            self._refuse_vanished()
            with self._reading.connect() as connection:
                found = MigrationContext.configure(connection).get_current_revision()
                script = ScriptDirectory.from_config(_alembic(connection))
        if found == script.get_current_head():
            return
        known = {each.revision for each in script.walk_revisions()}
        if found is not None and found not in known:
            raise ArtefactError(
                f"the database has the schema {found!r}, which this version of concord does not know: it is newer, or "
                "not concord's. Install the version that made it; nothing was changed"
            )
        raise ArtefactError(
            f"the database has {'no schema' if found is None else f'the older schema {found!r}'}. "
            "Stop the coordinator, make a backup, then run: concord server upgrade DIR"
        )

    @contextlib.contextmanager
    def _migrating(self) -> Iterator["Config"]:
        """One transaction over all steps. SQLite rebuilds tables to change them: references are off meanwhile."""
        with _translated():
            with self._engine.connect() as connection:
                if self._file is not None:
                    connection.connection.driver_connection.execute("PRAGMA foreign_keys=OFF")  # type: ignore[union-attr]
                yield _alembic(connection)
            self._engine.dispose()

    def close(self) -> None:
        self._engine.dispose()


def at_the_end(session: Session, name: str, action: Callable[[Session], None]) -> None:
    """Does it as the last thing of this transaction, once for each name: what takes a lock that everybody needs takes
    it last, so that nobody who holds it waits for another one.
    """
    session.info.setdefault(AT_THE_END, {})[name] = action


def lock(session: Session, name: str) -> None:
    """Until the end of this transaction, nobody else holds `name`. In SQLite a writing session is alone anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": zlib.crc32(name.encode())})


def _connect(url: str) -> tuple[Path | None, Engine]:
    """The engine, and for SQLite the file."""
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgres", "postgresql"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.get_backend_name() == "postgresql":
            return None, create_engine(parsed, pool_pre_ping=True, pool_timeout=10, connect_args={"connect_timeout": 5})
        if parsed.get_backend_name() != "sqlite" or not parsed.database:
            raise UsageError(f"database_url: expected sqlite:///FILE or postgresql://…, got {parsed.drivername}://…")
        engine = create_engine(parsed, connect_args={"check_same_thread": False})
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise UsageError(
            "database_url: expected sqlite:///FILE, or postgresql://USER@HOST/NAME with the extra `postgres` installed"
        ) from error
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return Path(parsed.database), engine


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _begin_sqlite, not by the driver's guess
    for pragma in PRAGMAS:
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes its turn at the beginning: one that began as a reader could find that it is too late to write."""
    reading = connection.get_execution_options().get("reading", False)
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise ConflictError("it exists already, or it names something that does not; nothing was changed") from error
    except (DataError, OverflowError) as error:
        raise ApiError("a value is out of the range that can be stored; nothing was changed") from error
    except (DBAPIError, PoolTimeoutError) as error:
        raise UnavailableError(
            "the database cannot be used just now (locked, full, unreachable or of another schema); nothing was "
            "changed. Try again; the coordinator's log says more"
        ) from error


def _alembic(connection: Connection) -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
