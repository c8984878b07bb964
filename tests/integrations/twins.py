"""A peft model of any method of the family, twice: as peft runs it and accelerated."""

import copy

import torch

import fastlora
from fastlora.adapters import layers
from tests.adapters.family import (
    IDS,
    LORA,
    METHODS,
    PROJECTIONS,
    SORTS,
    SORTS_IDS,
    peft_config,
    randomise,
    sorts,
)

# lora_fa: LoRA with A frozen. adalora_masked: AdaLoRA with some triplets masked.
LINEAR = [*METHODS, "lora_fa", "adalora_masked"]
CASES = [("llama", method) for method in LINEAR] + [("sorts", method) for method in [*LORA]]


def base_of(which, tiny_llama, dtype=torch.float32):
    """(a plain model, what to adapt, its input)."""
    if which == "llama":
        return tiny_llama(dtype=dtype, attention_bias=True), PROJECTIONS, IDS
    return sorts(dtype), SORTS, SORTS_IDS


def config_of(which, method, targets, **more):
    if which == "sorts" and method == "lora_bias":
        targets = [name for name in targets if name != "words"]  # embeddings have none
    return peft_config(method.removesuffix("_masked").replace("_fa", ""), targets, **more)


def build(which, method, tiny_llama, dtype=torch.float32, **more):
    """(peft's model with an adapter that does something, its input)."""
    import peft

    base, targets, ids = base_of(which, tiny_llama, dtype)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config_of(which, method, targets, **more))
    if dtype == torch.float64:  # peft keeps VeRA's projections and AdaLoRA's factors in float32
        model.double()
    fill(model, method)
    return model, ids


def fill(model, method, adapter=None, seed=1):
    randomise((t for layer in layers(model, adapter) for t in layer.tensors.values()), seed)
    for layer in layers(model, adapter):
        if method == "lora_fa" and layer.kind != "embedding":
            layer.lora_A.requires_grad_(False)
        if method == "adalora_masked":
            with torch.no_grad():
                layer.tensors["lora_E"][::2] = 0.0


def twins(which, method, tiny_llama, dtype=torch.float32, **more):
    """(plain, accelerated, input)."""
    plain, ids = build(which, method, tiny_llama, dtype, **more)
    fused = copy.deepcopy(plain)
    report = fastlora.accelerate(fused)
    assert not report.skipped and len(report.fused) == len(layers(plain)), report
    return plain, fused, ids


def output(model, ids, **kwargs):
    y = model(input_ids=ids, **kwargs) if ids is IDS else model(ids, **kwargs)
    return getattr(y, "logits", y)


def values(model, ids, **kwargs):
    with torch.no_grad():
        return output(model, ids, **kwargs)


def gradients(model):
    """And puts them back to None."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def assert_gradients(got, expected, tolerance=1e-5):
    """By the largest value of each gradient."""
    assert got.keys() == expected.keys() and got
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1e-3)
        error = float((got[name] - gradient).abs().max()) / scale
        assert error <= tolerance, (name, error)
