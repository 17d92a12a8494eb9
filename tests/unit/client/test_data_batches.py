"""Batches: the rows of `read_data`, bounded, by the same code, from every format of tables."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from concord_client.data import RawData, differences, read_batches, read_data
from concord_client.data import frames as bounds
from concord_client.data.dataset import joined
from concord_shared.errors import ContractError, DataError, SourceError
from helpers import TABLE, one_column_plan, plan_of

PLAN = plan_of(TABLE)
REAL = one_column_plan()
TABLE_ROWS = {
    "age": [30, 45, None, 60, 7],
    "city": ["bonn", " köln", "ulm", None, "ulm"],
    "dose": [1.5, -0.2, None, 0.1 + 0.2, 5.0],
    "ill": ["no", "yes", "no", "yes", "yes"],
    "ward": ["A", "B", None, "A", "C"],
    "split": ["train", "test", "validation", "train", "train"],
}
FORMATS = ("csv", "csv.gz", "parquet", "arrow", "arrows", "jsonl", "jsonl.gz")


def written(folder: Path, format: str, rows: dict[str, Any]) -> str:
    """The SPEC of a new file with these rows."""
    frame, file = pl.DataFrame(rows), folder / f"t.{format}"
    match format.removesuffix(".gz"):
        case "csv":
            file.write_text(frame.write_csv(), "utf-8")
        case "parquet":
            frame.write_parquet(file, row_group_size=2)
        case "arrow":
            frame.write_ipc(file, compression="zstd", record_batch_size=2)
        case "arrows":
            frame.write_ipc_stream(file)
        case "jsonl":
            file.write_text("\n".join(json.dumps(row) for row in frame.to_dicts()) + "\n", "utf-8")
    if format.endswith(".gz"):
        file.write_bytes(gzip.compress(file.read_bytes()))
    return f"{format.removesuffix('.gz').removesuffix('s')}:{file}"


def same(one: RawData, other: RawData) -> bool:
    assert one.split is not None
    assert other.split is not None
    return (
        np.array_equal(one.inputs, other.inputs, equal_nan=True)
        and one.targets.tolist() == other.targets.tolist()
        and one.split.tolist() == other.split.tolist()
    )


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_rows_at_once_and_in_batches(tmp_path: Path, format: str) -> None:
    spec = written(tmp_path, format, TABLE_ROWS)
    whole = read_data(spec, PLAN)
    expected = [[30, 0, 1.5], [45, 1, -0.2], [np.nan, 2, np.nan], [60, np.nan, 0.1 + 0.2], [7, 2, 5]]
    assert np.array_equal(whole.inputs, expected, equal_nan=True)
    assert whole.targets.tolist() == [0, 1, 0, 1, 1]
    assert whole.groups["ward"].tolist() == ["A", "B", "", "A", "C"]
    batches = list(read_batches(spec, PLAN, rows=2))
    assert max(map(len, batches)) <= 2
    assert same(joined(batches), whole)
    assert not any(batch.groups for batch in batches)


def test_arrays_come_in_batches_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(5.0)[:, None], y=np.arange(5.0))
    batches = list(read_batches(f"npz:{tmp_path / 'a.npz'}", REAL, rows=2))
    assert [batch.inputs[:, 0].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]


def test_numbers_are_bit_for_bit_whatever_the_format(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, float(np.pi), -12.345678901234567, 1 / 3]
    for format in FORMATS:
        spec = written(tmp_path, format, {"x0": values, "y": [1.0] * 5})
        assert read_data(spec, REAL).inputs[:, 0].tobytes() == np.array(values).tobytes(), format


def test_no_batch_follows_the_first_that_differs_and_all_are_counted(tmp_path: Path) -> None:
    spec = written(tmp_path, "csv", {"x0": [1.0, 2.0, 1e9, 3.0, -1e9], "y": [1.0] * 5})
    got = []
    with pytest.raises(ContractError, match="column x0: 2 values are outside the range") as caught:
        got.extend(read_batches(spec, REAL, rows=1))
    assert [batch.inputs[0, 0] for batch in got] == [1, 2]
    assert [(each.code, each.name, each.count) for each in caught.value.differences] == [("range", "column x0", 2)]


def test_what_is_tolerated_is_passed_on(tmp_path: Path) -> None:
    spec = written(tmp_path, "parquet", {"x0": [1.0, None, 1e9], "y": [1.0] * 3})
    with pytest.raises(ContractError, match="1 of 3 values are missing"):
        list(read_batches(spec, REAL))
    batches = list(read_batches(spec, REAL, tolerated=("missing", "range")))
    assert np.array_equal(joined(batches).inputs[:, 0], [1, np.nan, 1e9], equal_nan=True)


def test_json_lines_of_several_types_and_without_some_columns(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('\n{"x0": true, "y": 1}\n\n{"y": 2, "x0": 3, "z": [1]}\n{"x0": 1.5, "y": "2"}')
    with pytest.raises(ContractError, match="column x0: 1 values are not numbers"):
        read_data(f"jsonl:{tmp_path / 't.jsonl'}", REAL)
    (tmp_path / "t.jsonl").write_text('{"x0": 1, "y": 1}\n{"y": 2}\n')
    found = differences(f"jsonl:{tmp_path / 't.jsonl'}", REAL)
    assert [(each.code, each.count) for each in found] == [("missing", 1)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"x0": 1}\nSECRET\n', "line 2 is not JSON"),
        (b'{"x0": 1}\n\n["SECRET"]\n', "line 3 is not a JSON object"),
        (b'{"x0": "SECRET\xff"}\n', "is not UTF-8 text"),
        (b'{"x0": 1, "y": 2}\n' + b"[" * 100_000 + b"\n", "line 2 is not JSON"),
    ],
)
def test_lines_that_are_no_objects_are_told_by_their_number(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(text)
    with pytest.raises(SourceError, match=words) as caught:
        read_data(f"jsonl:{tmp_path / 't.jsonl'}", REAL)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("adapter", ["csv", "jsonl"])
@pytest.mark.parametrize("where", ["first", "later"])
def test_a_giant_line_is_refused_without_reading_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str, where: str
) -> None:
    monkeypatch.setattr(bounds, "LINE_BYTES_MAX", 1 << 12)
    good = b"x0,y\n1,2\n" if adapter == "csv" else b'{"x0": 1, "y": 2}\n'
    (tmp_path / "t").write_bytes((good if where == "later" else b"") + b'"' + b"x" * (1 << 14))
    with pytest.raises(SourceError, match="has a line of more than"):
        read_data(f"{adapter}:{tmp_path / 't'}", REAL)


def test_a_small_file_that_expands_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(gzip.compress(b"x0,y\n" + b"1,2\n" * (20 << 20)))
    assert (tmp_path / "t.csv").stat().st_size < 1 << 20
    with pytest.raises(SourceError, match="gives more than 200 bytes for each of its own"):
        list(read_batches(f"csv:{tmp_path / 't.csv'}", REAL))


def test_more_columns_than_any_table_has_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(",".join(f"c{index}" for index in range(bounds.COLUMNS_MAX + 1)) + "\n1\n")
    with pytest.raises(SourceError, match="has 100001 columns"):
        read_data(f"csv:{tmp_path / 't.csv'}", REAL)


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x0,y,x0\n1,2,3\n")
    with pytest.raises(SourceError, match="names 1 of its columns twice"):
        read_data(f"csv:{tmp_path / 't.csv'}", REAL)


@pytest.mark.parametrize("format", ["csv", "csv.gz", "parquet", "arrow", "jsonl.gz"])
def test_a_file_cut_anywhere_is_refused_or_read_and_never_anything_else(tmp_path: Path, format: str) -> None:
    spec = written(tmp_path, format, TABLE_ROWS)
    file = tmp_path / f"t.{format}"
    content, refused = file.read_bytes(), 0
    for end in range(0, len(content), max(1, len(content) // 50)):
        file.write_bytes(content[:end])
        try:
            read_data(spec, PLAN)
        except DataError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("change", ["grows", "goes"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: str) -> None:
    spec = written(tmp_path, "csv", {"x0": [1.0, 2.0, 3.0], "y": [1.0] * 3})
    batches = read_batches(spec, REAL, rows=1)
    next(batches)
    if change == "grows":
        (tmp_path / "t.csv").write_text("x0,y\n9,9\n")
    else:
        (tmp_path / "t.csv").unlink()
    with pytest.raises(SourceError, match="changed while it was read"):
        list(batches)
