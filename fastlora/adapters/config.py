"""The options of a LoRA adapter, under peft's names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from fastlora.nn.lora_linear import check_hyperparameters

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAConfig:
    """One LoRA adapter over a model; the fields are those of ``peft.LoraConfig``.

    Attributes:
        r: rank, at least 1.
        lora_alpha: α; the scaling is α/r, or α/√r with ``use_rslora``.
        lora_dropout: probability in [0, 1) on the adapter's input while training.
        target_modules: "all-linear" (every ``nn.Linear`` but the output embedding), a list of
            module names (a whole path or its end), or a regular expression for whole paths.
        exclude_modules: a list or regular expression of modules to leave out.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        rank_pattern, alpha_pattern: r and α for modules whose path ends in a match of the key.

    Raises TypeError for an option that does not exist here (what peft has beyond these is reached
    through peft itself and ``fastlora.accelerate``), ValueError for values out of range.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | list[str] = ALL_LINEAR
    exclude_modules: str | list[str] | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __new__(cls, *args: Any, **options: Any) -> LoRAConfig:
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(
                f"LoRAConfig has no option {', '.join(unknown)}; it has {', '.join(known)}. "
                "For what only peft offers, build the model with peft and call fastlora.accelerate."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_hyperparameters(self.r, self.lora_alpha, self.lora_dropout)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                value = sorted(value)
                object.__setattr__(self, name, value)
            _check_names(name, value)
        if not self.target_modules:
            raise ValueError("target_modules names no module")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora must be True or False, not {self.use_rslora!r}")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must map expressions to numbers")
            for key, value in getattr(self, name).items():
                _check_expression(name, key)
                is_rank = name == "rank_pattern"
                check_hyperparameters(value if is_rank else 1, 1 if is_rank else value, 0.0)

    def rank_of(self, name: str) -> int:
        return _lookup(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        return _lookup(self.alpha_pattern, name, self.lora_alpha)


def _lookup(pattern: dict[str, Any], name: str, default: Any) -> Any:
    for key, value in pattern.items():
        if pattern_matches(key, name):
            return value
    return default


def pattern_matches(key: str, name: str) -> bool:
    """Whether the expression ``key`` matches the path ``name`` or its end at a dot, as in peft."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _check_names(option: str, value: Any) -> None:
    if value is None and option == "exclude_modules":
        return
    if isinstance(value, str):
        _check_expression(option, value)
    elif not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{option} must be a list of module names or one string, not {value!r}")


def _check_expression(option: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"{option}: '{expression}' is not a regular expression: {error}"
        ) from error
