"""Each task's sums, what they cannot be, and the figures that people read."""

import math

import numpy as np
from numpy.typing import NDArray

from concord_shared.metrics.base import FRACTION_BITS, Counts, Figures, MetricSums, fixed, real
from concord_shared.plan.data import DataContract

__all__ = ["TOP", "ClassificationSums", "OwnSums", "RankingSums", "RegressionSums", "TokenSums"]

BINS = 1024
TOP = 10
LOSS_MAX = 700.0
"""In nats: e to it is still a number."""
UTF8_MAX, ENDS_MAX = 4, 16
"""A token is a byte of a character at least; a few more begin and end a text."""


class ClassificationSums(MetricSums):
    """[rows, loss, K·K confusion (true, predicted), K·2·1024 histogram of one-vs-rest scores (for the AUC)]."""

    @staticmethod
    def size(contract: DataContract) -> int:
        k = len(contract.classes)
        return 2 + k * k + k * 2 * BINS

    @staticmethod
    def headline(contract: DataContract) -> str:
        return "accuracy"

    @classmethod
    def of(
        cls, contract: DataContract, loss_sum: float, probabilities: NDArray[np.float32], targets: Counts
    ) -> "ClassificationSums":
        """From probabilities `(n, K)` and class indices `(n,)`."""
        k = len(contract.classes)
        loss = fixed(loss_sum)
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

    def _confusion(self) -> Counts:
        k = len(self.contract.classes)
        return self.vector[2 : 2 + k * k].reshape(k, k)

    def _histogram(self) -> Counts:
        k = len(self.contract.classes)
        return self.vector[2 + k * k :].reshape(k, 2, BINS)

    def _problem(self) -> str | None:
        if int(self.vector.min()) < 0:
            return "a count is negative"
        confusion, histogram = self._confusion(), self._histogram()
        if int(confusion.max()) > self.rows or int(confusion.sum()) != self.rows:
            return "the confusion matrix does not count each row once"
        positives = confusion.sum(1)
        if int(histogram.max()) > self.rows or not np.array_equal(
            histogram.sum(2), np.stack([self.rows - positives, positives], 1)
        ):
            return "the score histograms do not count each row once a class"
        return None

    def _figures(self) -> Figures:
        confusion = self._confusion()
        hits, actual, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        present = actual > 0
        recall = hits[present] / actual[present]
        precision = hits[present] / np.maximum(predicted[present], 1)
        f1 = 2 * hits[present] / (actual[present] + predicted[present])
        return {
            "loss": real(self.vector[1]) / self.rows,
            "accuracy": float(hits.sum() / self.rows),
            "recall_macro": float(recall.mean()),
            "precision_macro": float(precision.mean()),
            "f1_macro": float(f1.mean()),
            "auc": self._auc(),
            "confusion": confusion.tolist(),
        }

    def _auc(self) -> float | None:
        """Area under the ROC curve from histograms, ties within a bin counted half; macro over the classes present."""
        histogram = self._histogram().astype(np.float64)
        areas = []
        for negatives, positives in histogram[1:] if len(histogram) == 2 else histogram:
            if negatives.sum() and positives.sum():
                below = np.cumsum(negatives) - negatives
                areas.append(float((positives * (below + negatives / 2)).sum() / negatives.sum() / positives.sum()))
        return float(np.mean(areas)) if areas else None


class RegressionSums(MetricSums):
    """[rows, squared error, absolute error, Σt, Σt²], t the target minus the middle of its range; all in units of half
    that range, so that no range is too wide for the sums, with BITS of fraction.
    """

    BITS = 32

    @staticmethod
    def size(contract: DataContract) -> int:
        return 5

    @staticmethod
    def headline(contract: DataContract) -> str:
        return "rmse"

    @classmethod
    def of(
        cls, contract: DataContract, predictions: NDArray[np.float64], targets: NDArray[np.float64]
    ) -> "RegressionSums":
        """Of two vectors `(n,)`."""
        middle, half = _middle_and_half(contract)
        error, centred = (predictions - targets) / half, (targets - middle) / half
        sums = [
            float(error @ error),
            float(np.abs(error).sum()),
            float(centred.sum()),
            float(centred @ centred),
        ]
        return cls(contract, np.array([len(targets), *(fixed(each, cls.BITS) for each in sums)], np.int64))

    def _problem(self) -> str | None:
        """Of the targets all is bounded by their range; of the errors nothing, for a prediction may be anything."""
        squared, absolute, first, second = (int(value) for value in self.vector[1:])
        if min(squared, absolute, second) < 0:
            return "a sum of squares is negative"
        middle, half = _middle_and_half(self.contract)
        widest = 1 + math.ldexp((abs(middle) + half) / half, -23)  # nodes hold targets as float32
        for power, total in ((1, abs(first)), (2, second)):
            if total > math.ldexp(widest**power, self.BITS) * self.rows * (1 + 1e-9) + self.rows:
                return "the targets have a sum that no values within their range have"
        for total, squares in ((absolute, squared), (first, second)):  # Cauchy and Schwarz, and what was rounded
            rounded = max(0, abs(total) - self.rows)
            if rounded**2 * (1 - 1e-9) > (self.rows * (squares + self.rows)) << self.BITS:
                return "a sum of numbers is greater than that of their squares allows"
        return None

    def _figures(self) -> Figures:
        squared, absolute, first, second = (real(value, self.BITS) / self.rows for value in self.vector[1:])
        variance, half = second - first**2, _middle_and_half(self.contract)[1]
        noise = (2 * abs(first) + 2) / (1 << self.BITS)  # what fixed point alone can show where all are equal
        return {
            "loss": squared * half**2,
            "rmse": squared**0.5 * half,
            "mae": absolute * half,
            "r2": 1 - squared / variance if variance > noise else None,
        }


