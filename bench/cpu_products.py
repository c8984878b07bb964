"""The CPU's matrix products, MKL against oneDNN: the figures behind ops/adapter_linear/onednn.py.

    python -m bench.cpu_products [--tokens 8,256] [--rank 16] [--repeats 100]

Times the base product x Wᵀ and the narrow products of a rank-r adapter (shrink x Aᵀ, reduce
Hᵀ x), dropout's draws, and what the native core does between large products, and with them in one,
beside torch's calls, for the shapes of SmolLM2-135M and one larger.
Each row interleaves its contestants and prints medians in microseconds; oneDNN's result is first
checked against float64, and a row whose check fails prints no time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.measure import whole
from fastlora.ops import library
from fastlora.ops.backend import cpu_vendor
from fastlora.ops.dropout import stream_mask

SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 2048))  # K, N


def onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def mkl(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.linear(a, b)


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns."""
    taken = whole(calls, repeats, "cpu", warmup=5)
    return {name: statistics.median(values) / 1e3 for name, values in taken.items()}


def is_right(a: Tensor, b: Tensor) -> bool:
    exact = a.double() @ b.double().t()
    return bool((onednn(a, b).double() - exact).abs().max() <= 1e-5 * exact.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="8,256", help="M, comma-separated")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=100)
    arguments = parser.parse_args()
    tokens = [int(m) for m in arguments.tokens.split(",")]
    print(
        f"{cpu_vendor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, "
        f"rank {arguments.rank}, medians of {arguments.repeats}, microseconds: MKL / oneDNN"
    )
    print(f"{'M':>5} {'K':>5} {'N':>5}  {'x Wᵀ':>13} {'x Aᵀ':>11} {'Hᵀ x':>11}")
    torch.manual_seed(0)
    for m in tokens:
        for k, n in SHAPES:
            x, weight = torch.randn(m, k), torch.randn(n, k)
            lora_A = torch.randn(arguments.rank, k)
            t = x @ lora_A.t()
            pairs = {"base": (x, weight), "shrink": (x, lora_A), "reduce": (t.t(), x.t())}
            cells = []
            for width, (a, b) in zip((13, 11, 11), pairs.values(), strict=True):
                if not is_right(a, b):
                    cells.append("WRONG".rjust(width))
                    continue
                calls = {"mkl": lambda a=a, b=b: mkl(a, b), "onednn": lambda a=a, b=b: onednn(a, b)}
                times = medians(calls, arguments.repeats)
                cells.append(f"{times['mkl'] * 1e6:.0f} / {times['onednn'] * 1e6:.0f}".rjust(width))
            print(f"{m:>5} {k:>5} {n:>5}  {' '.join(cells)}")
    if library.missing():
        print("native core: not built, and left out of what follows")
    print("dropout of [256, K]: F.dropout / torch's generator, as eager's / native")
    for k in (576, 1536):
        print(f"{256:>5} {k:>5}  {_row(dropouts(256, k), arguments.repeats)}")
    print(
        "y += t Cᵀ of y [M, N]: addmm_ / native; what is read off dY [M, N]: two products / native"
    )
    for m in tokens:
        for n in dict.fromkeys(n for _, n in SHAPES):
            cells = [updates(m, n, arguments.rank), passes(m, n, arguments.rank)]
            both = "   ".join(_row(calls, arguments.repeats).rjust(13) for calls in cells)
            print(f"{m:>5} {n:>5}  {both}")
    if not library.missing():
        _sums(tokens, arguments.rank, arguments.repeats)


def _sums(tokens: list[int], rank: int, repeats: int) -> None:
    """What ``native.takes_sum`` decides on."""
    print(
        "the sum's time / the library's and an update's, medians of the ratios: y; dx; dx of DoRA"
    )
    for m in tokens:
        for k, n in (*SHAPES, (4096, 4096)):
            cells = []
            for calls in sums(m, k, n, rank):
                taken = whole(calls, repeats, "cpu", warmup=3)
                pairs = zip(taken["sum"], taken["library"], strict=True)
                cells.append(f"{statistics.median(own / other for own, other in pairs):.2f}")
            print(f"{m:>5} {k:>5} {n:>5}  {'   '.join(cells)}", flush=True)


