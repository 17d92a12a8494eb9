"""Metrics as sums of exact integers, so that they add over nodes and can ride under masks.

Classification: loss, confusion matrix, one-vs-rest score histograms (for the AUC). Regression: squared and
absolute error, the target's sum and squares. Ranking: hits among the first 10, and what they gain by their places.
Language models: loss, tokens, tokens told right. Real numbers are fixed point with 20 fractional bits.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from concord_shared.blocks import Block
from concord_shared.errors import TrainingDivergedError
from concord_shared.plan.schema import DataContract

__all__ = ["TOP", "MetricSums", "better", "headline", "higher_is_better", "metrics_block", "metrics_size"]

Counts = NDArray[np.int64]
Figures = dict[str, float | list[list[int]] | None]

FRACTION_BITS = 20
BINS = 1024
TOP = 10
LOSS_MAX = 700.0
"""In nats: e to it is still a number."""


def metrics_block(contract: DataContract) -> Block:
    """The integer block that carries a `MetricSums` of this contract."""
    return Block("metrics", metrics_size(contract), "none", ring_bits=64)


def metrics_size(contract: DataContract) -> int:
    """How many numbers the sums are."""
    k = len(contract.classes)
    sizes = {"classification": 2 + k * k + k * 2 * BINS, "regression": 5, "ranking": 3, "language-model": 4}
    return 2 + len(contract.scores) if contract.task == "own" else sizes[contract.task]


def headline(contract: DataContract) -> str:
    """The figure that decides which node is worst and which plan is best."""
    if contract.task == "own":
        return contract.scores[0] if contract.scores else "loss"
    figures = {"classification": "accuracy", "regression": "rmse", "ranking": "ndcg_10", "language-model": "loss"}
    return figures[contract.task]


def higher_is_better(contract: DataContract) -> bool:
    """Of the headline."""
    return headline(contract) not in ("rmse", "loss")


def better(contract: DataContract, first: float, second: float) -> bool:
    return first > second if higher_is_better(contract) else first < second


@dataclass(frozen=True)
class MetricSums:
    """Integer sums over rows.

    `vector` (int64) is for K classes [rows, loss, K·K confusion (true, predicted), K·2·1024 histogram]
    and for a regression [rows, squared error, absolute error, Σt, Σt²], t the target minus the middle of its
    range; for a ranking [rows, hits, gain]; for a language model [rows, loss, tokens, tokens that were told right]; for
    a task of a model's own [rows, loss, each score].
    """

    contract: DataContract
    vector: Counts

    @classmethod
    def empty(cls, contract: DataContract) -> "MetricSums":
        return cls(contract, np.zeros(metrics_size(contract), np.int64))

    @classmethod
    def of_classification(
        cls, contract: DataContract, loss_sum: float, probabilities: NDArray[np.float32], targets: Counts
    ) -> "MetricSums":
        """From probabilities `(n, K)` and class indices `(n,)`."""
        k = len(contract.classes)
        loss = _fixed(loss_sum)
        predicted = probabilities.argmax(1)
        confusion = np.bincount(targets * k + predicted, minlength=k * k)
        bins = np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)
        is_class = targets[:, None] == np.arange(k)
        index = (np.arange(k) * 2 + is_class) * BINS + bins
        histogram = np.bincount(index.reshape(-1), minlength=k * 2 * BINS)
        return cls(
            contract,
            np.concatenate([[len(targets), loss], confusion, histogram]).astype(np.int64),
        )

    @classmethod
    def of_regression(
        cls, contract: DataContract, predictions: NDArray[np.float64], targets: NDArray[np.float64]
    ) -> "MetricSums":
        error, centred = predictions - targets, targets - _middle(contract)
        sums = [
            float(error @ error),
            float(np.abs(error).sum()),
            float(centred.sum()),
            float(centred @ centred),
        ]
        return cls(contract, np.array([len(targets), *map(_fixed, sums)], np.int64))

    @classmethod
    def of_ranking(cls, contract: DataContract, places: NDArray[np.float64]) -> "MetricSums":
        """From the places `(n,)` (1, 2, …) at which test items are among all that their users did not take before.

        With one item to find, NDCG is its gain 1 / log2(1 + place) (Järvelin and Kekäläinen 2002; He et al. 2017).
        """
        top = places[places <= TOP]
        return cls(contract, np.array([len(places), len(top), _fixed(float((1 / np.log2(1 + top)).sum()))], np.int64))

    @classmethod
    def of_scores(cls, contract: DataContract, loss_sum: float, scores: NDArray[np.float64]) -> "MetricSums":
        """From what a model says of its answers: scores `(n, k)`, taken as 0 to 1."""
        sums = np.clip(np.nan_to_num(scores), 0, 1).sum(axis=0)
        return cls(contract, np.array([len(scores), _fixed(loss_sum), *map(_fixed, sums.tolist())], np.int64))

    @classmethod
    def of_tokens(cls, contract: DataContract, rows: int, loss_sum: float, known: int, hits: int) -> "MetricSums":
        """Of so many texts: the summed loss over their `known` next tokens, and how many of these were told right."""
        return cls(contract, np.array([rows, _fixed(loss_sum), known, hits], np.int64))

    def __add__(self, other: "MetricSums") -> "MetricSums":
        return MetricSums(self.contract, self.vector + other.vector)

    @property
    def rows(self) -> int:
        return int(self.vector[0])

    def problem(self, rows_max: int) -> str | None:
        """Why these sums cannot be those of an honest node with `rows_max` rows, or None."""
        k = len(self.contract.classes)
        if not 0 <= self.rows <= rows_max:
            return f"{self.rows} rows, where {rows_max} are registered"
        if self.contract.task == "regression":
            return self._regression_problem()
        if self.contract.task == "ranking":
            return self._ranking_problem()
        if self.contract.task == "own":
            most = (self.rows << FRACTION_BITS) + self.rows
            return None if ((self.vector[2:] >= 0) & (self.vector[2:] <= most)).all() else "a score outside of 0 to 1"
        if self.contract.task == "language-model":
            return self._tokens_problem()
        if int(self.vector.min()) < 0:
            return "a count is negative"
        confusion, histogram = self.vector[2 : 2 + k * k], self.vector[2 + k * k :]
        if int(confusion.max()) > rows_max or int(confusion.sum()) != self.rows:
            return "the confusion matrix does not count each row once"
        by_class = histogram.reshape(k, 2, BINS).sum(2)
        positives = confusion.reshape(k, k).sum(1)
        if int(histogram.max()) > rows_max or not np.array_equal(
            by_class, np.stack([self.rows - positives, positives], 1)
        ):
            return "the score histograms do not count each row once a class"
        return None

    def _regression_problem(self) -> str | None:
        """Of the targets all is bounded by their range; of the errors nothing, for a prediction may be anything."""
        squared, absolute, first, second = (int(value) for value in self.vector[1:])
        if min(squared, absolute, second) < 0:
            return "a sum of squares is negative"
        low, high = self.contract.target_range or (0.0, 0.0)
        half = (high - low) / 2 + math.ldexp(max(abs(low), abs(high)), -23)  # nodes hold targets as float32
        for power, total in ((1, abs(first)), (2, second)):
            if total > math.ldexp(half**power, FRACTION_BITS) * self.rows * (1 + 1e-9) + self.rows:
                return "the targets have a sum that no values within their range have"
        return None

    def _ranking_problem(self) -> str | None:
        hits, gain = int(self.vector[1]), _real(self.vector[2])
        if not 0 <= hits <= self.rows:
            return f"{hits} hits in {self.rows} rows"
        if not hits / math.log2(1 + TOP) - self.rows * 1e-5 - 1e-5 <= gain <= hits + 1e-5:
            return "a gain that no places of so many hits have"
        return None

    def _tokens_problem(self) -> str | None:
        loss, known, hits = (int(value) for value in self.vector[1:])
        if not 0 <= known <= self.rows * self.contract.length_max:
            return f"{known} tokens, which so many texts do not have"
        if loss < 0 or not 0 <= hits <= known:
            return "a loss below 0, or more tokens told right than there are"
        return None

    def figures(self) -> Figures:
        """What people read; None where a figure is undefined (no rows, one class only)."""
        if self.rows == 0:
            return {"rows": 0}
        if self.contract.task == "ranking":
            hits, gain = int(self.vector[1]), _real(self.vector[2])
            return {"rows": self.rows, f"hit_rate_{TOP}": hits / self.rows, f"ndcg_{TOP}": gain / self.rows}
        if self.contract.task == "own":
            means = {
                name: _real(total) / self.rows
                for name, total in zip(self.contract.scores, self.vector[2:], strict=True)
            }
            return {"rows": self.rows, "loss": _real(self.vector[1]) / self.rows, **means}
        if self.contract.task == "language-model":
            return self._tokens()
        return self._classification() if self.contract.task == "classification" else self._regression()

    def _tokens(self) -> Figures:
        """Loss in nats and share told right, of each token; none where no text has a second one."""
        known, hits = int(self.vector[2]), int(self.vector[3])
        if known == 0:
            return {"rows": self.rows, "tokens": 0}
        loss = _real(self.vector[1]) / known
        return {
            "rows": self.rows,
            "tokens": known,
            "loss": loss,
            "perplexity": math.exp(min(loss, LOSS_MAX)),
            "accuracy": hits / known,
        }

    def _classification(self) -> Figures:
        k = len(self.contract.classes)
        confusion = self.vector[2 : 2 + k * k].reshape(k, k)
        hits, actual, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        present = actual > 0
        recall = hits[present] / actual[present]
        precision = hits[present] / np.maximum(predicted[present], 1)
        f1 = 2 * hits[present] / (actual[present] + predicted[present])
        return {
            "rows": self.rows,
            "loss": _real(self.vector[1]) / self.rows,
            "accuracy": float(hits.sum() / self.rows),
            "recall_macro": float(recall.mean()),
            "precision_macro": float(precision.mean()),
            "f1_macro": float(f1.mean()),
            "auc": self._auc(),
            "confusion": confusion.tolist(),
        }

    def _auc(self) -> float | None:
        """Area under the ROC curve from histograms, ties within a bin counted half; macro over the classes present."""
        k = len(self.contract.classes)
        histogram = self.vector[2 + k * k :].reshape(k, 2, BINS).astype(np.float64)
        areas = []
        for negatives, positives in histogram[1:] if k == 2 else histogram:
            if negatives.sum() and positives.sum():
                below = np.cumsum(negatives) - negatives
                areas.append(float((positives * (below + negatives / 2)).sum() / negatives.sum() / positives.sum()))
        return float(np.mean(areas)) if areas else None

    def _regression(self) -> Figures:
        squared, absolute, first, second = (_real(value) / self.rows for value in self.vector[1:])
        variance = second - first**2
        noise = (2 * abs(first) + 2) / (1 << FRACTION_BITS)  # what fixed point alone can show where all are equal
        return {
            "rows": self.rows,
            "loss": squared,
            "rmse": squared**0.5,
            "mae": absolute,
            "r2": 1 - squared / variance if variance > noise else None,
        }


def _fixed(value: float) -> int:
    if not np.isfinite(value) or abs(value) >= 1 << (62 - FRACTION_BITS):
        raise TrainingDivergedError(f"a metric is {value:g}; try a lower training.learning_rate")
    return round(value * (1 << FRACTION_BITS))


def _real(value: np.int64) -> float:
    return float(value) / (1 << FRACTION_BITS)


def _middle(contract: DataContract) -> float:
    assert contract.target_range is not None
    return (contract.target_range[0] + contract.target_range[1]) / 2
