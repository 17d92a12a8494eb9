"""Rows of a database: in one order, with a digest that sees every change, and no word of its password anywhere."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_client import registry
from concord_client.data import differences, read_batches, read_data, sql
from concord_client.data.dataset import joined
from concord_client.store import NodeStore
from concord_shared.errors import ContractError, DataError, SourceError
from helpers import TABLE, plan_of
from unit.client.fake_coordinator import NOW

PLAN = plan_of(TABLE)
ROWS = [(30, "bonn", 1.5, "no"), (45, " köln", -0.2, "yes"), (None, "ulm", None, "no"), (60, None, 0.25, "yes")]
SECRET = "hunter2"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of an SQLite database with a table `patients`, whose URL is in the environment."""
    fill(tmp_path / "clinic.db", ROWS)
    monkeypatch.setenv("CLINIC_URL", f"sqlite:///{tmp_path / 'clinic.db'}")
    return written(tmp_path, 'url_env = "CLINIC_URL"\ntable = "patients"\n')


@pytest.fixture
def store(tmp_path: Path) -> Iterator[NodeStore]:
    with NodeStore(tmp_path / "node.db") as opened:
        yield opened


def fill(file: Path, rows: list[Any]) -> None:
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE IF NOT EXISTS patients (age, city, dose, ill)")
    connection.execute("DELETE FROM patients")
    connection.executemany("INSERT INTO patients VALUES (?,?,?,?)", rows)
    connection.commit()
    connection.close()


def written(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "clinic.toml"
    file.write_text(text, "utf-8")
    file.chmod(mode)
    return file


def test_a_table_is_read_like_a_file_at_once_and_in_batches(settings: Path) -> None:
    data = read_data(f"sql:{settings}", PLAN)
    found = {tuple(row) for row in np.nan_to_num(data.inputs, nan=-9).tolist()}
    assert found == {(30, 0, 1.5), (45, 1, -0.2), (-9, 2, -9), (60, -9, 0.25)}
    batches = list(read_batches(f"sql:{settings}", PLAN, rows=3))
    assert [len(batch) for batch in batches] == [3, 1]
    assert np.array_equal(joined(batches).inputs, data.inputs, equal_nan=True)


def test_the_order_does_not_depend_on_how_rows_were_put_in(settings: Path, tmp_path: Path) -> None:
    before = read_data(f"sql:{settings}", PLAN).inputs, sql.digest_of(settings)
    fill(tmp_path / "clinic.db", ROWS[::-1])
    assert np.array_equal(read_data(f"sql:{settings}", PLAN).inputs, before[0], equal_nan=True)
    assert sql.digest_of(settings) == before[1]


def test_the_digest_does_not_depend_on_batches(settings: Path) -> None:
    assert sql.digest_of(settings, rows=1) == sql.digest_of(settings, rows=3) == sql.digest_of(settings)


@pytest.mark.parametrize("change", [(30, "bonn", 1.5, "yes"), ("30", "bonn", 1.5, "no"), (30, "bonn", None, "no")])
def test_the_digest_sees_every_value_and_its_type(settings: Path, tmp_path: Path, change: Any) -> None:
    before = sql.digest_of(settings)
    fill(tmp_path / "clinic.db", [change, *ROWS[1:]])
    assert sql.digest_of(settings) != before


def test_a_query_may_name_columns_contain_colons_and_comments(settings: Path, tmp_path: Path) -> None:
    query = "SELECT age, city, dose, ill, 'a:b%' AS note FROM patients WHERE ill LIKE 'y%' -- the ill;"
    written(tmp_path, f'url_env = "CLINIC_URL"\nquery = "{query}"\norder_by = ["age"]\n')
    data = read_data(f"sql:{settings}", PLAN)
    assert data.inputs[:, 0].tolist() == [45, 60]
    assert data.groups["note"].tolist() == ["a:b%"] * 2


def test_a_table_without_rows_is_a_difference(settings: Path, tmp_path: Path) -> None:
    fill(tmp_path / "clinic.db", [])
    assert [each.code for each in differences(f"sql:{settings}", PLAN)] == ["rows"]


def test_text_among_numbers_is_counted_and_never_missing(settings: Path, tmp_path: Path) -> None:
    fill(tmp_path / "clinic.db", [*ROWS, ("many", "ulm", 2, "no")])
    with pytest.raises(ContractError, match="column age: 1 values are not numbers"):
        read_data(f"sql:{settings}", PLAN)


def test_a_database_is_never_written_nor_made(settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, 'url_env = "CLINIC_URL"\nquery = "DELETE FROM patients RETURNING *"\n')
    with pytest.raises(SourceError):
        read_data(f"sql:{settings}", PLAN)
    written(tmp_path, 'url_env = "CLINIC_URL"\ntable = "patients"\n')
    assert len(read_data(f"sql:{settings}", PLAN)) == 4
    monkeypatch.setenv("CLINIC_URL", f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(SourceError, match="cannot be reached"):
        read_data(f"sql:{settings}", PLAN)
    assert not (tmp_path / "other.db").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("url = 1", "url: "),
        (f'url = "postgresql://me:{SECRET}@host/db"', "one of table and query"),
        (f'url = "postgresql://me:{SECRET}@host/db"\npasswort = "{SECRET}"\ntable = "t"', "passwort: Extra inputs"),
        (f'url = "postgresql://me:{SECRET}@host/db"\nurl_env = "X"\ntable = "t"', "one of url, url_env and url_file"),
        (f'url = "{SECRET}"\ntable = "t"', "its URL is none"),
        (f'url = "postgresql://me:{SECRET}@127.0.0.1:1/db"\ntable = "t"', r"cannot be reached.*OperationalError"),
        (f'url = "oracle://me:{SECRET}@host/db"\ntable = "t"', "no driver for this database is installed"),
        (f'url = "nothing://me:{SECRET}@host/db"\ntable = "t"', "no driver for this database is installed"),
        ('url_env = "NOT_SET"\ntable = "t"', "the variable NOT_SET with the database's URL is not set"),
        ('url_file = "absent"\ntable = "t"', "its url_file cannot be read"),
        (f'url = "{SECRET}', "not valid TOML"),
        ('url_env = "CLINIC_URL"\ntable = "absent"', "does not answer the query"),
        ('url_env = "CLINIC_URL"\ntable = "patients"\norder_by = ["id"]', "order_by names 1 columns"),
    ],
)
def test_what_is_wrong_is_told_without_the_password(settings: Path, tmp_path: Path, text: str, words: str) -> None:
    written(tmp_path, text)
    with pytest.raises(SourceError, match=words) as caught:
        read_data(f"sql:{settings}", PLAN)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert SECRET not in "".join(each.what for each in differences(f"sql:{settings}", PLAN))


