import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from concord_client.data import Split, read_data
from concord_shared.errors import DataError
from concord_shared.plan import load_plan

HEART, WINE = load_plan("heart-disease").plan, load_plan("wine-quality").plan


class TestHeartDisease:
    @pytest.fixture
    def copy(self, dataset_path: Callable[[str], Path], tmp_path: Path) -> Path:
        """A copy that a test may damage."""
        for file in dataset_path("heart_disease").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    def test_rows_and_split_are_flambys(self, dataset_path: Callable[[str], Path]) -> None:
        data = read_data(f"heart-disease:{dataset_path('heart_disease')}", HEART)
        assert data.split is not None
        sizes = {
            hospital: tuple(int(((data.groups["hospital"] == hospital) & (data.split == s)).sum()) for s in Split)
            for hospital in ("cleveland", "hungarian", "switzerland", "va")
        }
        assert sizes == {
            "cleveland": (199, 0, 104),
            "hungarian": (172, 0, 89),
            "switzerland": (30, 0, 16),
            "va": (85, 0, 45),
        }

    def test_the_first_patient(self, dataset_path: Callable[[str], Path]) -> None:
        data = read_data(f"heart-disease:{dataset_path('heart_disease')}", HEART)
        # 63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,…,0
        assert data.inputs[0].tolist() == [63, 1, 0, 145, 233, 1, 2, 150, 0, 2.3]
        assert data.targets[0] == 0
        assert data.targets.sum() / len(data) == pytest.approx(0.5, abs=0.05)

    def test_a_missing_file_is_named(self, copy: Path) -> None:
        (copy / "processed.va.data").unlink()
        with pytest.raises(DataError, match=r"processed\.va\.data: expected this file of the study"):
            read_data(f"heart-disease:{copy}", HEART)

    def test_another_number_of_columns_is_named(self, copy: Path) -> None:
        (copy / "processed.va.data").write_text("1,2,3\n" * 200)
        with pytest.raises(DataError, match=r"processed\.va\.data: expected 14 columns, got 3"):
            read_data(f"heart-disease:{copy}", HEART)

    @pytest.mark.parametrize("field", [2, 6])
    def test_text_in_the_place_of_a_category_is_a_data_error_without_it(self, copy: Path, field: int) -> None:
        file = copy / "processed.cleveland.data"
        first, rest = file.read_text().split("\n", 1)
        fields = first.split(",")
        fields[field] = "secret"
        file.write_text(",".join(fields) + "\n" + rest)
        with pytest.raises(DataError) as caught:
            read_data(f"heart-disease:{copy}", HEART)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("line", ["cleveland,99999,train,0", "cleveland,0,train,7", "cleveland,x,train,0"])
    def test_a_split_file_that_does_not_fit_is_a_data_error(self, copy: Path, line: str) -> None:
        with (copy / "flamby_split.csv").open("a") as file:
            file.write(line + "\n")
        with pytest.raises(DataError):
            read_data(f"heart-disease:{copy}", HEART)


class TestWineQuality:
    def test_reads_both_colours(self, dataset_path: Callable[[str], Path]) -> None:
        data = read_data(f"wine-quality:{dataset_path('wine_quality')}", WINE)
        assert data.inputs.shape == (6497, 11)
        assert (data.groups["colour"] == "red").sum() == 1599
        assert data.inputs[0].tolist() == [7.4, 0.7, 0, 1.9, 0.076, 11, 34, 0.9978, 3.51, 0.56, 9.4]
        assert np.unique(data.targets).tolist() == [3, 4, 5, 6, 7, 8, 9]

    def test_a_missing_colour_is_named(self, dataset_path: Callable[[str], Path], tmp_path: Path) -> None:
        shutil.copyfile(dataset_path("wine_quality") / "winequality-red.csv", tmp_path / "winequality-red.csv")
        with pytest.raises(DataError, match=r"winequality-white\.csv: expected this file"):
            read_data(f"wine-quality:{tmp_path}", WINE)
