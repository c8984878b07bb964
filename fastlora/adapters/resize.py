"""Trained adapters cut to fewer ranks, and the singular values that say how few will do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.adapters.view import AdapterLayer, layers
from fastlora.nn import AdaptedLayer
from fastlora.nn.adapted import check_rank
from fastlora.ops import svd_product


@torch.no_grad()
def spectra(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """The singular values of s·BA of every adapted layer (fastlora's or peft's), by its name.

    [r] each in float64, descending ([min(N, K)] where that is less), from the factors: BA is not
    formed. AdaLoRA's E and VeRA's vectors are in it, DoRA's magnitudes are not. ``adapter`` names
    one of peft's adapters; None takes the active one.

    Raises ValueError for a model without adapters or with two active ones on a layer.
    """
    found = layers(model, adapter)
    if not found:
        raise ValueError("the model has no adapter")
    if len({layer.name for layer in found}) < len(found):
        raise ValueError("two adapters are active on a layer: name one of them, adapter=...")
    values: dict[str, Tensor] = {}
    for group, B, A in _stacks(found):
        singular = svd_product(B, A).S if A.shape[1] else A[..., 0]
        for layer, own in zip(group, singular, strict=True):
            values[layer.name] = own * abs(layer.scaling)
    return {layer.name: values[layer.name] for layer in found}


@torch.no_grad()
def resize(
    model: nn.Module, rank: int | None = None, *, energy: float | None = None
) -> dict[str, int]:
    """Replace every LoRA adapter, in place, by the nearest one of fewer ranks.

    ``rank``: what no layer is to be above; or ``energy`` in (0, 1]: each layer gets the smallest
    rank, at least 1, whose singular values of BA hold that share of the sum of their squares.
    Layers that are not above it stay as they are. The new factors are U √S and √S Vᵀ of the
    truncated SVD of BA (0 and Vᵀ where a singular value is zero). The scaling stays what it is, so
    that α becomes s·r (s·√r with rsLoRA), and what is saved has the rank_pattern and alpha_pattern
    that say so.

    Biases (lora_bias) stay. DoRA's magnitudes stay, too, and with them the norm of each row of the
    merged weight; the energy is that of BA, not of DoRA's whole change.

    Parameters stay the same objects with other shapes: make optimizers, and methods attached to
    them, anew. What interrupts it, an exception of any kind, finds the model as it was.

    Returns each layer's rank by its name.

    Raises ValueError unless one of ``rank`` and ``energy`` is given, for a model without LoRA of
    fastlora's own, for AdaLoRA (whose ranks are allotted in training), VeRA and grouped
    convolutions, and for values that are not finite; RuntimeError for merged layers. Nothing has
    changed then.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give either a rank or an energy")
    if rank is not None:
        check_rank("rank", rank)
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must be in (0, 1], not {energy!r}")
    found = [layer for layer in layers(model) if isinstance(layer.module, AdaptedLayer)]
    if not found:
        raise ValueError(
            "the model has no fastlora adapter to resize; save a peft model's and load it with "
            "fastlora.load_adapter"
        )
    for layer in found:
        if layer.merged:
            raise RuntimeError(f"{layer.name} is merged; unmerge the model before resizing")
        if reason := _cannot(layer):
            raise ValueError(f"the adapter of {layer.name} cannot be resized: {reason}")
    planned: list[_Plan] = []
    for group, B, A in _stacks([layer for layer in found if rank is None or layer.r > rank]):
        U, S, Vh = svd_product(B, A)
        ranks = [min(rank, S.shape[1])] * len(group) if rank is not None else _enough(S, energy)
        # both factors of a triplet at zero would never train again: one keeps its unit vector
        least = torch.finfo(S.dtype).eps * S[:, :1]
        there = least < S
        left = U * (S.sqrt() * there)[:, None, :]
        right = torch.where(there, S.sqrt(), 1.0)[:, :, None] * Vh
        planned += [
            _Plan.of(layer, left[index, :, :r], right[index, :r])
            for index, (layer, r) in enumerate(zip(group, ranks, strict=True))
            if r < layer.r
        ]
    before = [_Plan.back(plan.layer) for plan in planned]
    try:
        for plan in planned:
            plan.carry_out()
        return {layer.name: layer.module.r for layer in found}  # type: ignore[misc]
    except BaseException:
        for plan in before:
            plan.carry_out()
        raise


