"""The eager form with PyTorch's faster products, and natively what stands between them.

The narrow products, the scales and the sums over columns are bound by memory: y and dY are gone
through once for all of them. The large products are the library's, or, where that is no slower
(``takes_sum``), one with the narrow ones: then y and dx are written once, and dY ∘ g is not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.ops import backend
from fastlora.ops.adapter_linear import eager, onednn
from fastlora.ops.adapter_linear.contract import Needs, legible
from fastlora.ops.adapter_linear.eager import InPlace, Linear, Passed, Update
from fastlora.ops.dropout import Mask, keep_scale, threshold
from fastlora.ops.library import address, core, with_rows

_core = core()
_BOUNDS = legible(torch.float32)
_NARROW = 64  # ranks up to which the native products keep up with a GEMM library's
_STRIP = 64  # columns for which a thread brings W into order
_DRAW = 8  # a draw takes as long as so many multiply-adds
_LARGE = 1 << 20  # multiply-adds of a product of few rows that repay a Function of ours
_SMALL = 1 << 17  # multiply-adds that take no longer than a second thread takes to come

_ONEDNN = backend.multiplies_with_onednn()

linear = onednn.linear if _ONEDNN else eager.aten_linear
onto = onednn.onto if _ONEDNN else eager.aten_onto


class Sums(NamedTuple):
    """The sizes at which a processor makes y or dx no slower in one sum than by the library and an
    update (``bench.cpu_products``): from how few rows on, for y and for dx, up to how many, and up
    to how many elements of x or dY, and of dx's W. ``slice``: how much of a depth goes at once."""

    slice: int
    y_rows: int
    dx_rows: int
    rows: float = math.inf
    near: float = math.inf
    light: float = math.inf


# by the processor's maker and the widest vectors it has
_SUMS = {
    # a Xeon (Emerald Rapids): as long as x or dY stays in the second cache while W goes by
    ("GenuineIntel", "avx512"): Sums(128, y_rows=8, dx_rows=128, near=3 << 16, light=1 << 20),
    # EPYCs: Zen 4, where the library is oneDNN, and Zen 3
    ("AuthenticAMD", "avx512"): Sums(256, y_rows=1, dx_rows=1, rows=256),
    ("AuthenticAMD", "avx2"): Sums(384, y_rows=8, dx_rows=8, rows=1024),
}
_sums = _SUMS.get((backend.cpu_vendor(), _core.isas()[-1]))
_SLICE = 0 if _sums is None else _sums.slice


def takes_sum(
    rows: int, depth: int, columns: int, turned: bool = False, scaled: bool = False
) -> bool:
    """Whether y or dx [rows, columns], sums over ``depth``, are better made by ``sum_of_products``
    than by the library and an update.

    ``turned``: the large b lies as [columns, depth], as y's; ``scaled``: a is multiplied by g.
    """
    if _sums is None:
        return False
    return _takes_sum(_sums, rows, depth, columns, turned, scaled, torch.get_num_threads())


@functools.lru_cache(maxsize=1024)  # it is asked three times a layer
def _takes_sum(
    sums: Sums, rows: int, depth: int, columns: int, turned: bool, scaled: bool, threads: int
) -> bool:
    if not (sums.y_rows if turned else sums.dx_rows) <= rows <= sums.rows:
        return False
    a_thread = rows * columns // (_STRIP * threads)  # its rows of a strip
    return (
        rows * depth <= (2 if scaled else 1) * sums.near
        and (turned or depth * columns <= sums.light)
        and a_thread >= min(rows, _STRIP)
    )


def takes_layer(rows: int, depth: int, columns: int, rank: int) -> bool:
    """Whether a layer without vectors is one call of the core's."""
    return rank <= _NARROW and takes_sum(rows, depth, columns, turned=True)


def takes_few(rows: int, depth: int, columns: int, rank: int | None = None) -> bool:
    """Whether few rows are better off with ``forward`` and ``backward`` than with ``few_rows``:
    where each of them is one call of the core's (``rank``: of a layer without vectors), or where
    the product takes so long that the faster one makes up for a Function's calls."""
    if rank is not None and takes_layer(rows, depth, columns, rank):
        return True
    return rows * depth * columns >= _LARGE and takes_sum(rows, depth, columns, turned=True)


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
_Term = tuple[int, int, int, int, int, int, int]  # as the core takes it


def sum_of_products(
    out: Tensor,
    products: Sequence[Product],
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    isa: str = "",
) -> None:
    """out [m, n] ← scale ∘ Σ (a ∘ its scale) b + bias. ``isa``: as above."""
    held: list[Tensor | None] = []
    terms = [_term(a, b, along, False, held) for a, b, along in products]
    _sum(out, terms, scale, bias, isa)


