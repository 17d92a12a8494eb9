"""What a node infers of a table, what its owner says of it, and that neither leaves; where data may lie."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from concord_client import registry
from concord_client.data import Reading, differences, read_data, survey
from concord_client.policy import Policy
from concord_client.schema import DatasetSchema
from concord_client.store import NodeStore
from concord_shared.errors import SourceError, UsageError
from helpers import one_column_plan
from unit.client.fake_coordinator import NOW, Partner, partner_in, use_commands_at, write_table
from unit.client.node_cli import run, run_json

TABLE = """age,chol,city,note,ill
30,233.5,bonn,a,no
45,?,köln,b,yes
,250,ulm,c,no
60,199,,d,yes
"""
MMOL = one_column_plan("data.columns=[{name='x0', range=[0, 20], unit='mmol/L', units={'mg/dL'=0.02586}}]")


@pytest.fixture
def partner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Partner]:
    made = partner_in(tmp_path)
    use_commands_at(made, monkeypatch)
    yield made
    made.store.close()


def inferred(folder: Path, text: str) -> DatasetSchema:
    (folder / "t.csv").write_text(text, "utf-8")
    found = registry.infer_schema(f"csv:{folder / 't.csv'}")
    assert found is not None
    return found


def test_kinds_ranges_categories_and_missing_values_are_inferred(tmp_path: Path) -> None:
    schema = inferred(tmp_path, TABLE)
    assert (schema.rows, schema.encoding, schema.target, schema.units) == (4, "utf-8", "ill", {})
    found = {column.name: (column.kind, column.range, column.categories, column.missing) for column in schema.columns}
    assert found == {
        "age": ("number", (30, 60), (), 1),
        "chol": ("number", (199, 250), (), 1),
        "city": ("category", None, ("bonn", "köln", "ulm"), 1),
        "note": ("category", None, ("a", "b", "c", "d"), 0),
        "ill": ("category", None, ("no", "yes"), 0),
    }


def test_the_target_is_found_by_its_name_first(tmp_path: Path) -> None:
    assert inferred(tmp_path, "Label,x,site\n1,2,a\n0,3,b\n").target == "Label"
    assert inferred(tmp_path, "x,free\n" + "".join(f"{i},{i}\n" for i in range(50))).target == ""


def test_a_vocabulary_without_end_is_text_and_stays_small(tmp_path: Path) -> None:
    pl.DataFrame({"word": [f"w{i}" for i in range(1_000_000)], "y": 1.0}).write_parquet(tmp_path / "t.parquet")
    schema = registry.infer_schema(f"parquet:{tmp_path / 't.parquet'}")
    assert schema is not None
    assert (schema.columns[0].kind, schema.columns[0].categories, schema.rows) == ("text", (), 1_000_000)
    plan = one_column_plan("data.columns=[{name='word', kind='category', categories=['w1', 'w2']}]")
    (found,) = differences(f"parquet:{tmp_path / 't.parquet'}", plan)
    assert (found.code, found.count) == ("category", 999_998)


def test_every_adapter_infers_the_same(tmp_path: Path) -> None:
    expected = inferred(tmp_path, TABLE)
    frame = pl.read_csv(tmp_path / "t.csv", null_values=["?", ""])
    frame.write_parquet(tmp_path / "t.parquet")
    frame.write_ipc(tmp_path / "t.arrow")
    frame.write_ndjson(tmp_path / "t.jsonl")
    connection = sqlite3.connect(tmp_path / "t.db")
    connection.execute("CREATE TABLE t (age, chol, city, note, ill)")
    connection.executemany("INSERT INTO t VALUES (?,?,?,?,?)", frame.rows())
    connection.commit()
    connection.close()
    (tmp_path / "t.toml").write_text(f'url = "sqlite:///{tmp_path / "t.db"}"\ntable = "t"\n', "utf-8")
    (tmp_path / "t.toml").chmod(0o600)
    for spec in ("parquet:t.parquet", "arrow:t.arrow", "jsonl:t.jsonl", "sql:t.toml"):
        name, _, file = spec.partition(":")
        found = registry.infer_schema(f"{name}:{tmp_path / file}")
        assert found is not None
        assert found.columns == expected.columns, spec
        assert found.target == "ill"


def test_an_owner_is_shown_a_schema_corrects_it_and_is_read_by_it(partner: Partner, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("x0,y\n200,1\n300,2\n", "utf-8")
    shown = run("data", "add", "own", f"csv:{tmp_path / 'own.csv'}")
    assert ["x0", "number", "unknown", "0", "200", "to", "300"] in [line.split() for line in shown.splitlines()]
    file = partner.home.schema_file("own")
    assert file.stat().st_mode & 0o077 == 0
    file.write_text(file.read_text("utf-8").replace('unit = ""', 'unit = "mg/dL"', 1), "utf-8")
    run("data", "schema", "own", "--edit-with", str(file))
    assert run_json("data", "schema", "own")["schema"]["columns"][0]["unit"] == "mg/dL"
    dataset = registry.current_dataset(partner.store, "own")
    data = read_data(dataset.spec, MMOL, reading=registry.verify(partner.store, dataset))
    assert data.inputs[:, 0].tolist() == [200 * 0.02586, 300 * 0.02586]


def test_a_corrected_file_may_come_with_the_data(partner: Partner, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("x0,y\n200,1\n", "utf-8")
    columns = '[[columns]]\nname = "x0"\nkind = "number"\nunit = "mg/dL"\n[[columns]]\nname = "y"\nkind = "number"\n'
    (tmp_path / "own.toml").write_text(f"rows = 1\n{columns}", "utf-8")
    added = run_json("data", "add", "own", f"csv:{tmp_path / 'own.csv'}", "--schema", str(tmp_path / "own.toml"))
    assert added["schema"]["columns"][0]["unit"] == "mg/dL"
    replaced = registry.add_dataset(partner.store, "own", f"csv:{tmp_path / 'own.csv'}", NOW, replaces=True)
    assert registry.reading_of(replaced).units == {"x0": "mg/dL"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('rows = 1\n[[columns]]\nname = "other"\nkind = "number"\n', "the schema is of other columns: 3"),
        ('rows = 1\n[[columns]]\nname = "age"\nkind = "words"\n', "kind"),
        (
            'rows = 1\n[[columns]]\nname = "ill"\nkind = "category"\nunit = "kg"\n',
            "a unit and a range belong to numbers",
        ),
        ('rows = 1\ntarget = "x"\n', "the target is one of the columns"),
    ],
)
def test_a_schema_of_something_else_is_refused(partner: Partner, tmp_path: Path, text: str, words: str) -> None:
    run("data", "add", "patients", f"csv:{tmp_path / 'patients.csv'}", "--replace")
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        run("data", "schema", "patients", "--edit-with", str(tmp_path / "s.toml"))


def test_ranges_and_categories_are_in_the_owners_file_alone(partner: Partner, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("x0,city,y\n4711.25,canaria,1\n0,ulm,2\n", "utf-8")
    run("data", "add", "own", f"csv:{tmp_path / 'own.csv'}", "--publish")
    partner.store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for kept in (partner.home.database.read_bytes(), json.dumps(run_json("data", "show", "own")["card"]).encode()):
        assert b"canaria" not in kept
        assert b"4711" not in kept
    assert "canaria" in partner.home.schema_file("own").read_text("utf-8")
    run("data", "remove", "own", "--yes")
    assert not partner.home.schema_file("own").exists()


def test_a_store_of_before_there_were_schemas_is_carried_over(tmp_path: Path) -> None:
    with NodeStore(tmp_path / "node.db") as store:
        registry.add_dataset(store, "own", f"csv:{write_table(tmp_path / 't.csv')}", NOW)
    connection = sqlite3.connect(tmp_path / "node.db")
    connection.execute("ALTER TABLE datasets DROP COLUMN schema")
    connection.execute("PRAGMA user_version=2")
    connection.commit()
    connection.close()
    with NodeStore(tmp_path / "node.db") as store:
        dataset = registry.current_dataset(store, "own")
        assert dataset.schema is None
        assert registry.verify(store, dataset) == Reading()


class TestUnits:
    def test_a_unit_without_a_factor_is_a_difference_and_nothing_else_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("x0,y\n200,1\n300,2\n", "utf-8")
        spec = f"csv:{tmp_path / 't.csv'}"
        (found,) = differences(spec, MMOL, Reading(units={"x0": "g/L"}))
        assert str(found) == "column x0: g/L here, mmol/L in the plan"
        assert differences(spec, MMOL, Reading(units={"x0": "mg/dL"})) == []

    def test_a_unit_that_nobody_stated_is_taken_as_the_plans(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("x0,y\n5,1\n", "utf-8")
        for units in ({}, {"x0": "mmol/L"}):
            assert read_data(f"csv:{tmp_path / 't.csv'}", MMOL, reading=Reading(units=units)).inputs.tolist() == [[5]]

    def test_the_range_is_of_the_plans_unit(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_text("x0,y\n900,1\n", "utf-8")
        (found,) = differences(f"csv:{tmp_path / 't.csv'}", MMOL, Reading(units={"x0": "mg/dL"}))
        assert found.code == "range"


class TestRoots:
    @pytest.fixture
    def exposed(self, partner: Partner, tmp_path: Path) -> Path:
        (tmp_path / "exposed").mkdir()
        text = partner.home.policy_file.read_text("utf-8").replace("roots = []", f'roots = ["{tmp_path / "exposed"}"]')
        partner.home.policy_file.write_text(text, "utf-8")
        assert Policy.load(partner.home.policy_file).data.roots == (str(tmp_path / "exposed"),)
        return tmp_path / "exposed"

    def test_what_lies_elsewhere_is_neither_registered_nor_read(
        self, partner: Partner, exposed: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(SourceError, match=r"1 of 1 files lie outside of what the owner exposed: data\.roots"):
            run("data", "add", "own", f"csv:{write_table(tmp_path / 'own.csv')}")
        run("data", "add", "own", f"csv:{write_table(exposed / 'own.csv')}")
        dataset = registry.current_dataset(partner.store, "patients")  # registered before there were roots
        with pytest.raises(SourceError, match="outside"):
            registry.verify(partner.store, dataset, (str(exposed),))
        with pytest.raises(SourceError, match="outside"):
            read_data(dataset.spec, partner.plan, reading=Reading(roots=(str(exposed),)))
        assert [each.code for each in differences(dataset.spec, partner.plan, Reading(roots=(str(exposed),)))] == [
            "source"
        ]
        assert "outside of what the owner exposed" in run_json("data", "show", "patients")["files"]

    @pytest.mark.parametrize("what", ["file", "directory", "swapped"])
    def test_a_link_that_leads_elsewhere_is_followed_and_refused(
        self, partner: Partner, exposed: Path, tmp_path: Path, what: str
    ) -> None:
        outside = tmp_path / "outside"
        (outside / "a").mkdir(parents=True)
        (outside / "a" / "1.png").write_bytes(b"x")
        images = exposed / "images"
        (images / "a").mkdir(parents=True)
        (images / "a" / "0.png").write_bytes(b"x")
        if what == "file":
            (images / "a" / "1.png").symlink_to(outside / "a" / "1.png")
        elif what == "directory":
            (images / "b").symlink_to(outside / "a", target_is_directory=True)
        else:
            dataset = registry.add_dataset(partner.store, "own", f"images:{images}", NOW, roots=(str(exposed),))
            images.rename(tmp_path / "gone")
            images.symlink_to(outside, target_is_directory=True)
            with pytest.raises(SourceError, match="outside"):
                registry.verify(partner.store, dataset, (str(exposed),))
            return
        with pytest.raises(SourceError, match="1 of 2 files lie outside"):
            run("data", "add", "own", f"images:{images}")

    def test_a_database_file_elsewhere_is_refused(self, partner: Partner, exposed: Path, tmp_path: Path) -> None:
        sqlite3.connect(tmp_path / "t.db").close()
        (exposed / "t.toml").write_text(f'url = "sqlite:///{tmp_path / "t.db"}"\ntable = "t"\n', "utf-8")
        (exposed / "t.toml").chmod(0o600)
        with pytest.raises(SourceError, match="1 of 2 files lie outside"):
            run("data", "add", "own", f"sql:{exposed / 't.toml'}")

    def test_roots_are_absolute(self, partner: Partner) -> None:
        partner.home.policy_file.write_text('[data]\nroots = ["data"]\n', "utf-8")
        with pytest.raises(UsageError, match="absolute paths"):
            Policy.load(partner.home.policy_file)


def test_words_too_long_to_be_categories_are_text(tmp_path: Path) -> None:
    schema = inferred(tmp_path, f"x,y\n{'w' * (survey.WORD_CHARACTERS_MAX + 1)},1\nb,2\n")
    assert schema.columns[0].kind == "text"
