import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from concord_client.data import Split, read_data
from concord_client.data.studies import ADULT_COLUMNS
from concord_shared.errors import DataError
from concord_shared.plan import load_plan

HEART, WINE, ADULT = (load_plan(name).plan for name in ("heart-disease", "wine-quality", "adult"))


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

    def test_an_empty_directory_is_told_what_to_hold(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"flamby_split\.csv: expected this file of the study"):
            read_data(f"heart-disease:{tmp_path}", HEART)

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


class TestAdult:
    def test_seven_employers_and_the_official_test_rows(self, dataset_path: Callable[[str], Path]) -> None:
        data = read_data(f"adult:{dataset_path('adult')}", ADULT)
        assert data.split is not None
        employers, counts = np.unique(data.groups["employer"][data.split == Split.TRAIN], return_counts=True)
        assert dict(zip(employers.tolist(), counts.tolist(), strict=True)) == {
            "Federal-gov": 960,
            "Local-gov": 2093,
            "Private": 22696 + 21,
            "Self-emp-inc": 1116,
            "Self-emp-not-inc": 2541,
            "State-gov": 1298,
            "unknown": 1836,
        }
        assert int((data.split == Split.TEST).sum()) == 16281
        assert float(data.targets[data.split == Split.TRAIN].mean()) == pytest.approx(0.2408, abs=1e-4)
        assert float(data.targets[data.split == Split.TEST].mean()) == pytest.approx(0.2362, abs=1e-4)

    def test_a_node_with_its_rows_as_csv_reads_the_same(
        self, dataset_path: Callable[[str], Path], tmp_path: Path
    ) -> None:
        """As a partner holds them: with a header, and `?` where a value is missing."""
        lines = gzip.decompress((dataset_path("adult") / "adult.data.gz").read_bytes()).decode().splitlines()
        own = [line for line in lines if ", State-gov," in line]
        (tmp_path / "state-gov.csv").write_text("\n".join([",".join(ADULT_COLUMNS), *own]).replace(", ", ","))
        read = read_data(f"csv:{tmp_path / 'state-gov.csv'}", ADULT)
        data = read_data(f"adult:{dataset_path('adult')}", ADULT)
        assert data.split is not None
        rows = (data.groups["employer"] == "State-gov") & (data.split == Split.TRAIN)
        assert np.array_equal(read.inputs, data.inputs[rows], equal_nan=True)
        assert np.array_equal(read.targets, data.targets[rows])
        assert np.isnan(read.inputs).any()
