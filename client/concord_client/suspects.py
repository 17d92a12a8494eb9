"""`concord-node data suspects`: rows whose label a model of the other rows confidently disagrees with.

Cross-validated at this node, with the plan's model and preprocessing (Northcutt et al. 2021, confident learning: a row
is suspect where another class is at least as likely as that class is, on average, for rows that carry it). Nothing
leaves; whether a label is wrong, or the row only rare, is for a person to say.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from concord_shared.errors import DataError, UsageError
from concord_shared.fitting import fit_locally
from concord_shared.models import new_vector
from concord_shared.plan.schema import Plan
from concord_shared.seeds import derive_seed

if TYPE_CHECKING:
    from concord_client.data import RawData

__all__ = ["Suspect", "find_suspects"]

FOLDS = 5


@dataclass(frozen=True)
class Suspect:
    """row: its number in the source, from 1 without a header. probability: of the class that seems more likely."""

    row: int
    label: str
    likely: str
    probability: float

    def document(self) -> dict[str, Any]:
        return asdict(self)


def find_suspects(plan: Plan, data: "RawData", passes: int = 10, device: str = "auto") -> list[Suspect]:
    """The surest first.

    Args:
        passes: rounds of the plan's local work that each of the models is trained for.

    Raises:
        UsageError: the plan predicts numbers.
        DataError: too few rows to leave some out.
    """
    if plan.data.task != "classification":
        raise UsageError("suspect labels are those of a classification; this plan is of another task")
    if len(data) < 2 * FOLDS:
        raise DataError(f"{len(data)} rows are too few to look for suspect labels; expected at least {2 * FOLDS}")
    likely = _cross_validated(plan.with_changes(privacy={"mode": "plain"}), data, passes, device)
    classes, labels = len(plan.data.classes), data.targets
    own = [likely[labels == code, code] for code in range(classes)]
    enough = np.array([values.mean() if len(values) else 1.0 for values in own])
    best = likely.argmax(1)
    sure = likely[np.arange(len(best)), best]
    rows = np.flatnonzero((best != labels) & (sure >= enough[best]))
    names = plan.data.classes
    found = [Suspect(int(r) + 1, names[labels[r]], names[best[r]], round(float(sure[r]), 4)) for r in rows]
    return sorted(found, key=lambda suspect: (-suspect.probability, suspect.row))


def _cross_validated(plan: Plan, data: "RawData", passes: int, device: str) -> NDArray[np.float32]:
    """`(n, classes)`: of each row the probabilities that a model of the other folds gives."""
    from concord_client.devices import choose_device, prepare_process
    from concord_client.trainer import Workbench, new_optimiser, round_learning_rate

    prepare_process(1 if plan.training.deterministic else None)
    bench = Workbench(plan, choose_device(device))
    order = np.random.default_rng(derive_seed(plan.seed, "suspects")).permutation(len(data))
    out = np.zeros((len(data), len(plan.data.classes)), np.float32)
    for fold, held_out in enumerate(np.array_split(order, FOLDS)):
        others = np.setdiff1d(order, held_out)
        fitted = fit_locally(plan, data.inputs[others])
        rows = bench.rows(fitted.transform(data.inputs[others]), data.targets[others])
        bench.load(new_vector(plan)[1])
        optimiser = new_optimiser(plan.training, bench.trained(), plan.training.learning_rate)
        for number in range(1, passes + 1):
            seed = derive_seed(plan.seed, "suspects", number, str(fold))
            rate = round_learning_rate(plan.training, number, passes)
            bench.train(rows, rate, seed, optimiser=optimiser, timed=False)
        held = bench.rows(fitted.transform(data.inputs[held_out]), data.targets[held_out])
        out[held_out] = bench.predict(held)
    return out
