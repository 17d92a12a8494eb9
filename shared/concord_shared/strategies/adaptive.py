"""FedAdam, FedYogi and FedAdagrad: the mean difference as a pseudo-gradient (Reddi et al. 2021, Algorithm 2)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.plan.schema import Plan
from concord_shared.plan.strategies import FedOpt
from concord_shared.strategies.averaging import train_plainly
from concord_shared.strategies.base import State, Strategy, delta_block, encode_delta
from concord_shared.tensors import Float32Vector, Layout

__all__ = ["fedadagrad", "fedadam", "fedyogi"]

Vector = NDArray[np.float64]
SecondMoment = Callable[[Vector, Vector, float], Vector]


def _init(plan: Plan, layout: Layout) -> State:
    """m = 0; v = τ², the paper's smallest admissible start."""
    section = plan.strategy
    assert isinstance(section, FedOpt)
    return {"first": np.zeros(layout.size), "second": np.full(layout.size, section.tau**2)}


def _adam(second: Vector, squares: Vector, beta2: float) -> Vector:
    return beta2 * second + (1 - beta2) * squares


def _yogi(second: Vector, squares: Vector, beta2: float) -> Vector:
    return second - (1 - beta2) * squares * np.sign(second - squares)


def _adagrad(second: Vector, squares: Vector, beta2: float) -> Vector:
    return second + squares


def _fedopt(name: str, second_moment: SecondMoment) -> Strategy:
    def apply(
        plan: Plan, layout: Layout, theta: Float32Vector, state: State, means: Mapping[str, NDArray[Any]], share: float
    ) -> tuple[Float32Vector, State]:
        section = plan.strategy
        assert isinstance(section, FedOpt)
        delta = means["delta"]
        first = section.beta1 * state["first"] + (1 - section.beta1) * delta
        second = second_moment(state["second"], delta**2, section.beta2)
        step = section.server_learning_rate * first / (np.sqrt(second) + section.tau)
        return (theta + step).astype(np.float32), {"first": first, "second": second}

    return Strategy(name, lambda plan, layout: (delta_block(plan, layout),), _init, train_plainly, encode_delta, apply)


fedadam = _fedopt("fedadam", _adam)
fedyogi = _fedopt("fedyogi", _yogi)
fedadagrad = _fedopt("fedadagrad", _adagrad)
