"""A pretrained transformer as a model of this project: it reads the numbers of `words`, and answers as ours do."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from concord_shared.errors import UsageError
from concord_shared.models.transformer import mean_of_real, real_tokens, started
from concord_shared.plan.models import PretrainedModel
from concord_shared.plan.preparation import RESERVED_TOKENS
from concord_shared.pretrained.store import find
from concord_shared.pretrained.words import largest_token

__all__ = ["pretrained_model"]


def pretrained_model(model: PretrainedModel, length: int, outputs: int) -> nn.Module:
    """The plan's model with the directory's weights; a new head where it tells texts apart. Without LoRA all of it is
    trained.

    length: of texts, in tokens.

    Raises:
        UsageError: `transformers` is not installed, the directory is not here, or it is no such model.
    """
    folder = str(find(model.sha256, model.package).folder)
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "pretrained models need the package transformers, which is not installed here. Install and run with: "
            "bash deploy/run.sh --with hf …, or pip install 'concord-node[hf]' at a node"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind = transformers.AutoModel if model.name == "pretrained-encoder" else transformers.AutoModelForCausalLM
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        config.use_cache = False
        base, loaded = kind.from_pretrained(
            folder, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
        )
        _check(model, base, loaded, length)
        built = _Encoder(base, outputs) if model.name == "pretrained-encoder" else _Decoder(base)
        with torch.no_grad():
            built.eval()(torch.full((1, 2), RESERVED_TOKENS))  # one text, so that what cannot run is known now
    except UsageError:
        raise
    except Exception as error:  # whatever another party's configuration comes to
        raise UsageError(f"{model.package}: transformers cannot build it: {type(error).__name__}: {error}") from error
    return built.train()


def _check(model: PretrainedModel, base: Any, loaded: Any, length: int) -> None:
    if getattr(base, "pooler", None) is not None:
        base.pooler = None  # of the sentence that it was trained on; the head reads the mean of all tokens
    missing = [name for name in loaded["missing_keys"] if not name.startswith("pooler.")]
    if missing or loaded["mismatched_keys"]:
        raise UsageError(
            f"{model.package}: its weights lack {', '.join((missing or [str(loaded['mismatched_keys'])])[:3])}; the "
            "rest would begin at random, differently at each node"
        )
    places = getattr(base.config, "max_position_embeddings", None)
    if places is not None and length > places:
        raise UsageError(
            f"preprocessing.tokens.length = {length}: {model.package} reads at most {places} tokens; lower it"
        )
    known, largest = int(base.get_input_embeddings().num_embeddings), largest_token(model.sha256)
    if largest >= known:
        raise UsageError(f"{model.package}: its tokenizer has the token {largest}, and its weights know {known}")
    block: Any
    for blocks in base.modules():
        for block in blocks if isinstance(blocks, nn.ModuleList) else ():
            block.is_block = True


def _read(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own numbers and what of them is no padding, both `(n, length)`, as long as the longest of these."""
    real = real_tokens(tokens)
    longest = int(real.sum(1).max()) if len(tokens) else 1
    return (tokens[:, :longest] - RESERVED_TOKENS).clamp(min=0), real[:, :longest]


class _Encoder(nn.Module):
    """Tokens `(n, length)` to logits `(n, outputs)` of the mean over all tokens."""

    def __init__(self, base: nn.Module, outputs: int) -> None:
        super().__init__()
        self.base = base
        self.head = started(nn.Linear(int(base.config.hidden_size), outputs))  # type: ignore[union-attr, arg-type]

    def forward(self, tokens: Tensor) -> Tensor:
        numbers, real = _read(tokens)
        hidden = self.base(input_ids=numbers, attention_mask=real.long()).last_hidden_state
        logits: Tensor = self.head(mean_of_real(hidden, real))
        return logits


class _Decoder(nn.Module):
    """Tokens `(n, length)` to logits `(n, vocabulary, length)` of the next."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, tokens: Tensor) -> Tensor:
        numbers, real = _read(tokens)
        logits = self.base(input_ids=numbers, attention_mask=real.long()).logits
        ours = functional.pad(logits, (RESERVED_TOKENS, 0), value=torch.finfo(logits.dtype).min)  # of no text
        missing = tokens.shape[1] - numbers.shape[1]
        return functional.pad(ours, (0, 0, 0, missing)).transpose(1, 2)
