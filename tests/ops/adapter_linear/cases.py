"""Operands for adapter_linear's tests, and the reference's values and gradients for them."""

from __future__ import annotations

import torch

from fastlora.ops.adapter_linear.reference import adapter_linear_reference

NAMES = ("x", "weight", "lora_A", "lora_B", "bias")


def operands(
    leading=(7,), k=24, n=20, r=4, bias=True, dtype=torch.float32, adapter_dtype=None, seed=0
):
    """x [*leading, k] and the parameters, with values of the size a trained layer has."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0, to=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(to)

    to = adapter_dtype or dtype
    return {
        "x": draw(*leading, k),
        "weight": draw(n, k, scale=k**-0.5),
        "lora_A": draw(r, k, scale=k**-0.5, to=to),
        "lora_B": draw(n, r, scale=r**-0.5, to=to),
        "bias": draw(n) if bias else None,
    }


def exact(tensors, scaling, dy, keep=None, keep_scale=1.0):
    """y and the gradients for dy in float64: {"y": …, "x": …, "weight": …, …}."""
    wide = {
        name: None if t is None else t.detach().double().requires_grad_()
        for name, t in tensors.items()
    }
    y = adapter_linear_reference(scaling=scaling, keep=keep, keep_scale=keep_scale, **wide)
    y.backward(dy.double())
    return {"y": y.detach()} | {n: t.grad for n, t in wide.items() if t is not None}


def error(got, expected):
    """The largest deviation relative to the largest expected value."""
    if expected.numel() == 0:
        assert got.shape == expected.shape
        return 0.0
    scale = expected.abs().max().clamp_min(1e-30)
    return float((got.double() - expected).abs().max() / scale)
