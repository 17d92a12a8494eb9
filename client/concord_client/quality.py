"""The quality section of a card: computed here over the rows themselves, told as coarse shares only."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from concord_client.store import Dataset
from concord_shared.cards import figure
from concord_shared.documents import Quality
from concord_shared.errors import UsageError
from concord_shared.plan.schema import Plan
from concord_shared.preprocessing import unfitted

if TYPE_CHECKING:
    from concord_client.data import RawData, Reading

__all__ = ["measure", "measure_by"]

LOOKED_AT_MAX = 5_000
"""Rows that the suspicion of wrong labels is computed on; of more, a seeded draw of these."""
FOLDS, MARGIN = 5, 0.5


def measure(dataset: Dataset, minimum: int, reading: "Reading | None" = None) -> Quality:
    """Of a table without a contract: what is missing, and rows that repeat another one.

    reading: how the dataset is read.

    Raises:
        UsageError: the data say nothing of themselves without a plan. DataError: they cannot be read.
    """
    import polars as pl

    from concord_client.data import is_table, table_frames

    if not is_table(dataset.spec):
        raise UsageError(f"dataset {dataset.name}: its quality is measured against a contract; name one with --plan")
    absent: dict[str, int] = {}
    hashes = [pl.Series(dtype=pl.UInt64)]
    for frame in table_frames(dataset.spec, version=reading.version if reading else ""):
        for name, count in frame.null_count().row(0, named=True).items():
            absent[name] = absent.get(name, 0) + int(count)
        hashes.append(frame.select(pl.struct(pl.all()).hash(seed=0)).to_series())
    seen = pl.concat(hashes)
    return Quality(
        minimum=minimum,
        missing={name: figure(count, len(seen), minimum) for name, count in absent.items()},
        duplicates=figure(len(seen) - int(seen.n_unique()), len(seen), minimum),
    )


def measure_by(dataset: Dataset, plan: Plan, minimum: int, reading: "Reading | None" = None) -> Quality:
    """Of data that fit a plan's contract, values that are missing aside: all of the section.

    reading: how the dataset is read.

    Raises:
        DataError: they cannot be read, or break the contract.
    """
    from concord_client.data import read_data
    from concord_client.data.dataset import repeated

    lenient = plan.preprocessing.model_copy(update={"missing": "impute"})
    data = read_data(dataset.spec, plan.model_copy(update={"preprocessing": lenient}), reading=reading)
    rows = len(data)
    shares: dict[str, str] = {}
    if plan.data.input == "table":
        absent = np.isnan(data.inputs).sum(axis=0)
        shares = {
            column.name: figure(int(count), rows, minimum)
            for column, count in zip(plan.data.columns, absent, strict=True)
        }
    largest = smallest = suspect = ""
    if plan.data.task == "classification":
        counts = np.bincount(data.targets, minlength=len(plan.data.classes))
        largest, smallest = (figure(int(count), rows, minimum) for count in (counts.max(), counts.min()))
        found, looked_at = suspects(data, plan)
        suspect = figure(found, looked_at, minimum) if looked_at else ""
    return Quality(
        minimum=minimum,
        missing=shares,
        duplicates=figure(int(repeated(data, np.arange(rows)).sum()), rows, minimum),
        largest_class=largest,
        smallest_class=smallest,
        suspect_labels=suspect,
    )


def suspects(data: "RawData", plan: Plan) -> tuple[int, int]:
    """How many rows have a label that a model which never saw them contradicts, and of how many.

    The model is a logistic regression, fitted on the other folds: to it another class is likelier than the row's own
    by at least `MARGIN`. Hard rows are among them, so that this is a reason to look. (0, 0) where a class has too few
    rows.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    chance = np.random.default_rng(plan.seed)
    chosen = np.sort(chance.permutation(len(data))[:LOOKED_AT_MAX])
    classes, labels, counts = np.unique(data.targets[chosen], return_inverse=True, return_counts=True)
    if len(classes) < 2 or counts.min() < FOLDS:
        return 0, 0
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-2))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    likely = cross_val_predict(model, _features(data.inputs[chosen], plan), labels, cv=folds, method="predict_proba")
    own = likely[np.arange(len(labels)), labels]
    return int((likely.max(axis=1) - own >= MARGIN).sum()), len(labels)


def _features(inputs: NDArray[Any], plan: Plan) -> NDArray[np.float64]:
    """`(n, d)`: pixels, a text's features, or numbers with the mean where one is missing and a column for each
    category.
    """
    if plan.data.input == "text":
        return unfitted(plan).transform(inputs).astype(np.float64)
    if plan.data.input == "image":
        return inputs.reshape(len(inputs), -1).astype(np.float64)
    columns = []
    for index, column in enumerate(plan.data.columns):
        values = inputs[:, index].astype(np.float64)
        if column.kind == "category":
            columns += [(values == code).astype(np.float64) for code in range(len(column.words))]
        else:
            known = ~np.isnan(values)
            columns.append(np.where(known, values, values[known].mean() if known.any() else 0.0))
    return np.stack(columns, axis=1)
