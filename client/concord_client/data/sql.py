"""Rows of a database, through SQLAlchemy: a table or a query that a settings file at the node names.

    url_env = "CLINIC_URL"     # the variable that holds postgresql://USER:PASSWORD@HOST/DATABASE, or sqlite:////FILE
    table = "patients"         # or query = "SELECT …"
    order_by = ["id"]          # columns that tell each row apart; all columns where none is named

The URL stays in that file, in the environment, or in a file of its own (`url_file`): it is never stored, shown or
logged. Rows are read in one statement, in one order, so that equal tables give equal rows and an equal digest.
"""

import hashlib
import json
import os
import sqlite3
import stat
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from concord_shared.errors import SourceError

if TYPE_CHECKING:
    import polars as pl
    from sqlalchemy import URL, Connection, Engine

__all__ = ["RowsDigest", "SqlSource", "database_file", "digest_of", "open_source", "read_rows"]

SETTINGS_BYTES_MAX = 1 << 20
CONNECT_TIMEOUT_S = 15


class SqlSource(BaseModel):
    """The settings file. Exactly one of url, url_env and url_file; exactly one of table and query."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    url: str = Field("", repr=False)
    url_env: str = ""
    url_file: str = ""
    table: str = ""
    query: str = ""
    order_by: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> "SqlSource":
        if sum(map(bool, (self.url, self.url_env, self.url_file))) != 1:
            raise ValueError("expected one of url, url_env and url_file")
        if bool(self.table) == bool(self.query):
            raise ValueError("expected one of table and query")
        return self


class RowsDigest:
    """SHA-256 over the names of the columns and all rows, in their order; the same however they are cut in batches."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def names(self, names: Sequence[str]) -> None:
        self._update(names)

    def rows(self, rows: Sequence[Sequence[Any]]) -> None:
        for row in rows:
            self._update(row)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()

    def _update(self, row: Sequence[Any]) -> None:
        self._sha256.update(json.dumps(list(row), default=_typed, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        self._sha256.update(b"\n")


def open_source(path: Path) -> SqlSource:
    """Raises: SourceError: the settings file is not one, or others may read its password. Without its content."""
    try:
        if path.stat().st_size > SETTINGS_BYTES_MAX:
            raise SourceError(path, f"expected at most {SETTINGS_BYTES_MAX} bytes of settings for a database")
        source = SqlSource.model_validate_json(json.dumps(tomllib.loads(path.read_text("utf-8")), default=str))
    except OSError as error:
        raise SourceError(path, f"cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise SourceError(path, f"not settings of a database: {where}: {first['msg']}".replace(": : ", ": ")) from None
    except ValueError:
        raise SourceError(path, "not valid TOML; expected the settings of a database, as in the README") from None
    if source.url and os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise SourceError(path, "holds a database's URL and others may read it. Run: chmod 600 on it, or use url_env")
    return source


def read_rows(path: Path, rows: int, digest: RowsDigest | None = None) -> Iterator["pl.DataFrame"]:
    """The rows of the settings file's table or query, at most `rows` in a frame.

    Raises:
        SourceError: the database cannot be reached, goes away meanwhile, or does not answer the query.
    """
    for names, part in _walk(path, rows, digest or RowsDigest()):
        yield _frame(names, part)


def digest_of(path: Path, rows: int = 1 << 13) -> str:
    """The content's version: one walk over all rows in their order.

    Raises:
        SourceError: as `read_rows`.
    """
    digest = RowsDigest()
    for _ in _walk(path, rows, digest):
        pass
    return digest.hexdigest()


def _walk(path: Path, rows: int, digest: RowsDigest) -> Iterator[tuple[list[str], Sequence[Sequence[Any]]]]:
    """Names of the columns, and rows: at least once, so that a table without rows has columns."""
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    source, count = open_source(path), 0
    try:
        engine = _engine(path, _url(path, source))
    except (ImportError, NoSuchModuleError):
        raise SourceError(
            path, "no driver for this database is installed; for PostgreSQL: pip install 'concord-node[postgres]'"
        ) from None
    try:
        with engine.connect() as connection:
            names, statement = _statement(path, connection, source)
            digest.names(names)
            yield names, []
            options = {"stream_results": True, "yield_per": rows}
            with closing(connection.execution_options(**options).execute(statement)) as result:
                for part in result.partitions(rows):
                    count += len(part)
                    digest.rows(part)
                    yield names, part
    except (SQLAlchemyError, sqlite3.Error) as error:
        kind = type(getattr(error, "orig", None) or error).__name__  # its text may hold a value, or the URL
        if count:
            raise SourceError(path, f"the database went away while its rows were read ({kind}); try again") from None
        raise SourceError(path, f"the database cannot be reached, or does not answer the query ({kind})") from None
    finally:
        engine.dispose()


def database_file(path: Path) -> Path | None:
    """Where an SQLite database lies; None for a server."""
    url = _url(path, open_source(path))
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def _url(path: Path, source: SqlSource) -> "URL":
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    text = source.url
    if source.url_env:
        text = os.environ.get(source.url_env, "")
        if not text:
            raise SourceError(
                path, f"the variable {source.url_env} with the database's URL is not set for this process"
            )
    if source.url_file:
        try:
            text = (path.parent / Path(source.url_file).expanduser()).read_text("utf-8").strip()
        except (OSError, ValueError):
            raise SourceError(path, "its url_file cannot be read") from None
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise SourceError(path, "its URL is none; expected postgresql://USER:PASSWORD@HOST/DATABASE") from None
    return url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url


def _engine(path: Path, url: "URL") -> "Engine":
    """For reading only, where the database can promise it."""
    from sqlalchemy import NullPool, create_engine

    if url.get_backend_name() == "sqlite":
        file = f"file:{quote(str(Path(url.database or '').resolve()))}?mode=ro"
        return create_engine("sqlite://", creator=lambda: sqlite3.connect(file, uri=True), poolclass=NullPool)
    arguments: dict[str, Any] = {}
    if url.get_backend_name() == "postgresql":
        arguments = {"connect_timeout": CONNECT_TIMEOUT_S, "options": "-c default_transaction_read_only=on"}
    return create_engine(url, connect_args=arguments, poolclass=NullPool, hide_parameters=True)


def _statement(path: Path, connection: "Connection", source: SqlSource) -> tuple[list[str], Any]:
    """The names of the columns, and what selects all rows in one order."""
    from sqlalchemy import text

    quoted = connection.dialect.identifier_preparer.quote
    table = ".".join(map(quoted, source.table.split(".")))
    inner = source.query.strip().rstrip(";") or f"SELECT * FROM {table}"  # noqa: S608 - the owner's own settings
    wrapped = f"SELECT * FROM (\n{inner}\n) AS source".replace(":", r"\:")  # noqa: S608 - the owner's own settings
    names = list(connection.execute(text(f"{wrapped} WHERE 1 = 0")).keys())
    unknown = [name for name in source.order_by if name not in names]
    if unknown or len(set(names)) != len(names):
        problem = f"order_by names {len(unknown)} columns that are not there" if unknown else "columns share a name"
        raise SourceError(path, problem)
    order = [quoted(name).replace(":", r"\:") for name in source.order_by or names]
    return names, text(f"{wrapped} ORDER BY {', '.join(order)}")


def _frame(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> "pl.DataFrame":
    import polars as pl

    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return pl.DataFrame([_series(name, values) for name, values in zip(names, columns, strict=True)])


def _series(name: str, values: Sequence[Any]) -> "pl.Series":
    """Numbers where all are numbers, else text: a database may hold both in one column."""
    import polars as pl

    kinds = set(map(type, values)) - {type(None)}
    if kinds <= {int} and all(value is None or -(2**63) <= value < 2**63 for value in values):
        return pl.Series(name, values, dtype=pl.Int64)
    if kinds <= {int, float, Decimal}:
        return pl.Series(name, [None if value is None else float(value) for value in values], dtype=pl.Float64)
    if bytes in kinds or memoryview in kinds:
        return pl.Series(name, [None] * len(values), dtype=pl.Binary)
    words = [value if value is None or isinstance(value, str) else str(value) for value in values]
    return pl.Series(name, words, dtype=pl.String)


def _typed(value: Any) -> str:
    """Of what JSON has no type for."""
    content = bytes(value).hex() if isinstance(value, (bytes, memoryview, bytearray)) else str(value)
    return f"{type(value).__name__}:{content}"
