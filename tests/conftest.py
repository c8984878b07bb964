"""Shared set-up. Kernels run in Triton's interpreter where there is no GPU; no hub is asked."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

settings.register_profile("fastlora", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("fastlora")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def poison(monkeypatch):
    """``torch.empty`` and its kin give NaN, so that memory nobody wrote shows in the result."""

    def filled(make):
        def poisoned(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


@pytest.fixture
def tiny_llama():
    """A llama of two blocks with random weights, in a function so that each call makes it anew."""
    transformers = pytest.importorskip("transformers")

    def make(seed=0, dtype=torch.float32, **changes):
        torch.manual_seed(seed)
        options = {
            "vocab_size": 96,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
        } | changes
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).to(dtype)

    return make