def _term(
    a: Tensor, b: Tensor, along: Tensor | None, turned: bool, held: list[Tensor | None]
) -> _Term:
    """``turned``: b lies as [n, k]. ``held`` keeps what may have had to be copied."""
    a = with_rows(a)
    b = b if 1 in b.stride() else b.contiguous()
    along = None if along is None else along.contiguous()
    held += (a, b, along)
    row, column = b.stride()
    if turned:
        row, column = column, row
    return address(a), a.stride(0), a.shape[1], address(b), row, column, address(along)


def _sum(
    out: Tensor, terms: list[_Term], scale: Tensor | None, bias: Tensor | None, isa: str = ""
) -> None:
    scale = None if scale is None else scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    m, n = out.shape
    depth = sum([term[2] for term in terms])
    _core.sum_of_products(
        address(out), m, n, out.stride(0), terms, address(scale), address(bias), _SLICE,
        _threads(m * n * depth), isa,
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
    m, k = x.shape
    n = weight.shape[0]
    if not takes_sum(m, k, n, turned=True):
        return eager.add_output(x, weight, t, lora_B, scale, bias, linear, update)
    y = x.new_empty(m, n)
    held: list[Tensor | None] = []
    terms = [_term(x, weight, None, True, held), _term(t, lora_B, None, True, held)]
    _sum(y, terms, scale, bias)
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


few_rows = functools.partial(eager.few_rows, draw=draw)
scaled_forward = functools.partial(eager.scaled_forward, **FORWARD)
scaled_backward = functools.partial(eager.scaled_backward, **BACKWARD)
# where a layer is no single call
_forward: Callable[..., Any] = functools.partial(eager.forward, **FORWARD)
_backward: Callable[..., Any] = functools.partial(eager.backward, **BACKWARD)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    *,
    need_t: bool,
    isa: str = "",
) -> tuple[Tensor, Tensor | None]:
    """See ``eager.forward``; ``isa`` as above. One call of the core's where it takes the sum."""
    m, k = x.shape
    n, r = lora_B.shape
    if not takes_layer(m, k, n, r):
        return _forward(x, weight, lora_A, lora_B, scaling, bias, dropout_p, seed, need_t=need_t)
    x, weight, lora_A, lora_B = with_rows(x), _dense(weight), _dense(lora_A), _dense(lora_B)
    bias = None if bias is None else bias.contiguous()
    y, t = x.new_empty(m, n), x.new_empty(m, r)
    layer = _layer(m, k, n, r, x, weight, lora_A, lora_B, scaling, dropout_p, seed)
    _core.adapter_linear_forward(
        layer, address(bias), address(y), address(t), torch.get_num_threads(), isa
    )
    return y, t if need_t else None


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    t: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
    isa: str = "",
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See ``eager.backward``, and ``forward``."""
    m, n = dy.shape
    known = t if lora_B is None else lora_B
    r = 0 if known is None else known.shape[1]
    wide = lora_A if x is None else x
    k = 0 if wide is None else wide.shape[1]
    if not 0 < r <= _NARROW or needs.weight or not k or not takes_sum(m, n, k):
        return _backward(dy, x, weight, lora_A, lora_B, t, scaling, dropout_p, seed, needs)
    dy = with_rows(dy)
    weight, lora_A = (None if w is None else _dense(w) for w in (weight, lora_A))
    x, lora_B, t = (None if w is None else with_rows(w) for w in (x, lora_B, t))
    dx = dy.new_empty(m, k) if needs.x else None
    dA = dy.new_empty(r, k) if needs.lora_A else None
    dB = dy.new_empty(n, r) if needs.lora_B else None
    layer = _layer(m, k, n, r, x, weight, lora_A, lora_B, scaling, dropout_p, seed)
    _core.adapter_linear_backward(
        layer, address(dy), dy.stride(0), address(t), address(dx), address(dA), address(dB),
        torch.get_num_threads(), isa,
    )  # fmt: skip
    return dx, None, dA, dB, dy.sum(0) if needs.bias else None


def _dense(matrix: Tensor) -> Tensor:
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _layer(
    m: int,
    k: int,
    n: int,
    r: int,
    x: Tensor | None,
    weight: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Any, ...]:
    """As the core takes it: its LayerTuple."""
    factor, key, level = scaling, 0, 0
    if seed is not None:
        factor, key, level = scaling * keep_scale(dropout_p), int(seed), threshold(dropout_p)
    return (
        m, k, n, r, address(x), 0 if x is None else x.stride(0),
        _matrix(weight), _matrix(lora_A), _matrix(lora_B), factor, key, level, _SLICE, _SMALL,
    )  # fmt: skip


def _matrix(matrix: Tensor | None) -> tuple[int, int, int]:
    if matrix is None:
        return 0, 0, 0
    row, column = matrix.stride()
    return address(matrix), row, column
