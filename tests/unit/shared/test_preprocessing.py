import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord_shared.errors import ArtefactError, DataError, PlanError
from concord_shared.fitting import fit, fit_locally, programme_of
from concord_shared.plan import Plan
from concord_shared.preprocessing import Fitted, feature_names, unfitted
from helpers import IMAGES, TABLE, one_column_plan, plan_of

PLAN = plan_of(TABLE)
COLOUR_TEXT = IMAGES.replace("[1, 8, 8]", "[3, 4, 5]") + "[preprocessing]\nscope = 'federated'\nstandardise = true\n"


def table(rows: int, rng: np.random.Generator) -> np.ndarray:
    """Columns age, city, dose; a tenth of the values missing."""
    raw = np.stack([rng.uniform(0, 120, rows), rng.choice(3, rows, p=[0.2, 0.5, 0.3]), rng.normal(0, 1, rows)], 1)
    raw[:, 2] = np.clip(raw[:, 2], -5, 5)
    raw[rng.random(raw.shape) < 0.1] = np.nan
    return raw


def federated(plan: Plan, nodes: Sequence[np.ndarray], rows_max: int = 1 << 12, second: Any = None) -> Fitted:
    """The two statistics rounds, summed over nodes; over `second` in the second, where others survive it."""
    programme, known = programme_of(plan), dict[str, Any]()
    for stage in (1, 2):
        asked = second if second is not None and stage == 2 else nodes
        told = programme.read(stage, json.dumps(known))
        vectors = [programme.measure(stage, [(raw, None)], told, rows_max) for raw in asked]
        known = programme.absorb(stage, np.sum(vectors, 0), known, rows_max)
    return fit(plan, known)


def split(raw: np.ndarray, cuts: Sequence[int]) -> list[np.ndarray]:
    return [raw[a:b] for a, b in pairwise([0, *sorted(cuts), len(raw)])]


class TestFederatedTable:
    def test_equals_the_pooled_mean_deviation_and_mode(self, rng: np.random.Generator) -> None:
        raw = table(1200, rng)
        fitted = federated(PLAN, split(raw, [1, 300, 301, 900]))
        for index, name in ((0, "age"), (2, "dose")):
            assert fitted.means[name] == pytest.approx(np.nanmean(raw[:, index]), rel=1e-9)
            assert fitted.scales[name] == pytest.approx(np.nanstd(raw[:, index]), rel=1e-9)
        assert fitted.modes == {"city": 1}

    @given(st.lists(st.integers(0, 200), max_size=6), st.integers(0, 2**32 - 1))
    def test_is_the_same_bit_for_bit_for_any_split_of_the_same_rows(self, cuts: list[int], seed: int) -> None:
        rng = np.random.default_rng(seed)
        raw = table(200, rng)
        whole = federated(PLAN, [raw])
        shuffled = federated(PLAN, split(raw[rng.permutation(200)], cuts))
        assert shuffled.digest == whole.digest
        assert shuffled.transform(raw).tobytes() == whole.transform(raw).tobytes()

    def test_stage_1_by_hand(self) -> None:
        raw = np.array([[30.0, 2, -5.0], [np.nan, 2, 5.0], [0.0, np.nan, np.nan]])
        programme = programme_of(PLAN)
        vector = programme.measure(1, [(raw, None)], {}, 4)
        # rows; values, outside, sum; by city, unknown; values, outside, sum
        # 52 bits for a whole range: 7 of them for age's 120, 4 for dose's 10, which is counted from its low end -5
        assert vector.tolist() == [3, 2, 0, 30 << 45, 0, 0, 2, 0, 2, 0, 10 << 48]
        assert programme.block(1).size == len(vector)
        assert programme.block(1).rows_first

    def test_stage_2_by_hand(self) -> None:
        raw = np.array([[30.0, 2, 1.0], [10.0, 0, np.nan]])
        programme, known = programme_of(PLAN), {"numbers": {"columns": {"age": {"mean": 20.0}, "dose": {"mean": 0.5}}}}
        vector = programme.measure(2, [(raw, None)], known, 4)
        # for squares 14 bits of the 52 for 120², 7 for 10²
        assert vector.tolist() == [2, 0, 200 << 38, 1, 1 << 47, 1 << 43]
        assert programme.block(2).size == len(vector)
        assert not programme.block(2).rows_first

    def test_a_full_federation_at_the_end_of_its_range_does_not_overflow(self) -> None:
        plan = one_column_plan("preprocessing={scope='federated', standardise=true}", column_range="[-1e6, 1e6]")
        rows_max = 1 << 12
        raw = np.where(np.arange(rows_max) % 2, 1e6, -1e6)[:, None]
        fitted = federated(plan, [raw], rows_max)
        assert fitted.means["x0"] == pytest.approx(0, abs=1e-3)
        assert fitted.scales["x0"] == pytest.approx(1e6, rel=1e-9)

    def test_survivors_of_the_second_stage_alone_give_their_own_deviation(self) -> None:
        plan = one_column_plan("preprocessing={scope='federated', standardise=true}")
        here, gone = np.array([[1.0], [3.0]]), np.array([[50.0], [70.0]])
        fitted = federated(plan, [here, gone], 4, second=[here])
        assert fitted.means["x0"] == 31.0
        assert fitted.scales["x0"] == pytest.approx(1.0)  # about their own mean, not about 31

    def test_a_column_that_no_survivor_of_the_second_stage_has_is_named(self) -> None:
        plan = one_column_plan("preprocessing={scope='federated', standardise=true}")
        with pytest.raises(DataError, match="x0: no node of the last stage"):
            federated(plan, [np.ones((3, 1))], 4, second=[np.full((3, 1), np.nan)])

    def test_a_column_without_a_single_value_is_named(self) -> None:
        plan = one_column_plan("preprocessing={scope='federated', standardise=true, missing='impute'}")
        with pytest.raises(DataError, match="column x0: no node has a single value"):
            federated(plan, [np.full((3, 1), np.nan)])

    def test_a_constant_column_gets_scale_1(self) -> None:
        plan = one_column_plan("preprocessing={scope='federated', standardise=true}")
        fitted = federated(plan, [np.full((7, 1), 0.1), np.full((5, 1), 0.1)])
        assert fitted.scales == {"x0": 1.0}
        assert fitted.transform(np.array([[0.1]])) == pytest.approx(0.0, abs=1e-9)

    @pytest.mark.parametrize("width", ["1e-3", "1e-6", "1e-9"])
    def test_a_narrow_column_is_fitted_as_well_as_a_wide_one(self, width: str, rng: np.random.Generator) -> None:
        plan = one_column_plan("preprocessing={scope='federated', standardise=true}", column_range=f"[0, {width}]")
        raw = rng.uniform(0, float(width), (500, 1))
        fitted = federated(plan, split(raw, [100]))
        assert fitted.means["x0"] == pytest.approx(raw.mean(), rel=1e-9)
        assert fitted.scales["x0"] == pytest.approx(raw.std(), rel=1e-9)


