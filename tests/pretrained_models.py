"""Tiny Hugging Face directories with weights at random: an encoder as BERT, a decoder as GPT-2."""

from pathlib import Path
from typing import Any

import torch

__all__ = ["LETTERS", "decoder_directory", "encoder_directory"]

LETTERS = "abcdefgh"
WIDTH = 16


def encoder_directory(folder: Path) -> Path:
    """Words of one letter; [CLS] before a text and [SEP] after it."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=4 + len(LETTERS),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    return _saved(folder, BertModel(config), ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), "[CLS] $A [SEP]")


def decoder_directory(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=2 + len(LETTERS), n_embd=WIDTH, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0
    )
    return _saved(folder, GPT2LMHeadModel(config), ("[END]", "[UNK]"), "")


def _saved(folder: Path, model: Any, special: tuple[str, ...], template: str) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    words = {word: number for number, word in enumerate((*special, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        around = [(word, words[word]) for word in template.split() if word in words]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
