"""A convolution with a LoRA or DoRA adapter, as a drop-in for ``torch.nn.Conv1d`` … ``Conv3d``."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.nn.adapted import AdaptedLayer, adapter_dtype_over, cannot_adapt, refuse
from fastlora.nn.dora import Magnitude
from fastlora.nn.lora_linear import (
    bias_with,
    check_hyperparameters,
    check_variants,
    lora_facts,
    lora_summary,
)

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}


class Shape(NamedTuple):
    """How a convolution walks over its input."""

    stride: Any
    padding: Any  # a tuple of numbers, 'same' or 'valid'
    groups: int


class LoRAConv(AdaptedLayer):
    """y = g ∘ (x ∗ W + s · (drop(x) ∗ A) ∗ B) + bias, with W and bias frozen; g with ``use_dora``.

    x [batch, C, ...], ``weight`` [N, C, kernel...]; ``lora_A.weight`` [r, C, kernel...] walks as
    the base does, ``lora_B.weight`` [N, r, 1, ...] is pointwise (the shapes of peft and of the
    authors' code). DoRA's norm runs over all dimensions but the outputs, and its magnitude
    ``lora_magnitude_vector.weight`` is [1, N, 1, ...]; other options as in ``LoRALinear``. The base
    may have groups if they divide r; such an adapter is no change of the weight, so it is neither
    merged nor DoRA's. Make one with ``from_conv``.
    """

    def __init__(
        self,
        base: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        *,
        use_dora: bool = False,
        dora_simple: bool = True,
        use_lora_fa: bool = False,
        lora_bias: bool = False,
    ) -> None:
        check_hyperparameters(r, lora_alpha, lora_dropout)
        check_variants(use_dora, dora_simple, use_lora_fa, lora_bias)
        if r % base.groups:
            raise ValueError(f"r = {r} is not divisible by the {base.groups} groups of the layer")
        if use_dora and base.groups > 1:
            raise ValueError("use_dora does not go with a grouped convolution")
        super().__init__(base.weight, base.bias)
        self.kind = type(base)
        self.in_channels, self.out_channels = base.in_channels, base.out_channels
        self.shape = Shape(base.stride, base.padding, base.groups)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.use_lora_fa = use_lora_fa
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        dtype = adapter_dtype_over(base.weight.dtype, adapter_dtype)
        where: dict[str, Any] = {"device": base.weight.device, "dtype": dtype}
        one = (1,) * len(base.kernel_size)
        self.lora_A = nn.utils.skip_init(
            self.kind, base.in_channels, r, base.kernel_size, base.stride, base.padding,
            bias=False, **where,
        )  # fmt: skip
        self.lora_B = nn.utils.skip_init(
            self.kind, r, base.out_channels, one, groups=base.groups, bias=lora_bias, **where
        )
        self.lora_A.weight.requires_grad_(not use_lora_fa)
        self.lora_magnitude_vector: Magnitude | None = None
        self.reset_parameters()
        if use_dora:
            wide = torch.promote_types(base.weight.dtype, torch.float32)
            norm = torch.linalg.vector_norm(base.weight.detach().flatten(1), dim=1, dtype=wide)
            self.lora_magnitude_vector = Magnitude(norm.view(1, -1, *one), dtype, dora_simple)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        **variants: bool,
    ) -> LoRAConv:
        """An adapted layer around ``conv``'s own weight and bias (shared, and frozen by this).

        ``variants``: use_dora, dora_simple, use_lora_fa, lora_bias. Raises as
        ``LoRALinear.from_linear`` does, and ValueError for a dilated or otherwise than zero-padded
        convolution (peft's adapter would not follow it), and for groups that do not divide r.
        """
        refuse(conv, cannot_adapt_conv(conv), *KINDS)
        layer = cls(conv, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, **variants)
        return layer.train(conv.training)

    def reset_parameters(self) -> None:
        """Draw A anew and set B (and its bias) to zero; the base stays, and so do magnitudes."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if self.lora_B.bias is not None:
            nn.init.zeros_(self.lora_B.bias)

    def base_forward(self, x: Tensor) -> Tensor:
        stride, padding, groups = self.shape
        convolve = _CONVOLVE[self.weight.dim()]
        return convolve(x, self.weight, self.bias, stride, padding, groups=groups)

    def adapted_forward(self, x: Tensor) -> Tensor:
        return adapted_conv(
            x,
            self.weight,
            self.lora_A.weight,
            self.lora_B.weight,
            self.scaling,
            self._bias(),
            self.lora_dropout if self.training else 0.0,
            self._out_scale(),
            self.shape,
        )

    def tensors(self) -> dict[str, nn.Parameter]:
        found = {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}
        if self.lora_B.bias is not None:
            found["lora_B.bias"] = self.lora_B.bias
        if self.lora_magnitude_vector is not None:
            found["lora_magnitude_vector"] = self.lora_magnitude_vector.weight
        return found

    def summary(self) -> str:
        return lora_summary(self)

    def plain(self) -> nn.Module:
        stride, padding, groups = self.shape
        kernel: Any = tuple(self.weight.shape[2:])
        conv = self.kind(
            self.in_channels, self.out_channels, kernel, stride, padding, groups=groups,
             bias=self.bias is not None, device="meta",
        )  # fmt: skip
        conv.register_parameter("weight", self.weight)
        conv.register_parameter("bias", self.bias)
        return conv.train(self.training)

    def cannot_merge(self) -> str | None:
        if self.shape.groups > 1:
            return "its base is a grouped convolution, whose weight has no place for it"
        if self.lora_B.bias is not None and self.bias is None:
            return "it has a bias of its own (lora_bias), and the base has none to take it"
        return None

    def _bias(self) -> Tensor | None:
        own = self.lora_B.bias
        return (
            self.bias if own is None else bias_with(self.bias, own, self.scaling, self.weight.dtype)
        )

    def _out_scale(self) -> Tensor | None:
        """g [N]."""
        magnitude = self.lora_magnitude_vector
        if magnitude is None:
            return None
        A, B = self.lora_A.weight, self.lora_B.weight
        return conv_scale(magnitude, self.weight, A, B, self.scaling)

    def _delta(self, dtype: torch.dtype) -> Tensor:
        left, right = (
            self.lora_B.weight.flatten(1).to(dtype),
            self.lora_A.weight.flatten(1).to(dtype),
        )
        return (left @ right).mul_(self.scaling).view(self.weight.shape)

    def _scale(self, dtype: torch.dtype) -> Tensor | None:
        g = self._out_scale()
        one = (1,) * (self.weight.dim() - 1)
        return None if g is None else g.to(dtype).view(-1, *one)

    def _merged_bias(self) -> Tensor | None:
        return None if self.lora_B.bias is None else self._bias()

    def _facts(self) -> dict[str, Any]:
        stride, padding, groups = self.shape
        facts: dict[str, Any] = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": tuple(self.weight.shape[2:]),
            "stride": stride,
            "padding": padding,
            "groups": groups,
            "bias": self.bias is not None,
        }
        return facts | lora_facts(self)


def adapted_conv(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    out_scale: Tensor | None,
    shape: Shape,
) -> Tensor:
    """y = g ∘ (x ∗ W + s · (drop(x) ∗ A) ∗ B) + bias, by PyTorch's own convolutions.

    Shapes as in ``LoRAConv``, g [N]. With g and dropout the part of the base that g adds reads
    drop(x), too: y = x ∗ W + (g − 1) ∘ (drop(x) ∗ W) + g ∘ (s · …) + bias, as in peft.
    """
    convolve = _CONVOLVE[weight.dim()]

    def base(of: Tensor, own_bias: Tensor | None) -> Tensor:
        return convolve(of, weight, own_bias, shape.stride, shape.padding, groups=shape.groups)

    dropped = nn.functional.dropout(x, dropout_p) if dropout_p > 0.0 else x
    t = convolve(dropped.to(lora_A.dtype), lora_A, None, shape.stride, shape.padding)
    update = convolve(t * scaling, lora_B, groups=shape.groups)
    if out_scale is None:
        plain = base(x, bias)
        return (plain + update).to(plain.dtype)
    g = per_output(out_scale, x.dim(), weight.dim())
    if dropout_p > 0.0:
        plain = base(x, bias)
        return (plain + (g - 1) * base(dropped, None) + g * update).to(plain.dtype)
    plain = base(x, None)
    y = g * (plain + update)
    if bias is not None:
        y = y + per_output(bias, x.dim(), weight.dim())
    return y.to(plain.dtype)


def conv_scale(
    magnitude: Magnitude, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """DoRA's g [N] of a convolution without groups."""
    return magnitude.scale(weight.flatten(1), lora_A.flatten(1), lora_B.flatten(1), scaling)


def per_output(vector: Tensor, x_dim: int, weight_dim: int) -> Tensor:
    """[N] → [1, N, 1, ...] for a batched input, [N, 1, ...] for one without a batch."""
    trailing = (1,) * (weight_dim - 2)
    return vector.view(1, -1, *trailing) if x_dim == weight_dim else vector.view(-1, *trailing)


def cannot_adapt_conv(module: nn.Module) -> str | None:
    """Why a ``LoRAConv`` cannot stand in for this module, as a sentence; None if it can."""
    if reason := cannot_adapt(module, *KINDS):
        return reason
    assert isinstance(module, KINDS)
    if any(step != 1 for step in module.dilation):
        return "it is dilated, which peft's adapter for convolutions would not follow"
    if module.padding_mode != "zeros":
        return f"it pads with '{module.padding_mode}', which peft's adapter would not follow"
    return None
