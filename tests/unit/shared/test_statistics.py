"""The programme of statistics against numpy on the pooled rows."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord_shared.errors import DataError
from concord_shared.statistics import Batch, Programme, Wanted
from concord_shared.statistics.suppression import suppressed
from helpers import IMAGES, TABLE, plan_of

CONTRACT = plan_of(TABLE).data
LEVELS = (0.05, 0.25, 0.5, 0.9)
ALL = Wanted(
    spread=True, target=True, quantiles=LEVELS, extremes=True, bins=10, correlation=True, sites=True, resolution=1e-3
)
ROWS_MAX = 1 << 14


def rows_of(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Columns age, city, dose with missing values, some outside of their ranges, an unknown city; the target."""
    age = rng.uniform(0, 120, count)
    raw = np.stack(
        [age, rng.choice(3, count, p=[0.2, 0.5, 0.3]), np.clip(rng.normal(0, 1, count) + age / 60, -5, 5)], 1
    )
    raw[rng.random(raw.shape) < 0.1] = np.nan
    raw[::50, 0], raw[::70, 1] = 900.0, 3.0
    return raw, rng.integers(0, 2, count)


def federated(
    programme: Programme, nodes: Sequence[Sequence[Batch]], survivors: Sequence[Sequence[Batch]] | None = None
) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for stage in range(1, programme.stages + 1):
        told = programme.read(stage, json.dumps(known))
        asked = nodes if stage == 1 or survivors is None else survivors
        vectors = [programme.measure(stage, batches, told, ROWS_MAX) for batches in asked]
        for batches, vector in zip(asked, vectors, strict=True):
            rows = sum(len(inputs) for inputs, _ in batches)
            assert programme.problem(stage, vector, rows, ROWS_MAX) is None
        total = np.sum(vectors, 0)
        assert programme.block(stage).size == len(total)
        assert programme.problem(stage, total, sum(len(b[0]) for each in asked for b in each), ROWS_MAX) is None
        known = programme.absorb(stage, total, known, ROWS_MAX)
    return known


def dealt(raw: np.ndarray, targets: np.ndarray, cuts: Sequence[int], batch: int = 97) -> list[list[Batch]]:
    nodes = []
    for a, b in pairwise([0, *sorted(cuts), len(raw)]):
        nodes.append([(raw[i : min(b, i + batch)], targets[i : min(b, i + batch)]) for i in range(a, b, batch)])
    return nodes


