"""The part of a base weight that an adapter started with, where it was taken out of the weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = ("lora_A_start", "lora_B_start")


class Start(NamedTuple):
    """A₀ [r, K] and B₀ [N, r], on the CPU: the base weight holds W₀ − s·B₀A₀.

    What is saved, switched off or taken out of the model is told from W₀ by them.
    """

    lora_A: Tensor
    lora_B: Tensor

    @classmethod
    def of(cls, lora_A: Tensor, lora_B: Tensor) -> Start:
        """Copies of these factors as they are now."""
        return cls(*(t.detach().to("cpu", copy=True).contiguous() for t in (lora_A, lora_B)))

    @property
    def r(self) -> int:
        return len(self.lora_A)

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.lora_A.to(device, dtype), self.lora_B.to(device, dtype)


def write(start: Start | None, state: dict[str, Any], prefix: str) -> None:
    """Put a layer's start into its state dict: without it, a run that goes on from there would no
    longer know W₀."""
    if start is not None:
        for name, tensor in zip(NAMES, start, strict=True):
            state[prefix + name] = tensor


def read(
    start: Start | None,
    shape: tuple[int, int],
    state: dict[str, Any],
    prefix: str,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> Start | None:
    """The start in a state dict, or the one there is; what is wrong goes into the lists, as in
    ``nn.Module._load_from_state_dict``. ``shape``: that of the weight, without which in the state
    its start is not taken, but unexpected: it says what another weight has lost."""
    if f"{prefix}weight" not in state:
        return start
    keys = [prefix + name for name in NAMES]
    there = [key for key in keys if key in state]
    unexpected[:] = [key for key in unexpected if key not in there]
    if len(there) < 2:
        if start is not None or there:
            missing += [key for key in keys if key not in there]
        return start
    lora_A, lora_B = (state[key] for key in keys)
    rank = lora_A.shape[:1]
    if (*lora_B.shape, *lora_A.shape) != (shape[0], *rank, *rank, shape[1]):
        errors.append(
            f"{keys[0]} and {keys[1]} have shapes {list(lora_A.shape)} and {list(lora_B.shape)}, "
            f"which are no factors of a weight {list(shape)}"
        )
        return start
    return Start.of(lora_A, lora_B)