def _middle_and_half(contract: DataContract) -> tuple[float, float]:
    """Of the targets' range."""
    assert contract.target_range is not None
    low, high = contract.target_range
    return low / 2 + high / 2, high / 2 - low / 2


class RankingSums(MetricSums):
    """[rows, hits, gain]: hits among the first 10, and what they gain by their places."""

    @staticmethod
    def size(contract: DataContract) -> int:
        return 3

    @staticmethod
    def headline(contract: DataContract) -> str:
        return f"ndcg_{TOP}"

    @classmethod
    def of(cls, contract: DataContract, places: NDArray[np.float64]) -> "RankingSums":
        """From the places `(n,)` (1, 2, …) at which test items are among all that their users did not take before.

        With one item to find, NDCG is its gain 1 / log2(1 + place) (Järvelin and Kekäläinen 2002; He et al. 2017).
        """
        top = places[places <= TOP]
        return cls(contract, np.array([len(places), len(top), fixed(float((1 / np.log2(1 + top)).sum()))], np.int64))

    def _problem(self) -> str | None:
        hits, gain = int(self.vector[1]), real(self.vector[2])
        if not 0 <= hits <= self.rows:
            return f"{hits} hits in {self.rows} rows"
        if not hits / math.log2(1 + TOP) - self.rows * 1e-5 - 1e-5 <= gain <= hits + 1e-5:
            return "a gain that no places of so many hits have"
        return None

    def _figures(self) -> Figures:
        hits, gain = int(self.vector[1]), real(self.vector[2])
        return {f"hit_rate_{TOP}": hits / self.rows, f"ndcg_{TOP}": gain / self.rows}


class TokenSums(MetricSums):
    """[rows, loss, tokens, tokens told right], of a language model: a row is a text."""

    @staticmethod
    def size(contract: DataContract) -> int:
        return 4

    @staticmethod
    def headline(contract: DataContract) -> str:
        return "loss"

    @classmethod
    def of(cls, contract: DataContract, rows: int, loss_sum: float, known: int, hits: int) -> "TokenSums":
        """Of so many texts: the summed loss over their `known` next tokens, and how many of these were told right."""
        return cls(contract, np.array([rows, fixed(loss_sum), known, hits], np.int64))

    def _problem(self) -> str | None:
        loss, known, hits = (int(value) for value in self.vector[1:])
        if not 0 <= known <= self.rows * (UTF8_MAX * self.contract.length_max + ENDS_MAX):
            return f"{known} tokens, which so many texts do not have"
        if loss < 0 or not 0 <= hits <= known:
            return "a loss below 0, or more tokens told right than there are"
        return None

    def _figures(self) -> Figures:
        """Loss in nats and share told right, of each token; none where no text has a second one."""
        known, hits = int(self.vector[2]), int(self.vector[3])
        if known == 0:
            return {"tokens": 0}
        loss = real(self.vector[1]) / known
        return {
            "tokens": known,
            "loss": loss,
            "perplexity": math.exp(min(loss, LOSS_MAX)),
            "accuracy": hits / known,
        }


class OwnSums(MetricSums):
    """[rows, loss, each score], of a task that another wheel's model brings."""

    @staticmethod
    def size(contract: DataContract) -> int:
        return 2 + len(contract.scores)

    @staticmethod
    def headline(contract: DataContract) -> str:
        return contract.scores[0] if contract.scores else "loss"

    @classmethod
    def of(cls, contract: DataContract, loss_sum: float, scores: NDArray[np.float64]) -> "OwnSums":
        """From what a model says of its answers: scores `(n, k)`, taken as 0 to 1."""
        sums = np.clip(np.nan_to_num(scores), 0, 1).sum(axis=0)
        return cls(contract, np.array([len(scores), fixed(loss_sum), *map(fixed, sums.tolist())], np.int64))

    def _problem(self) -> str | None:
        most = (self.rows << FRACTION_BITS) + self.rows
        return None if ((self.vector[2:] >= 0) & (self.vector[2:] <= most)).all() else "a score outside of 0 to 1"

    def _figures(self) -> Figures:
        loss, *scores = (real(total) / self.rows for total in self.vector[1:])
        return {"loss": loss, **dict(zip(self.contract.scores, scores, strict=True))}