class TestEqualsThePooledRows:
    @pytest.fixture
    def pooled(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return rows_of(3000, rng)

    @pytest.fixture
    def known(self, pooled: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
        return federated(Programme(CONTRACT, ALL), dealt(*pooled, [1, 700, 701, 2000]))

    def inside(self, raw: np.ndarray, index: int) -> np.ndarray:
        low, high = CONTRACT.columns[index].range  # type: ignore[misc]
        values = raw[:, index]
        return values[(values >= low) & (values <= high)]

    @pytest.mark.parametrize("index", [0, 2])
    def test_counts_means_and_variances(
        self, known: dict[str, Any], pooled: tuple[np.ndarray, np.ndarray], index: int
    ) -> None:
        about, values = known["columns"][CONTRACT.columns[index].name], self.inside(pooled[0], index)
        assert about["count"] == len(values)
        assert about["missing"] == np.isnan(pooled[0][:, index]).sum()
        assert about["outside"] == len(pooled[0]) - about["count"] - about["missing"]
        assert about["mean"] == pytest.approx(values.mean(), rel=1e-9)
        assert about["variance"] == pytest.approx(values.var(), rel=1e-9)

    @pytest.mark.parametrize("index", [0, 2])
    def test_quantiles_and_extremes_within_the_resolution(
        self, known: dict[str, Any], pooled: tuple[np.ndarray, np.ndarray], index: int
    ) -> None:
        column, values = CONTRACT.columns[index], self.inside(pooled[0], index)
        about, step = known["columns"][column.name], 1e-3 * (column.range[1] - column.range[0])  # type: ignore[index]
        assert about["resolution"] <= step
        for level in LEVELS:
            true = np.quantile(values, level, method="inverted_cdf")
            assert abs(about["quantiles"][repr(level)] - true) <= step / 2
        assert 0 <= values.min() - about["minimum"] <= step
        assert 0 <= about["maximum"] - values.max() <= step

    def test_histograms_and_categories(self, known: dict[str, Any], pooled: tuple[np.ndarray, np.ndarray]) -> None:
        raw, targets = pooled
        expected = np.histogram(self.inside(raw, 0), bins=10, range=(0, 120))[0]
        assert known["columns"]["age"]["histogram"] == expected.tolist()
        codes = raw[:, 1][~np.isnan(raw[:, 1])].astype(int)
        assert known["columns"]["city"]["counts"] == np.bincount(codes, minlength=4)[:3].tolist()
        assert known["columns"]["city"]["unknown"] == (codes == 3).sum() > 0
        assert known["columns"]["ill"]["counts"] == np.bincount(targets).tolist()

    def test_correlation_over_rows_that_have_both(
        self, known: dict[str, Any], pooled: tuple[np.ndarray, np.ndarray]
    ) -> None:
        age, dose = pooled[0][:, 0], pooled[0][:, 2]
        both = (age <= 120) & ~np.isnan(dose)
        expected = np.corrcoef(age[both], dose[both])[0, 1]
        assert known["correlation"]["columns"] == ["age", "dose"]
        assert known["correlation"]["values"][0][1] == pytest.approx(expected, rel=1e-9)

    def test_how_nodes_differ(self, rng: np.random.Generator) -> None:
        """By hand over three nodes: eta squared, and the mean distance of each one's shares from those of all."""
        raw = np.stack([rng.uniform(0, 60, 900), np.zeros(900), np.zeros(900)], 1)
        raw[300:600, 0] += 30
        raw[:300, 1] = 1
        parts = [raw[:300], raw[300:600], raw[600:]]
        known = federated(Programme(CONTRACT, replace(ALL, target=False)), [[(part, None)] for part in parts])
        values = raw[:, 0]
        between = sum(300 * (part[:, 0].mean() - values.mean()) ** 2 for part in parts)
        expected = between / ((values - values.mean()) ** 2).sum()
        assert known["columns"]["age"]["between"] == pytest.approx(expected, rel=1e-6)
        # of all, 2/3 are city 0: one node has none of it, two have nothing else
        assert known["columns"]["city"]["drift"] == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3, abs=1e-5)

    @pytest.mark.parametrize("resolution", [1e-3, 1e-5, 1e-8])
    def test_refines_to_the_stated_resolution(self, resolution: float, rng: np.random.Generator) -> None:
        raw, targets = rows_of(1000, rng)
        programme = Programme(CONTRACT, Wanted(quantiles=LEVELS, extremes=True, resolution=resolution))
        assert programme.stages == {1e-3: 1, 1e-5: 2, 1e-8: 3}[resolution]
        about = federated(programme, dealt(raw, targets, [10, 500]))["columns"]["dose"]
        values = self.inside(raw, 2)
        for level in LEVELS:
            true = np.quantile(values, level, method="inverted_cdf")
            assert abs(about["quantiles"][repr(level)] - true) <= 10 * resolution / 2 * (1 + 1e-6)
        assert about["minimum"] <= values.min() + 1e-12
        assert values.min() - about["minimum"] <= 10 * resolution * (1 + 1e-6)

    @given(st.lists(st.integers(0, 300), max_size=5), st.integers(1, 60), st.integers(0, 2**32 - 1))
    def test_however_rows_are_spread_and_read(self, cuts: list[int], batch: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        raw, targets = rows_of(300, rng)
        programme = Programme(CONTRACT, replace(ALL, correlation=False, sites=False))
        order = rng.permutation(300)
        whole = federated(programme, dealt(raw, targets, [], 300))
        assert federated(programme, dealt(raw[order], targets[order], cuts, batch)) == whole

    def test_pixels(self, rng: np.random.Generator) -> None:
        contract = plan_of(IMAGES.replace("[1, 8, 8]", "[3, 4, 5]")).data
        raw = rng.integers(0, 256, (40, 3, 4, 5)).astype(np.uint8)
        wanted = Wanted(spread=True, quantiles=(0.5,), resolution=1e-5)
        known = federated(Programme(contract, wanted), [[(raw[:9], None)], [(raw[9:], None)]])
        for channel in range(3):
            about, pixels = known["columns"][f"channel_{channel}"], raw[:, channel].astype(float).ravel()
            assert about["variance"] == pytest.approx(pixels.var(), rel=1e-9)
            true = np.quantile(pixels, 0.5, method="inverted_cdf")
            assert abs(about["quantiles"]["0.5"] - true) <= about["resolution"] / 2


def test_a_node_lost_between_stages_leaves_figures_of_those_that_stayed(rng: np.random.Generator) -> None:
    raw, targets = rows_of(600, rng)
    nodes = dealt(raw, targets, [200, 400])
    known = federated(Programme(CONTRACT, replace(ALL, resolution=1e-5)), nodes, nodes[:2])
    values = raw[:400, 2][~np.isnan(raw[:400, 2])]
    assert known["columns"]["dose"]["variance"] == pytest.approx(values.var(), rel=1e-9)
    assert abs(known["columns"]["dose"]["quantiles"]["0.5"] - np.median(values)) < 0.1


class TestSmallCounts:
    @given(st.lists(st.integers(0, 12), min_size=1, max_size=9), st.integers(1, 7))
    def test_what_is_left_out_is_never_one_cell_nor_few_rows(self, cells: list[int], minimum: int) -> None:
        told = suppressed(cells, minimum)
        hidden = [count for count, cell in zip(cells, told, strict=True) if cell is None]
        assert all(cell == count for count, cell in zip(cells, told, strict=True) if cell is not None)
        assert not any(0 < cell < minimum for cell in told if cell is not None)
        if hidden and len([count for count in cells if count]) > len(hidden):
            assert len(hidden) >= 2
            assert sum(hidden) >= minimum

    def test_what_is_missing_is_told_together_with_the_values(self, rng: np.random.Generator) -> None:
        raw = np.stack([rng.uniform(0, 120, 40), np.array([0.0] * 20 + [1.0] * 17 + [2.0] * 3), np.zeros(40)], 1)
        raw[:2, 0] = np.nan
        known = federated(Programme(CONTRACT, Wanted(minimum_count=5)), [[(raw, None)]])
        age, city = known["columns"]["age"], known["columns"]["city"]
        assert (age["count"], age["missing"], age["outside"]) == (None, None, 0)
        assert age["mean"] == pytest.approx(np.nanmean(raw[:, 0]))
        assert city["counts"] == [20, None, None]
        assert city["count"] is None

    def test_the_extremes_are_the_kth_and_a_quantile_stands_for_as_many(self, rng: np.random.Generator) -> None:
        raw = np.stack([np.arange(100.0), np.zeros(100), np.zeros(100)], 1)
        wanted = Wanted(quantiles=(0.03, 0.05, 0.5, 0.97), extremes=True, minimum_count=5)
        age = federated(Programme(CONTRACT, wanted), [[(raw, None)]])["columns"]["age"]
        assert age["quantiles"]["0.03"] is None
        assert age["quantiles"]["0.97"] is None
        assert age["quantiles"]["0.05"] == pytest.approx(4, abs=0.12)
        assert age["minimum"] == pytest.approx(4, abs=0.12)
        assert age["maximum"] == pytest.approx(95, abs=0.12)

    def test_fewer_rows_are_not_told_of_at_all(self) -> None:
        with pytest.raises(DataError, match="fewer than 5 rows"):
            federated(Programme(CONTRACT, Wanted(minimum_count=5)), [[(np.zeros((4, 3)), None)]])


class TestHostileSums:
    """A vector that no honest nodes can have: each cell far too large or below zero."""

    @pytest.mark.parametrize("stage", [1, 2])
    def test_every_lane_is_bounded(self, stage: int, rng: np.random.Generator) -> None:
        programme = Programme(CONTRACT, replace(ALL, resolution=1e-5))
        raw, targets = rows_of(200, rng)
        known: dict[str, Any] = {}
        if stage == 2:
            first = programme.measure(1, [(raw, targets)], {}, ROWS_MAX)
            known = programme.read(2, json.dumps(programme.absorb(1, first, {}, ROWS_MAX)))
        vector = programme.measure(stage, [(raw, targets)], known, ROWS_MAX)
        assert programme.problem(stage, vector, 200, ROWS_MAX) is None
        at = 0
        for part in programme.parts(stage):
            for lane in range(at, at + part.size, max(1, part.size // 5)):
                for value in (np.iinfo(np.int64).max, np.iinfo(np.int64).min):
                    hostile = vector.copy()
                    hostile[lane] = value
                    assert programme.problem(stage, hostile, 200, ROWS_MAX), (part, lane - at, value)
            at += part.size


class TestWhatANodeReads:
    PROGRAMME = Programme(CONTRACT, replace(ALL, resolution=1e-5))

    @pytest.fixture
    def known(self, rng: np.random.Generator) -> dict[str, Any]:
        vector = self.PROGRAMME.measure(1, [rows_of(200, rng)], {}, ROWS_MAX)
        return self.PROGRAMME.absorb(1, vector, {}, ROWS_MAX)

    @pytest.mark.parametrize(
        ("column", "change"),
        [
            ("age", {"mean": 121.0}),
            ("age", {"mean": float("nan")}),
            ("age", {"mean": "x"}),
            ("age", {"open": [0]}),
            ("age", {"open": [-1] * 6}),
            ("age", {"open": [0.5] * 6}),
            ("age", {"open": None}),
            ("age", {"shares": [0.1]}),
            ("city", {"shares": [2.0, 0, 0]}),
            ("city", {"shares": None}),
        ],
    )
    def test_refuses_what_no_stage_finds(self, known: dict[str, Any], column: str, change: dict[str, Any]) -> None:
        self.PROGRAMME.read(2, json.dumps(known))
        known["columns"][column] |= change
        with pytest.raises(ValueError, match="no results of the stage before"):
            self.PROGRAMME.read(2, json.dumps(known))


class TestNoise:
    """With differential privacy: how far one record moves a stage, in deviations of its noise."""

    DP = "privacy={mode='plain', dp={unit='record', epsilon=2.0, delta=1e-5, clip=1.0}}"
    ASKED = "statistics={of=['moments','extremes','classes','correlation'], quantiles=[0.5], bins=8, resolution=1e-5}"
    PLAN = plan_of("kind = 'statistics'\n" + TABLE[: TABLE.index("[preprocessing]")], DP, ASKED)

    @given(st.integers(0, 2**32 - 1))
    def test_one_record_moves_a_stage_by_less_than_one_deviation_over_the_multiplier(self, seed: int) -> None:
        rng, programme, multiplier = np.random.default_rng(seed), Programme.of(self.PLAN), 3.0
        raw, targets = rows_of(50, rng)
        raw[0] = rng.choice([0.0, 120.0, np.nan]), rng.integers(0, 4), rng.choice([-5.0, 5.0, 9.0])
        known: dict[str, Any] = {}
        for stage in (1, 2):
            told = programme.read(stage, json.dumps(known))
            whole, less = (programme.measure(stage, [(raw[i:], targets[i:])], told, 64) for i in (0, 1))
            moved = (whole - less) / programme.deviations(stage, 64, multiplier)
            assert np.linalg.norm(moved) <= 1 / multiplier
            known = programme.absorb(stage, whole, known, 64)

    def test_the_figures_are_near_the_true_ones_where_there_are_many_rows(self, rng: np.random.Generator) -> None:
        from concord_shared.accounting import noise_multiplier
        from concord_shared.noise import SecretStream, noised_statistics

        programme, rows = Programme.of(self.PLAN), 20_000
        raw, targets = rows_of(rows, rng)
        known: dict[str, Any] = {}
        for stage in (1, 2):
            told = programme.read(stage, json.dumps(known))
            spread = programme.deviations(stage, 1 << 15, noise_multiplier(self.PLAN, rows))
            exact = programme.measure(stage, [(raw, targets)], told, 1 << 15)
            vector = noised_statistics(self.PLAN, spread, exact, SecretStream())
            assert not np.array_equal(vector, exact)
            assert programme.problem(stage, vector, rows, 1 << 15, 12 * spread) is None
            vector[1] = 1 << 50
            assert programme.problem(stage, vector, rows, 1 << 15, 12 * spread)
            vector[1] = exact[1]
            known = programme.absorb(stage, vector, known, 1 << 15)
        ages = raw[:, 0][raw[:, 0] <= 120]
        about = known["columns"]["age"]
        assert about["mean"] == pytest.approx(ages.mean(), rel=0.05)
        assert about["scale"] == pytest.approx(ages.std(), rel=0.1)
        assert about["quantiles"]["0.5"] == pytest.approx(np.median(ages), abs=6)
        assert known["columns"]["ill"]["counts"][0] == pytest.approx((targets == 0).sum(), abs=300)

    def test_an_empty_node_can_be_noised_and_absorbed(self) -> None:
        programme = Programme.of(self.PLAN)
        vector = programme.measure(1, [(np.zeros((9, 3)), np.zeros(9))], {}, 64) - 4
        known = programme.absorb(1, vector, {}, 64)
        assert known["columns"]["age"]["count"] is None or known["columns"]["age"]["count"] >= 0
