"""What each ``--method`` means on peft's side and on ours."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters import (
    AdaLoRAConfig,
    AdapterConfig,
    LoRAConfig,
    Report,
    VeRAConfig,
    inject,
)
from fastlora.methods import AdaLoRA, LoRAFA, LoRAPro, lora_ga, orthogonal_regulariser

ALL_LINEAR: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def _inject(model: nn.Module, config: AdapterConfig, batches: Sequence[Tensor]) -> Report:
    return inject(model, config)


@dataclass(frozen=True)
class Method:
    """``title``: as in tables. ``rank`` and ``lr``: what the demo takes unless told otherwise.

    ``ours`` and ``theirs`` make the configurations. ``around_steps`` is attached to a model and
    its optimizer, on both sides unless ``around_peft_steps`` is peft's own way; ``beside`` is what
    our loss has beside the model's, where peft's model adds it itself.

    ``own_start``: where our adapters do not start as copies of peft's, what they start as and what
    peft's are, as a sentence; the base weights then change at the start, and each side gets its
    own. ``put_in`` puts ours into a model, from its configuration and batches of the training.
    """

    title: str
    ours: Callable[[Recipe], AdapterConfig]
    theirs: Callable[[Recipe], Any]
    rank: int = 16
    lr: float = 5e-4
    has_alpha: bool = True
    around_steps: Callable[[nn.Module, torch.optim.Optimizer], object] | None = None
    around_peft_steps: Callable[[nn.Module, torch.optim.Optimizer], object] | None = None
    beside: Callable[[nn.Module], Tensor] | None = None
    own_start: str | None = None
    put_in: Callable[[nn.Module, Any, Sequence[Tensor]], Report] = _inject


@dataclass(frozen=True)
class Recipe:
    """How the adapter is made and trained."""

    method: Method
    r: int
    alpha: float
    dropout: float
    lr: float
    steps: int
    via: str
    backend: str | None
    optimizer: str = "adamw"


def _lora_options(recipe: Recipe) -> dict[str, Any]:
    return {"r": recipe.r, "lora_alpha": recipe.alpha, "lora_dropout": recipe.dropout}


def _lora(title: str, **variant: Any) -> Method:
    def theirs(recipe: Recipe) -> Any:
        import peft

        return peft.LoraConfig(**ALL_LINEAR, **_lora_options(recipe), **variant)

    return Method(title, lambda recipe: LoRAConfig(**_lora_options(recipe), **variant), theirs)


def _vera_options(recipe: Recipe) -> dict[str, Any]:
    return {"r": recipe.r, "vera_dropout": recipe.dropout}


def _peft_vera(recipe: Recipe) -> Any:
    import peft

    return peft.VeraConfig(**ALL_LINEAR, **_vera_options(recipe))


def _adalora_options(recipe: Recipe) -> dict[str, Any]:
    return {
        "init_r": recipe.r,
        "target_r": max(1, recipe.r * 2 // 3),
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "total_step": max(recipe.steps, 2),  # the ranks are settled at the last step
    }


def _peft_adalora(recipe: Recipe) -> Any:
    import peft

    return peft.AdaLoraConfig(**ALL_LINEAR, **_adalora_options(recipe))


def _peft_allocates(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """peft's ``update_and_allocate`` after every step, counted from 1."""
    steps = itertools.count(1)
    inner: Any = model.base_model
    optimizer.register_step_post_hook(lambda *_: inner.update_and_allocate(next(steps)))


def _lora_ga(model: nn.Module, config: LoRAConfig, batches: Sequence[Tensor]) -> Report:
    """From the gradients of the first eight batches of the training."""

    def loss(model: Any, batch: Tensor) -> Tensor:
        return model(input_ids=batch, labels=batch, use_cache=False).loss

    return lora_ga(model, config, batches[:8], loss)


_PLAIN = _lora("LoRA")

METHODS = {
    "lora": _PLAIN,
    "rslora": _lora("rsLoRA", use_rslora=True),
    "dora": _lora("DoRA", use_dora=True),
    "vera": Method(
        "VeRA",
        lambda recipe: VeRAConfig(**_vera_options(recipe)),
        _peft_vera,
        rank=256,
        lr=5e-3,
        has_alpha=False,
    ),
    "adalora": Method(
        "AdaLoRA",
        lambda recipe: AdaLoRAConfig(**_adalora_options(recipe)),
        _peft_adalora,
        around_steps=lambda model, optimizer: AdaLoRA().attach(model, optimizer),
        around_peft_steps=_peft_allocates,
        beside=lambda model: AdaLoRAConfig.orth_reg_weight * orthogonal_regulariser(model),
    ),
    "lora_fa": Method(
        "LoRA-FA",
        lambda recipe: LoRAConfig(use_lora_fa=True, **_lora_options(recipe)),
        _PLAIN.theirs,
        # peft's own optimizer multiplies in bfloat16, so that losses would differ by its rounding
        around_steps=lambda model, optimizer: LoRAFA().attach(model, optimizer),
    ),
    # which peft does not have: on both sides it is ours, over peft's layers and over fastlora's
    "lora_pro": dataclasses.replace(
        _PLAIN,
        title="LoRA-Pro",
        around_steps=lambda model, optimizer: LoRAPro().attach(model, optimizer),
    ),
    "pissa": dataclasses.replace(
        _lora("PiSSA", init_lora_weights="pissa_niter_4"),
        own_start="both start as PiSSA, each with its own decomposition",
    ),
    # peft's own LoRA-GA is another formula
    "lora_ga": dataclasses.replace(
        _PLAIN,
        title="LoRA-GA",
        own_start="fastlora starts as LoRA-GA, peft as plain LoRA",
        put_in=_lora_ga,
    ),
}
