"""Columns whose words nobody lists: hashed into bins at each node, counted with a minimum, trained on."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from concord_client.data import read_data
from concord_local.inference import evaluate_run
from concord_local.simulation import simulate
from concord_local.slices import write_slice
from concord_server.commands.statistics import show_statistics
from concord_shared.errors import PlanError
from concord_shared.hashed_words import bins_of
from concord_shared.plan import load_plan
from concord_shared.plan.data import Column
from concord_shared.preprocessing import Fitted, feature_names
from concord_shared.statistics.suppression import suppressed
from helpers import TABLE, plan_of

HASHED = TABLE.replace('categories = ["bonn", "köln", "ulm"]', "bins = 64\nminimum_count = 5")
CITY = Column(name="city", kind="category", bins=64)
CITIES = ["bonn", "köln", "ulm", "wien", "graz", "linz"]
ROWS = 1200


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Who lives in wien or graz is ill; one person lives where nobody else does."""
    rng = np.random.default_rng(3)
    city = rng.choice(CITIES, ROWS).astype(object)
    ill = np.isin(city, ["wien", "graz"]) ^ (rng.random(ROWS) < 0.05)
    city[7] = "atlantis"
    rows = {
        "age": rng.uniform(20, 90, ROWS),
        "city": [None if missing else word for missing, word in zip(rng.random(ROWS) < 0.02, city, strict=True)],
        "dose": rng.uniform(-5, 5, ROWS),
        "ill": np.where(ill, "yes", "no"),
    }
    pl.DataFrame(rows).write_csv(tmp_path / "rows.csv")
    file = tmp_path / "plan.toml"
    file.write_text(
        f'{HASHED}\n[rounds]\ncount = 6\n[simulate]\ndata = "csv:{tmp_path}/rows.csv"\nnodes = 3\npartition = "iid"\n'
    )
    return file


def run(plan: Path, out: Path, *overrides: str) -> dict[str, Any]:
    return simulate(str(plan), overrides=list(overrides), workers=1, out=out).summary


def test_a_word_has_one_bin_everywhere_and_bins_name_themselves() -> None:
    words = ["bonn", "köln", "ko\u0308ln", " ulm ", "ulm"]
    first, *rest = bins_of(words, CITY)
    assert rest[0] == rest[1]  # one form of Unicode
    assert rest[2] == rest[3]
    assert all(0 <= place < 64 for place in (first, *rest))
    assert bins_of([f"bin {place}" for place in range(64)], CITY) == list(range(64))
    assert 0 <= bins_of(["bin 64"], CITY)[0] < 64
    many = [f"word {number}" for number in range(6400)]
    counts = np.bincount(bins_of(many, CITY), minlength=64)
    assert counts.min() > 50
    assert counts.max() < 150
    other = Column(name="town", kind="category", bins=64)
    assert bins_of(many, CITY) != bins_of(many, other)


def test_a_model_learns_from_words_that_no_plan_lists(plan: Path, tmp_path: Path) -> None:
    plain = run(plan, tmp_path / "plain")
    masked = run(plan, tmp_path / "masked", "privacy.mode=private")
    listed = run(plan, tmp_path / "listed", f"data.columns=[{listing()}]")
    assert plain["model_digest"] == masked["model_digest"]
    assert plain["metrics"]["accuracy"] > 0.9
    assert abs(plain["metrics"]["accuracy"] - listed["metrics"]["accuracy"]) < 0.02
    again = evaluate_run(tmp_path / "plain", f"csv:{tmp_path}/rows.csv")
    assert again["metrics"]["accuracy"] > 0.9


def listing() -> str:
    words = ", ".join(f"'{city}'" for city in [*CITIES, "atlantis"])
    return (
        "{name='age', range=[0, 120]}, {name='city', kind='category', categories=[" + words + "]}, "
        "{name='dose', range=[-5, 5]}"
    )


