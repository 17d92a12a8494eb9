from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from concord_client.data import RawData, read_data
from concord_shared.errors import DataError
from helpers import REGRESSION, TABLE, one_column_plan, plan_of

PLAN = plan_of(TABLE)
REAL = one_column_plan()
SECRET = "4711.5"

ROWS = """age,city,dose,ill,ward,split
30,bonn,1.5,no,A,train
 45 ,köln,-2e-1,yes,B,test
,ulm,?,no,,validation
60,,0,yes,A,train
"""


def read(tmp_path: Path, text: str | bytes, plan: Any = PLAN) -> RawData:
    file = tmp_path / "t.csv"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_data(f"csv:{file}", plan)


def refused(tmp_path: Path, text: str | bytes, words: str, plan: Any = PLAN) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path, text, plan)
    assert SECRET not in str(caught.value)
    assert "t.csv" in str(caught.value)


class TestCsv:
    def test_reads_columns_target_split_and_groups(self, tmp_path: Path) -> None:
        data = read(tmp_path, ROWS)
        expected = [[30, 0, 1.5], [45, 1, -0.2], [np.nan, 2, np.nan], [60, np.nan, 0]]
        assert np.array_equal(data.inputs, expected, equal_nan=True)
        assert data.inputs.dtype == np.float64
        assert data.targets.tolist() == [0, 1, 0, 1]
        assert data.split is not None
        assert data.split.tolist() == [0, 2, 1, 0]
        assert data.groups["ward"].tolist() == ["A", "B", "", "A"]
        assert data.groups["ill"].tolist() == [0, 1, 0, 1]
        assert data.groups.keys() == {"ward", "ill"}

    def test_the_order_of_columns_does_not_matter(self, tmp_path: Path) -> None:
        assert read(tmp_path, "ill,dose,city,age\nno,1,ulm,7\n").inputs.tolist() == [[7, 2, 1]]

    @pytest.mark.parametrize("missing", ["", "?", "NA", "NaN", "nan", "null"])
    def test_spellings_of_missing(self, tmp_path: Path, missing: str) -> None:
        data = read(tmp_path, f"age,city,dose,ill\n{missing},{missing},{missing},no\n")
        assert np.isnan(data.inputs).all()

    def test_missing_values_are_refused_where_the_plan_does_not_impute(self, tmp_path: Path) -> None:
        plan = plan_of(TABLE, "preprocessing.missing=refuse")
        refused(tmp_path, ROWS, "column city: 1 of 4 values are missing", plan)

    def test_a_missing_column_is_named(self, tmp_path: Path) -> None:
        refused(
            tmp_path,
            "age,ill,ward\n1,no,A\n",
            "column city: missing; the plan's contract names it\n  column dose: missing",
        )

    def test_a_missing_target_column_is_named(self, tmp_path: Path) -> None:
        refused(tmp_path, "age,city,dose\n1,ulm,2\n", "target ill: missing; the plan's contract names it")

    def test_text_in_a_number_column_is_counted(self, tmp_path: Path) -> None:
        text = f"age,city,dose,ill\n1,ulm,x{SECRET},no\n2,ulm,0,no\n"
        refused(tmp_path, text, "column dose: 1 values are not numbers")

    def test_a_category_outside_the_contract_is_counted(self, tmp_path: Path) -> None:
        text = f"age,city,dose,ill\n1,{SECRET},1,no\n2,Ulm,0,no\n"
        refused(
            tmp_path, text, r"column city: 2 rows have a value outside the contract's categories \(bonn, köln, ulm\)"
        )

    def test_a_class_outside_the_contract_is_counted(self, tmp_path: Path) -> None:
        refused(
            tmp_path,
            f"age,city,dose,ill\n1,ulm,1,{SECRET}\n",
            "target ill: 1 rows have a class outside the contract's 2 classes",
        )

    def test_a_missing_class_is_counted(self, tmp_path: Path) -> None:
        refused(tmp_path, "age,city,dose,ill\n1,ulm,1,\n", "target ill: 1 rows have a class outside")

    @pytest.mark.parametrize("value", [SECRET, "-" + SECRET, "inf", "1e999"])
    def test_a_number_outside_the_range_is_counted(self, tmp_path: Path, value: str) -> None:
        refused(tmp_path, f"age,city,dose,ill\n{value},ulm,1,no\n", "column age: 1 values are outside the range")

    @pytest.mark.parametrize("word", ["holdout", "", "0", SECRET])
    def test_a_split_column_with_another_word_is_refused(self, tmp_path: Path, word: str) -> None:
        text = f"age,city,dose,ill,split\n1,ulm,1,no,train\n1,ulm,1,no,{word}\n"
        refused(tmp_path, text, "column split: expected train, validation or test in every row")

    def test_a_regression_target_that_is_missing_is_counted(self, tmp_path: Path) -> None:
        refused(tmp_path, "x0,y\n1,\n2,3\n", "target y: 1 values are missing", REAL)

    @pytest.mark.parametrize(
        "content",
        [b"", b"x0,y\n1,2,3,4\n", b"x0,y\n\xff\xfe,2\n", b"\0\0\0"],
        ids=["empty", "ragged", "not UTF-8", "zeros"],
    )
    def test_a_file_that_is_no_csv_is_named(self, tmp_path: Path, content: bytes) -> None:
        refused(tmp_path, content, r"t\.csv: ", REAL)

    def test_a_header_alone_has_no_rows(self, tmp_path: Path) -> None:
        refused(tmp_path, "x0,y\n", "no rows", REAL)

    @pytest.mark.parametrize("rows", [1, 2])
    def test_rows_for_prediction_need_no_target(self, tmp_path: Path, rows: int) -> None:
        (tmp_path / "t.csv").write_text("\n".join(["age,city,dose", "1,ulm,1", "2,köln,0"][: rows + 1]), "utf-8")
        data = read_data(f"csv:{tmp_path / 't.csv'}", PLAN, labelled=False)
        assert data.inputs.tolist() == [[1, 2, 1], [2, 1, 0]][:rows]
        assert len(data) == rows


