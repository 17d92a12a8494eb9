"""What a plan's task asks of a model: its loss, what its answers are worth, and what they say. Nothing else in training
knows one task from another.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from concord_client.batches import Rows
from concord_shared.errors import UsageError
from concord_shared.metrics import ClassificationSums, MetricSums, OwnSums, RankingSums, RegressionSums, TokenSums
from concord_shared.plan.schema import Plan
from concord_shared.seeds import derive_seed
from concord_shared.text_tokens import PADDING

__all__ = ["Recommending", "Task", "task_of"]


class Task(ABC):
    """Of one model, whose parameters others load and move. What follows holds where a task says nothing else.

    rows_at_once: in evaluation. alone: why several devices cannot share a batch; "" where they can.
    """

    targets_dtype = torch.float32
    rows_at_once = 256
    alone = ""

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self.plan = plan
        self.model: Any = model

    def rows(self, inputs: Tensor, targets: NDArray[Any]) -> Rows:
        """Prepared rows: inputs `(n, …)` on the model's device, targets `(n,)`."""
        owned = np.require(targets, requirements="W")  # a column of a table file is read-only, which torch warns of
        return Rows(inputs, torch.from_numpy(owned).to(inputs.device, self.targets_dtype))

    def meet(self, rows: Rows) -> None:  # noqa: B027  # most tasks know nobody
        """Before rows are evaluated: those of the same people whom training knows."""

    def epoch(self, rows: Rows, generator: torch.Generator) -> Rows:
        """The rows that an epoch of training goes over."""
        return rows

    def counted(self, targets: Tensor) -> float:
        """What a mean loss is a mean of."""
        return float(len(targets))

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """A number, or with "none" one of each row, `(n,)`."""

    def sums(self, inputs: Tensor, targets: Tensor) -> MetricSums:
        """What the model's answers to these rows are worth."""
        return self.measured(self.model(inputs).float(), targets)

    @abstractmethod
    def measured(self, outputs: Tensor, targets: Tensor) -> MetricSums:
        """As `sums`, of the model's answers as they are."""

    def answers(self, rows: Rows) -> NDArray[np.float32]:
        """`(n, …)`: of each row what people read."""
        return torch.cat([self.answer(*batch) for batch in rows.batches(self.rows_at_once)]).cpu().numpy()

    @abstractmethod
    def answer(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Of one batch."""


class Classification(Task):
    targets_dtype = torch.int64

    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return functional.cross_entropy(outputs, targets, reduction=reduction)

    def measured(self, outputs: Tensor, targets: Tensor) -> MetricSums:
        loss, probabilities = self.loss(outputs, targets, "sum"), outputs.softmax(1).cpu().numpy()
        return ClassificationSums.of(self.plan.data, float(loss), probabilities, targets.cpu().numpy())

    def answer(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Probabilities `(n, classes)`."""
        outputs: Tensor = self.model(inputs)
        return outputs.float().softmax(1)


class Regression(Task):
    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return functional.mse_loss(outputs.squeeze(1), targets, reduction=reduction)

    def measured(self, outputs: Tensor, targets: Tensor) -> MetricSums:
        predicted, wanted = (each.double().cpu().numpy() for each in (outputs.squeeze(1), targets))
        return RegressionSums.of(self.plan.data, predicted, wanted)

    def answer(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Values `(n,)`."""
        outputs: Tensor = self.model(inputs)
        return outputs.float().squeeze(1)


class Recommending(Regression):
    """Ratings, of users who are fitted to their own rows whenever the model needs them."""

    alone = "its users are fitted in one place"

    def meet(self, rows: Rows) -> None:
        """Always in the same way, what is drawn for the users too."""
        self.epoch(rows, torch.Generator().manual_seed(derive_seed(self.plan.seed, "negatives")))

    def epoch(self, rows: Rows, generator: torch.Generator) -> Rows:
        self.model.fit_users(rows.inputs, rows.targets)
        return rows

    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        loss: Tensor = self.model.loss(outputs.squeeze(1), targets, reduction)
        return loss

    def best(self, users: NDArray[np.int64], known: Rows, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """For each of `users` `(u,)`, fitted to `known`: scores and places `(u, count)` of the best items that they do
        not have there, best first; -inf where there are no more.
        """
        from concord_shared.models.recommender import top_items

        self.model.eval()
        self.meet(known)
        wanted = torch.from_numpy(users).to(known.inputs.device, torch.float32)
        with torch.inference_mode():
            scores, places = top_items(self.model, wanted, known.inputs, len(self.plan.data.items), count)
        return scores.cpu().numpy(), places.cpu().numpy()


class Ranking(Recommending):
    """Of items that users took: each is to stand before those that they did not."""

    rows_at_once = 1 << 40  # a user's items are scored once, for all of the user's rows

    def meet(self, rows: Rows) -> None:
        self._taken = rows.inputs
        super().meet(rows)

    def epoch(self, rows: Rows, generator: torch.Generator) -> Rows:
        from concord_shared.models.recommender import with_negatives

        each = getattr(self.plan.model, "negatives", 0)
        if each:
            items = len(self.plan.data.items)
            rows = Rows(*with_negatives(rows.inputs, rows.targets, items, each, generator))
        return super().epoch(rows, generator)

    def sums(self, inputs: Tensor, targets: Tensor) -> MetricSums:
        from concord_shared.models.recommender import places_of

        places = places_of(self.model, inputs, self._taken, len(self.plan.data.items))
        return RankingSums.of(self.plan.data, places.numpy())


class LanguageModel(Task):
    def __init__(self, plan: Plan, model: nn.Module) -> None:
        super().__init__(plan, model)
        self.rows_at_once = min(self.rows_at_once, plan.training.micro_batch or plan.training.batch_size)
        """A number for each token of a vocabulary: no more at once than a step of training holds."""

    def rows(self, inputs: Tensor, targets: NDArray[Any]) -> Rows:
        """Tokens `(n, length - 1)`, and the tokens that follow each of them; a text has no other targets."""
        return Rows(inputs[:, :-1], inputs[:, 1:])

    def counted(self, targets: Tensor) -> float:
        return float((targets != PADDING).sum())

    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """Cross entropy of each known next token: `(n, vocabulary, length)` logits, `(n, length)` tokens. Of rows, each
        one's mean, or the mean over all tokens.
        """
        losses = functional.cross_entropy(outputs, targets, reduction="none", ignore_index=PADDING)
        known = (targets != PADDING).to(losses.dtype)
        if reduction == "none":
            return losses.sum(1) / known.sum(1).clamp(min=1)
        return losses.sum() / known.sum().clamp(min=1)

    def measured(self, outputs: Tensor, targets: Tensor) -> MetricSums:
        known = targets != PADDING
        loss = functional.cross_entropy(outputs, targets, reduction="sum", ignore_index=PADDING)
        hits = (outputs.argmax(1) == targets) & known
        return TokenSums.of(self.plan.data, len(targets), float(loss), int(known.sum()), int(hits.sum()))

    def answer(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """How unlikely each text is to the model: the mean loss of its tokens, `(n,)`."""
        return self.loss(self.model(inputs).float(), targets, "none")


class Own(Task):
    """Of another wheel's model, with `loss(outputs, targets) → (n,)` and `scores(outputs, targets) → (n, k)`."""

    def loss(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        each: Tensor = self.model.loss(outputs, targets)
        return each if reduction == "none" else each.mean()

    def measured(self, outputs: Tensor, targets: Tensor) -> MetricSums:
        contract, total = self.plan.data, float(self.loss(outputs, targets, "none").sum())
        scores = self.model.scores(outputs, targets) if contract.scores else outputs.new_zeros(len(targets), 0)
        return OwnSums.of(contract, total, scores.double().cpu().numpy())

    def answer(self, inputs: Tensor, targets: Tensor) -> Tensor:
        raise UsageError("what a row's answer means, only the model's own wheel knows: predict with it")


def task_of(plan: Plan, model: nn.Module) -> Task:
    if plan.data.input == "ratings":
        return (Ranking if plan.data.task == "ranking" else Recommending)(plan, model)
    kinds: dict[str, type[Task]] = {
        "classification": Classification,
        "regression": Regression,
        "language-model": LanguageModel,
        "own": Own,
    }
    return kinds[plan.data.task](plan, model)
