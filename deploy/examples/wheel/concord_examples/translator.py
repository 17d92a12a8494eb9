"""A small translator, letter by letter: a recurrent encoder and decoder with attention (Bahdanau et al. 2015).

A row is a sentence and its translation, as numbers of letters: the source, then the translation up to the letter before
the one that is asked for. The answer is the translation.

    python -m concord_examples.translator SIB200 eng_Latn zho_Hans pairs.npz      pairs of sentences by their index_id
"""

import csv
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SOURCE, TARGET, LETTERS = 160, 60, 1024
PADDING, BEGIN = 0, 1


class Translator(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(LETTERS, width, padding_idx=PADDING)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.answer = nn.Linear(2 * width, LETTERS)

    def forward(self, rows: Tensor) -> Tensor:
        """`(n, 220)` numbers to logits `(n, 60, 1024)`."""
        source, before = rows[:, :SOURCE].long(), rows[:, SOURCE:].long()
        memory, last = self.encoder(self.letters(source))
        states, _ = self.decoder(self.letters(before), last)
        hidden = (source == PADDING)[:, None, :]
        weights = (states @ memory.transpose(1, 2) / memory.shape[2] ** 0.5).masked_fill(hidden, -1e9).softmax(-1)
        return self.answer(torch.cat([states, weights @ memory], -1))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`(n,)`: the mean cross entropy of the letters that there are."""
        wanted = targets.long()
        losses = functional.cross_entropy(outputs.transpose(1, 2), wanted, reduction="none", ignore_index=PADDING)
        return losses.sum(1) / (wanted != PADDING).sum(1).clamp(min=1)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """`(n, 1)`: the share of letters that are told right, given those before them."""
        wanted = targets.long()
        known = wanted != PADDING
        return (((outputs.argmax(-1) == wanted) & known).sum(1) / known.sum(1).clamp(min=1))[:, None]


def build(plan) -> nn.Module:
    return Translator(int(plan.model.settings.get("width", 64)))


def numbers(text: str, length: int) -> np.ndarray:
    """Letters hashed into numbers from 2 on, cut or padded: nobody's texts tell which letters occur."""
    found = [
        2 + int.from_bytes(hashlib.blake2b(each.encode(), digest_size=4).digest()) % (LETTERS - 2) for each in text
    ]
    return np.array([*found[:length], *[PADDING] * (length - len(found))], np.float32)


def pairs(folder: Path, source: str, target: str) -> dict[str, np.ndarray]:
    """`x, y, x_test, y_test` of the sentences that both languages have."""
    arrays: dict[str, np.ndarray] = {}
    for suffix, splits in (("", ("train", "dev")), ("_test", ("test",))):
        texts = [_sentences(folder, language, splits) for language in (source, target)]
        both = sorted(texts[0].keys() & texts[1].keys())
        answers = [numbers(texts[1][key], TARGET) for key in both]
        asked = [np.append(BEGIN, answer[:-1]) for answer in answers]
        sources = [numbers(texts[0][key], SOURCE) for key in both]
        arrays["x" + suffix] = np.concatenate([np.stack(sources), np.stack(asked)], 1).astype(np.float32)
        arrays["y" + suffix] = np.stack(answers)
    return arrays


def _sentences(folder: Path, language: str, splits: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for split in splits:
        with (folder / f"{language}.{split}.tsv").open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            found |= {row["index_id"]: row["text"] for row in rows}
    return found


if __name__ == "__main__":
    np.savez_compressed(sys.argv[4], **pairs(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