def _row(calls: dict[str, Callable[[], object]], repeats: int) -> str:
    return " / ".join(f"{time * 1e6:.0f}" for time in medians(calls, repeats).values())


def dropouts(m: int, k: int) -> dict[str, Callable[[], object]]:
    """Dropout of [m, k]."""
    x, seed = torch.randn(m, k), torch.tensor([1])
    calls: dict[str, Callable[[], object]] = {
        "torch": lambda: torch.nn.functional.dropout(x, 0.1),
        "eager": lambda: stream_mask((m, k), 0.1, seed, x.device)(x),
    }
    if not library.missing():
        from fastlora.ops.adapter_linear import native

        calls["native"] = lambda: native.draw((m, k), 0.1, seed, x.device)(x)
    return calls


def updates(m: int, n: int, r: int) -> dict[str, Callable[[], object]]:
    """The adapter's update of [m, n], in place."""
    y, t, lora_B = torch.randn(m, n), torch.randn(m, r), 1e-3 * torch.randn(n, r)
    calls: dict[str, Callable[[], object]] = {"addmm": lambda: y.addmm_(t, lora_B.t())}
    if not library.missing():
        from fastlora.ops.adapter_linear import native

        calls["native"] = lambda: native.update(y, t, lora_B.t())
    return calls


def passes(m: int, n: int, r: int) -> dict[str, Callable[[], object]]:
    """H = dY B and dC = dYᵀ t of dY [m, n]."""
    dy, t, lora_B = torch.randn(m, n), torch.randn(m, r), torch.randn(n, r)
    calls: dict[str, Callable[[], object]] = {"products": lambda: (dy @ lora_B, dy.t() @ t)}
    if not library.missing():
        from fastlora.ops.adapter_linear import native

        calls["native"] = lambda: native.output_pass(dy, lora_B, t, 1.0, native.linear)
    return calls


def sums(m: int, k: int, n: int, r: int) -> list[dict[str, Callable[[], object]]]:
    """y [m, n] = x Wᵀ + t Cᵀ; dx [m, k] = dY W + H A; with g, H among it, (dY ∘ g) W + H A."""
    from fastlora.ops.adapter_linear import eager, native

    x, dy, g = torch.randn(m, k), torch.randn(m, n), torch.rand(n) + 0.5
    # a model's weights do not lie in the cache
    weights = [torch.randn(n, k) * k**-0.5 for _ in range(max(2, (1 << 24) // (n * k)))]
    lora_A, lora_B = torch.randn(r, k) * k**-0.5, torch.randn(n, r)
    t, h = torch.randn(m, r), torch.randn(m, r)
    linear, update = native.linear, native.update
    place = 0

    def weight() -> Tensor:
        nonlocal place
        place += 1
        return weights[place % len(weights)]

    def y(by_sum: bool) -> Tensor:
        if not by_sum:
            return eager.add_output(x, weight(), t, lora_B, None, None, linear, update)
        out = x.new_empty(m, n)
        native.sum_of_products(out, [(x, weight().t(), None), (t, lora_B.t(), None)])
        return out

    def dx(by_sum: bool, scaled: bool = False) -> Tensor:
        own, narrow, scale = dy, h, g if by_sum and scaled else None
        if scaled:
            passed = native.output_pass(
                dy, lora_B, None, 1.0, linear, out_scale=g, need_dy=not by_sum
            )
            assert passed.h is not None
            own, narrow = passed.dy, passed.h
        if not by_sum:
            gathered = eager.InPlace(linear, update)
            gathered.add(own, weight())
            gathered.update(narrow, lora_A)
            return gathered.total()
        out = x.new_empty(m, k)
        native.sum_of_products(out, [(own, weight(), scale), (narrow, lora_A, None)])
        return out

    def dora(by_sum: bool) -> Tensor:
        return dx(by_sum, True)

    return [{"library": partial(f, False), "sum": partial(f, True)} for f in (y, dx, dora)]


if __name__ == "__main__":
    main()
