"""The baseline of `concord bench simulate`: what a person would write first, in one process, without concord.

`python -m concord_local.bare_loop DIR THREADS` prints the seconds of 950 steps: 50 times 600 rows of
Fashion-MNIST in batches of 32 through the seed CNN, SGD 0.05.
"""

import gzip
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

VISITS, ROWS, BATCH = 50, 600, 32


def main(directory: Path, threads: int) -> float:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, labels = _read(directory)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(5408, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    loss_of = nn.CrossEntropyLoss()
    started = time.perf_counter()
    for _ in range(VISITS):
        order = torch.randperm(len(images))[:ROWS]
        for start in range(0, ROWS, BATCH):
            batch = order[start : start + BATCH]
            optimiser.zero_grad()
            loss_of(model(images[batch]), labels[batch]).backward()
            optimiser.step()
    return time.perf_counter() - started


def _read(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    images = np.frombuffer(gzip.decompress((directory / "train-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    labels = np.frombuffer(gzip.decompress((directory / "train-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
    scaled = images.reshape(-1, 1, 28, 28).astype(np.float32) / 255
    return torch.from_numpy(scaled), torch.from_numpy(labels.astype(np.int64))


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]), int(sys.argv[2])):.6f}\n")
