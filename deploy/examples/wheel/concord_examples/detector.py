"""A small detector: digits of 8×8 pixels somewhere on a canvas of 40×40, in cells of 8×8.

A row's answer is `(5, 5, 4)`: of each cell whether a digit has its upper left corner there, how far down and right in
it (0 to 1), and which digit.

    python -m concord_examples.detector canvases.npz      writes canvases of scikit-learn's digits
"""

import sys

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

CANVAS, CELL, CLASSES = 40, 8, 10
CELLS = CANVAS // CELL
OVERLAP = 0.5


class Detector(nn.Module):
    """Convolutions down to one position a cell; of each, an object, its place and its class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        steps = []
        for before, after, stride in (
            (1, width, 1),
            (width, width, 2),
            (width, 2 * width, 2),
            (2 * width, 2 * width, 2),
        ):
            steps += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(4, after), nn.ReLU()]
        self.body = nn.Sequential(*steps)
        self.head = nn.Conv2d(2 * width, 3 + CLASSES, 3, padding=1)

    def forward(self, canvases: Tensor) -> Tensor:
        """`(n, 1, 40, 40)` to `(n, 5, 5, 13)`: logit of an object, place, logits of classes."""
        return self.head(self.body(canvases)).permute(0, 2, 3, 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`(n,)`: whether there is one, and of those that are where and which."""
        there = targets[..., 0]
        found = functional.binary_cross_entropy_with_logits(outputs[..., 0], there, reduction="none")
        place = functional.l1_loss(outputs[..., 1:3].sigmoid(), targets[..., 1:3], reduction="none").sum(-1)
        which = functional.cross_entropy(outputs[..., 3:].permute(0, 3, 1, 2), targets[..., 3].long(), reduction="none")
        return (found + there * (2 * place + which)).sum((1, 2))

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`(n, 1)`: each canvas's average precision at an overlap of 0.5, over the digits that are on it."""
        chance = outputs[..., 0].sigmoid()[..., None] * outputs[..., 3:].softmax(-1)
        truth, told = corners(targets[..., 1:3]), corners(outputs[..., 1:3].sigmoid())
        pairs = zip(chance, told, targets, truth, strict=True)
        return torch.tensor([[average_precision(*(each.cpu().numpy() for each in pair))] for pair in pairs])


def corners(places: Tensor) -> Tensor:
    """Pixels of upper left corners from places within cells, `(n, 5, 5, 2)`."""
    cells = torch.stack(torch.meshgrid(torch.arange(CELLS), torch.arange(CELLS), indexing="ij"), -1)
    return (cells.to(places) + places) * CELL


def average_precision(chance: np.ndarray, told: np.ndarray, targets: np.ndarray, truth: np.ndarray) -> float:
    """Over the classes on one canvas, the mean area under precision and recall (Everingham et al. 2010)."""
    found = []
    there = targets[..., 0] > 0.5
    for digit in np.unique(targets[..., 3][there]).astype(int):
        boxes = truth[there & (targets[..., 3] == digit)]
        order = np.argsort(-chance[..., digit].ravel(), kind="stable")
        hits, left = [], list(boxes)
        for corner in told.reshape(-1, 2)[order]:
            best = max(range(len(left)), key=lambda i: overlap(corner, left[i]), default=None)
            hit = best is not None and overlap(corner, left[best]) >= OVERLAP
            if hit:
                left.pop(best)
            hits.append(hit)
        right = np.cumsum(hits)
        precision = right / np.arange(1, len(hits) + 1)
        best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
        found.append(float((best_from_here * hits).sum() / len(boxes)))
    return float(np.mean(found)) if found else 0.0


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two squares of 8×8 pixels, given by their corners."""
    shared = np.prod(np.maximum(0, CELL - np.abs(first - second)))
    return float(shared / (2 * CELL * CELL - shared))


def build(plan) -> nn.Module:
    return Detector(int(plan.model.settings.get("width", 16)))


def canvases(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Canvases `(n, 1, 40, 40) uint8` with one to three digits apart from each other, and answers `(n, 5, 5, 4)`."""
    from sklearn.datasets import load_digits

    digits, chance = load_digits(), np.random.default_rng(seed)
    images = np.zeros((count, 1, CANVAS, CANVAS), np.uint8)
    answers = np.zeros((count, CELLS, CELLS, 4), np.float32)
    for canvas, answer in zip(images, answers, strict=True):
        taken: list[np.ndarray] = []
        for _ in range(chance.integers(1, 4)):
            corner = chance.integers(0, CANVAS - CELL + 1, 2)
            if any(np.abs(corner - other).max() < CELL for other in taken):
                continue  # no digit hides another, and no two begin in one cell
            taken.append(corner)
            index = int(chance.integers(len(digits.target)))
            down, right = corner
            canvas[0, down : down + CELL, right : right + CELL] = np.rint(digits.images[index] * (255 / 16))
            answer[tuple(corner // CELL)] = [1, *(corner % CELL / CELL), digits.target[index]]
    return images, answers


if __name__ == "__main__":
    x, y = canvases(3000)
    np.savez_compressed(sys.argv[1], x=x[:2400], y=y[:2400], x_test=x[2400:], y_test=y[2400:])
