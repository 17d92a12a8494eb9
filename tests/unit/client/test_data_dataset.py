from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord_client.data import NodeDataset, RawData, Split
from concord_client.data.contract import Code, Tally
from concord_client.data.dataset import assign_splits
from concord_shared.errors import DataError
from helpers import IMAGES, REGRESSION, TABLE, plan_of


def raw(rows: int, split: Any = None) -> RawData:
    return RawData(np.zeros((rows, 1)), np.zeros(rows, np.int64), split)


class TestSplits:
    @given(
        st.sets(st.integers(0, 299), min_size=1),
        st.sampled_from([0.0, 0.1, 0.5]),
        st.integers(0, 9),
        st.booleans(),
    )
    def test_each_row_is_in_one_split_the_same_every_time(
        self, chosen: set[int], validation: float, seed: int, own: bool
    ) -> None:
        own_split = np.random.default_rng(seed).choice(3, 300).astype(np.uint8) if own else None
        data, rows = raw(300, own_split), np.array(sorted(chosen))
        splits = assign_splits(data, rows, "alpha", seed, validation)
        assert sorted(np.concatenate(list(splits.values()))) == sorted(chosen)
        again = assign_splits(data, rows, "alpha", seed, validation)
        assert all(np.array_equal(splits[split], again[split]) for split in Split)

    def test_eighty_twenty(self) -> None:
        splits = assign_splits(raw(100), np.arange(100), "alpha", 1, 0.0)
        assert [len(splits[split]) for split in Split] == [80, 0, 20]
        other = assign_splits(raw(100), np.arange(100), "beta", 1, 0.0)
        assert not np.array_equal(splits[Split.TEST], other[Split.TEST])

    def test_validation_is_taken_from_the_training_rows(self) -> None:
        without, with_it = (assign_splits(raw(100), np.arange(100), "a", 1, share) for share in (0.0, 0.25))
        assert [len(with_it[split]) for split in Split] == [60, 20, 20]
        assert np.array_equal(with_it[Split.TEST], without[Split.TEST])

    def test_the_sources_own_split_is_kept(self) -> None:
        data = raw(6, np.array([0, 2, 1, 0, 2, 0], np.uint8))
        splits = assign_splits(data, np.array([1, 2, 3, 5]), "a", 1, 0.5)
        assert {split.name: rows.tolist() for split, rows in splits.items()} == {
            "TRAIN": [3, 5],
            "VALIDATION": [2],
            "TEST": [1],
        }

    def test_one_row_is_for_training(self) -> None:
        assert assign_splits(raw(1), np.arange(1), "a", 1, 0.0)[Split.TRAIN].tolist() == [0]

    def test_a_node_takes_its_own_rows(self) -> None:
        rows = {Split.TRAIN: np.array([2, 0]), Split.VALIDATION: np.arange(0), Split.TEST: np.array([1])}
        dataset = NodeDataset("a", np.array([[1.0], [2.0], [3.0]]), np.array([0, 1, 2]), rows)
        inputs, targets = dataset.take(Split.TRAIN)
        assert (inputs.tolist(), targets.tolist(), dataset.size(Split.TEST)) == ([[3], [1]], [2, 0], 1)
        inputs[:] = 9
        assert dataset.inputs.max() == 3


class TestContract:
    def problems(self, plan_text: str, inputs: Any, targets: Any, *overrides: str, missing: bool = False) -> list[str]:
        try:
            plan = plan_of(plan_text, *overrides)
            tally = Tally(plan.data, frozenset[Code]({"missing"} if missing else ()))
            tally.look_at(RawData(np.array(inputs), np.array(targets)))
            tally.raise_for("csv:f")
        except DataError as error:
            first, *lines = str(error).splitlines()
            assert first == "csv:f: does not fit the plan's data contract:"
            return [line.strip() for line in lines]
        return []

    def test_what_fits_passes(self) -> None:
        assert self.problems(TABLE, [[0.0, 2, -5], [120, 0, 5]], [0, 1]) == []
        assert self.problems(IMAGES, np.zeros((2, 1, 8, 8), np.uint8), [0, 2]) == []
        assert self.problems(REGRESSION, [[0.0, 0, 0]], [-100.0]) == []

    def test_every_problem_is_counted_and_no_value_is_told(self) -> None:
        inputs = [[np.nan, 0, 777.5], [121.25, 1, np.inf], [30, 2, 0]]
        assert self.problems(TABLE, inputs, [0, 1, 7]) == [
            "column age: 1 of 3 values are missing; set preprocessing.missing = \"impute\" or remove those rows",
            "column age: 1 values are outside the range [0.0, 120.0]",
            "column dose: 2 values are outside the range [-5.0, 5.0]",
            "column dose: 1 values are infinite",
            "target ill: 1 rows have a class outside the contract's 2 classes",
        ]  # fmt: skip

    def test_missing_values_may_be_imputed(self) -> None:
        assert self.problems(TABLE, [[np.nan, np.nan, np.nan]], [0], missing=True) == []

    @pytest.mark.parametrize("target", [np.nan, 100.5, -101, np.inf])
    def test_a_target_that_is_missing_or_out_of_range(self, target: float) -> None:
        assert self.problems(REGRESSION, [[0.0, 0, 0]], [target]) == [
            "target y: 1 values are missing or outside [-100.0, 100.0]"
        ]

    def test_images_of_another_shape_or_type(self) -> None:
        assert self.problems(IMAGES, np.zeros((2, 1, 8, 9), np.float32), [0, 1]) == [
            "images: expected shape [1, 8, 8] (channels, height, width), got [1, 8, 9]",
            "images: expected dtype uint8, got float32",
        ]

    def test_pixels_that_are_nan(self) -> None:
        images = np.zeros((2, 1, 8, 8), np.float32)
        images[0, 0, 0, :3] = [np.nan, np.inf, -np.inf]
        assert self.problems(IMAGES, images, [0, 1], "data.dtype=float32") == ["images: 3 pixels are NaN or Inf"]

    def test_no_rows(self) -> None:
        assert self.problems(TABLE, np.zeros((0, 3)), []) == ["data: no rows"]
