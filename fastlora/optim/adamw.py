"""The groups of ``algorithm="adamw"``: torch's own AdamW, beside Lion or Tiger in one optimizer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

TENSORS = ("exp_avg", "exp_avg_sq")  # in the parameter's shape
STATE = (*TENSORS, "step")


def check_gradient(grad: Tensor, where: str) -> None:
    """Raise RuntimeError for a sparse gradient, as torch's AdamW does."""
    if grad.is_sparse:
        raise RuntimeError(
            f"{where} has a sparse gradient, which AdamW does not take: make the embedding with "
            "sparse=False, or give its group lazy_rows instead"
        )


def empty_state(param: Tensor, capturable: bool) -> dict[str, Any]:
    """As torch.optim.AdamW begins."""
    return {
        "step": torch.zeros((), device=param.device if capturable else "cpu"),
        "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
    }


def step(
    group: dict[str, Any], lr: Any, params: list[Tensor], grads: list[Tensor], states: list[Any]
) -> None:
    """One step of a group's parameters; ``lr`` is the group's, times a schedule's factor."""
    # DTensors and plain tensors do not mix in one call
    by_type: dict[Any, list[int]] = defaultdict(list)
    for i, param in enumerate(params):
        by_type[type(param), getattr(param, "device_mesh", None)].append(i)
    beta1, beta2 = group["adam_betas"]
    for indices in by_type.values():
        adamw(
            [params[i] for i in indices],
            [grads[i] for i in indices],
            [states[i]["exp_avg"] for i in indices],
            [states[i]["exp_avg_sq"] for i in indices],
            [],
            [states[i]["step"] for i in indices],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr if group["capturable"] else float(lr),
            weight_decay=float(group["weight_decay"]),
            eps=group["adam_eps"],
            maximize=group["maximize"],
            capturable=group["capturable"],
        )