class TestPerNode:
    def test_is_fitted_on_these_rows_alone(self, rng: np.random.Generator) -> None:
        plan = plan_of(TABLE, "preprocessing.scope=per-node")
        raw = table(300, rng)
        fitted = fit_locally(plan, raw)
        assert fitted.means["age"] == pytest.approx(np.nanmean(raw[:, 0]), rel=1e-9)
        assert fitted.scales["dose"] == pytest.approx(np.nanstd(raw[:, 2]), rel=1e-9)

    def test_a_column_without_a_range_is_refused(self) -> None:
        with pytest.raises(PlanError, match="missing for: x0"):
            one_column_plan("preprocessing={scope='per-node', standardise=true}", column_range="")

    @pytest.mark.parametrize("size", [1e7, 1e9])
    def test_a_column_may_hold_large_values(self, size: float, rng: np.random.Generator) -> None:
        text = "preprocessing={scope='per-node', standardise=true}"
        plan = one_column_plan(text, column_range=f"[{-9 * size}, {9 * size}]")
        raw = rng.normal(size, size, (100, 1))
        fitted = fit_locally(plan, raw)
        assert fitted.means["x0"] == pytest.approx(raw.mean(), rel=1e-6)
        assert fitted.scales["x0"] == pytest.approx(raw.std(), rel=1e-6)

    def test_scope_none_learns_nothing(self) -> None:
        plan = plan_of(IMAGES)
        assert fit_locally(plan, np.zeros((2, 1, 8, 8), np.uint8)) == unfitted(plan)


class TestTransform:
    FITTED = Fitted(PLAN.data, PLAN.preprocessing, {"age": 40.0, "dose": 0.5}, {"age": 20.0, "dose": 2.0}, {"city": 2})

    def test_by_hand(self) -> None:
        raw = np.array([[60.0, 0, 2.5], [40.0, 1, -3.5], [20.0, 2, 0.5]])
        # the first city, bonn, is dropped
        assert self.FITTED.transform(raw).tolist() == [[1, 0, 0, 1], [0, 1, 0, -2], [-1, 0, 1, 0]]
        assert self.FITTED.transform(raw).dtype == np.float32

    def test_missing_values_become_the_mean_or_the_most_frequent(self) -> None:
        assert self.FITTED.transform(np.full((1, 3), np.nan)).tolist() == [[0, 0, 1, 0]]

    def test_one_hot_keeps_every_category(self) -> None:
        plan = plan_of(TABLE, "preprocessing={scope='none', encode='one-hot'}")
        assert unfitted(plan).transform(np.array([[7.0, 1, 2]])).tolist() == [[7, 0, 1, 0, 2]]
        assert feature_names(plan.data, plan.preprocessing) == ("age", "city=bonn", "city=köln", "city=ulm", "dose")

    def test_names_match_the_columns(self) -> None:
        assert feature_names(PLAN.data, PLAN.preprocessing) == ("age", "city=köln", "city=ulm", "dose")

    @pytest.mark.parametrize(("scale", "expected"), [("unit", [0.0, 0.2, 1.0]), ("none", [0.0, 51.0, 255.0])])
    def test_images_by_hand(self, scale: str, expected: list[float]) -> None:
        plan = plan_of(IMAGES, "data.shape=[1, 1, 3]", f"preprocessing.scale={scale}")
        images = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
        assert unfitted(plan).transform(images).reshape(-1) == pytest.approx(expected, rel=1e-6)
        assert images.dtype == np.uint8


