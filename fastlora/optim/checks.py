"""What a parameter group may hold; every refusal is a sentence."""

from __future__ import annotations

import numbers
import sys
from typing import Any

import torch
from torch import Tensor

STATE_DTYPES = ("float32", "bfloat16", "8bit")
ALGORITHMS = ("sign", "adamw")


def number(name: str, value: Any) -> None:
    """Raise ValueError unless it is a finite number of at least 0, or a zero-dim tensor of one.

    A tensor on another device than the CPU is not waited for, and its value not looked at.
    """
    if isinstance(value, Tensor):
        if value.dim() or not value.is_floating_point():
            raise ValueError(
                f"{name} as a tensor must hold one floating-point number and have no axes, not "
                f"{value.dtype} {list(value.shape)}"
            )
        if value.device.type != "cpu":
            return
        value = value.item()
    real = isinstance(value, numbers.Real)
    if not real or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} must be a finite number of at least 0, not {value}")


def fraction(name: str, value: Any) -> None:
    """Raise ValueError unless it is in [0, 1)."""
    real = isinstance(value, numbers.Real)
    if not real or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), not {value}")


def whole(name: str, value: Any, least: int | None = 0) -> None:
    """Raise ValueError unless it is an int, of at least ``least``."""
    if type(value) is not int or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be a whole number{bound}, not {value!r}")


def pair(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be two numbers, not {value}")
    for one in value:
        fraction(name, one)


def one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, not {value!r}")


def state_dtype(value: Any) -> str:
    """Its name in a group: "float32", "bfloat16" or "8bit". Raises ValueError for another."""
    name = str(value).removeprefix("torch.")
    one_of("state_dtype", name, STATE_DTYPES)
    return name


def common(group: dict[str, Any]) -> None:
    """The options that every group of Lion and Tiger has. Raises ValueError."""
    one_of("algorithm", group["algorithm"], ALGORITHMS)
    number("lr", group["lr"])
    number("weight_decay", group["weight_decay"])
    one_of("state_dtype", group["state_dtype"], STATE_DTYPES)
    whole("steps", group["steps"])
    if group["stochastic_rounding"]:
        whole("seed", group["seed"], None)
    if group["lazy_momentum"] and not group["lazy_rows"]:
        raise ValueError("lazy_momentum keeps the momentum of rows that lazy_rows keeps; give both")
    if group["algorithm"] == "adamw":
        pair("adam_betas", group["adam_betas"])
        number("adam_eps", group["adam_eps"])
        if group["lazy_rows"]:
            raise ValueError("lazy_rows is a remedy for sign updates; AdamW has no need of it")
    if group["capturable"] and group["stochastic_rounding"]:
        raise ValueError(
            "a captured step would round with the same random bits at every replay: capturable and "
            "stochastic_rounding exclude each other"
        )


def parameter(param: Any, name: str) -> None:
    """Raise TypeError unless it is a real floating-point tensor."""
    if not isinstance(param, Tensor):
        raise TypeError(f"{name} is a {type(param).__name__}, not a tensor")
    if param.is_complex():
        raise TypeError(f"{name} is complex, and a complex number has no sign")
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"{name} is {param.dtype}; floating-point parameters are updated")
    if param.is_neg():
        raise TypeError(f"{name} is a negated view, which cannot be updated in place")
    if param.is_sparse:
        raise TypeError(f"{name} is sparse; gradients may be, parameters not")
