"""``EightBit``: momentum in one byte an element, with a scale for each block of 256."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256
LEVELS = 127
STEP = 1 / LEVELS**2  # in float32, 127² times it is 1, so that the largest keeps its value


class EightBit:
    """A tensor as codes in [-127, 127] with the largest magnitude of each block of 256 elements.

    A code q stands for scale · q|q| / 127². Squares give small elements finer steps than large
    ones, so that an element keeps its sign down to 1/64516 of its block's largest (with a linear
    code 1/254), and the sign is all that an update takes from momentum. Encoding is a division, a
    root, a product and a rounding to nearest even, each rounded by itself, so every backend gives
    the same bytes; encoding what was decoded changes nothing.

    Blocks run over the elements in row-major order. A NaN or infinity makes its whole block NaN.

    Attributes:
        codes: int8, in the tensor's shape, contiguous.
        scales: float32 [ceil(n / 256)].
    """

    __slots__ = ("codes", "scales")

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        """Takes both as they are. Raises ValueError or TypeError where they do not fit."""
        if codes.dtype != torch.int8 or scales.dtype != torch.float32:
            raise TypeError(
                f"codes must be int8 and scales float32, not {codes.dtype} and {scales.dtype}"
            )
        if tuple(scales.shape) != (blocks(codes.numel()),):
            raise ValueError(
                f"scales must have shape [{blocks(codes.numel())}], one per {BLOCK} of "
                f"{codes.numel()} elements; they have {list(scales.shape)}"
            )
        if codes.device != scales.device:
            raise ValueError(f"codes are on {codes.device} but scales on {scales.device}")
        if not codes.is_contiguous() or not scales.is_contiguous():
            raise ValueError("codes and scales must be contiguous")
        self.codes, self.scales = codes, scales

    @classmethod
    def zeros_like(cls, tensor: Tensor) -> EightBit:
        """Zeros in ``tensor``'s shape, on its device."""
        return cls(
            torch.zeros(tensor.shape, dtype=torch.int8, device=tensor.device),
            torch.zeros(blocks(tensor.numel()), dtype=torch.float32, device=tensor.device),
        )

    @classmethod
    def from_float(cls, values: Tensor) -> EightBit:
        """``values`` (any floating dtype) encoded anew."""
        made = cls.zeros_like(values)
        made.set_(values)
        return made

    def set_(self, values: Tensor) -> EightBit:
        """Encodes ``values``, of this shape, in place."""
        n = self.codes.numel()
        if values.shape != self.codes.shape:
            raise ValueError(
                f"values have shape {list(values.shape)}, codes {list(self.codes.shape)}"
            )
        flat = values.detach().to(torch.float32).reshape(-1)
        rest = -n % BLOCK
        if rest:
            flat = torch.cat([flat, flat.new_zeros(rest)])
        tiles = flat.view(-1, BLOCK)
        scales = tiles.abs().amax(dim=1)
        scales = torch.where(scales.isfinite(), scales, torch.nan)
        # torch's float32 root is off by one unit here and there (MKL's, on CPUs)
        roots = (tiles.abs() / scales[:, None]).to(double(flat.device)).sqrt().to(torch.float32)
        codes = (roots * LEVELS).round() * tiles.sign()
        codes = torch.where(scales[:, None] > 0, codes, 0.0)
        self.scales.copy_(scales)
        self.codes.view(-1).copy_(codes.to(torch.int8).view(-1)[:n])
        return self

    def to_float(self) -> Tensor:
        """The values, float32, in the tensor's shape."""
        n = self.codes.numel()
        q = self.codes.view(-1).to(torch.float32)
        scales = self.scales.repeat_interleave(BLOCK)[:n]
        return (q * q.abs() * STEP * scales).view(self.codes.shape)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def numel(self) -> int:
        return self.codes.numel()

    def to(self, device: torch.device | str) -> EightBit:
        """On another device; itself where it is there already."""
        if self.codes.device == torch.device(device):
            return self
        return EightBit(self.codes.to(device), self.scales.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """The two tensors, not copied: what a checkpoint keeps."""
        return {"codes": self.codes, "scales": self.scales}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> EightBit:
        """From ``state_dict``. Raises ValueError or TypeError where it does not fit itself."""
        if set(state) != {"codes", "scales"}:
            raise ValueError(f"expected codes and scales, not {sorted(state)}")
        return cls(state["codes"], state["scales"])

    def __repr__(self) -> str:
        return f"EightBit(shape={list(self.codes.shape)}, device='{self.codes.device}')"


def blocks(n: int) -> int:
    """How many scales n elements have."""
    return -(-n // BLOCK)


def double(device: torch.device) -> torch.dtype:
    """The widest floating dtype of a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