class TestImages:
    @pytest.mark.parametrize("scale", ["unit", "none"])
    def test_channel_statistics_are_the_pooled_ones(self, scale: str, rng: np.random.Generator) -> None:
        plan = plan_of(COLOUR_TEXT, f"preprocessing.scale={scale}")
        raw = rng.integers(0, 256, (90, 3, 4, 5)).astype(np.uint8)
        raw[:, 2] //= 4
        fitted = federated(plan, split(raw, [10, 11]), 128)
        pooled = raw.astype(np.float64)
        for channel in range(3):
            assert fitted.means[f"channel_{channel}"] == pytest.approx(pooled[:, channel].mean(), rel=1e-9)
            assert fitted.scales[f"channel_{channel}"] == pytest.approx(pooled[:, channel].std(), rel=1e-9)
        out = fitted.transform(raw)
        assert out.mean((0, 2, 3)) == pytest.approx(np.zeros(3), abs=1e-5)
        assert out.std((0, 2, 3)) == pytest.approx(np.ones(3), abs=1e-5)

    def test_no_overflow_where_every_pixel_is_white_or_black(self) -> None:
        raw = np.zeros((128, 3, 4, 5), np.uint8)
        raw[::2] = 255
        fitted = federated(plan_of(COLOUR_TEXT), [raw], 128)
        assert fitted.means["channel_1"] == pytest.approx(127.5, rel=1e-9)
        assert fitted.scales["channel_1"] == pytest.approx(127.5, rel=1e-9)

    def test_float_images_cannot_be_standardised_and_the_plan_says_so(self) -> None:
        with pytest.raises(PlanError, match="standardise and denoise of images need data"):
            plan_of(COLOUR_TEXT, "data.dtype=float32")


class TestDocument:
    def test_travels_as_json_without_losing_a_bit(self, rng: np.random.Generator) -> None:
        raw = table(50, rng)
        fitted = federated(PLAN, [raw])
        back = Fitted.from_document(json.loads(json.dumps(fitted.document())))
        assert back == fitted
        assert back.digest == fitted.digest
        assert math.isfinite(back.means["age"])

    @pytest.mark.parametrize(
        "damage",
        [{"means": None}, {"means": {"age": "much"}}, {"contract": {}}, {"preprocessing": {"scope": "all"}}],
    )
    def test_refuses_a_damaged_document(self, damage: dict[str, Any]) -> None:
        document = TestTransform.FITTED.document() | damage
        with pytest.raises(ArtefactError, match="not a preprocessing document"):
            Fitted.from_document(document)

    @pytest.mark.parametrize("missing", ["contract", "preprocessing", "means", "scales", "modes"])
    def test_refuses_a_document_without_a_part(self, missing: str) -> None:
        document = {key: value for key, value in TestTransform.FITTED.document().items() if key != missing}
        with pytest.raises(ArtefactError, match="not a preprocessing document"):
            Fitted.from_document(document)

    @pytest.mark.parametrize("damage", [{"means": {"age": None}}, {"modes": {"city": [1]}}])
    def test_refuses_values_of_another_type(self, damage: dict[str, Any]) -> None:
        with pytest.raises(ArtefactError):
            Fitted.from_document(TestTransform.FITTED.document() | damage)


def test_category_counts_that_wrap_around_are_impossible() -> None:
    """Eleven of 1.7e18 sum to less than a hundred where int64 wraps around."""
    names = [f"c{index}" for index in range(11)]
    plan = plan_of(TABLE.replace('["bonn", "köln", "ulm"]', json.dumps(names)))
    programme = programme_of(plan)
    vector = programme.measure(1, [(table(10, np.random.default_rng(0)), None)], {}, 100)
    assert programme.problem(1, vector, 100, 100) is None
    vector[4:15] = (1 << 64) // 11 + 1  # 1.68e18
    assert vector[4:15].sum() < 100
    assert programme.problem(1, vector, 100, 100) == "column city: counts or a sum that no values within its range have"
