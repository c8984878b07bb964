"""A model small enough to fine-tune in a moment, and text for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SENTENCE = (
    "the statement evaluates an expression and binds its value to a name in the current scope "
    "while every other object keeps a reference that the garbage collector may find later"
)


@pytest.fixture(scope="session", name="sentences")
def sentences_fixture() -> Callable[[int, int], str]:
    return sentences


def sentences(count: int, seed: int) -> str:
    """``count`` paragraphs of shuffled words, each unlike the others."""
    generator = torch.Generator().manual_seed(seed)
    words = SENTENCE.split()
    lines = []
    for _ in range(count):
        picks = torch.randint(len(words), (14,), generator=generator).tolist()
        lines.append(" ".join(words[pick] for pick in picks) + ".")
    return "\n\n".join(lines)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random llama of two layers and a byte-pair tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentences(40, 0)], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=wrapped.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(sentences(150, 1), encoding="utf-8")
    return path
