"""Recommenders whose users are no parameters: a node fits them to its own ratings whenever it needs them.

Items, the mean and dense layers are the model, which is averaged. What is known of a user (a bias and a vector) is
worked out at the user's node from the model and the user's ratings there, used, and forgotten: federated reconstruction
(Singhal et al. 2021). So nothing of a user can be sent, stored or lost, and a partner who joins late has it at once.

A row is `(user, item)`: the user's number at this node, and the item's place in the contract or -1 for one that it does
not name. A user without ratings has bias 0 and vector 0; so has an unknown item.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from concord_shared.optimisers import Adam

__all__ = ["MatrixFactorisation", "NeuralCollaborativeFiltering", "places_of", "top_items", "with_negatives"]

Loss = Callable[[Tensor, Tensor, str], Tensor]
DEVIATION = 0.1
"""Of the first item vectors: small, as an item that nobody rates keeps them."""
USERS_AT_ONCE = 64
FIT_RATE = 0.3


class MatrixFactorisation(nn.Module):
    """μ + b_u + b_i + p_u·q_i (Koren, Bell and Volinsky 2009, equation 4) with squared error.

    The users (b_u, p_u) are the exact minimum of Σ(r - r̂)² + bias_penalty·b_u² + factor_penalty·|p_u|² over the
    user's ratings: a ridge regression each, so that a step on the items sees the gradient of the whole.

    middle: what μ is counted from.
    """

    def __init__(self, items: int, factors: int, bias_penalty: float, factor_penalty: float, middle: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1))
        self.item_bias = nn.Parameter(torch.zeros(items))
        self.item_vectors = nn.Parameter(DEVIATION * torch.randn(items, factors))
        self.penalties = torch.tensor([bias_penalty, *[factor_penalty] * factors])
        self.middle = middle
        self.users = torch.zeros(1, 1 + factors)

    def forward(self, rows: Tensor) -> Tensor:
        """`(n, 2)` to `(n, 1)`."""
        known, items = _items(rows)
        users = _users(self.users, rows)
        scores = users[:, 0] + known * (self.item_bias[items] + (users[:, 1:] * self.item_vectors[items]).sum(1))
        return (self.middle + self.mean + scores)[:, None]

    def loss(self, scores: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return functional.mse_loss(scores, targets, reduction=reduction)

    @torch.no_grad()
    def fit_users(self, rows: Tensor, targets: Tensor) -> None:
        """Users of rows `(n, 2)` with targets `(n,)`, from the items as they are now."""
        known, items = _items(rows)
        slots, count = rows[:, 0].long(), _count(rows)
        features = torch.cat([torch.ones_like(known)[:, None], known[:, None] * self.item_vectors[items]], 1)
        left = targets - self.middle - self.mean - known * self.item_bias[items]
        width = features.shape[1]
        squares = torch.diag(self.penalties.to(rows.device)).repeat(count, 1, 1)
        squares.index_add_(0, slots, features[:, :, None] * features[:, None, :])
        sums = torch.zeros(count, width, device=rows.device).index_add_(0, slots, features * left[:, None])
        self.users = _with_stranger(torch.linalg.solve(squares, sums))


class NeuralCollaborativeFiltering(nn.Module):
    """NeuMF (He et al. 2017, section 3.4): h·(p_u ⊙ q_i) beside dense layers over (m_u, n_i), with biases.

    The users (b_u, p_u, m_u) begin at 0 and take `steps` of Adam on their own rows, towards the least
    Σ loss + bias_penalty·b_u² + factor_penalty·(|p_u|² + |m_u|²).

    loss: of scores and targets: log loss where rows are ranked, squared error of ratings.
    """

    def __init__(
        self,
        items: int,
        factors: int,
        hidden: tuple[int, ...],
        bias_penalty: float,
        factor_penalty: float,
        steps: int,
        middle: float,
        loss: Loss,
    ) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1))
        self.item_bias = nn.Parameter(torch.zeros(items))
        self.item_vectors = nn.Parameter(DEVIATION * torch.randn(items, factors))
        self.item_features = nn.Parameter(DEVIATION * torch.randn(items, factors))
        self.weights = nn.Parameter(torch.ones(factors))
        layers: list[nn.Module] = []
        size = 2 * factors
        for width in hidden:
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.dense = nn.Sequential(*layers, nn.Linear(size, 1))
        self.penalties = torch.tensor([bias_penalty, *[factor_penalty] * (2 * factors)])
        self.steps, self.middle, self._loss = steps, middle, loss
        self.users = torch.zeros(1, 1 + 2 * factors)

    def forward(self, rows: Tensor) -> Tensor:
        """`(n, 2)` to `(n, 1)`."""
        return self._scores(_users(self.users, rows), rows)[:, None]

    def _scores(self, users: Tensor, rows: Tensor) -> Tensor:
        known, items = _items(rows)
        own, features = users[:, 1:].chunk(2, 1)
        product = (own * self.item_vectors[items]) @ self.weights
        dense = self.dense(torch.cat([features, self.item_features[items]], 1))[:, 0]
        scores: Tensor = self.middle + self.mean + users[:, 0] + known * (self.item_bias[items] + product + dense)
        return scores

    def loss(self, scores: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return self._loss(scores, targets, reduction)

    @torch.enable_grad()
    def fit_users(self, rows: Tensor, targets: Tensor) -> None:
        """Users of rows `(n, 2)` with targets `(n,)`, from the items and layers as they are now."""
        slots, penalties = rows[:, 0].long(), self.penalties.to(rows.device)
        users = torch.zeros(_count(rows), len(penalties), device=rows.device, requires_grad=True)
        optimiser = Adam([users], FIT_RATE)
        for _ in range(self.steps):
            left = self._loss(self._scores(users[slots], rows), targets, "sum") + (penalties * users**2).sum()
            (users.grad,) = torch.autograd.grad(left, [users])
            optimiser.step()
        self.users = _with_stranger(users.detach())


Recommender = MatrixFactorisation | NeuralCollaborativeFiltering


def with_negatives(
    rows: Tensor, targets: Tensor, items: int, each: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows of items that users took `(n, 2)` with targets 1, and after them `each` others drawn for each, with 0.

    Of those that are drawn the ones which the same user took are left out.
    """
    drawn = torch.randint(items, (each * len(rows),), generator=generator).to(rows.device)
    others = torch.stack([rows[:, 0].repeat_interleave(each), drawn.to(rows.dtype)], 1)
    others = others[~torch.isin(_keys(others, items), _keys(rows, items))]
    return torch.cat([rows, others]), torch.cat([targets, torch.zeros(len(others), device=rows.device)])


