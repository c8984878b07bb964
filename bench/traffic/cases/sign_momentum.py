"""Lion's and Tiger's update of a list, by ``sign_momentum``'s kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bench.cards import Card
from bench.traffic.cases.case import Case, Shape
from fastlora.ops.sign_momentum import EightBit, sign_momentum

LAYERS = 8  # of LoRA, in a list

_AGAIN = "a rate relative to its tensor, and a test for NaN, must see all of it before the update"


def on(card: Card) -> AbstractContextManager[None]:
    """Nothing to choose: these kernels take the same length of a list everywhere."""
    return nullcontext()


class _List:
    """Tensors of one memory each for parameters, gradients and momentum."""

    def __init__(self, sizes: Sequence[tuple[int, int]], dtype: torch.dtype, coded: bool) -> None:
        count = sum(a * b for a, b in sizes)
        generator = torch.Generator().manual_seed(0)
        whole = {
            name: torch.randn(count, generator=generator).to(dtype) for name in ("params", "grads")
        }

        def cut(tensor: Tensor) -> list[Tensor]:
            parts = tensor.split([a * b for a, b in sizes])
            return [part.view(size) for part, size in zip(parts, sizes, strict=True)]

        self.params, self.grads = cut(whole["params"]), cut(whole["grads"])
        self.momenta: list[Any]
        if coded:
            whole["momenta"] = torch.zeros(count, dtype=torch.int8)
            whole["scales"] = torch.zeros(sum(-(-a * b // 256) for a, b in sizes))
            scales = whole["scales"].split([-(-a * b // 256) for a, b in sizes])
            pairs = zip(cut(whole["momenta"]), scales, strict=True)
            self.momenta = [EightBit(codes, scale) for codes, scale in pairs]
        else:
            whole["momenta"] = torch.zeros(count, dtype=dtype)
            self.momenta = cut(whole["momenta"])
        self.whole = whole

    def step(self, **options: Any) -> Callable[[], list[Tensor]]:
        """One update, and what it writes."""

        def run() -> list[Tensor]:
            sign_momentum(
                self.params, self.grads, self.momenta, lr=1e-3, betas=(0.9, 0.99),
                weight_decay=0.1, backend="triton", **options,
            )  # fmt: skip
            return [part for name, part in self.whole.items() if name != "grads"]

        return run


def cases(shape: Shape) -> Iterator[Case]:
    """LoRA's tensors of some layers in every storage, with Tiger's rates, and an embedding's."""
    n, k, r = shape.n, shape.k, shape.r
    lora = [(r, k), (n, r)] * LAYERS

    def case(name: str, own: _List, passes: dict[str, int], why: str = "", **options: Any) -> Case:
        return Case(name, own.whole, own.step(**options), passes, 0, why)

    once = {"params": 1, "grads": 1, "momenta": 1}
    for name, dtype, coded in (
        ("sign-fp32", torch.float32, False),
        ("sign-bf16", torch.bfloat16, False),
        ("sign-8bit", torch.bfloat16, True),
    ):
        yield case(name, _List(lora, dtype, coded), once)
    twice = {"params": 2, "grads": 2, "momenta": 1}
    own = _List(lora, torch.bfloat16, False)
    yield case("sign-tiger", own, twice, _AGAIN, relative="tensor", shrink=(0.99, 0.0))
    rows = {"params": 2, "grads": 1, "momenta": 1}
    own = _List([(n, k // 4)], torch.bfloat16, False)
    mask = torch.ones(n, dtype=torch.bool)
    yield case("sign-rows", own, rows, _AGAIN, relative="rows", rows=[mask])
