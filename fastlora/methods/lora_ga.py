"""LoRA-GA (arXiv 2407.05000): A and B start with the singular vectors of the weight's gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from fastlora.adapters.config import LoRAConfig
from fastlora.adapters.inject import prepared
from fastlora.adapters.report import Report
from fastlora.adapters.starts import Taken, check_finite, stacks
from fastlora.adapters.view import unwrap
from fastlora.nn import LoRALinear
from fastlora.nn.adapted import check_finite as check_number
from fastlora.ops import svd_lowrank

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = {
    "official": ("stable", "unit", "gd", "weightS"),
    "peft": ("stable", "unit", "gd_scale", "weight_svd"),
}
_NITER = 4

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class LoRAGAConfig:
    """How the factors are made of the gradient G = U Σ Vᵀ; fields as in ``peft.LoraGAConfig``.

    Attributes:
        direction: which of the 2r leading singular vectors A and B get. "ArB2r": A the right ones
            1…r, B the left ones r+1…2r; "A2rBr": the other way round; "ArBr": A every second one,
            B those between; "random": a random half each. In all of them the first step of
            gradient descent moves W along the best approximation of G of rank 2r.
        scale: what both factors are multiplied by. "stable": N^¼ / √γ; "unit": 1; "gd": 1/s;
            "weightS": the mean of √(S_W/s) over the weight's r leading singular values.
        stable_gamma: γ.
        variant: "official" is the authors' form. "peft" is peft's, another formula: only B is
            scaled and carries Σ, "random" gives both the same vectors, and ``scale`` has peft's
            names: "gd_scale" divides both by s, "weight_svd" makes B's first column as long as the
            weight's largest singular value.
        seed: of "random".
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16
    variant: str = "official"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("variant", tuple(SCALES)), ("direction", DIRECTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}"
                )
        if self.scale not in SCALES[self.variant]:
            scales = ", ".join(SCALES[self.variant])
            raise ValueError(
                f"scale of variant '{self.variant}' must be one of {scales}, not {self.scale!r}"
            )
        check_number("stable_gamma", self.stable_gamma)
        if not self.stable_gamma > 0:
            raise ValueError(f"stable_gamma must be above 0, not {self.stable_gamma!r}")


def lora_ga(
    model: nn.Module,
    config: LoRAConfig,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor | None],
    options: LoRAGAConfig | None = None,
) -> Report:
    """``inject`` LoRA into ``model``, started from the mean gradient of its weights over batches.

    The adapted weights give up what the adapters start with, W ← W − sBA, as with PiSSA: see
    ``inject`` for how, ``save_adapter`` for what is then saved. The paper takes use_rslora=True,
    α = 16, r = 8 and some 64 small batches.

    ``loss(model, batch)`` gives a batch's loss, or runs backward itself and returns None. It gets
    the plain model in the mode it is in, without adapters; gradient checkpointing may be on (if
    of the reentrant kind, with ``enable_input_require_grads``). A gradient is added to its sum in
    host memory, in float32 or wider, and dropped as soon as it is there, so that one layer's at a
    time lives beside the model. Where torch.distributed runs, the mean is over all batches of all
    ranks, which must call this together, before the model is wrapped.

    Raises, before any weight has changed: what ``inject`` does; TypeError for a configuration that
    is not LoRA's; ValueError if it has a start of its own or means a layer that is no linear or has
    less than 2r singular values, for no batch at all, and for a gradient that is missing, zero or
    not finite. What ``loss`` raises comes through. Warns of gradients whose rank is below 2r, as
    those of fewer tokens are.
    """
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"LoRA-GA starts LoRA, and this is a {type(config).__name__}")
    if config.init_lora_weights is not True:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} is another start; leave it True"
        )
    options = options or LoRAGAConfig()
    model = unwrap(model)
    with prepared(model, config) as plan:
        layers = plan.startable()
        for name, layer in layers.items():
            N, K = layer.weight.shape
            if 2 * layer.r > min(N, K):
                raise ValueError(
                    f"{name} [{N}, {K}] has {min(N, K)} singular values, and LoRA-GA needs "
                    f"2r = {2 * layer.r}"
                )
            if not layer.scaling > 0:
                raise ValueError(f"{name} has a scaling of {layer.scaling:g}, not above 0")
        gradients = _mean_gradients(model, layers, batches, loss)
        plan.starts = _starts(layers, gradients, options)
        return plan.place()


