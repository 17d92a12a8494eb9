"""Metrics as sums of exact integers, so that they add over nodes and can ride under masks: a class for each task."""

from concord_shared.blocks import Block
from concord_shared.metrics.base import Counts, Figures, MetricSums
from concord_shared.metrics.kinds import (
    TOP,
    ClassificationSums,
    OwnSums,
    RankingSums,
    RegressionSums,
    TokenSums,
)
from concord_shared.plan.data import DataContract

__all__ = [
    "TOP",
    "ClassificationSums",
    "Figures",
    "MetricSums",
    "OwnSums",
    "RankingSums",
    "RegressionSums",
    "TokenSums",
    "better",
    "headline",
    "higher_is_better",
    "metric_sums",
    "metrics_block",
    "no_sums",
]

_KINDS: dict[str, type[MetricSums]] = {
    "classification": ClassificationSums,
    "regression": RegressionSums,
    "ranking": RankingSums,
    "language-model": TokenSums,
    "own": OwnSums,
}


def metric_sums(contract: DataContract, vector: Counts) -> MetricSums:
    """What `metrics_block` carried, `(size,) int64`."""
    return _KINDS[contract.task](contract, vector)


def no_sums(contract: DataContract) -> MetricSums:
    """Of no rows, which any others can be added to."""
    return _KINDS[contract.task].empty(contract)


def metrics_block(contract: DataContract) -> Block:
    """The integer block that carries the sums of this contract."""
    return Block("metrics", _KINDS[contract.task].size(contract), "none", ring_bits=64)


def headline(contract: DataContract) -> str:
    """The figure that decides which node is worst and which plan is best."""
    return _KINDS[contract.task].headline(contract)


def higher_is_better(contract: DataContract) -> bool:
    """Of the headline."""
    return headline(contract) not in ("rmse", "loss")


def better(contract: DataContract, first: float, second: float) -> bool:
    return first > second if higher_is_better(contract) else first < second
