"""A dataset in PostgreSQL: read in one snapshot and order, for reading only, and refused where the server goes away."""

from pathlib import Path
from typing import Any

import psycopg
import pytest

from concord_client.data import read_batches, read_data, sql
from concord_shared.errors import SourceError
from coordinators import new_database_url
from helpers import one_column_plan

PLAN = one_column_plan()
COUNT = 3000


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


@pytest.fixture
def url(postgresql: Any) -> str:
    found = new_database_url(postgresql)
    rows = "SELECT i, i / 100.0, i / 100.0, 'p:' || i, DATE '2020-01-01' + i"
    execute(
        found,
        "CREATE TABLE patients (id int PRIMARY KEY, x0 numeric, y float8, note text, seen date)",
        f"INSERT INTO patients {rows} FROM generate_series(1, {COUNT}) AS i",
    )
    return found


@pytest.fixture
def settings(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLINIC_URL", url)
    (tmp_path / "clinic.toml").write_text('url_env = "CLINIC_URL"\ntable = "public.patients"\norder_by = ["id"]\n')
    return tmp_path / "clinic.toml"


def test_numbers_come_back_as_they_are_and_changes_are_seen(settings: Path, url: str) -> None:
    data = read_data(f"sql:{settings}", PLAN)
    assert data.inputs[:, 0].tolist() == [i / 100 for i in range(1, COUNT + 1)] == data.targets.tolist()
    assert data.groups["seen"][0] == "2020-01-02"
    before = sql.digest_of(settings)
    execute(url, "UPDATE patients SET note = 'other' WHERE id = 7")
    assert sql.digest_of(settings) != before


def test_columns_of_one_name_are_refused(settings: Path) -> None:
    settings.write_text('url_env = "CLINIC_URL"\nquery = "SELECT 1 AS x0, 2 AS x0"\n')
    with pytest.raises(SourceError, match="columns share a name"):
        read_data(f"sql:{settings}", PLAN)


def test_nothing_can_be_written(settings: Path) -> None:
    query = "WITH gone AS (DELETE FROM patients RETURNING *) SELECT * FROM gone"
    settings.write_text(f'url_env = "CLINIC_URL"\nquery = "{query}"\n')
    with pytest.raises(SourceError, match="does not answer the query"):
        read_data(f"sql:{settings}", PLAN)
    settings.write_text('url_env = "CLINIC_URL"\ntable = "patients"\n')
    assert len(read_data(f"sql:{settings}", PLAN)) == COUNT


def test_a_server_that_goes_away_in_the_middle_is_named_without_a_value(settings: Path, url: str) -> None:
    batches = read_batches(f"sql:{settings}", PLAN, rows=100)
    assert next(batches).inputs[0, 0] == 0.01
    others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
    execute(url, f"SELECT pg_terminate_backend(pid) {others}")
    with pytest.raises(SourceError, match=r"went away while its rows were read \(\w+\); try again") as caught:
        list(batches)
    assert url not in str(caught.value)
