"""What a node cleans of its own rows: duplicates, values outside of the contract, texts."""

from pathlib import Path

import numpy as np
import pytest

from concord_client.data import RawData, Split, read_data
from concord_client.data.dataset import assign_splits, cleaning_counts
from concord_local.federation import Federation
from concord_shared.errors import DataError
from helpers import TABLE, plan_of
from unit.shared.test_fitting import TEXT

OUTSIDE = plan_of(TABLE, "preprocessing.outside=missing", "preprocessing.duplicates=drop")
WORDS = plan_of(TEXT)


def written(directory: Path, text: str) -> str:
    (directory / "t.csv").write_text(text, "utf-8")
    return f"csv:{directory / 't.csv'}"


class TestDuplicates:
    ROWS = np.array([[1.0, 0, np.nan], [1, 0, np.nan], [1, 0, np.nan], [2, 0, 0], [1, 0, 3]])
    DATA = RawData(ROWS, np.array([0, 0, 1, 0, 0]), np.zeros(5, np.uint8))

    def test_of_training_rows_equal_in_every_input_and_the_target_the_first_stays(self) -> None:
        kept = assign_splits(self.DATA, np.arange(5), "a", 1, 0.0, drop_duplicates=True)
        assert kept[Split.TRAIN].tolist() == [0, 2, 3, 4]
        assert assign_splits(self.DATA, np.arange(5), "a", 1, 0.0)[Split.TRAIN].tolist() == [0, 1, 2, 3, 4]

    def test_rows_to_test_on_are_never_dropped(self) -> None:
        data = RawData(self.ROWS, self.DATA.targets, np.full(5, Split.TEST, np.uint8))
        assert len(assign_splits(data, np.arange(5), "a", 1, 0.0, drop_duplicates=True)[Split.TEST]) == 5

    def test_the_same_row_at_two_nodes_is_none(self) -> None:
        data = RawData(self.ROWS, self.DATA.targets, np.zeros(5, np.uint8), {"ward": np.array(list("aabbb"))})
        federation = Federation.of(data, OUTSIDE, "natural:ward", None)
        assert {name: rows[Split.TRAIN].tolist() for name, rows in federation.rows.items()} == {
            "a": [0],
            "b": [2, 3, 4],
        }
        assert federation.dropped == {"a": 1, "b": 0}

    def test_texts_are_compared_as_they_are_read(self) -> None:
        data = RawData(
            np.array(["心脏病", " 心脏病", "心脏 病", "ＡＢ", "AB"]), np.zeros(5, np.int64), np.zeros(5, np.uint8)
        )
        kept = assign_splits(data, np.arange(5), "a", 1, 0.0, drop_duplicates=True)
        assert kept[Split.TRAIN].tolist() == [0, 2, 3]


class TestOutside:
    TEXT = "age,city,dose,ill\n4000,ulm,1,no\n30,ulm,inf,no\n30,ulm,1,no\n30,ulm,1,no\n"

    def test_is_accepted_where_the_plan_says_so_and_counted(self, tmp_path: Path) -> None:
        data = read_data(written(tmp_path, self.TEXT), OUTSIDE)
        assert cleaning_counts(OUTSIDE, data) == {"outside": 2, "duplicates": 1}

    def test_is_refused_otherwise(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="column age: 1 values are outside"):
            read_data(written(tmp_path, self.TEXT), plan_of(TABLE))

    def test_a_category_that_nobody_knows_is_refused_either_way(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="column city: 1 rows have a value outside"):
            read_data(written(tmp_path, "age,city,dose,ill\n1,paris,1,no\n"), OUTSIDE)


class TestTexts:
    def test_a_column_of_text_is_read(self, tmp_path: Path) -> None:
        data = read_data(written(tmp_path, 'words,label,site\n"心脏, 病",a,x\n 天气 ,b,y\n'), WORDS)
        assert data.inputs.tolist() == ["心脏, 病", "天气"]
        assert data.inputs.dtype.kind == "U"
        assert data.targets.tolist() == [0, 1]
        assert data.groups["site"].tolist() == ["x", "y"]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("words,label\n,a\nb,a\n", "column words: 1 texts are missing or empty"),
            (f"words,label\n{'心' * 101},a\n", "column words: 1 texts have more than 100 characters"),
            ("text,label\nx,a\n", "column words: missing; the plan's contract names it"),
            ("words,label\nx,c\n", "target label: 1 rows have a class outside"),
        ],
    )
    def test_what_does_not_fit_is_counted_and_never_shown(self, text: str, words: str, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=words) as caught:
            read_data(written(tmp_path, text), WORDS)
        assert "心心" not in str(caught.value)

    def test_another_encoding_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "t.csv").write_bytes("words,label\n心脏病,a\n".encode("gb18030"))
        with pytest.raises(DataError, match=r"t\.csv: is not UTF-8 text"):
            read_data(f"csv:{tmp_path / 't.csv'}", WORDS)

    def test_a_table_is_no_text(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "t.npz", x=np.zeros((3, 2)), y=np.zeros(3, np.int64))
        with pytest.raises(DataError, match="expected one text in each row"):
            read_data(f"npz:{tmp_path / 't.npz'}", WORDS)

    def test_rows_for_prediction_need_no_label(self, tmp_path: Path) -> None:
        assert len(read_data(written(tmp_path, "words\nx\n"), WORDS, labelled=False)) == 1
