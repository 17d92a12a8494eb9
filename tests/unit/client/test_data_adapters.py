from pathlib import Path
from typing import Any

import numpy as np
import pytest

from concord_client.data import adapter_names, locate, read_data
from concord_shared.errors import ConcordError, DataError, UsageError
from concord_shared.plan import load_plan
from helpers import IMAGES, one_column_plan, plan_of

PLAN = one_column_plan()


@pytest.fixture(autouse=True)
def _nowhere_else(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No dataset of this machine is found by accident."""
    monkeypatch.delenv("CONCORD_DATA", raising=False)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


def csv(file: Path, *values: float, split: str = "") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{value},{value}{',' + split if split else ''}" for value in values]
    file.write_text("\n".join([f"x0,y{',split' if split else ''}", *rows]))
    return file


class TestSpec:
    def test_adapter_and_path(self, tmp_path: Path) -> None:
        assert read_data(f"csv:{csv(tmp_path / 't.csv', 1, 2)}", PLAN).targets.tolist() == [1, 2]

    def test_a_bare_path_is_read_as_the_plans_own_data(self, tmp_path: Path) -> None:
        assert len(read_data(str(csv(tmp_path / "t.csv", 1, 2)), PLAN, "csv:elsewhere.csv")) == 2

    def test_an_unknown_adapter_lists_the_known_ones(self) -> None:
        with pytest.raises(UsageError, match="--data cvs:f: expected one of digits, idx, npz"):
            read_data("cvs:f", PLAN)

    def test_a_path_that_is_not_there_says_where_it_was_looked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CONCORD_DATA", "/nowhere")
        with pytest.raises(UsageError, match=r"csv:gone\.csv: no such file.*\(/nowhere\); name the place with --data"):
            read_data("csv:gone.csv", PLAN)

    def test_the_error_of_a_contract_names_the_spec(self, tmp_path: Path) -> None:
        spec = f"csv:{csv(tmp_path / 't.csv', 1e6)}"
        with pytest.raises(DataError) as caught:
            read_data(spec, PLAN)
        assert str(caught.value).startswith(spec)

    def test_every_adapter_has_a_name(self) -> None:
        assert set(adapter_names()) >= {"digits", "idx", "npz", "images", "csv", "parquet"}

    def test_a_bare_path_without_an_adapter_to_read_it_is_a_usage_error(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError):
            read_data(str(tmp_path), PLAN)

    @pytest.mark.parametrize("prefix", ["", "digits:"])
    def test_ones_own_directory_is_never_replaced_by_the_bundled_digits(self, tmp_path: Path, prefix: str) -> None:
        with pytest.raises(ConcordError):
            read_data(f"{prefix}{tmp_path}", load_plan("digits-cnn").plan, "digits")


class TestLocate:
    def test_as_it_is_then_below_concord_data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        (tmp_path / "root" / "there").mkdir(parents=True)
        (tmp_path / "root" / "here").mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("CONCORD_DATA", str(tmp_path / "root"))
        assert locate("here") == Path("here")
        assert locate("there") == tmp_path / "root" / "there"
        assert locate("nowhere") == Path("nowhere")
        assert locate(str(tmp_path / "gone")) == tmp_path / "gone"

    def test_beside_the_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "shared" / "data" / "mnist").mkdir(parents=True)
        (tmp_path / "main").mkdir()
        monkeypatch.chdir(tmp_path / "main")
        assert locate("mnist") == Path("../shared/data/mnist")


class TestPerDirectory:
    def read(self, root: Path, plan: Any = PLAN) -> Any:
        return read_data(f"csv:{root}", plan, per_directory=True)

    def test_each_directory_or_file_is_a_node(self, tmp_path: Path) -> None:
        csv(tmp_path / "ulm.csv", 1, 2)
        csv(tmp_path / "bonn" / "anything.csv", 3)
        (tmp_path / ".hidden").mkdir()
        data = self.read(tmp_path)
        assert data.groups["directory"].tolist() == ["bonn", "ulm", "ulm"]
        assert data.targets.tolist() == [3, 1, 2]

    def test_a_split_of_all_is_kept(self, tmp_path: Path) -> None:
        csv(tmp_path / "a.csv", 1, split="train")
        csv(tmp_path / "b.csv", 2, split="test")
        assert self.read(tmp_path).split.tolist() == [0, 2]

    def test_a_split_of_some_is_refused(self, tmp_path: Path) -> None:
        csv(tmp_path / "a.csv", 1, split="train")
        csv(tmp_path / "b.csv", 2)
        with pytest.raises(DataError, match="some nodes have an own test split and others not"):
            self.read(tmp_path)

    def test_two_tables_in_one_directory_are_refused(self, tmp_path: Path) -> None:
        csv(tmp_path / "a" / "1.csv", 1)
        csv(tmp_path / "a" / "2.csv", 2)
        with pytest.raises(DataError, match="expected one table of this node, found 2"):
            self.read(tmp_path)

    def test_an_empty_directory_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="expected a directory with one directory or file for each node"):
            self.read(tmp_path)

    @pytest.mark.parametrize("names", [("site.1/t.csv", "site.2/t.csv"), ("ulm/t.csv", "ulm.csv")])
    def test_no_node_is_lost_where_names_differ_after_a_dot_only(self, tmp_path: Path, names: tuple[str, str]) -> None:
        for name, value in zip(names, (1, 2), strict=True):
            csv(tmp_path / name, value)
        try:
            assert sorted(self.read(tmp_path).targets.tolist()) == [1, 2]
        except DataError:
            return

    def test_a_file_in_the_place_of_the_directory_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConcordError):
            self.read(csv(tmp_path / "a.csv", 1))

    def test_images_of_different_sizes_are_a_data_error(self, tmp_path: Path) -> None:
        for name, side in (("a", 8), ("b", 9)):
            np.savez(tmp_path / f"{name}.npz", x=np.zeros((1, side, side), np.uint8), y=np.zeros(1, int))
        with pytest.raises(DataError):
            read_data(f"npz:{tmp_path}", plan_of(IMAGES), per_directory=True)
