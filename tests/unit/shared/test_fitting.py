"""Quantiles over nodes become fences and norms: those of the pooled rows, and nobody can be led to others."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from concord_shared.errors import PlanError
from concord_shared.fitting import Fitting, fit, fit_locally
from concord_shared.plan import Plan
from concord_shared.preprocessing import Fitted
from helpers import IMAGES, TABLE
from helpers import plan_of as any_plan_of

TEXT = """
name = "text"
[data]
task = "classification"
input = "text"
text = "words"
length_max = 100
classes = ["a", "b"]
[preprocessing]
scope = "federated"
[preprocessing.text]
bins = 256
ngrams = 2
minimum_count = 2
[model]
name = "logistic-regression"
"""
IQR = "preprocessing.outliers={rule='iqr', factor=3.0}"
MAD = "preprocessing.outliers={rule='mad', factor=4.0}"


def plan_of(text: str, *overrides: str) -> Plan:
    """Under masks, as what is fitted from quantiles has to be."""
    private = () if any(override.startswith("privacy") for override in overrides) else ("privacy.mode=private",)
    return any_plan_of(text, *private, *overrides)


@pytest.fixture
def raw(rng: np.random.Generator) -> np.ndarray:
    """Ages, cities, and doses that are mostly 0; 2 % of the ages are damaged."""
    ages = rng.normal(50, 8, 4000).clip(0, 120)
    ages[::50] = 120.0
    doses = np.where(rng.random(4000) < 0.9, 0.0, rng.uniform(1, 5, 4000))
    rows = np.stack([ages, rng.integers(0, 3, 4000).astype(float), doses], 1)
    rows[rng.random(rows.shape) < 0.05] = np.nan
    return rows


def stages(plan: Plan, nodes: Sequence[np.ndarray], rows_max: int = 1 << 13) -> dict[str, Any]:
    """All stages over nodes, each answer checked as the coordinator does."""
    fitting, known = Fitting(plan), dict[str, Any]()
    for stage in range(1, fitting.stages + 1):
        told = fitting.read(stage, json.dumps(known))
        vectors = [fitting.measure(stage, [(part, None)], told, rows_max) for part in nodes]
        for part, vector in zip(nodes, vectors, strict=True):
            assert fitting.problem(stage, vector, len(part), rows_max) is None
            assert len(vector) == fitting.block(stage).size
        known = fitting.absorb(stage, np.sum(vectors, 0), known, rows_max)
    return known


def federated(plan: Plan, nodes: Sequence[np.ndarray]) -> Fitted:
    fitted = fit(plan, stages(plan, nodes))
    assert fitted.is_complete
    assert Fitted.from_document(json.loads(json.dumps(fitted.document()))) == fitted
    return fitted


class TestOutliers:
    def test_fences_of_quartiles_are_the_pooled_ones(self, raw: np.ndarray) -> None:
        fitted = federated(plan_of(TABLE, IQR), [raw[:10], raw[10:3000], raw[3000:]])
        first, third = np.nanquantile(raw[:, 0], [0.25, 0.75], method="inverted_cdf")
        expected = first - 3 * (third - first), third + 3 * (third - first)
        assert fitted.fences["age"] == pytest.approx(expected, abs=1e-5)
        moved = raw[:, 0].clip(*fitted.fences["age"])
        assert fitted.means["age"] == pytest.approx(np.nanmean(moved), abs=1e-6)
        assert fitted.scales["age"] == pytest.approx(np.nanstd(moved), abs=1e-6)
        assert fitted.counts(raw)["outliers"] >= 70

    def test_fences_of_median_distances_are_the_pooled_ones(self, raw: np.ndarray) -> None:
        fitted = federated(plan_of(TABLE, MAD), [raw[:10], raw[10:3000], raw[3000:]])
        ages = raw[:, 0][~np.isnan(raw[:, 0])]
        median = np.quantile(ages, 0.5, method="inverted_cdf")
        spread = 1.4826 * np.quantile(np.abs(ages - median), 0.5, method="inverted_cdf")
        assert fitted.fences["age"] == pytest.approx((median - 4 * spread, median + 4 * spread), abs=1e-5)

    @pytest.mark.parametrize("rule", [IQR, MAD])
    def test_a_column_that_is_mostly_zeros_survives(self, rule: str, raw: np.ndarray) -> None:
        fitted = federated(plan_of(TABLE, rule), [raw])
        low, high = np.nanquantile(raw[:, 2], [0.01, 0.99], method="inverted_cdf")
        assert fitted.fences["dose"] == pytest.approx((low, high), abs=1e-6)
        assert np.ptp(fitted.transform(raw)[:, -1]) > 3

    def test_a_flag_that_is_rarely_on_is_left_alone(self) -> None:
        rows = np.stack([np.full(1000, 30.0), np.zeros(1000), np.zeros(1000)], 1)
        rows[:4, 2] = 1.0
        fitted = federated(plan_of(TABLE, IQR), [rows])
        assert "dose" not in fitted.fences
        assert np.unique(fitted.transform(rows)[:, -1]).size == 2

    def test_each_spread_of_rows_over_nodes_gives_the_same_bits(self, raw: np.ndarray) -> None:
        plan = plan_of(TABLE, MAD, "preprocessing.normalise=robust", "preprocessing.standardise=false")
        assert federated(plan, [raw]).digest == federated(plan, [raw[:1], raw[1:2000], raw[2000:]]).digest
        assert fit_locally(plan, raw).means == pytest.approx(federated(plan, [raw]).means, rel=1e-9)


class TestNorms:
    def test_min_max(self, raw: np.ndarray) -> None:
        plan = plan_of(TABLE, "preprocessing.standardise=false", "preprocessing.normalise=min-max")
        out = federated(plan, [raw[:100], raw[100:]]).transform(raw)
        assert out[:, 0].min() == pytest.approx(0, abs=1e-6)
        assert out[:, 0].max() == pytest.approx(1, abs=1e-6)
        filled = (np.nanmean(raw[:, 0]) - np.nanmin(raw[:, 0])) / np.ptp(raw[:, 0][~np.isnan(raw[:, 0])])
        assert out[np.isnan(raw[:, 0]), 0] == pytest.approx(filled, abs=1e-6)

    def test_min_max_is_that_of_moved_values(self, raw: np.ndarray) -> None:
        plan = plan_of(TABLE, IQR, "preprocessing.standardise=false", "preprocessing.normalise=min-max")
        out = federated(plan, [raw]).transform(raw)
        assert (out[:, 0].min(), out[:, 0].max()) == pytest.approx((0, 1), abs=0.2)
        assert np.median(out[:, 0]) > 0.4

    def test_robust_fills_with_the_median_and_divides_by_the_quartiles(self, raw: np.ndarray) -> None:
        plan = plan_of(TABLE, "preprocessing.standardise=false", "preprocessing.normalise=robust")
        out = federated(plan, [raw[:100], raw[100:]]).transform(raw)
        assert out[np.isnan(raw[:, 0]), 0] == pytest.approx(0, abs=1e-6)
        assert np.subtract(*np.quantile(out[~np.isnan(raw[:, 0]), 0], [0.75, 0.25])) == pytest.approx(1, abs=0.01)
        assert np.abs(out[:, -1]).max() < 20  # no spread between its quartiles: by its deviation

    def test_standard_is_one_word(self) -> None:
        with_word = plan_of(TABLE, "preprocessing.standardise=false", "preprocessing.normalise=standard")
        assert with_word.digest == plan_of(TABLE).digest

    def test_two_norms_are_refused(self) -> None:
        with pytest.raises(PlanError, match="two ways"):
            plan_of(TABLE, "preprocessing.normalise=robust")


class TestOutside:
    PLAN = plan_of(TABLE, "preprocessing.outside=missing")

    def test_values_outside_are_missing_everywhere(self) -> None:
        rows = np.array([[20.0, 0, 1], [40, 1, 2], [4000, 2, 3], [-1, 0, 4]])
        fitted = federated(self.PLAN, [rows[:2], rows[2:]])
        assert fitted.means["age"] == pytest.approx(30)
        assert fitted.transform(rows)[2:, 0].tolist() == pytest.approx([0, 0], abs=1e-6)
        assert fitted.counts(rows) == {"outside": 2}
        assert rows[2, 0] == 4000

    def test_needs_something_to_fill_in(self) -> None:
        with pytest.raises(PlanError, match="outside"):
            plan_of(TABLE, "preprocessing.outside=missing", "preprocessing.missing=refuse")


class TestText:
    PLAN = plan_of(TEXT)
    WORDS = np.array(["心脏病", "心脏 病", "天气", "weather", "weather"])

    def test_documents_are_counted_over_nodes(self) -> None:
        fitted = federated(self.PLAN, [self.WORDS[:2], self.WORDS[2:]])
        assert fitted.documents[0] == 5
        # n-grams of one and two characters, each once a text: weather has 6 and 6
        assert sum(fitted.documents[1:]) == (3 + 2) + (4 + 3) + (2 + 1) + 2 * (6 + 6)
        out = fitted.transform(self.WORDS)
        assert out.shape == (5, 256)
        assert np.linalg.norm(out, axis=1) == pytest.approx([1, 1, 0, 1, 1], abs=1e-6)  # 天气 occurs once alone

    def test_a_bin_that_occurs_in_more_texts_than_there_are_is_refused(self) -> None:
        fitting = Fitting(self.PLAN)
        vector = fitting.measure(1, [(self.WORDS, None)], {}, 10)
        assert fitting.problem(1, vector, 5, 10) is None
        for place, value, words in ((0, 6, "6 rows"), (0, -1, "-1 rows"), (7, 6, "more texts"), (7, -1, "more texts")):
            wrong = vector.copy()
            wrong[place] = value
            assert words in str(fitting.problem(1, wrong, 5, 10))

    @pytest.mark.parametrize("damage", [[], [5], [5] + [6] * 256, [5] + [-1] * 256, [5] * 256])
    def test_a_document_with_other_counts_is_incomplete(self, damage: list[int]) -> None:
        document = federated(self.PLAN, [self.WORDS]).document() | {"documents": damage}
        assert not Fitted.from_document(document).is_complete


class TestHostileCoordinator:
    PLAN = plan_of(TABLE, MAD)

    @pytest.fixture
    def known(self, raw: np.ndarray) -> dict[str, Any]:
        return stages(self.PLAN, [raw])

    @pytest.mark.parametrize("value", [1e9, -1.0, "much", [1], float("nan")])
    @pytest.mark.parametrize("phase", ["quantiles", "distances"])
    def test_quantiles_outside_of_the_contract_are_refused(self, phase: str, value: Any, known: dict[str, Any]) -> None:
        fitting = Fitting(self.PLAN)
        fitting.read(fitting.stages, json.dumps(known))
        known[phase]["columns"]["age"]["quantiles"]["0.5"] = value
        with pytest.raises(ValueError, match="no results of the stage before"):
            fitting.read(fitting.stages, json.dumps(known))

    @pytest.mark.parametrize("missing", ["quantiles", "distances", "numbers"])
    def test_a_phase_that_is_missing_is_refused(self, missing: str, known: dict[str, Any]) -> None:
        del known[missing]
        with pytest.raises(ValueError, match="no results of the stage before"):
            Fitting(self.PLAN).read(Fitting(self.PLAN).stages, json.dumps(known))

    @pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000])
    def test_what_is_no_document_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="no results of the stage before"):
            Fitting(self.PLAN).read(5, text)

    @pytest.mark.parametrize(
        "damage", [{"fences": {"age": [3.0, 2.0]}}, {"fences": {"city": [0.0, 1.0]}}, {"centres": {"age": 1.0}}]
    )
    def test_a_fitted_document_that_does_not_fit_the_plan_is_incomplete(
        self, damage: dict[str, Any], known: dict[str, Any]
    ) -> None:
        document = fit(self.PLAN, known).document()
        assert Fitted.from_document(document).is_complete
        assert not Fitted.from_document(document | damage).is_complete


class TestRefusals:
    @pytest.mark.parametrize("wanted", ["outliers={rule='iqr'}", "normalise='min-max'", "normalise='robust'"])
    def test_quantiles_in_plain_mode(self, wanted: str) -> None:
        """The coordinator would see each node's counts, down to single values."""
        scope = f"preprocessing={{scope='SCOPE', missing='impute', {wanted}}}"
        with pytest.raises(PlanError, match="would see those of each node"):
            any_plan_of(TABLE, scope.replace("SCOPE", "federated"))
        any_plan_of(TABLE, scope.replace("SCOPE", "per-node"))
        any_plan_of(TABLE, scope.replace("SCOPE", "federated"), "privacy.mode=private")

    @pytest.mark.parametrize(
        ("text", "override", "words"),
        [
            (TABLE, "preprocessing.denoise=median", 'is for data.input = "image"'),
            (TABLE, "preprocessing.augment={flip=true}", 'is for data.input = "image"'),
            (TABLE, "preprocessing.text={bins=64}", 'is for data.input = "text"'),
            (IMAGES, "preprocessing={scope='federated', outliers={rule='iqr'}}", 'is for data.input = "table"'),
            (IMAGES, "preprocessing={scope='federated', normalise='robust'}", 'is for data.input = "table"'),
            (TEXT, "preprocessing.standardise=true", "nothing to standardise"),
            (TEXT, "preprocessing.text.bins=1000", "power of two"),
            (TEXT, "data.length_max=0", "length_max"),
            (IMAGES, "preprocessing.augment={shift=8}", "moves a whole image away"),
            (IMAGES, "preprocessing.denoise=median", "at least 16×16"),
            (TABLE, "preprocessing={outliers={rule='iqr'}}", "need scope"),
            (TEXT, "privacy={mode='plain', dp={unit='node', epsilon=1.0, delta=1e-5, clip=10.0}}", "exact sums"),
            (TEXT, "privacy.mode=robust", "one node can bend"),
        ],
    )
    def test_a_step_that_the_data_do_not_have_is_named(self, text: str, override: str, words: str) -> None:
        with pytest.raises(PlanError, match=words):
            plan_of(text, override)
