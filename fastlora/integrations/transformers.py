"""Lion and Tiger by name for transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.optim import Lion, Tiger, param_groups

OPTIMIZERS = {"lion": Lion, "tiger": Tiger}


class _Factory:
    """What the Trainer calls with the model: it makes groups by kind, which a class could not."""

    def __init__(self, name: str) -> None:
        self._class = OPTIMIZERS[name]

    def __call__(self) -> Any:
        return self._make

    def _make(self, model: nn.Module, *, groups: dict[str, Any], **options: Any) -> Any:
        return self._class(param_groups(model, **groups), **options)


def trainer_optimizer(
    name: str, args: Any = None, *, groups: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """An optimizer for ``Trainer(..., optimizer_cls_and_kwargs=trainer_optimizer("lion", args))``.

    The Trainer then makes it over the model as it trains it (wrapped, sharded). Its schedule works
    as with every other: leave Tiger's ``lr_schedule`` out. Gradient accumulation is the Trainer's.

    Args:
        name: "lion" or "tiger".
        args: TrainingArguments, of which learning_rate is the lr and weight_decay the decay;
            without, and for what ``options`` gives, the optimizer's own defaults. For Tiger
            learning_rate is relative, 1e-3 or 2e-3.
        groups: options of ``fastlora.optim.param_groups``, as {"embedding": {"lazy_rows": True}}.
        options: the optimizer's.

    Raises ValueError for another name, and where transformers is too old to call it with the model;
    TypeError for an option that the optimizer does not have.
    """
    from transformers import trainer_optimizer as door

    if name not in OPTIMIZERS:
        raise ValueError(f"there is no optimizer '{name}'; there are {', '.join(OPTIMIZERS)}")
    if not hasattr(door, "is_optimizer_factory"):
        raise ValueError("this needs transformers 5: make the optimizer, and give optimizers=")
    chosen = dict(options)
    if args is not None:
        chosen = {"lr": args.learning_rate, "weight_decay": args.weight_decay} | chosen
    # for a wrong option or value to show here, and not within the Trainer
    OPTIMIZERS[name]([nn.Parameter(torch.zeros(1, 1, device="cpu"))], **chosen)
    return _Factory(name), {"groups": dict(groups or {}), **chosen}
