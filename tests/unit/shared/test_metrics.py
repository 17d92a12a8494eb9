import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from concord_shared.errors import TrainingDivergedError
from concord_shared.metrics import (
    ClassificationSums,
    MetricSums,
    RegressionSums,
    better,
    headline,
    metrics_block,
    no_sums,
)
from concord_shared.plan import Plan
from helpers import IMAGES, REGRESSION, TABLE, plan_of, softmax

ROWS = 1500
REAL = plan_of(REGRESSION).data


def plan_with(classes: int) -> Plan:
    return plan_of(IMAGES, f"data.classes={[str(c) for c in range(classes)]}")


def scored(classes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that know something of the targets, of unequal frequency."""
    targets = rng.choice(classes, ROWS, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    return softmax(rng.normal(size=(ROWS, classes)) + 1.2 * np.eye(classes)[targets]), targets


def sums_of(probabilities: np.ndarray, targets: np.ndarray, loss: float = 0.0) -> MetricSums:
    contract = plan_with(probabilities.shape[1]).data
    return ClassificationSums.of(contract, loss, probabilities.astype(np.float32), targets)


@pytest.mark.parametrize("classes", [2, 3, 7])
class TestAgainstScikitLearn:
    def test_accuracy_recall_precision_f1_and_confusion(self, classes: int, rng: np.random.Generator) -> None:
        probabilities, targets = scored(classes, rng)
        figures, predicted = sums_of(probabilities, targets).figures(), probabilities.argmax(1)
        assert figures["rows"] == ROWS
        assert figures["confusion"] == sk.confusion_matrix(targets, predicted).tolist()
        assert figures["accuracy"] == pytest.approx(sk.accuracy_score(targets, predicted), rel=1e-12)
        for name, score in (("recall", sk.recall_score), ("precision", sk.precision_score), ("f1", sk.f1_score)):
            expected = score(targets, predicted, average="macro", zero_division=0)
            assert figures[f"{name}_macro"] == pytest.approx(expected, rel=1e-12)

    def test_auc_is_that_of_scores_rounded_to_the_histogram(self, classes: int, rng: np.random.Generator) -> None:
        probabilities, targets = scored(classes, rng)

        def area(scores: np.ndarray) -> float:
            chosen = [1] if classes == 2 else range(classes)
            return float(np.mean([sk.roc_auc_score(targets == c, scores[:, c]) for c in chosen]))

        auc = sums_of(probabilities, targets).figures()["auc"]
        assert auc == pytest.approx(area(np.floor(probabilities * 1024)), rel=1e-9)
        assert auc == pytest.approx(area(probabilities), abs=1e-3)

    def test_loss(self, classes: int, rng: np.random.Generator) -> None:
        probabilities, targets = scored(classes, rng)
        loss_sum = -float(np.log(probabilities[np.arange(ROWS), targets].astype(np.float64)).sum())
        loss = sums_of(probabilities, targets, loss_sum).figures()["loss"]
        exact = probabilities.astype(np.float64)
        expected = sk.log_loss(targets, exact / exact.sum(1, keepdims=True), labels=range(classes))
        assert loss == pytest.approx(expected, abs=1e-6)

    def test_counts_of_any_split_add_to_those_of_all(self, classes: int, rng: np.random.Generator) -> None:
        probabilities, targets = scored(classes, rng)
        whole, parts = sums_of(probabilities, targets), no_sums(plan_with(classes).data)
        for rows in np.split(rng.permutation(ROWS), [0, 1, 700]):
            parts += sums_of(probabilities[rows], targets[rows])
        assert np.array_equal(whole.vector, parts.vector)


def test_regression_figures_are_scikit_learns(rng: np.random.Generator) -> None:
    targets = rng.uniform(-60, 90, ROWS)
    predictions = targets + rng.normal(3, 5, ROWS)
    figures = RegressionSums.of(REAL, predictions, targets).figures()
    assert figures["rmse"] == pytest.approx(sk.root_mean_squared_error(targets, predictions), rel=1e-6)
    assert figures["mae"] == pytest.approx(sk.mean_absolute_error(targets, predictions), rel=1e-6)
    assert figures["r2"] == pytest.approx(sk.r2_score(targets, predictions), rel=1e-6)
    assert figures["loss"] == pytest.approx(sk.mean_squared_error(targets, predictions), rel=1e-6)


def test_r2_is_about_the_targets_mean_also_where_the_range_is_elsewhere() -> None:
    contract = plan_of(REGRESSION, "data.target_range=[100, 300]").data
    targets, predictions = np.array([101.0, 102.0, 103.0]), np.array([101.0, 102.0, 104.0])
    assert RegressionSums.of(contract, predictions, targets).figures()["r2"] == pytest.approx(0.5, abs=1e-6)


def test_confusion_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.6, 0.4, 0], [0, 0.1, 0.9]])
    figures = sums_of(probabilities, np.array([0, 1, 1, 2])).figures()
    assert figures["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert figures["accuracy"] == 0.75
    assert figures["recall_macro"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert figures["precision_macro"] == pytest.approx((0.5 + 1 + 1) / 3)


def test_a_class_that_no_row_has_is_left_out(rng: np.random.Generator) -> None:
    probabilities, targets = scored(4, rng)
    some = targets != 2
    figures, predicted = sums_of(probabilities[some], targets[some]).figures(), probabilities[some].argmax(1)
    present = [0, 1, 3]
    for name, score in (("recall", sk.recall_score), ("precision", sk.precision_score), ("f1", sk.f1_score)):
        expected = score(targets[some], predicted, labels=present, average="macro", zero_division=0)
        assert figures[f"{name}_macro"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("score", "auc"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_auc_of_a_perfect_a_perverse_and_a_blind_model(score: float, auc: float) -> None:
    targets = np.array([0, 0, 1, 1])
    ill = np.where(targets == 1, score, 1 - score)
    assert sums_of(np.stack([1 - ill, ill], 1), targets).figures()["auc"] == auc


def test_undefined_figures_are_none() -> None:
    assert sums_of(np.array([[0.3, 0.7]]), np.array([1])).figures()["auc"] is None
    assert no_sums(REAL).figures() == {"rows": 0}
    assert no_sums(plan_with(2).data).figures() == {"rows": 0}


@pytest.mark.parametrize("target", [9.504636963259353, 3.3])
def test_r2_of_equal_targets_is_undefined(target: float) -> None:
    figures = [
        RegressionSums.of(REAL, np.full(rows, target + 1), np.full(rows, target)).figures()["r2"]
        for rows in range(1, 60)
    ]
    assert set(figures) == {None}


@pytest.mark.parametrize("high", [1e-3, 1e6, 1e9])
def test_a_range_may_be_as_narrow_or_wide_as_its_unit_makes_it(high: float) -> None:
    contract = REAL.model_copy(update={"target_range": (0.0, high)})
    targets = np.linspace(0, high, 1000)
    sums = RegressionSums.of(contract, np.zeros(1000), targets)
    figures = sum([sums] * 99, sums).figures()
    assert sums.problem(1000) is None
    assert figures["rmse"] == pytest.approx(np.sqrt(np.mean(targets**2)), rel=1e-6)
    assert figures["r2"] == pytest.approx(sk.r2_score(targets, np.zeros(1000)), rel=1e-6)


def test_what_the_sums_do_not_hold_is_divergence_and_not_another_number() -> None:
    sums = RegressionSums(REAL, np.array([1, 1 << 62, 0, 0, 0]))
    with pytest.raises(TrainingDivergedError):
        _ = sums + sums


def test_the_error_tells_no_value() -> None:
    with pytest.raises(TrainingDivergedError) as caught:
        RegressionSums.of(REAL, np.array([7.3e14]), np.array([0.0]))
    assert not any(letter.isdigit() for letter in str(caught.value))


@pytest.mark.parametrize("value", [np.inf, 1e30])
def test_an_error_too_large_to_sum_is_divergence(value: float) -> None:
    with pytest.raises(TrainingDivergedError, match="a metric is"):
        RegressionSums.of(REAL, np.array([value]), np.array([0.0]))
    with pytest.raises(TrainingDivergedError, match="a metric is"):
        sums_of(np.array([[0.5, 0.5]]), np.array([0]), loss=value)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_probabilities_that_are_nan_are_divergence() -> None:
    with pytest.raises(TrainingDivergedError):
        sums_of(np.full((2, 2), np.nan), np.array([0, 1]), loss=float("nan"))


class TestProblems:
    """What the coordinator refuses: sums that no honest node with that many rows can have."""

    def honest(self) -> MetricSums:
        return sums_of(np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]]), np.array([0, 1, 0]), 1.0)

    def changed(self, index: int, value: int) -> str | None:
        sums = self.honest()
        sums.vector[index] += value
        return sums.problem(3)

    def test_honest_sums_have_none(self) -> None:
        assert self.honest().problem(3) is None
        assert no_sums(plan_with(2).data).problem(0) is None
        assert RegressionSums.of(REAL, np.array([1.0]), np.array([-90.0])).problem(1) is None

    def test_more_rows_than_registered(self) -> None:
        assert self.honest().problem(2) == "3 rows, where 2 are registered"

    def test_negative_rows(self) -> None:
        assert "rows" in str(self.changed(0, -4))

    def test_negative_loss(self) -> None:
        assert self.changed(1, -(1 << 30)) == "a count is negative"

    def test_negative_cell_that_a_large_one_makes_up_for(self) -> None:
        sums = self.honest()
        sums.vector[[2, 3]] += [-2, 2]
        assert sums.problem(3) == "a count is negative"

    def test_confusion_matrix_that_counts_a_row_twice(self) -> None:
        assert "confusion" in str(self.changed(2, 1))

    def test_confusion_matrix_that_wraps_around(self) -> None:
        sums = self.honest()
        sums.vector[[2, 3, 4, 5]] = [2**62, 2**62, 2**62, 2**62 + 3]  # sums to 3 modulo 2⁶⁴
        assert "confusion" in str(sums.problem(3))

    def test_histogram_that_counts_a_row_twice(self) -> None:
        assert "histogram" in str(self.changed(6 + 100, 1))

    def test_histogram_that_counts_one_class_twice_and_another_never(self) -> None:
        sums = self.honest()
        first, second = np.split(sums.vector[6:], 2)
        first += second
        second[:] = 0
        assert "histogram" in str(sums.problem(3))

    @pytest.mark.parametrize("index", [1, 2, 4])
    def test_negative_squares(self, index: int) -> None:
        sums = RegressionSums.of(REAL, np.array([1.0]), np.array([0.0]))
        sums.vector[index] = -1
        assert sums.problem(1) == "a sum of squares is negative"

    @pytest.mark.parametrize("index", [3, 4])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_targets_outside_of_their_range(self, index: int, sign: int) -> None:
        """With them a node could give everyone any r²."""
        sums = RegressionSums.of(REAL, np.zeros(2), np.array([100.0, -100.0]))
        assert sums.problem(2) is None
        sums.vector[index] = (1 if index == 4 else sign) * int(2.001 * (1 << RegressionSums.BITS))
        assert "within their range" in str(sums.problem(2))

    @pytest.mark.parametrize("index", [2, 3])
    def test_numbers_that_their_squares_do_not_allow(self, index: int) -> None:
        sums = RegressionSums.of(REAL, np.array([1.0, 2.0]), np.array([30.0, 10.0]))
        assert sums.problem(2) is None
        sums.vector[index] = int(0.9 * (1 << RegressionSums.BITS))  # their squares are 0.09 and 0.1
        assert "squares" in str(sums.problem(2))

    @pytest.mark.parametrize("sums", [no_sums(REAL), no_sums(plan_with(2).data)], ids=["regression", "classification"])
    def test_figures_of_no_rows(self, sums: MetricSums) -> None:
        assert sums.problem(3) is None
        sums.vector[1] = 1 << 40
        assert sums.problem(3) == "figures of no rows"

    def test_targets_at_the_end_of_a_narrow_range_far_from_zero(self) -> None:
        contract = REAL.model_copy(update={"target_range": (1e6 + 0.1, 1e6 + 0.3)})
        targets = np.float64(np.float32([1e6 + 0.3] * 1000))  # as a node holds them: 1000000.3125
        assert RegressionSums.of(contract, targets, targets).problem(1000) is None


@given(st.integers(2, 6))
def test_block_has_the_size_of_the_sums(classes: int) -> None:
    block = metrics_block(plan_with(classes).data)
    assert (block.size, block.weight, block.ring_bits) == (2 + classes**2 + 2048 * classes, "none", 64)
    assert metrics_block(REAL).size == 5


def test_headline_decides_what_is_better() -> None:
    table = plan_of(TABLE).data
    assert (headline(table), headline(REAL)) == ("accuracy", "rmse")
    assert better(table, 0.9, 0.8)
    assert not better(table, 0.8, 0.8)
    assert better(REAL, 0.8, 0.9)
