"""Tables as frames of bounded size, whatever their format: CSV, Parquet, Arrow, JSON lines. A table of readers below.

A frame has the source's own types: text as text, numbers as numbers; `tables.py` makes rows of the contract of it.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from concord_client.data.files import open_bounded
from concord_shared.errors import SourceError
from concord_shared.files import explain

if TYPE_CHECKING:
    import polars as pl

__all__ = ["COLUMNS_MAX", "LINE_BYTES_MAX", "READERS", "ROWS", "read_frames"]

ROWS = 1 << 16
LINE_BYTES_MAX = 8 << 20
COLUMNS_MAX = 100_000
MISSING_WORDS = ("", "?", "NA", "NaN", "nan", "null")
NOT_UTF8 = "is not UTF-8 text; convert it, for example with: iconv -f GB18030 -t UTF-8 OLD > NEW"
LONG_LINE = f"has a line of more than {LINE_BYTES_MAX >> 20} MiB; is it a table, with its quotes closed?"

Frames = Iterator["pl.DataFrame"]
Reader = Callable[[Path, Collection[str] | None, int], Frames]


def read_frames(adapter: str, path: Path, columns: Collection[str] | None = None, rows: int = ROWS) -> Frames:
    """The rows of a table in their order, at most `rows` in a frame; never empty of columns.

    Args:
        columns: which to read, as far as they are there; None for all of them.

    Raises:
        SourceError: it cannot be read; without a value of it.
    """
    import polars as pl

    try:
        for frame in READERS[adapter](path, columns, rows):
            yield from frame.iter_slices(rows)
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile) or error.errno is None:
            raise SourceError(path, f"not a readable {_TITLES[adapter]} file: {type(error).__name__}") from None
        raise SourceError(path, f"cannot be read: {explain(error)}") from error
    except (pl.exceptions.PolarsError, ValueError, EOFError, zlib.error, NotImplementedError, KeyError) as error:
        raise SourceError(path, _why(adapter, error)) from None  # its text may hold a value


def _read_csv(path: Path, columns: Collection[str] | None, rows: int) -> Frames:
    import polars as pl
    from pyarrow import csv

    reading = csv.ReadOptions(block_size=LINE_BYTES_MAX)
    parsing = csv.ParseOptions(newlines_in_values=True)
    with open_bounded(path) as file:
        names = _header(path, file)
    with open_bounded(path) as file:
        options = csv.ConvertOptions(
            column_types=dict.fromkeys(names, "string"),
            include_columns=_chosen(names, columns),
            strings_can_be_null=True,
            null_values=list(MISSING_WORDS),
        )
        words = pl.all().str.strip_chars()
        for batch in csv.open_csv(file, reading, parsing, options):
            frame = pl.DataFrame(pl.from_arrow(batch))
            yield frame.select(pl.when(words.is_in(MISSING_WORDS)).then(None).otherwise(words).name.keep())


def _header(path: Path, file: IO[bytes]) -> list[str]:
    """The names of a CSV file's columns."""
    import csv

    line = file.readline(LINE_BYTES_MAX)
    if len(line) == LINE_BYTES_MAX:
        raise SourceError(path, LONG_LINE)
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SourceError(path, NOT_UTF8) from None
    return _checked(path, next(csv.reader([text]), []))


def _read_parquet(path: Path, columns: Collection[str] | None, rows: int) -> Frames:
    import polars as pl
    from pyarrow import parquet

    # pages are fetched as they are needed: a file of a single row group does not come into memory as a whole
    with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        names = _checked(path, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=rows, columns=_chosen(names, columns)):
            yield pl.DataFrame(pl.from_arrow(batch))


def _read_arrow(path: Path, columns: Collection[str] | None, rows: int) -> Frames:
    """Arrow IPC: a file (Feather, version 2), or a stream. One record batch in memory at a time."""
    import polars as pl
    import pyarrow as pa

    with pa.OSFile(str(path)) as file:  # not mapped: a file that is cut while it is read would end the process
        try:
            reader = pa.ipc.open_file(file)
        except pa.ArrowInvalid:
            file.seek(0)
            batches = pa.ipc.open_stream(file)
            names = _chosen(_checked(path, batches.schema.names), columns)
        else:
            names = _chosen(_checked(path, reader.schema.names), columns)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        for batch in batches:
            yield pl.DataFrame(pl.from_arrow(batch.select(names)))


def _read_jsonl(path: Path, columns: Collection[str] | None, rows: int) -> Frames:
    """One JSON object a line; what a line leaves out is missing."""
    import polars as pl

    first = 1
    with open_bounded(path) as file:
        while lines := _lines(path, file, rows):
            content = [line for line in lines if line.strip()]
            if content:
                try:
                    frame = pl.read_ndjson(io.BytesIO(b"".join(content)), infer_schema_length=None)
                except pl.exceptions.PolarsError:
                    frame = _objects(path, lines, first)
                yield frame.select(_chosen(_checked(path, frame.columns), columns))
            first += len(lines)


def _lines(path: Path, file: IO[bytes], rows: int) -> list[bytes]:
    """The next lines: at most `rows`, and not much more than 8 MiB."""
    lines: list[bytes] = []
    size = 0
    while len(lines) < rows and size < LINE_BYTES_MAX and (line := file.readline(LINE_BYTES_MAX)):
        if len(line) == LINE_BYTES_MAX:
            raise SourceError(path, LONG_LINE)
        lines.append(line)
        size += len(line)
    return lines


def _objects(path: Path, lines: list[bytes], first: int) -> "pl.DataFrame":
    """Lines whose values are of several types, as text; or the number of the line that is no JSON object."""
    import polars as pl

    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            raise SourceError(path, NOT_UTF8) from None
        except (ValueError, RecursionError):
            raise SourceError(path, f"line {number} is not JSON") from None
        if not isinstance(row, dict):
            raise SourceError(path, f'line {number} is not a JSON object, as in {{"column": 1}}')
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    _checked(path, names)
    return pl.DataFrame({name: pl.Series([_word(row.get(name)) for row in rows], dtype=pl.String) for name in names})


def _word(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _checked(path: Path, names: list[str]) -> list[str]:
    if len(names) > COLUMNS_MAX:
        raise SourceError(path, f"has {len(names)} columns; expected at most {COLUMNS_MAX}")
    if len(set(names)) != len(names):
        raise SourceError(path, f"names {len(names) - len(set(names))} of its columns twice")
    return names


def _chosen(names: list[str], columns: Collection[str] | None) -> list[str]:
    """In the source's order; its first where it has none of them, so that rows are counted still."""
    if columns is None:
        return names
    return [name for name in names if name in columns] or names[:1]


def _why(adapter: str, error: Exception) -> str:
    """What a library says of a source, without its values."""
    text = str(error)
    if isinstance(error, UnicodeDecodeError) or re.search("invalid utf-?8", text, re.IGNORECASE):
        return NOT_UTF8
    if "straddl" in text:
        return LONG_LINE
    ragged = re.search(r"Expected (\d+) columns, got (\d+)", text)
    if ragged:
        return f"not a readable CSV file: a line has {ragged[2]} fields, the header {ragged[1]}"
    return f"not a readable {_TITLES[adapter]} file: {type(error).__name__}"


READERS: dict[str, Reader] = {
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "jsonl": _read_jsonl,
}
_TITLES = {"csv": "CSV", "parquet": "Parquet", "arrow": "Arrow", "jsonl": "JSON lines"}