class _Plan(NamedTuple):
    """What a layer is to have: factors in the shapes and dtype of its own, and what goes with
    them."""

    layer: AdapterLayer
    lora_A: Tensor
    lora_B: Tensor
    lora_alpha: float
    scaling: float
    gradients: tuple[Tensor | None, Tensor | None] = (None, None)

    @classmethod
    def back(cls, layer: AdapterLayer) -> _Plan:
        """To what it has now."""
        module: Any = layer.module
        A, B = layer.lora_A, layer.lora_B
        return cls(
            layer, A.detach(), B.detach(), module.lora_alpha, module.scaling, (A.grad, B.grad)
        )

    @classmethod
    def of(cls, layer: AdapterLayer, left: Tensor, right: Tensor) -> _Plan:
        """``left`` [N, r], ``right`` [r, K]."""
        module: Any = layer.module
        A, B, r = layer.lora_A, layer.lora_B, len(right)
        one = (1,) * (B.dim() - 2)
        ratio = r / module.r
        lora_alpha = module.lora_alpha * (math.sqrt(ratio) if module.use_rslora else ratio)
        return cls(
            layer,
            right.to(A.dtype).reshape(-1, *A.shape[1:]),
            left.to(B.dtype).reshape(len(B), -1, *one),
            lora_alpha,
            lora_alpha / (math.sqrt(r) if module.use_rslora else r),
        )

    def carry_out(self) -> None:
        module: Any = self.layer.module
        module.r = r = len(self.lora_A)
        module.lora_alpha, module.scaling = self.lora_alpha, self.scaling
        for old, new, gradient in zip(
            (self.layer.lora_A, self.layer.lora_B),
            (self.lora_A, self.lora_B),
            self.gradients,
            strict=True,
        ):
            # The parameter stays: an optimizer with moments for it then fails, where it would go on
            # stepping a parameter that nobody uses. Another dtype in between makes autograd forget
            # the shape it knows if a graph is alive.
            old.data = new.new_empty(0, dtype=torch.complex64)
            old.data, old.grad = new, gradient
        if self.layer.kind == "linear":
            module.lora_A.out_features = module.lora_B.in_features = r
        elif self.layer.kind == "conv":
            module.lora_A.out_channels = module.lora_B.in_channels = r


def _cannot(layer: AdapterLayer) -> str | None:
    if layer.method == "ADALORA":
        return "AdaLoRA's ranks are allotted in training"
    if layer.method == "VERA":
        return "VeRA's factors are frozen and shared by all layers"
    if _groups(layer) > 1:
        return "a grouped convolution's is no product of two matrices"
    for tensor in layer.tensors.values():
        if not torch.isfinite(tensor).all():
            return "it holds non-finite values"
    return None


def _enough(S: Tensor, energy: float | None) -> list[int]:
    """Of each row [k] the smallest count, at least 1, that holds this share of the squares."""
    assert energy is not None
    sums = S.square().cumsum(1)
    return ((sums < energy * sums[:, -1:]).sum(1) + 1).tolist()


def _stacks(found: list[AdapterLayer]) -> Iterator[tuple[list[AdapterLayer], Tensor, Tensor]]:
    """(layers of equal shapes, B [L, N, r], A [L, r, K]) in float64, with the vectors in them."""
    groups: dict[Any, list[tuple[AdapterLayer, Tensor, Tensor]]] = {}
    for layer in found:
        B, A = _factors(layer)
        groups.setdefault((B.shape, A.shape, A.device), []).append((layer, B, A))
    for group in groups.values():
        members, left, right = zip(*group, strict=True)
        yield list(members), torch.stack(left).double(), torch.stack(right).double()


def _factors(layer: AdapterLayer) -> tuple[Tensor, Tensor]:
    """B [N, r] and A [r, K] whose product, times the scaling, the layer's weight is changed by."""
    B, A = layer.lora_B.detach().flatten(1), layer.lora_A.detach().flatten(1)
    if layer.method == "ADALORA":
        B = B * layer.tensors["lora_E"].view(-1)
    elif layer.method == "VERA":
        B = layer.tensors["vera_lambda_b"][:, None] * B * layer.tensors["vera_lambda_d"]
    if (groups := _groups(layer)) > 1:
        B = torch.block_diag(*B.chunk(groups))
    return B, A


def _groups(layer: AdapterLayer) -> int:
    """Of a convolution; each group of B [N, r / groups] reads its own part of A's outputs."""
    return layer.r // layer.lora_B.shape[1] if layer.kind == "conv" else 1
