"""``weight_norm``: the row norms of an adapted weight as one function."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import backend as _backend
from fastlora.ops.adapter_linear.entry import is_transformed
from fastlora.ops.dtypes import to
from fastlora.ops.once import once_differentiable
from fastlora.ops.weight_norm.cache import WeightNormCache
from fastlora.ops.weight_norm.contract import BACKENDS, FLOOR, result_dtype


def weight_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    cache: WeightNormCache | None = None,
    differentiable: bool = False,
    backend: str | None = None,
) -> Tensor:
    """n_j = ‖(W + s·BA)_j‖₂, one norm per output (DoRA, arXiv 2402.09353), BA never formed.

    Args:
        weight: base weight [N, K]; any strides (transposed views serve Conv1D and Embedding).
        lora_A, lora_B: [r, K] and [N, r], r ≥ 1; in weight's dtype, or float32 over a
            half-precision weight (then they are rounded to it, as ``adapter_linear`` does: these
            are the norms of the weight that the layer multiplies by).
        scaling: s, a finite number.
        cache: the layer's own ``WeightNormCache``; a call in which nothing has changed is free.
        differentiable: let gradients flow to lora_A and lora_B (never to weight). By default
            the norm is a constant, as DoRA prescribes (its §4.3). A second derivative is not
            available.
        backend: 'triton', 'native', 'onednn' or 'eager'; None chooses (see ``fastlora.explain``).

    Under torch.func's transforms, forward-mode derivatives and torch.jit.trace, and for meta
    tensors, the formula runs as ordinary differentiable PyTorch, which does form BA.

    Returns:
        n [N] in float32 (float64 for a float64 weight), accumulated in it, and never below
        ``FLOOR`` = 1e-12, so that a zero row gives a finite m/n. Do not write into it.

    Raises:
        ValueError: shapes that do not fit, a rank below 1, a scaling that is not finite, tensors
            on different devices, a gradient asked for with respect to weight.
        TypeError: dtypes that are not floating or do not go together.
        BackendError: the backend asked for cannot run this call.
    """
    _check(weight, lora_A, lora_B, scaling)
    if differentiable and weight.requires_grad:
        raise ValueError(
            "weight_norm has no gradient with respect to weight: freeze it with "
            "requires_grad_(False), or take the norm as a constant (DoRA with dora_simple=True; "
            "here differentiable=False)"
        )
    scaling = float(scaling)
    if not torch.compiler.is_compiling() and is_transformed(weight):
        norm = composite(weight, lora_A, lora_B, scaling)
        return norm if differentiable else norm.detach()
    flows = (
        differentiable
        and torch.is_grad_enabled()
        and (lora_A.requires_grad or lora_B.requires_grad)
    )
    if torch.compiler.is_compiling():
        # registering operators imports dynamo and triton, so it waits until somebody compiles
        from fastlora.ops.weight_norm.registered import compiled

        return compiled(weight, lora_A, lora_B, scaling, flows, backend)
    module = _backend.select("weight_norm", BACKENDS, weight.device, weight.dtype, backend)
    if flows:
        return _WeightNorm.apply(weight, lora_A, lora_B, scaling, cache, module)
    return _norm(weight, lora_A, lora_B, scaling, cache, module)


def composite(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """n [N] from differentiable PyTorch calls, for what a custom Function cannot go through."""
    dtype = result_dtype(weight.dtype)
    a, b = (to(matrix, weight.dtype).to(dtype) for matrix in (lora_A, lora_B))
    with torch.autocast(_autocast_kind(weight), enabled=False):
        merged = torch.addmm(weight.to(dtype), b, a, alpha=scaling)
    return merged.square().sum(1).clamp_min(FLOOR**2).sqrt()


def _norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    cache: WeightNormCache | None,
    module: ModuleType,
) -> Tensor:
    remembered = None if cache is None else getattr(module, "remembered", None)
    if remembered is not None:
        with _plain(weight):
            norm = remembered(weight, lora_A, lora_B, scaling, cache)
        if norm is not None:
            return norm.detach()
    weight_sq = seen = None
    if cache is not None:
        found, weight_sq, seen = cache.find(weight, lora_A, lora_B, scaling)
        if found is not None:
            return found
    with _plain(weight):
        norm, weight_sq = module.forward(
            weight.detach(),
            to(lora_A.detach(), weight.dtype),
            to(lora_B.detach(), weight.dtype),
            scaling,
            weight_sq,
        )
    if cache is None:
        return norm
    cache.keep(weight, lora_A, lora_B, scaling, norm, weight_sq, seen)
    return norm.detach()


class _WeightNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        cache: WeightNormCache | None,
        module: ModuleType,
    ) -> Tensor:
        # a tensor of its own: autograd marks what is returned, and the cache's must stay plain
        norm = _norm(weight, lora_A, lora_B, scaling, cache, module).clone()
        ctx.save_for_backward(weight, lora_A, lora_B, norm)
        ctx.static = (scaling, module)
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnorm: Tensor) -> tuple[Tensor | None, ...]:
        weight, lora_A, lora_B, norm = ctx.saved_tensors
        scaling, module = ctx.static
        with _plain(weight):
            dA, dB = module.backward(
                dnorm,
                norm,
                weight,
                lora_A.to(weight.dtype),
                lora_B.to(weight.dtype),
                scaling,
                *ctx.needs_input_grad[1:3],
            )
        return (
            None,
            None if dA is None else dA.to(lora_A.dtype),
            None if dB is None else dB.to(lora_B.dtype),
            None,
            None,
            None,
        )


@contextmanager
def _off(kind: str) -> Iterator[None]:
    # what is remembered must serve a later call that trains, so no inference tensors are made
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
        yield


def _plain(tensor: Tensor) -> AbstractContextManager[None]:
    """No inference mode, no autocast; and nothing at all where there is neither, which is free."""
    kind = _autocast_kind(tensor)
    if torch.is_inference_mode_enabled() or torch.is_autocast_enabled(kind):
        return _off(kind)
    return nullcontext()


def _autocast_kind(tensor: Tensor) -> str:
    kind = tensor.device.type
    return kind if torch.amp.is_autocast_available(kind) else "cpu"


def _check(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    if weight.dim() != 2 or lora_A.dim() != 2 or lora_B.dim() != 2:
        raise ValueError(
            f"weight, lora_A and lora_B must be matrices; they have shapes {_shape(weight)}, "
            f"{_shape(lora_A)} and {_shape(lora_B)}"
        )
    n, k = weight.shape
    r = lora_A.shape[0]
    if r < 1 or lora_A.shape[1] != k:
        raise ValueError(f"lora_A has shape {_shape(lora_A)}; it must be [r, {k}] with r ≥ 1")
    if lora_B.shape[0] != n or lora_B.shape[1] != r:
        raise ValueError(f"lora_B has shape {_shape(lora_B)}; it must be [{n}, {r}]")
    dtype = weight.dtype
    if not dtype.is_floating_point:
        raise TypeError(f"weight must be a floating tensor, not {dtype}: dequantise it first")
    device = weight.device
    for name, matrix in (("lora_A", lora_A), ("lora_B", lora_B)):
        if matrix.dtype != dtype and not (matrix.dtype == torch.float32 and dtype in _backend.HALF):
            raise TypeError(
                f"{name} is {matrix.dtype}; over a {dtype} weight it must be {dtype}"
                + (" or torch.float32" if dtype in _backend.HALF else "")
            )
        if matrix.device != device:
            raise ValueError(f"{name} is on {matrix.device} but weight is on {device}")
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be a finite number, not {scaling}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