def test_a_password_that_others_may_read_is_refused(settings: Path, tmp_path: Path) -> None:
    written(tmp_path, f'url = "sqlite:///{tmp_path / "clinic.db"}"\ntable = "patients"\n', 0o644)
    with pytest.raises(SourceError, match="chmod 600"):
        read_data(f"sql:{settings}", PLAN)
    settings.chmod(0o600)
    assert len(read_data(f"sql:{settings}", PLAN)) == 4


def test_the_url_may_lie_in_a_file_of_its_own(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "url").write_text(f"sqlite:///{tmp_path / 'clinic.db'}\n", "utf-8")
    written(tmp_path, 'url_file = "url"\ntable = "patients"\n', 0o644)
    assert len(read_data(f"sql:{settings}", PLAN)) == 4


def test_registered_rows_that_change_are_noticed(store: NodeStore, settings: Path, tmp_path: Path) -> None:
    dataset = registry.add_dataset(store, "patients", f"sql:{settings}", NOW)
    assert (dataset.rows, dataset.columns, dataset.files) == (4, ("age", "city", "dose", "ill"), {})
    reading = registry.verify(store, dataset, now=NOW)
    read_data(dataset.spec, PLAN, reading=reading)
    fill(tmp_path / "clinic.db", ROWS[1:])
    registry.verify(store, dataset, now=NOW + 1)  # looked at a second ago: whoever reads compares
    with pytest.raises(SourceError, match="are not those that were registered"):
        read_data(dataset.spec, PLAN, reading=reading)
    with pytest.raises(DataError, match="changed since registration"):
        registry.verify(store, dataset, now=NOW + registry.CHECKED_S)


def test_a_database_that_cannot_be_reached_is_not_said_to_have_changed(
    store: NodeStore, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = registry.add_dataset(store, "patients", f"sql:{settings}", NOW)
    monkeypatch.delenv("CLINIC_URL")
    with pytest.raises(SourceError, match="CLINIC_URL"):
        registry.verify(store, dataset, now=NOW)
