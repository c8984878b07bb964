"""What each ``--optimizer`` means on peft's side and on ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.optim import Lion, Tiger, param_groups


class PlainLion(torch.optim.Optimizer):
    """Lion as published (arXiv 2302.06675), a tensor after another: what ours is held against."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                m = self.state[param].setdefault("exp_avg", torch.zeros_like(param))
                param.sub_(group["lr"] * torch.sign(first * m + (1 - first) * param.grad))
                m.mul_(second).add_(param.grad, alpha=1 - second)


class PlainTiger(torch.optim.Optimizer):
    """Tiger as published (kexue 9512), one tensor after another, without decay.

    Groups are those of ``fastlora.optim.param_groups``; the floor of zero tensors is fastlora's, as
    there is none in the original and LoRA's B would not move.
    """

    def __init__(self, params: Any, lr: float, beta: float = 0.965) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                    rows = param.shape[0] / param.numel() if param.dim() > 1 else 1.0
                    state["floor"] = 0.0 if param.any() else rows**0.5
                m = state["exp_avg"].lerp_(param.grad, 1 - group["beta"])
                size: Tensor | float
                if group["kind"] in ("gamma", "beta"):
                    size = 0.5
                else:
                    by_row = group["kind"] == "embedding"
                    mean = (
                        param.square().mean(-1, keepdim=True) if by_row else param.square().mean()
                    )
                    size = mean.sqrt().clamp(min=state["floor"])
                param.sub_(group["lr"] * size * m.sign())


@dataclass(frozen=True)
class Choice:
    """How both sides' optimizers are made from a model and a learning rate, without decay; ``lr``
    gives the rate from AdamW's for the method."""

    title: str
    ours: Callable[[nn.Module, float], torch.optim.Optimizer]
    theirs: Callable[[nn.Module, float], torch.optim.Optimizer]
    lr: Callable[[float], float]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trained(model), lr=lr, weight_decay=0.0)


OPTIMIZERS = {
    "adamw": Choice("AdamW", _adamw, _adamw, lambda lr: lr),
    "lion": Choice(
        "Lion",
        lambda model, lr: Lion(param_groups(model), lr=lr),
        lambda model, lr: PlainLion(_trained(model), lr=lr),
        lambda lr: lr / 5,
    ),
    # relative to each tensor's size, and so much the same for every method
    "tiger": Choice(
        "Tiger",
        lambda model, lr: Tiger(param_groups(model), lr=lr, weight_decay=0.0),
        lambda model, lr: PlainTiger(param_groups(model), lr=lr),
        lambda lr: 2e-3,
    ),
}
