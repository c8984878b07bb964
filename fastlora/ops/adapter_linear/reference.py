"""The specification: the formula, naively, by plain autograd. Only tests and benches import it."""

from __future__ import annotations

from torch import Tensor


def adapter_linear_reference(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    keep_scale: float = 1.0,
    out_scale: Tensor | None = None,
    mid_scale: Tensor | None = None,
    adapter_scale: Tensor | None = None,
    drop_base: bool = False,
) -> Tensor:
    """y = g ∘ (x Wᵀ + s · b ∘ (((drop(x) Aᵀ) ∘ d) Bᵀ)) + bias, drop(x) = (keep ∘ x) · keep_scale.

    x [..., K], weight [N, K], lora_A [r, K], lora_B [N, r], bias [N], y [..., N]; the vectors
    out_scale g [N], mid_scale d [r] and adapter_scale b [N] are ones where None. ``keep`` is a
    dropout mask in x's shape. It acts on the adapter's input only, unless ``drop_base``: then the
    part of the base that g adds reads it too, y = x Wᵀ + (g − 1) ∘ (drop(x) Wᵀ) + g ∘ (s · …) +
    bias. Computes in the operands' own dtypes, so float64 in gives float64 out.
    """
    base = x @ weight.transpose(0, 1)
    dropped = x if keep is None else x * keep.to(x.dtype) * keep_scale
    inner = dropped @ lora_A.transpose(0, 1)
    if mid_scale is not None:
        inner = inner * mid_scale
    adapter = scaling * (inner @ lora_B.transpose(0, 1))
    if adapter_scale is not None:
        adapter = adapter * adapter_scale
    if out_scale is None:
        y = base + adapter
    elif drop_base:
        y = base + (out_scale - 1) * (dropped @ weight.transpose(0, 1)) + out_scale * adapter
    else:
        y = out_scale * (base + adapter)
    return y if bias is None else y + bias
