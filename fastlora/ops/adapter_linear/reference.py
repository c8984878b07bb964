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
) -> Tensor:
    """y = x Wᵀ + bias + s · ((keep ∘ x) · keep_scale) Aᵀ Bᵀ   (LoRA, arXiv 2106.09685, eq. 3).

    x [..., K], weight [N, K], lora_A [r, K], lora_B [N, r], bias [N], y [..., N]. ``keep`` is a
    dropout mask in x's shape; it acts on the adapter's input only. Computes in the operands' own
    dtypes, so float64 in gives float64 out.
    """
    y = x @ weight.transpose(0, 1)
    if bias is not None:
        y = y + bias
    dropped = x if keep is None else x * keep.to(x.dtype) * keep_scale
    return y + scaling * ((dropped @ lora_A.transpose(0, 1)) @ lora_B.transpose(0, 1))
