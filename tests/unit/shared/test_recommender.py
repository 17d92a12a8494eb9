"""Recommenders against formulas by hand and slow plain loops; users are no part of the model."""

import math

import numpy as np
import pytest
import torch

from concord_shared.errors import PlanError
from concord_shared.metrics import RankingSums, metric_sums
from concord_shared.models import build_model, layout_of
from concord_shared.models.recommender import places_of, top_items, with_negatives
from helpers import RANKING, RATINGS, plan_of

PLAN = plan_of(RATINGS, "model={name='matrix-factorisation', factors=1, bias_penalty=1.0, factor_penalty=2.0}")
NCF = ("model={name='neural-cf', factors=3, hidden=[4]}",)


def rows_of(*pairs: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.float32)


@torch.no_grad()
def score(model: torch.nn.Module, user: int, item: int) -> float:
    return float(model(rows_of((user, item))))


def by_hand() -> torch.nn.Module:
    """μ = 2 + 0.5; b = (1, 0, -1); q = (1, -1, 2)."""
    model = build_model(PLAN)
    with torch.no_grad():
        model.mean.fill_(0.5)
        model.item_bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
        model.item_vectors.copy_(torch.tensor([[1.0], [-1.0], [2.0]]))
    return model


def test_a_users_bias_and_vector_are_those_by_hand() -> None:
    """The user gives 4.5 to a and 1 to b; what is left is 4.5 - 3.5 = 1 and 1 - 2.5 = -1.5.

    The normal equations (b, p): [[2 + 1, 0], [0, 2 + 2]] (b, p) = (1 - 1.5, 1 + 1.5), so b = -1/6 and p = 5/8.
    """
    model = by_hand()
    model.fit_users(rows_of((0, 0), (0, 1)), torch.tensor([4.5, 1.0]))
    assert torch.allclose(model.users[0], torch.tensor([-1 / 6, 5 / 8]))
    assert model(rows_of((0, 2))).shape == (1, 1)
    assert score(model, 0, 2) == pytest.approx(2.5 - 1 / 6 - 1 + 2 * 5 / 8)


def test_the_gradient_of_an_item_is_that_by_hand() -> None:
    """∂/∂q of (r̂ - r)² is 2(r̂ - r)p, ∂/∂b is 2(r̂ - r): here r̂(a) - r = 3.5 - 1/6 + 5/8 - 4.5 = -13/24."""
    model = by_hand()
    model.fit_users(rows_of((0, 0), (0, 1)), torch.tensor([4.5, 1.0]))
    row, target = rows_of((0, 0)), torch.tensor([4.5])
    model.loss(model(row).squeeze(1), target).backward()
    error = -13 / 24
    assert float(model.mean.grad) == pytest.approx(2 * error)
    assert torch.allclose(model.item_bias.grad, torch.tensor([2 * error, 0, 0]))
    assert torch.allclose(model.item_vectors.grad[:, 0], torch.tensor([2 * error * 5 / 8, 0, 0]))


def test_a_stranger_and_an_unknown_item_get_what_is_known_without_them() -> None:
    model = by_hand()
    model.fit_users(rows_of((0, 0), (2, 1)), torch.tensor([4.5, 1.0]))
    mean = 2.5
    assert score(model, 9, 0) == pytest.approx(mean + 1)  # nobody has heard of user 9
    assert score(model, 1, 0) == pytest.approx(mean + 1)  # nor is there a rating of user 1
    assert score(model, 9, -1) == pytest.approx(mean)
    assert score(model, 0, -1) == pytest.approx(mean + float(model.users[0, 0]))
    assert float(model.users[0, 0]) != 0


@pytest.mark.parametrize("task", [RATINGS, RANKING])
@pytest.mark.parametrize("changes", [(), NCF], ids=["mf", "ncf"])
def test_users_are_no_part_of_the_model(task: str, changes: tuple[str, ...]) -> None:
    """Neither before nor after they were fitted is there a tensor that belongs to users."""
    plan = plan_of(task, *changes)
    model = build_model(plan)
    before = layout_of(plan, model)
    model.fit_users(rows_of((0, 0), (1, 1), (4, 2)), torch.tensor([1.0, 0.0, 1.0]))
    assert model.users.shape[0] == 6
    assert layout_of(plan, model) == before
    assert not any("user" in name for name, _ in before.entries)
    assert set(model.state_dict()) == {name for name, _ in before.entries}


@pytest.mark.parametrize("task", [RATINGS, RANKING])
def test_neural_users_come_nearer_to_their_ratings(task: str) -> None:
    torch.manual_seed(0)
    penalties = ["model.bias_penalty=0.01", "model.factor_penalty=0.01"]
    model = build_model(plan_of(task, *NCF, *penalties))
    rows, targets = rows_of((0, 0), (0, 1), (1, 1), (1, 2)), torch.tensor([1.0, 0.0, 1.0, 0.0])
    with torch.no_grad():
        before = float(model.loss(model(rows).squeeze(1), targets))
        model.fit_users(rows, targets)
        assert float(model.loss(model(rows).squeeze(1), targets)) < 0.8 * before