class TestParquet:
    NUMBERS = (0.1 + 0.2, 1e-300, np.pi, -12.345678901234567, 1 / 3)

    def read(self, tmp_path: Path, columns: dict[str, Any], plan: Any = REAL) -> RawData:
        pl.DataFrame(columns).write_parquet(tmp_path / "t.parquet")
        return read_data(f"parquet:{tmp_path / 't.parquet'}", plan)

    def test_numbers_come_back_bit_for_bit(self, tmp_path: Path) -> None:
        data = self.read(tmp_path, {"x0": self.NUMBERS, "y": [0, 1, 2, 3, 4]})
        assert data.inputs[:, 0].tobytes() == np.array(self.NUMBERS).tobytes()

    def test_whole_numbers_may_be_categories(self, tmp_path: Path) -> None:
        plan = plan_of(REGRESSION, "data.columns=[{name='c', kind='category', categories=['1', '2']}]")
        assert self.read(tmp_path, {"c": [2, 1], "y": [0.5, 1]}, plan).inputs.tolist() == [[1], [0]]

    def test_null_and_nan_are_both_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="column x0: 2 of 3 values are missing"):
            self.read(tmp_path, {"x0": [1.0, None, float("nan")], "y": [0, 1, 2]})

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"text"])
    def test_a_file_that_is_no_parquet_is_named(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "t.parquet").write_bytes(content)
        with pytest.raises(DataError, match=r"t\.parquet: not a readable Parquet file"):
            read_data(f"parquet:{tmp_path / 't.parquet'}", REAL)

    @pytest.mark.parametrize("extra", [[[1.0, 2.0]], [b"\xff"]], ids=["list", "bytes"])
    def test_a_column_that_the_plan_does_not_name_may_be_of_any_type(self, tmp_path: Path, extra: Any) -> None:
        assert len(self.read(tmp_path, {"x0": [1.0], "y": [0], "extra": extra})) == 1

    def test_a_list_in_a_column_of_the_plan_is_a_data_error(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="x0"):
            self.read(tmp_path, {"x0": [[1.0]], "y": [0]})
