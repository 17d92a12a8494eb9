"""Transformers over tokens: a decoder that predicts the next one, an encoder that tells texts apart.

Blocks normalise before each of their two parts (Xiong et al. 2020), so that they learn without a warm-up.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from concord_shared.text_tokens import PADDING

__all__ = ["gpt_mini", "mean_of_real", "real_tokens", "started", "text_encoder"]

STANDARD_DEVIATION = 0.02
"""Of new weights (Radford et al. 2019)."""


def gpt_mini(vocabulary: int, context: int, layers: int, width: int, heads: int, dropout: float) -> nn.Module:
    """A decoder as GPT-2 (Radford et al. 2019): `(n, length)` tokens to `(n, vocabulary, length)` logits of the next.

    Positions are learned; the head has weights of its own, not those of the embedding. 826,624 parameters with 98
    tokens, a context of 64, 4 layers of 128.
    """
    return started(_Decoder(vocabulary, context, layers, width, heads, dropout))


def text_encoder(
    vocabulary: int, length: int, layers: int, width: int, heads: int, dropout: float, outputs: int
) -> nn.Module:
    """An encoder as BERT (Devlin et al. 2019), normalised before: `(n, length)` tokens to `(n, outputs)` logits of the
    mean over all places that are no padding.
    """
    return started(_Encoder(vocabulary, length, layers, width, heads, dropout, outputs))


def real_tokens(tokens: Tensor) -> Tensor:
    """Which of `(n, length)` are no padding; the first is always one: attention over nothing would be no number."""
    real = tokens != PADDING
    real[:, 0] = True
    return real


def mean_of_real(x: Tensor, real: Tensor) -> Tensor:
    """Of `(n, length, width)` the mean over the places that are real, `(n, width)`."""
    weights = real.unsqueeze(2).to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1)


def started(model: nn.Module) -> nn.Module:
    """The model itself, with new weights in its dense layers and embeddings."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=STANDARD_DEVIATION)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return model


class _Embedding(nn.Module):
    """Tokens and their places: `(n, length)` to `(n, length, width)`."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        embedded: Tensor = self.tokens(tokens) + self.places(places)
        return embedded


class _Block(nn.Module):
    """Attention, then two dense layers with GELU between them; each added to what came in."""

    is_block = True

    def __init__(self, width: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attended = nn.Linear(width, width)
        self.norm_dense = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: `(n, 1, 1, length)`, True where attention may look."""
        rows, length, width = x.shape
        parts = self.query_key_value(self.norm_attention(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        seen = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=self.causal)
        x = x + self.dropout(self.attended(seen.transpose(1, 2).reshape(rows, length, width)))
        added: Tensor = x + self.dropout(self.narrow(functional.gelu(self.widen(self.norm_dense(x)))))
        return added


class _Decoder(nn.Module):
    def __init__(self, vocabulary: int, context: int, layers: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embedding = _Embedding(vocabulary, context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, causal=True, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits.transpose(1, 2)


class _Encoder(nn.Module):
    def __init__(
        self, vocabulary: int, length: int, layers: int, width: int, heads: int, dropout: float, outputs: int
    ) -> None:
        super().__init__()
        self.embedding = _Embedding(vocabulary, length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, causal=False, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        real = real_tokens(tokens)
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, real[:, None, None, :])
        logits: Tensor = self.head(mean_of_real(self.norm(x), real))
        return logits
