"""Canaries: values planted in data that differ from the plan in every way are in no message, log or row of a store."""

import json
import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tomli_w
from PIL import Image
from typer.testing import CliRunner

from concord_client import approvals, registry
from concord_client.cli import app
from concord_client.data import Reading, differences, read_batches
from concord_client.policy import Policy
from concord_shared.errors import ConcordError
from concord_shared.plan.schema import Plan
from helpers import IMAGES, TABLE, plan_of
from unit.client.fake_coordinator import NOW, Partner, partner_in, use_commands_at

WORD, NUMBER = "kanarienvogel", 8675309.25
CANARIES = (WORD, "8675309")
PLAN = plan_of(TABLE, "preprocessing.missing=refuse")
UNITS = plan_of(TABLE, "data.columns=[{name='age', range=[0, 120], unit='years'}, {name='dose', range=[-5, 5]}]")
PICTURES = plan_of(IMAGES)


def table(folder: Path, text: str | bytes) -> str:
    (folder / "own.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return f"csv:{folder / 'own.csv'}"


def missing_column(folder: Path) -> str:
    return table(folder, f"age,{WORD},ill\n{NUMBER},{WORD},no\n")


def other_types(folder: Path) -> str:
    return table(folder, f"age,city,dose,ill\n{WORD},{WORD},{WORD},{WORD}\n{NUMBER},ulm,{NUMBER},no\n")


def missing_values(folder: Path) -> str:
    return table(folder, f"age,city,dose,ill,note\n,,,,{WORD}\n")


def another_encoding(folder: Path) -> str:
    return table(folder, f"age,city,dose,ill\n1,{WORD}ö,1,no\n".encode("latin-1"))


def ragged(folder: Path) -> str:
    return table(folder, f"age,city,dose,ill\n1,ulm,1,no,{WORD},{NUMBER}\n")


def own_split(folder: Path) -> str:
    return table(folder, f"age,city,dose,ill,split\n1,ulm,1,no,{WORD}\n")


def lists(folder: Path) -> str:
    pl.DataFrame({"age": [[NUMBER]], "city": [WORD], "dose": [NUMBER], "ill": [WORD]}).write_parquet(
        folder / "t.parquet"
    )
    return f"parquet:{folder / 't.parquet'}"


def broken_lines(folder: Path) -> str:
    (folder / "t.jsonl").write_text(f'{{"age": "{WORD}", "city": {NUMBER}}}\n{WORD} {NUMBER}\n', "utf-8")
    return f"jsonl:{folder / 't.jsonl'}"


def database(folder: Path) -> str:
    connection = sqlite3.connect(folder / "t.db")
    connection.execute("CREATE TABLE t (age, city, dose, ill)")
    connection.execute("INSERT INTO t VALUES (?,?,?,?)", (WORD, WORD, NUMBER, WORD))
    connection.commit()
    connection.close()
    (folder / "t.toml").write_text(f'url = "sqlite:///{folder / "t.db"}"\ntable = "t"\n', "utf-8")
    (folder / "t.toml").chmod(0o600)
    return f"sql:{folder / 't.toml'}"


def failing_query(folder: Path) -> str:
    database(folder)
    query = f"SELECT CAST('{WORD}' AS int), abs({NUMBER}), nothing FROM t"
    (folder / "t.toml").write_text(f'url = "sqlite:///{folder / "t.db"}"\nquery = "{query}"\n', "utf-8")
    return f"sql:{folder / 't.toml'}"


def pictures(folder: Path) -> str:
    """A class that nobody knows, a damaged image and one of another size, each with a telling name."""
    for name in ("a", "b", WORD):
        (folder / "images" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "images" / name / "0.png")
    whole = (folder / "images" / "a" / "0.png").read_bytes()
    (folder / "images" / "a" / f"{WORD}.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "images" / "b" / f"{WORD}.png")
    return f"images:{folder / 'images'}"


CASES: list[tuple[Callable[[Path], str], Plan, set[str]]] = [
    (missing_column, PLAN, {"column", "range"}),
    (other_types, PLAN, {"type", "category", "range", "class"}),
    (missing_values, PLAN, {"missing", "class"}),
    (another_encoding, PLAN, {"source"}),
    (ragged, PLAN, {"source"}),
    (own_split, PLAN, {"split"}),
    (lists, PLAN, {"type", "category", "range", "class"}),
    (broken_lines, PLAN, {"source"}),
    (database, PLAN, {"type", "category", "range", "class"}),
    (failing_query, PLAN, {"source"}),
    (pictures, PICTURES, {"class", "image", "shape"}),
]


@pytest.fixture
def partner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Partner]:
    (tmp_path / "home").mkdir()
    made = partner_in(tmp_path / "home")
    use_commands_at(made, monkeypatch)
    yield made
    made.store.close()


def command(*words: str) -> str:
    """All that it says, on either stream or as an error."""
    result = CliRunner().invoke(app, list(words), input="", standalone_mode=False)
    return f"{result.output} {result.exception} {result.exception.__cause__ if result.exception else ''}"


@pytest.mark.parametrize(("plant", "plan", "codes"), CASES, ids=lambda each: getattr(each, "__name__", ""))
def test_no_value_is_told_of_data_that_do_not_fit(
    partner: Partner,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    plant: Callable[[Path], str],
    plan: Plan,
    codes: set[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    spec = plant(tmp_path)
    found = differences(spec, plan)
    assert {each.code for each in found} == codes  # all of them at once
    told = [json.dumps([str(each) for each in found])]
    with pytest.raises(ConcordError) as caught:
        list(read_batches(spec, plan))
    told.append(f"{caught.value} {caught.value.__cause__}")
    partner.plan = plan
    (tmp_path / "plan.toml").write_text(toml_of(plan), "utf-8")
    told.append(command("check", str(tmp_path / "plan.toml"), "--data", spec))
    told.append(command("data", "add", "own", spec, "--plan", str(tmp_path / "plan.toml")))
    command("data", "add", "own", spec)  # the owner sees values here; the node keeps none
    if partner.store.dataset("own") is not None:
        dataset = registry.current_dataset(partner.store, "own")
        with pytest.raises(ConcordError) as caught:
            approvals.count_rows(partner.store, dataset, plan, "node-1", Policy().data.roots)
        told.append(f"{caught.value} {caught.value.__cause__}")
        told.append(command("try", str(tmp_path / "plan.toml"), "--dataset", "own"))
        command("data", "publish", "own")
    told.append(caplog.text)
    told += list(rows_of(partner.home.database))
    told += [text for path in partner.home.logs.rglob("*") if path.is_file() for text in [path.read_text("utf-8")]]
    names = {WORD} if WORD in json.dumps(list(columns_of(partner))) else set()  # a column's name is on the card
    assert not [(canary, text) for text in told for canary in CANARIES if canary in text and canary not in names]


def test_the_search_itself_finds_a_canary(partner: Partner) -> None:
    partner.store.set_fact("slip", WORD)
    assert any(WORD in text for text in rows_of(partner.home.database))


def test_a_unit_is_told_and_no_value(tmp_path: Path) -> None:
    spec = table(tmp_path, f"age,dose,ill\n{NUMBER},{NUMBER},no\n")
    found = [str(each) for each in differences(spec, UNITS, Reading(units={"age": "months"}))]
    assert found[0] == "column age: months here, years in the plan"
    assert not any(canary in text for text in found for canary in CANARIES)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_node_of_one_row_or_none_is_told_what_to_do(partner: Partner, tmp_path: Path, rows: int) -> None:
    spec = table(tmp_path, "age,weight,ill\n" + "30,70,no\n" * rows)
    if rows == 0:
        assert "no rows" in command("data", "add", "own", spec)
        return
    registry.add_dataset(partner.store, "own", spec, NOW)
    dataset = registry.current_dataset(partner.store, "own")
    assert approvals.count_rows(partner.store, dataset, partner.plan, "node-1") == (1, 0)


def rows_of(database: Path) -> Iterator[str]:
    connection = sqlite3.connect(database)
    try:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            yield from (repr(row) for row in connection.execute(f"SELECT * FROM {name}"))
    finally:
        connection.close()


def columns_of(partner: Partner) -> Iterator[str]:
    for dataset in partner.store.datasets():
        yield from dataset.columns


def toml_of(plan: Plan) -> str:
    return tomli_w.dumps(without_none({key: value for key, value in plan.document().items() if key != "schema"}))


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(each) for key, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list) else value
