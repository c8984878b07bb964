"""Operands for adapter_linear's tests, and the reference's values and gradients for them."""

from __future__ import annotations

import torch

from fastlora.ops.adapter_linear.reference import adapter_linear_reference

NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
VECTORS = ("out_scale", "mid_scale", "adapter_scale")


class InOneSum(str):
    """The name 'native', for tests in which it makes every y and dx in one sum (conftest.py)."""


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


def vectors(tensors, which=VECTORS, dtype=None, zeros=False, seed=1):
    """The scale vectors named, for these operands; ``zeros`` puts a few into each."""
    generator = torch.Generator().manual_seed(seed)
    n, r = tensors["lora_B"].shape
    made = {
        "out_scale": torch.rand(n, generator=generator, dtype=torch.float64) + 0.5,
        "mid_scale": torch.randn(r, generator=generator, dtype=torch.float64),
        "adapter_scale": torch.randn(n, generator=generator, dtype=torch.float64),
    }
    made["out_scale"][1::3] *= -1
    if zeros:
        for vector in made.values():
            vector[::5] = 0.0
    return {name: made[name].to(dtype or tensors["x"].dtype) for name in which}


def exact(tensors, scaling, dy, keep=None, keep_scale=1.0, drop_base=False):
    """y and the gradients for dy in float64: {"y": …, "x": …, "weight": …, …}."""
    wide = {
        name: None if t is None else t.detach().double().requires_grad_()
        for name, t in tensors.items()
    }
    y = adapter_linear_reference(
        scaling=scaling, keep=keep, keep_scale=keep_scale, drop_base=drop_base, **wide
    )
    y.backward(dy.double())
    return {"y": y.detach()} | {n: t.grad for n, t in wide.items() if t is not None}


def error(got, expected):
    """The largest deviation relative to the largest expected value."""
    if expected.numel() == 0:
        assert got.shape == expected.shape
        return 0.0
    scale = expected.abs().max().clamp_min(1e-30)
    return float((got.double() - expected).abs().max() / scale)