def places_of(model: Recommender, rows: Tensor, taken: Tensor, items: int) -> Tensor:
    """`(n,) float64`: at which place (1, 2, …) each row's item is among all items that its user did not take before.

    Of items with equal scores each has their middle place. inf for an item that the contract does not name.
    """
    places = torch.full((len(rows),), math.inf, dtype=torch.float64)
    users, slots = torch.unique(rows[:, 0], return_inverse=True)
    for start in range(0, len(users), USERS_AT_ONCE):
        part = users[start : start + USERS_AT_ONCE]
        scores = _unseen(model, part, taken, items)
        mine = torch.nonzero((slots >= start) & (slots < start + len(part)) & (rows[:, 1] >= 0))[:, 0]
        of_user = scores[slots[mine] - start]
        own = of_user.gather(1, rows[mine, 1].long()[:, None])
        above, equal = (of_user > own).sum(1), (of_user == own).sum(1) - 1
        places[mine.cpu()] = (1 + above + equal / 2).double().cpu()
    return places


def top_items(model: Recommender, users: Tensor, taken: Tensor, items: int, count: int) -> tuple[Tensor, Tensor]:
    """For each of `users` `(u,)` the best of the items that it did not take: their scores and places `(u, count)`."""
    found = []
    for part in torch.split(users, USERS_AT_ONCE):
        found.append(_unseen(model, part, taken, items).topk(min(count, items)))
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])


def _unseen(model: Recommender, users: Tensor, taken: Tensor, items: int) -> Tensor:
    """Scores `(u, items)`; -inf where `taken` has the pair."""
    pairs = torch.stack(
        [users.repeat_interleave(items), torch.arange(items, device=users.device).repeat(len(users))], 1
    )
    scores: Tensor = model(pairs)[:, 0].float()
    seen = torch.isin(_keys(pairs, items), _keys(taken, items))
    return scores.masked_fill(seen, -math.inf).reshape(len(users), items)


def _keys(rows: Tensor, items: int) -> Tensor:
    return rows[:, 0].long() * (items + 1) + rows[:, 1].long()


def _items(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which items are known, as 1 or 0, and places that can be looked up."""
    return (rows[:, 1] >= 0).float(), rows[:, 1].long().clamp(min=0)


def _users(users: Tensor, rows: Tensor) -> Tensor:
    return users.to(rows.device)[rows[:, 0].long().clamp(max=len(users) - 1)]


def _count(rows: Tensor) -> int:
    return int(rows[:, 0].max()) + 1 if len(rows) else 0


def _with_stranger(users: Tensor) -> Tensor:
    """One more user, whom nothing is known of: everybody with a higher number."""
    return torch.cat([users, users.new_zeros(1, users.shape[1])])
