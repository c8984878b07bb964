"""Adapters that start with a part of the base weight, which is taken out of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.nn import LoRALinear
from fastlora.nn.start import Start
from fastlora.ops import svd_lowrank

# What is decomposed at once, in bytes: enough to fill a machine, little beside a model.
_STACK = 256 * 2**20


class Taken(NamedTuple):
    """A layer, and the factors that it is to start with and its weight to be without."""

    name: str
    layer: LoRALinear
    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    weight_is_finite: bool = False  # that of the layer, for all that is known

    def leaves_finite(self, residual: Tensor) -> bool:
        """Whether all of ``residual()`` is finite; mostly known without reading it."""
        limit = torch.finfo(residual.dtype)
        r = self.lora_A.shape[0]
        # an infinite factor makes it infinite or NaN, neither of which is small
        most = self.layer.scaling * r * self.lora_A.abs().max() * self.lora_B.abs().max()
        # less than half the last place of the largest number takes no number beyond that
        if self.weight_is_finite and bool(most < limit.max * limit.eps / 8):
            return True
        return _is_finite(residual)

    def residual(self) -> Tensor:
        """W − sBA, rounded once, of the factors as the layer will hold them."""
        weight = self.layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        A = self.lora_A.to(self.layer.lora_A.weight.dtype).to(wide)
        B = self.lora_B.to(self.layer.lora_B.weight.dtype).to(wide)
        return torch.addmm(weight.to(wide), B, A, alpha=-self.layer.scaling).to(weight.dtype)


@torch.no_grad()
def pissa(layers: Mapping[str, LoRALinear], niter: int | None) -> list[Taken]:
    """PiSSA (arXiv 2404.02948): B = U_r √(S_r/s), A = √(S_r/s) V_rᵀ of each weight. Nothing is
    written yet. ``niter``: of ``ops.svd_lowrank``; None decomposes wholly.

    Raises ValueError, naming the layer, for a weight that is not finite or has less than r singular
    values, and for a scaling that is not positive.
    """
    for name, layer in layers.items():
        N, K = layer.weight.shape
        if layer.r > min(N, K):
            raise ValueError(
                f"{name} [{N}, {K}] has only {min(N, K)} singular values, and r is {layer.r}"
            )
        if not layer.scaling > 0:
            raise ValueError(f"{name} has a scaling of {layer.scaling:g}; PiSSA divides by it")
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    check_values(weights, "weight")
    if niter is None:  # else the decomposition, which reads them anyway, says so
        check_finite(weights, "weight")
    found: dict[str, Taken] = {}
    for names in stacks(layers):
        group = [weights[name] for name in names]
        r, s = layers[names[0]].r, layers[names[0]].scaling
        try:
            factors = principal(group, r, s, niter)
        except ValueError:
            check_finite(weights, "weight")
            raise
        for name, (B, A) in zip(names, factors, strict=True):
            found[name] = Taken(name, layers[name], A, B, weight_is_finite=True)
    return [found[name] for name in layers]


def principal(
    weights: Sequence[Tensor], r: int, scaling: float, niter: int | None
) -> list[tuple[Tensor, Tensor]]:
    """(B [N, r], A [r, K]) with s·BA the best approximation of rank r, for weights of one shape."""
    if niter is None:
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        U, S, Vh = torch.linalg.svd(torch.stack(list(weights)).to(wide), full_matrices=False)
        U, S, Vh = U[..., :r], S[..., :r], Vh[..., :r, :]
        triples = list(zip(U, S, Vh, strict=True))
    else:
        fixed = torch.Generator().manual_seed(0)  # the same on every rank
        triples = [
            (each.U, each.S, each.Vh)
            for each in svd_lowrank(list(weights), r, niter, generator=fixed)
        ]
    roots = [(S / scaling).sqrt() for _, S, _ in triples]
    return [(U * root, root[:, None] * Vh) for (U, _, Vh), root in zip(triples, roots, strict=True)]


def check_values(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError, naming the first layer that has no values."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"the {what} of {name} is on the meta device: it has no values")


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError, naming the first layer that has NaN or infinity in it, or no values."""
    check_values(tensors, what)
    for name, tensor in tensors.items():
        if not _is_finite(tensor):
            raise ValueError(f"the {what} of {name} has NaN or infinity in it")


def _is_finite(tensor: Tensor) -> bool:
    # one pass at the speed of memory, where isfinite takes four; squares may leave the range
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norm = torch.linalg.vector_norm(tensor.detach(), dtype=wide)
    return math.isfinite(norm.item()) or bool(torch.isfinite(tensor).all())


def stacks(layers: Mapping[str, LoRALinear]) -> Iterator[list[str]]:
    """Names of layers that can be decomposed together, so many at once as memory is spent for."""
    groups: dict[object, list[str]] = {}
    for name, layer in layers.items():
        weight = layer.weight
        key = (weight.shape, weight.dtype, weight.device, layer.r, layer.scaling)
        groups.setdefault(key, []).append(name)
    for names in groups.values():
        weight = layers[names[0]].weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        count = max(1, _STACK // (weight.numel() * wide.itemsize))
        for first in range(0, len(names), count):
            yield names[first : first + count]


@contextmanager
def taken_out(starts: Sequence[Taken]) -> Iterator[None]:
    """Inside the context and after it the layers have started; if anything is raised, by the body
    too, every weight is bit for bit as it was."""
    before: list[tuple[LoRALinear, Tensor]] = []
    try:
        with torch.no_grad():
            for taken in starts:
                layer = taken.layer
                residual = taken.residual()
                if not taken.leaves_finite(residual):
                    raise ValueError(f"without its start the weight of {taken.name} is not finite")
                if layer.weight.device.type == "cpu":  # its old memory is the copy
                    before.append((layer, layer.weight.data))
                    layer.weight.data = residual
                else:
                    before.append((layer, layer.weight.detach().cpu()))
                    layer.weight.copy_(residual)
                layer.lora_A.weight.copy_(taken.lora_A)
                layer.lora_B.weight.copy_(taken.lora_B)
                layer.start = Start.of(layer.lora_A.weight, layer.lora_B.weight)
        yield
    except BaseException:
        with torch.no_grad():
            for layer, weight in before:
                if layer.weight.device.type == "cpu":
                    layer.weight.data = weight
                else:
                    layer.weight.copy_(weight)
        raise
