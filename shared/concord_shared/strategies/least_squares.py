"""Linear regression solved exactly in one round, from the nodes' summed moments.

With A = [1 X y], a node sends AᵀA / n as one block in a 64-bit ring; the weighted mean over nodes is the
pooled moment matrix, from which the normal equations give the coefficients and their standard errors.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.blocks import Block
from concord_shared.errors import RunFailedError, UsageError
from concord_shared.plan.schema import Plan
from concord_shared.plan.strategies import LeastSquares
from concord_shared.strategies.base import LocalResult, LocalWork, State, Strategy
from concord_shared.tensors import Float32Vector, Layout

__all__ = ["least_squares", "place_coefficients"]

RANK_TOLERANCE = 1e-8


def _width(layout: Layout) -> int:
    """Columns of [1 X y]: the model has one weight a feature and a bias."""
    return layout.size + 1


def _blocks(plan: Plan, layout: Layout) -> tuple[Block, ...]:
    section = plan.strategy
    assert isinstance(section, LeastSquares)
    size = _width(layout) * (_width(layout) + 1) // 2
    return (
        Block("moments", size, "examples", section.moment_bound, 64, over="refuse"),
        Block("rows", 1, "none", ring_bits=64, rows_first=True),
    )


def _init(plan: Plan, layout: Layout) -> State:
    return {"standard_errors": np.full(layout.size, np.nan)}


def _local(work: LocalWork) -> LocalResult:
    return LocalResult(work.theta)


def _encode(work: LocalWork, result: LocalResult) -> dict[str, NDArray[Any]]:
    inputs, targets = work.rows()
    if len(targets) > work.plan.rounds.weight_cap:
        raise UsageError(
            f"least squares is exact only where each node counts in full, and this one has {len(targets)} rows; "
            f"expected rounds.weight_cap of at least that, got {work.plan.rounds.weight_cap}"
        )
    matrix = np.column_stack([np.ones(len(targets)), inputs.astype(np.float64), targets])
    moments = matrix.T @ matrix / len(targets)
    return {"moments": moments[np.triu_indices(len(moments))], "rows": np.array([len(targets)])}


def _apply(
    plan: Plan, layout: Layout, theta: Float32Vector, state: State, means: Mapping[str, NDArray[Any]], share: float
) -> tuple[Float32Vector, State]:
    width = _width(layout)
    moments = np.zeros((width, width))
    moments[np.triu_indices(width)] = means["moments"]
    moments += np.triu(moments, 1).T
    rows, features = int(means["rows"][0]), layout.size
    gram, cross, square = moments[:-1, :-1], moments[:-1, -1], moments[-1, -1]
    # Rounding to the ring leaves about 1e-9 of the largest eigenvalue where there should be none.
    eigenvalues = np.linalg.eigvalsh(gram)
    if eigenvalues[0] < RANK_TOLERANCE * eigenvalues[-1]:
        raise RunFailedError(
            "the summed XᵀX is singular: two columns carry the same information, or one is constant over all nodes. "
            "Remove it from the plan's contract"
        )
    solution = np.linalg.solve(gram, cross)
    residual = max(0.0, square - solution @ cross) * rows / max(1, rows - features)
    errors = np.sqrt(residual * np.diag(np.linalg.inv(gram)) / rows)
    return place_coefficients(layout, solution), {
        "standard_errors": place_coefficients(layout, errors).astype(np.float64)
    }


def place_coefficients(layout: Layout, coefficients: NDArray[np.floating[Any]]) -> Float32Vector:
    """[intercept, slopes…] to the model's tensors: the bias is its one-element tensor."""
    tensors = {
        name: (coefficients[:1] if shape == (1,) else coefficients[1:].reshape(shape)).astype(np.float32)
        for name, shape in layout.entries
    }
    return layout.join(tensors)


least_squares = Strategy("least-squares", _blocks, _init, _local, _encode, _apply)
