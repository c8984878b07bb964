"""The eager form with PyTorch's faster products, and natively what stands between them.

The narrow products, the scales and the sums over columns are bound by memory: y and dY are gone
through once for all of them. The large products are the library's, or, where that is no slower
(``takes_sum``), one with the narrow ones: then y and dx are written once, and dY ∘ g is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import backend
from fastlora.ops.adapter_linear import eager, onednn
from fastlora.ops.adapter_linear.contract import legible
from fastlora.ops.adapter_linear.eager import InPlace, Linear, Passed, Update
from fastlora.ops.dropout import Mask, threshold
from fastlora.ops.library import address, core, with_rows

_core = core()
_BOUNDS = legible(torch.float32)
_NARROW = 64  # ranks up to which the native products keep up with a GEMM library's
_FEW_ROWS, _MANY_ROWS = 8, 128  # as many as are worth bringing W into order for y, and for dx
_NEAR = 3 << 16  # elements of x or dY that stay in the second cache while W goes by
_LIGHT = 1 << 20  # elements of W up to which that holds for dY W, too
_STRIP = 64  # columns for which a thread brings W into order
_DRAW = 8  # a draw takes as long as so many multiply-adds
_SMALL = 1 << 17  # multiply-adds that take no longer than a second thread takes to come

_ONEDNN = backend.multiplies_with_onednn()
_MEASURED = _core.isas()[-1] == "avx512" and backend.cpu_vendor() == "GenuineIntel"

linear = onednn.linear if _ONEDNN else eager.aten_linear
onto = onednn.onto if _ONEDNN else eager.aten_onto


def takes_sum(
    rows: int, depth: int, columns: int, turned: bool = False, scaled: bool = False
) -> bool:
    """Whether y or dx [rows, columns], sums over ``depth``, are better made by ``sum_of_products``
    than by the library and an update: for measured sizes on measured processors (README.md).

    ``turned``: the large b lies as [columns, depth], as y's; ``scaled``: a is multiplied by g.
    """
    if not _MEASURED or _ONEDNN or rows < (_FEW_ROWS if turned else _MANY_ROWS):
        return False
    a_thread = rows * columns // (_STRIP * torch.get_num_threads())  # its rows of a strip
    return (
        rows * depth <= (2 if scaled else 1) * _NEAR
        and (turned or depth * columns <= _LIGHT)
        and a_thread >= min(rows, _STRIP)
    )


def draw_seed(device: torch.device) -> Tensor:
    """A seed [1] int64, as of every Philox mask."""
    return eager.draw_seed(device).view(1)


class BitMask:
    """The mask of ``dropout.philox_keep`` [M, K], drawn when it is first used and from then on held
    as a bit an element. ``isa``: one of the core's instruction sets, for tests."""

    def __init__(
        self, shape: tuple[int, int], p: float, seed: Tensor, device: torch.device, isa: str = ""
    ) -> None:
        self.shape, self._key, self._level, self._isa = shape, int(seed), threshold(p), isa
        words = -(-shape[1] // 16)
        self._bits = torch.empty(shape[0], words, dtype=torch.int16, device=device)
        self._drawn = False

    def __call__(self, x: Tensor) -> Tensor:
        x = with_rows(x)
        out = x.new_empty(self.shape)
        self._run(address(x), x.stride(0), address(out), out.stride(0))
        return out

    def bits(self) -> Tensor:
        """[M, ceil(K / 16)] int16, the first element's bit the lowest."""
        if not self._drawn:
            self._run(0, 0, 0, 0)
        return self._bits

    def _run(self, x: int, x_stride: int, out: int, out_stride: int) -> None:
        m, k = self.shape
        work = m * k * (1 if self._drawn else _DRAW)
        _core.dropout(
            x, m, k, x_stride, out, out_stride, self._key, self._level,
            self._bits.data_ptr(), self._drawn, _threads(work), self._isa,
        )  # fmt: skip
        self._drawn = True


draw = BitMask


def update(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Mask | None = None,
    isa: str = "",
) -> None:
    """See ``eager.Update``. ``isa``: one of the core's instruction sets, for tests."""
    narrow = a.shape[1] <= _NARROW and out.stride(1) == 1
    if not narrow or not (keep is None or isinstance(keep, BitMask)):
        return eager.add_product(out, a, b, scale, bias, keep)
    a = with_rows(a)
    scale = None if scale is None else scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    bits = None if keep is None else keep.bits()
    _core.low_rank_update(
        address(out), *out.shape, out.stride(0), address(a), a.stride(0), a.shape[1],
        address(b), *b.stride(), address(scale), address(bias), address(bits),
        _threads(out.numel() * a.shape[1]), isa,
    )  # fmt: skip


Product = tuple[Tensor, Tensor, "Tensor | None"]  # a [m, k], b [k, n], a scale [k]


def sum_of_products(
    out: Tensor,
    products: Sequence[Product],
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    isa: str = "",
) -> None:
    """out [m, n] ← scale ∘ Σ (a ∘ its scale) b + bias. ``isa``: as above."""
    own = []
    for a, b, along in products:
        b = b if 1 in b.stride() else b.contiguous()
        own.append((with_rows(a), b, None if along is None else along.contiguous()))
    scale = None if scale is None else scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    terms = [
        (address(a), a.stride(0), a.shape[1], address(b), *b.stride(), address(along))
        for a, b, along in own
    ]
    depth = sum(a.shape[1] for a, _, _ in own)
    _core.sum_of_products(
        address(out), *out.shape, out.stride(0), terms, address(scale), address(bias),
        _threads(out.numel() * depth), isa,
    )  # fmt: skip


def output(
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    lora_B: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    linear: Linear,
    update: Update,
) -> Tensor:
    """See ``eager.Output``."""
    if not takes_sum(x.shape[0], x.shape[1], weight.shape[0], turned=True):
        return eager.add_output(x, weight, t, lora_B, scale, bias, linear, update)
    y = x.new_empty(x.shape[0], weight.shape[0])
    sum_of_products(y, [(x, weight.t(), None), (t, lora_B.t(), None)], scale, bias)
    return y


class Gathered(InPlace):
    """See ``eager.Gradient``: the terms that one sum takes wait for each other."""

    def __init__(self, linear: Linear, update: Update) -> None:
        super().__init__(linear, update, onto)
        self._terms: list[Product] = []
        self._masked: list[tuple[Tensor, Tensor, Mask]] = []

    def takes_scale(self, dy: Tensor, weight: Tensor) -> bool:
        return self._takes(dy, weight, True)

    def _takes(self, dy: Tensor, weight: Tensor, scaled: bool) -> bool:
        return takes_sum(dy.shape[0], weight.shape[0], weight.shape[1], scaled=scaled)

    def add(self, dy: Tensor, weight: Tensor, scale: Tensor | None = None) -> None:
        if self._takes(dy, weight, scale is not None):
            self._terms.append((dy, weight, scale))
        else:
            super().add(dy, weight, scale)

    def update(self, h: Tensor, lora_A: Tensor, keep: Mask | None = None) -> None:
        if not self._terms:
            super().update(h, lora_A, keep)
        elif keep is None:
            self._terms.append((h, lora_A, None))
        else:
            self._masked.append((h, lora_A, keep))

    def total(self) -> Tensor:
        if self._terms:
            dy, weight, _ = self._terms[0]
            dx = dy.new_empty(dy.shape[0], weight.shape[1])
            sum_of_products(dx, self._terms)
            if self._dx is not None:
                dx.add_(self._dx)
            for h, lora_A, keep in self._masked:
                self._update(dx, h, lora_A, keep=keep)
            self._dx, self._terms, self._masked = dx, [], []
        return super().total()


def output_pass(
    dy: Tensor,
    lora_B: Tensor | None,
    t: Tensor | None,
    factor: float,
    linear: Linear,
    *,
    out_scale: Tensor | None = None,
    need_dy: bool = True,
    read: Tensor | None = None,
    bias: Tensor | None = None,
    is_y: bool = True,
    isa: str = "",
) -> Passed:
    """See ``eager.OutputPass``; ``isa`` as above. Products of a larger rank go to ``linear``."""
    m, n = dy.shape
    known = lora_B if lora_B is not None else t
    r = 0 if known is None else known.shape[1]
    narrow = 0 < r <= _NARROW
    # the address of an empty tensor is the null pointer
    if dy.numel() == 0 or (not narrow and out_scale is None):
        return eager.read_output(
            dy, lora_B, t, factor, linear,
            out_scale=out_scale, need_dy=need_dy, read=read, bias=bias, is_y=is_y,
        )  # fmt: skip
    dy = with_rows(dy)
    c = with_rows(lora_B) if narrow and lora_B is not None else None
    left = with_rows(t) if narrow and t is not None else None
    # beyond the narrow ranks the library multiplies it
    need_dy = need_dy or (r > 0 and not narrow)
    own = dy.new_empty(m, n) if out_scale is not None and need_dy else None
    h = None if c is None else dy.new_empty(m, r)
    dC = None if left is None else dy.new_empty(n, r)
    dg = unread = None
    if out_scale is not None:
        out_scale = out_scale.contiguous()
    if read is not None:
        read = with_rows(read)
        bias = None if bias is None else bias.contiguous()
        dg = dy.new_empty(n)
        unread = dy.new_empty(n, dtype=torch.bool) if is_y else None
    count = _core.output_pass(
        address(dy), m, n, dy.stride(0), address(out_scale), address(own),
        address(read), 0 if read is None else read.stride(0), address(bias), *_BOUNDS,
        address(dg), address(unread),
        r, address(c), 0 if c is None else c.stride(0), factor, address(h),
        address(left), 0 if left is None else left.stride(0), address(dC),
        _threads(dy.numel() * max(r, 1)), isa,
    )  # fmt: skip
    own = dy if own is None else own
    if not narrow:
        _, h, dC, _, _ = eager.read_output(own, lora_B, t, factor, linear)
    return Passed(own, h, dC, dg, unread if count else None)


def _threads(multiplies: int) -> int:
    """One thread for little work: another, asleep since the last, may be milliseconds in coming."""
    return 1 if multiplies < _SMALL else torch.get_num_threads()


# the steps that eager.py takes by name, and adapter_group's takes too
FORWARD: dict[str, Any] = {"linear": linear, "update": update, "output": output, "draw": draw}
BACKWARD: dict[str, Any] = {
    "linear": linear,
    "update": update,
    "output_pass": output_pass,
    "gradient": Gathered,
    "draw": draw,
}

few_rows = partial(eager.few_rows, draw=draw)
forward = partial(eager.forward, **FORWARD)
scaled_forward = partial(eager.scaled_forward, **FORWARD)
backward = partial(eager.backward, **BACKWARD)
scaled_backward = partial(eager.scaled_backward, **BACKWARD)