def test_a_bin_of_few_rows_is_left_out_of_the_model(plan: Path, tmp_path: Path) -> None:
    run(plan, tmp_path / "run")
    document = json.loads((tmp_path / "run" / "preprocessing.json").read_text("utf-8"))
    fitted = Fitted.from_document(document)
    assert fitted.is_complete
    known, rare = set(bins_of(CITIES, CITY)), bins_of(["atlantis"], CITY)[0]
    assert set(fitted.kept["city"]) == known
    assert rare not in known
    rows = np.array([[50.0, rare, 0.0], [50.0, bins_of(["wien"], CITY)[0], 0.0]])
    one_hot = fitted.transform(rows)
    assert one_hot.dtype == np.float32
    assert one_hot.shape == (2, len(feature_names(fitted.contract, fitted.preprocessing)))
    assert one_hot[:, 1:-1].sum(1).tolist() == [0.0, 1.0]


def test_statistics_tell_no_bin_of_few_rows_and_none_that_is_empty(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = plan.read_text("utf-8").split("[preprocessing]")[0]
    asked = tmp_path / "statistics.toml"
    asked.write_text(
        text.replace('name = "table"\n', 'name = "table"\nkind = "statistics"\n', 1)
        + '[statistics]\nof = ["moments"]\nminimum_count = 5\n'
        + f'[simulate]\ndata = "csv:{tmp_path}/rows.csv"\nnodes = 3\npartition = "iid"\n'
    )
    summary = run(asked, tmp_path / "run", "privacy.mode=private")
    counts = summary["statistics"]["columns"]["city"]["counts"]
    assert len(counts) == 64
    told = {place for place, count in enumerate(counts) if count is not None}
    assert told <= set(bins_of(CITIES, CITY))
    assert len(told) >= len(CITIES) - 1
    assert "atlantis" not in json.dumps(summary)
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert {int(place) for place in re.findall(r"<dt>bin (\d+)</dt>", page)} == told
    show_statistics(summary["statistics"], load_plan(str(asked)).plan.document())
    shown = capsys.readouterr().out
    assert {int(place) for place in re.findall(r"^bin (\d+) ", shown, re.MULTILINE)} == told
    assert f"{64 - len(told)} bins of few rows or none" in shown


def test_empty_bins_are_hidden_and_never_alone() -> None:
    assert suppressed([0, 9, 0, 9, 0, 0], 5) == [0, 9, 0, 9, 0, 0]
    assert suppressed([0, 9, 8, 9, 0, 0], 5, of_hashed=True) == [None, None, None, 9, 0, 0]


def test_a_million_words_fit_into_few_bins(tmp_path: Path) -> None:
    pl.DataFrame(
        {
            "age": np.full(1_000_000, 50.0),
            "city": pl.Series([f"w{number}" for number in range(1_000_000)]),
            "dose": np.zeros(1_000_000),
            "ill": np.where(np.arange(1_000_000) % 2, "no", "yes"),
        }
    ).write_parquet(tmp_path / "rows.parquet")
    data = read_data(f"parquet:{tmp_path}/rows.parquet", plan_of(HASHED))
    assert np.bincount(data.inputs[:, 1].astype(int), minlength=64).min() > 14_000


def test_a_partners_slice_reads_back_as_the_same_bins(plan: Path, tmp_path: Path) -> None:
    contract = plan_of(HASHED)
    data = read_data(f"csv:{tmp_path}/rows.csv", contract)
    rows = np.arange(0, ROWS, 3)
    again = read_data(write_slice(data, rows, contract, tmp_path), contract)
    assert np.array_equal(again.inputs, data.inputs[rows], equal_nan=True)


@pytest.mark.parametrize(
    ("column", "match"),
    [
        ("{name='city', kind='category', bins=64, categories=['a', 'b']}", "in place of"),
        ("{name='city', bins=64}", "in place of"),
        ("{name='city', kind='category', bins=1}", "at least 2"),
        ("{name='city', kind='category', categories=['a', 'b'], minimum_count=3}", "minimum_count belongs to bins"),
    ],
)
def test_bins_that_say_nothing_are_refused(column: str, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        plan_of(TABLE, f"data.columns=[{column}]")
