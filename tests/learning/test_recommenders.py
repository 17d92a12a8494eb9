"""Restaurant ratings: 138 guests at 10 nodes, seeded 80/20 splits; figures on identical test rows.

The plans' penalties and rates were chosen on validation rows alone.
"""

import json
import statistics
from pathlib import Path

import pytest

from concord_client.data import read_data, resolve_spec
from concord_local import simulate
from concord_local.baselines import by_popularity
from concord_local.federation import Federation
from concord_shared.plan import load_plan
from datasets import needs

SPLITS = range(10)
AT_THE_END = "evaluation.every=0"


@pytest.mark.slow
@needs("restaurant_ratings")
def test_ratings_are_predicted_as_well_as_with_all_of_them_at_one_place(tmp_path: Path) -> None:
    """User and item bias on pooled ratings: RMSE .660; the mean alone .770."""
    simulate("restaurants-mf", seeds=len(SPLITS), compare=True, workers=1, overrides=[AT_THE_END], out=tmp_path)
    found = [json.loads((tmp_path / f"seed-{seed}" / "comparison.json").read_text("utf-8"))["all"] for seed in SPLITS]
    federated, pooled = (statistics.fmean(total[key] for total in found) for key in ("federated", "pooled"))
    assert federated <= pooled + 0.01
    assert federated <= 0.66


@pytest.mark.slow
@needs("restaurant_ratings")
def test_recommendations_are_better_than_what_is_popular(tmp_path: Path) -> None:
    """HR@10 and NDCG@10 of each test row among all places where the guest was not in training."""
    loaded = load_plan("restaurants-ncf")
    for figure, gain in gains(tmp_path, loaded.simulate.data).items():
        assert statistics.fmean(gain) > 0.03, figure
        assert min(gain) > 0, figure


def gains(folder: Path, source: str) -> dict[str, list[float]]:
    """By figure, how much better than popularity each split is."""
    found: dict[str, list[float]] = {"hit_rate_10": [], "ndcg_10": []}
    for seed in SPLITS:
        plan = load_plan("restaurants-ncf", [f"seed={seed}"]).plan
        nodes = Federation.of(read_data(resolve_spec(source), plan), plan, "grouped:userID", 10)
        popular = by_popularity(plan, nodes).figures()
        overrides = [AT_THE_END, f"seed={seed}"]
        metrics = simulate("restaurants-ncf", workers=1, overrides=overrides, out=folder / str(seed)).metrics
        for figure, values in found.items():
            values.append(metrics[figure] - popular[figure])  # type: ignore[operator]
    return found


@needs("restaurant_ratings")
def test_one_split_of_the_ratings(tmp_path: Path) -> None:
    """Without a word about anybody else's ratings, a node's own come to .69 or so on this split."""
    metrics = simulate("restaurants-mf", workers=1, overrides=[AT_THE_END], out=tmp_path).metrics
    assert metrics["rmse"] < 0.67
