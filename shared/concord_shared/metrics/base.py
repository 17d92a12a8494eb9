"""What the metrics of all tasks have in common: exact integers, the first of them the number of rows."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from concord_shared.errors import TrainingDivergedError
from concord_shared.plan.data import DataContract

__all__ = ["FRACTION_BITS", "Counts", "Figures", "MetricSums", "fixed", "real"]

Counts = NDArray[np.int64]
Figures = dict[str, float | list[list[int]] | None]

FRACTION_BITS = 20


TOO_LARGE = "a metric is NaN, Inf or too large to be summed; try a lower training.learning_rate"
"""Which it is, is not told: it is made of rows."""


def fixed(value: float, bits: int = FRACTION_BITS) -> int:
    """Raises: TrainingDivergedError: no fixed-point number holds it."""
    if not np.isfinite(value) or abs(value) >= 1 << (62 - bits):
        raise TrainingDivergedError(TOO_LARGE)
    return round(value * (1 << bits))


def real(value: np.int64, bits: int = FRACTION_BITS) -> float:
    return float(value) / (1 << bits)


@dataclass(frozen=True)
class MetricSums(ABC):
    """Sums over rows, so that they add over nodes. `vector` is int64: [rows, …], the rest by task; real numbers are
    fixed point.
    """

    contract: DataContract
    vector: Counts

    @staticmethod
    @abstractmethod
    def size(contract: DataContract) -> int:
        """How many numbers the sums are."""

    @staticmethod
    @abstractmethod
    def headline(contract: DataContract) -> str:
        """The figure that decides which node is worst and which plan is best."""

    @classmethod
    def empty(cls, contract: DataContract) -> Self:
        return cls(contract, np.zeros(cls.size(contract), np.int64))

    def __add__(self, other: Self) -> Self:
        """Raises: TrainingDivergedError: their integers do not hold it."""
        total = self.vector + other.vector
        if ((self.vector ^ total) & (other.vector ^ total) < 0).any():
            raise TrainingDivergedError(TOO_LARGE)
        return type(self)(self.contract, total)

    @property
    def rows(self) -> int:
        return int(self.vector[0])

    def problem(self, rows_max: int) -> str | None:
        """Why these sums cannot be those of an honest node with `rows_max` rows, or None."""
        if not 0 <= self.rows <= rows_max:
            return f"{self.rows} rows, where {rows_max} are registered"
        if not self.rows and self.vector.any():
            return "figures of no rows"
        return self._problem()

    @abstractmethod
    def _problem(self) -> str | None: ...

    def figures(self) -> Figures:
        """What people read; None where a figure is undefined (no rows, one class only)."""
        return {"rows": self.rows} | (self._figures() if self.rows else {})

    @abstractmethod
    def _figures(self) -> Figures: ...