@pytest.mark.parametrize("changes", [(), NCF], ids=["mf", "ncf"])
def test_a_user_is_the_same_whoever_else_is_there(changes: tuple[str, ...]) -> None:
    """In a simulation users of all nodes are numbered together, at a node its own alone: bit for bit the same."""
    model = build_model(plan_of(RATINGS, *changes))
    targets = torch.tensor([1.0, 4.0, 2.0])
    model.fit_users(rows_of((0, 0), (0, 1), (1, 2)), targets)
    first = model.users[:2]
    model.fit_users(rows_of((3, 0), (3, 1), (8, 2)), targets)
    assert torch.equal(model.users[[3, 8]], first)


def test_negatives_are_items_that_the_user_did_not_take() -> None:
    rows, targets = rows_of((0, 0), (0, 1), (1, 2)), torch.ones(3)
    generator = torch.Generator().manual_seed(0)
    drawn, labels = with_negatives(rows, targets, 3, 50, generator)
    assert torch.equal(drawn[:3], rows)
    assert labels[:3].tolist() == [1, 1, 1]
    assert set(labels[3:].tolist()) == {0}
    assert {tuple(pair) for pair in drawn[3:].long().tolist()} == {(0, 2), (1, 0), (1, 1)}


def slowly(scores: list[float], own: int, taken: set[int]) -> float:
    """One plus how many are better, and half of those that are as good."""
    others = [score for item, score in enumerate(scores) if item not in taken and item != own]
    return 1 + sum(score > scores[own] for score in others) + sum(score == scores[own] for score in others) / 2


def test_places_are_those_of_a_slow_count() -> None:
    chance = np.random.default_rng(3)
    items, users = 40, 100
    plan = plan_of(RANKING, f"data.items={[str(item) for item in range(items)]}")
    model = build_model(plan)
    with torch.no_grad():
        model.item_bias.copy_(torch.from_numpy(chance.integers(0, 12, items).astype(np.float32)))  # with ties
        model.item_vectors.zero_()
    order = [chance.permutation(items) for _ in range(users)]
    taken = rows_of(*[(user, int(item)) for user in range(users) for item in order[user][:5]])
    asked = rows_of(*[(user, int(item)) for user in range(users) for item in order[user][5:8]])
    model.fit_users(taken, torch.ones(len(taken)))
    found = places_of(model, asked, taken, items)
    expected = []
    for user, item in asked.long().tolist():
        scores = model(rows_of(*[(user, each) for each in range(items)]))[:, 0].tolist()
        expected.append(slowly(scores, item, set(order[user][:5].tolist())))
    assert found.tolist() == expected
    assert math.isinf(float(places_of(model, rows_of((0, -1)), taken, items)))


def test_the_best_items_are_new_to_the_user_and_in_order() -> None:
    model = by_hand()
    taken = rows_of((0, 0))
    model.fit_users(taken, torch.tensor([4.5]))
    scores, items = top_items(model, torch.tensor([0.0]), taken, 3, 10)
    assert items[0, :2].tolist() == ([1, 2] if scores[0, 0] == score(model, 0, 1) else [2, 1])
    assert scores[0, 0] > scores[0, 1] > -math.inf
    assert scores[0, 2] == -math.inf
    assert int(items[0, 2]) == 0


def test_figures_of_a_ranking_are_the_textbooks() -> None:
    """Places 1, 3, 10 hit; 11 and the unknown item do not. Gains 1, 1/2, 1/log2(11)."""
    sums = RankingSums.of(plan_of(RANKING).data, np.array([1, 3, 10, 11, math.inf]))
    figures = sums.figures()
    assert figures["hit_rate_10"] == 3 / 5
    assert figures["ndcg_10"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(11)) / 5, abs=1e-6)
    assert sums.problem(5) is None
    assert (sums + sums).figures() == figures | {"rows": 10}


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        ([6, 0, 0], "5 are registered"),
        ([5, 6, 6 << 20], "6 hits"),
        ([5, -1, 0], "-1 hits"),
        ([5, 1, 2 << 20], "gain"),
        ([5, 4, 1 << 20], "gain"),
    ],
)
def test_sums_that_no_ranking_has_are_refused(vector: list[int], reason: str) -> None:
    problem = metric_sums(plan_of(RANKING).data, np.array(vector)).problem(5)
    assert problem is not None
    assert reason in problem


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["data.items=['a']"], "at least 2 different"),
        (["data.items=['a', 'a']"], "at least 2 different"),
        (["data.user=''"], "names its columns in user and item"),
        (["data.user='place'"], "three columns"),
        (["data.task=classification", "data.classes=['a', 'b']"], "names its columns in user and item"),
        (["model={name='mlp'}"], "need each other"),
        (["data.columns=[{name='age', range=[0, 9]}]"], "names its columns in user and item"),
        (["preprocessing.duplicates=drop"], "nothing to prepare"),
        (["privacy={mode='plain', dp={unit='record', epsilon=1.0, delta=1e-5, clip=1.0}}"], "count in its user too"),
        (["data.task=ranking"], "neither classes nor target_range"),
    ],
)
def test_plans_that_do_not_fit_ratings_are_refused(changes: list[str], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        plan_of(RATINGS, *changes)