def _mean_gradients(
    model: nn.Module,
    layers: Mapping[str, LoRALinear],
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], Tensor | None],
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def collect(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            wide = torch.promote_types(gradient.dtype, torch.float32)
            gradient = gradient.to("cpu", wide)
            sums[name] = sums[name].add_(gradient) if name in sums else gradient

        return hook

    model.requires_grad_(False)
    before = {name: layer.weight.grad for name, layer in layers.items()}
    hooks = []
    count = 0
    try:
        for name, layer in layers.items():
            layer.weight.grad = None
            layer.weight.requires_grad_(True)
            hooks.append(layer.weight.register_post_accumulate_grad_hook(collect(name)))
        with torch.enable_grad():
            for batch in batches:
                value = loss(model, batch)
                if value is not None:
                    if not value.requires_grad:
                        raise ValueError("the loss does not depend on any weight to be adapted")
                    value.backward()
                count += 1
    finally:
        for handle in hooks:
            handle.remove()
        for name, layer in layers.items():
            layer.weight.requires_grad_(False)
            layer.weight.grad = before[name]
    return _over_ranks(layers, sums, count)


@torch.no_grad()
def _over_ranks(
    layers: Mapping[str, LoRALinear], sums: dict[str, Tensor], count: int
) -> dict[str, Tensor]:
    """The means over all batches of all ranks; every rank finds the same, and the same wrong."""
    together = distributed.is_available() and distributed.is_initialized()
    # NCCL adds up what is on a GPU
    local = not together or "nccl" not in distributed.get_backend()

    def added(tensor: Tensor, device: torch.device) -> Tensor:
        if together:
            moved = tensor if local else tensor.to(device)
            distributed.all_reduce(moved)
            return moved.cpu()
        return tensor

    first = next(iter(layers.values())).weight.device
    counts = torch.tensor(
        [count, *(name in sums for name in layers)], dtype=torch.float64, device="cpu"
    )
    total, *seen = added(counts, first).tolist()
    if not total:
        raise ValueError("there is no batch to take gradients of")
    for name, there in zip(layers, seen, strict=True):
        if not there:
            raise ValueError(f"no batch gave the weight of {name} a gradient")
    for name, layer in layers.items():
        weight = layer.weight
        if name not in sums:
            wide = torch.promote_types(weight.dtype, torch.float32)
            sums[name] = torch.zeros(weight.shape, dtype=wide, device="cpu")
        sums[name] = added(sums[name], weight.device).div_(total)
    check_finite({name: sums[name] for name in layers}, "gradient")
    for name in layers:
        if not sums[name].any():
            raise ValueError(f"the gradient of {name} is zero")
    return sums


@torch.no_grad()
def _starts(
    layers: Mapping[str, LoRALinear], gradients: dict[str, Tensor], options: LoRAGAConfig
) -> list[Taken]:
    """The factors of every layer, from its gradient; gradients are dropped on the way."""
    generator = torch.Generator().manual_seed(options.seed)
    found, thin = {}, []
    for names in stacks(layers):
        layer = layers[names[0]]
        weight, r, s = layer.weight, layer.r, layer.scaling
        N, K = weight.shape
        fixed = torch.Generator().manual_seed(0)  # the same on every rank
        decomposed = svd_lowrank(
            [gradients.pop(name).to(weight.device) for name in names],
            min(4 * r, N, K),
            _NITER,
            generator=fixed,
        )
        for name, (U, S, Vh, _) in zip(names, decomposed, strict=True):
            if S[2 * r - 1] <= torch.finfo(S.dtype).eps * max(N, K) * S[0]:
                thin.append(name)
            of_A, of_B = (part.to(U.device) for part in _parts(options, r, generator))
            own = layers[name].weight
            A, B = Vh[of_A], U[:, of_B]
            make = _official if options.variant == "official" else _pefts
            found[name] = Taken(name, layers[name], *make(A, B, S[of_B], own, s, options))
    if thin:
        warnings.warn(
            f"LoRA-GA starts with 2r directions of a gradient, and those of {', '.join(thin)} have "
            "a lower rank: the rest is rounding noise. Give more batches, or lower r",
            stacklevel=3,
        )
    return [found[name] for name in layers]


def _parts(options: LoRAGAConfig, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The indices, below 2r, of A's right singular vectors and of B's left ones."""
    every = torch.arange(2 * r, device="cpu")
    if options.direction == "ArB2r":
        return every[:r], every[r:]
    if options.direction == "A2rBr":
        return every[r:], every[:r]
    if options.direction == "ArBr":
        return every[1::2], every[0::2]
    drawn = torch.randperm(2 * r, generator=generator)
    return drawn[:r], drawn[:r] if options.variant == "peft" else drawn[r:]


def _official(
    A: Tensor, B: Tensor, S: Tensor, weight: Tensor, s: float, options: LoRAGAConfig
) -> tuple[Tensor, Tensor]:
    factor: Any = 1.0
    if options.scale == "stable":
        factor = len(B) ** 0.25 / math.sqrt(options.stable_gamma)
    elif options.scale == "gd":
        factor = 1 / s
    elif options.scale == "weightS":
        factor = (_singular_values(weight, len(A)) / s).sqrt().mean()
    return A * factor, B * factor


def _pefts(
    A: Tensor, B: Tensor, S: Tensor, weight: Tensor, s: float, options: LoRAGAConfig
) -> tuple[Tensor, Tensor]:
    B = B * S
    if options.scale == "stable":
        return A, B * (len(B) ** 0.25 / math.sqrt(options.stable_gamma))
    if options.scale == "weight_svd" and bool(S[0] > 0):
        return A, B * (_singular_values(weight, 1)[0] / S[0])
    if options.scale == "gd_scale":
        return A / s, B / s
    return A, B


def _singular_values(weight: Tensor, count: int) -> Tensor:
    fixed = torch.Generator().manual_seed(0)
    return svd_lowrank(weight.detach(), count, _NITER, generator=fixed).S
