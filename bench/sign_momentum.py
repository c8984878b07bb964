"""Times one step of Lion over many tensors against lion-pytorch and torch's fused AdamW.

    python -m bench.sign_momentum [--case small|seven|large ...] [--threads 2] [--rounds 15]
                                  [--json FILE]

Cases: ``small``, 240 LoRA tensors of SmolLM2-135M's size (r = 16, 2.2M parameters); ``seven``, the
448 of a 7B llama (r = 16, 40M); ``large``, four matrices of 4M. Ways, interleaved in one process,
each round in another order:

    native, native bf16     ops.sign_momentum; fp32 throughout, bf16 throughout
    native bf16 momentum    fp32 with momentum in bf16
    native 8-bit            fp32 with momentum in 8-bit blocks
    eager                   the same operation over torch._foreach
    lion-pytorch            its foreach optimizer's step: the package where it is installed, else
                            the same calls written from its published rule
    AdamW fused             torch.optim.AdamW(fused=True).step()
    compiled                the published rule through torch.compile: a C++ loop for each tensor,
                            which reads and writes what an fp32 step must. For ``large`` alone,
                            as 240 loops take minutes to compile, and where there is a compiler
    copy                    one copy of 10 bytes a parameter: 20 moved, as an fp32 step must

In its turn a way makes 17 steps. The first finds the caches full of the others' tensors, as after a
backward pass; the next four take what of its own the caches come to hold; after six more come six
"settled" ones, which find what the caches will hold of it. For each kind a row has the median in
microseconds, the fastest and slowest round, and how many times faster ``native`` is, as the median
of the ratios within each round. Before a case is timed, all that is ours
must equal the reference to the bit, and native must follow lion-pytorch and compiled to
1e-6 of the parameters; where one is off, nothing is reported and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import Call, Mark, take_turns
from fastlora.ops import EightBit, SignMomentumCache, library, sign_momentum
from fastlora.ops.backend import cpu_vendor
from fastlora.ops.sign_momentum import op, reference

LR, BETAS, DECAY = 1e-4, (0.9, 0.99), 0.1
# steps of a turn, by what is said of them; six others come before the last
KINDS = {"first step": 1, "next ones": 4, "settled": 6}
SETTLING = 6


def _pairs(*layers: tuple[int, int]) -> list[tuple[int, int]]:
    """LoRA's A and B of rank 16 for layers (inputs, outputs)."""
    return [shape for k, n in layers for shape in ((16, k), (n, 16))]


_LLAMA = ((4096, 4096),) * 4 + ((4096, 11008),) * 2 + ((11008, 4096),)
CASES = {
    "small": _pairs((576, 576)) * 120,
    "seven": _pairs(*_LLAMA) * 32,
    "large": [(2048, 2048)] * 4,
}


class Foreach:
    """lion-pytorch's rule (lerp, sign, lerp) by the calls its foreach optimizer makes."""

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float = LR,
        betas: tuple[float, float] = BETAS,
        weight_decay: float = DECAY,
    ) -> None:
        self.params = list(params)
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.momenta = [torch.zeros_like(param) for param in params]

    @torch.no_grad()
    def step(self) -> None:
        grads = [param.grad for param in self.params]
        torch._foreach_mul_(self.params, 1 - self.lr * self.weight_decay)
        updates = [momentum.clone() for momentum in self.momenta]
        torch._foreach_lerp_(updates, grads, 1 - self.betas[0])
        torch._foreach_sign_(updates)
        torch._foreach_add_(self.params, updates, alpha=-self.lr)
        torch._foreach_lerp_(self.momenta, grads, 1 - self.betas[1])


def lion_pytorch(
    params: Sequence[Tensor],
    lr: float = LR,
    betas: tuple[float, float] = BETAS,
    weight_decay: float = DECAY,
) -> tuple[Any, str]:
    """The optimizer, and what it is."""
    try:
        from lion_pytorch.foreach import Lion
    except ImportError:
        return Foreach(params, lr, betas, weight_decay), "its rule"
    return Lion(params, lr=lr, betas=betas, weight_decay=weight_decay), "the package"


class Compiled:
    """The rule as one would write it, fused by torch.compile."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.momenta = [torch.zeros_like(param) for param in params]
        self._rule = torch.compile(_rule)

    @torch.no_grad()
    def step(self) -> None:
        self._rule(self.params, [param.grad for param in self.params], self.momenta)


def _rule(params: list[Tensor], grads: list[Tensor], momenta: list[Tensor]) -> None:
    for param, grad, momentum in zip(params, grads, momenta, strict=True):
        update = torch.sign(BETAS[0] * momentum + (1 - BETAS[0]) * grad)
        param.copy_(param * (1 - LR * DECAY) - LR * update)
        momentum.copy_(BETAS[1] * momentum + (1 - BETAS[1]) * grad)


def compiles(shapes: list[tuple[int, int]]) -> bool:
    """Whether the rule can be compiled for them; if not, stderr says why."""
    try:
        Compiled(parameters(shapes, torch.float32)).step()
    except Exception as error:  # of many types: no compiler, no headers, a platform without either
        said = str(error).strip() or type(error).__name__
        print(f"compiled is absent: {said.splitlines()[0]}", file=sys.stderr)
        return False
    return True


@contextmanager
def as_reference() -> Iterator[None]:
    """``sign_momentum`` computes by the reference, whatever backend is asked for."""
    select = op._backend.select
    op._backend.select = lambda *_: reference  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        op._backend.select = select


class Ours:
    """A list that ``sign_momentum`` updates."""

    def __init__(self, shapes: list[tuple[int, int]], dtype: torch.dtype, kind: str, way: str):
        self.params = parameters(shapes, dtype)
        zeros = [torch.zeros_like(param) for param in self.params]
        self.momenta: list[Any] = zeros
        if kind == "8-bit":
            self.momenta = [EightBit.zeros_like(param) for param in self.params]
        if kind == "bf16":
            self.momenta = [zero.bfloat16() for zero in zeros]
        self.way, self.cache = way, SignMomentumCache()

    def step(self) -> None:
        grads = [param.grad for param in self.params]
        sign_momentum(
            self.params, grads, self.momenta, lr=LR, betas=BETAS, weight_decay=DECAY,
            cache=self.cache, backend=self.way,
        )  # fmt: skip

    def bytes(self) -> list[bytes]:
        """What it holds, to be compared to the bit."""
        parts = [t for m in self.momenta for t in _parts(m)] + [p.detach() for p in self.params]
        return [part.flatten().view(torch.uint8).numpy().tobytes() for part in parts]


def _parts(momentum: Any) -> list[Tensor]:
    return [momentum.codes, momentum.scales] if isinstance(momentum, EightBit) else [momentum]


def parameters(shapes: list[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """The same ones at every call, with their gradients."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        param.grad = torch.randn(shape, generator=generator).to(dtype)
        made.append(param)
    return made


OURS = {
    "native": (torch.float32, "", "native"),
    "native bf16": (torch.bfloat16, "", "native"),
    "native bf16 momentum": (torch.float32, "bf16", "native"),
    "native 8-bit": (torch.float32, "8-bit", "native"),
    "eager": (torch.float32, "", "eager"),
}


def rivals(shapes: list[tuple[int, int]], compile: bool) -> dict[str, tuple[list[Tensor], Any]]:
    """What else follows the rule, by name: parameters of its own, and what steps them."""
    params = parameters(shapes, torch.float32)
    made = {"lion-pytorch": (params, lion_pytorch(params)[0])}
    if compile:
        params = parameters(shapes, torch.float32)
        made["compiled"] = params, Compiled(params)
    return made


def check(shapes: list[tuple[int, int]], compile: bool) -> list[str]:
    """What is wrong, as sentences; ``compile``: of what is compiled as well."""
    wrong = []
    for name, how in OURS.items():
        own, plain = Ours(shapes, *how), Ours(shapes, *how)
        for _ in range(2):
            own.step()
            with as_reference():
                plain.step()
        if own.bytes() != plain.bytes():
            wrong.append(f"{name} is not the reference to the bit")
        if name != "native":
            continue
        for rival, (theirs, optimizer) in rivals(shapes, compile).items():
            for _ in range(2):
                optimizer.step()
            worst = max(
                float((a.detach() - b.detach()).abs().max() / b.detach().abs().max())
                for a, b in zip(own.params, theirs, strict=True)
            )
            if not worst <= 1e-6:
                wrong.append(f"native is {worst:.1e} away from {rival}")
    return wrong


def ways(shapes: list[tuple[int, int]], compile: bool) -> dict[str, Callable[[], object]]:
    """A step of each way, on tensors of its own."""
    calls: dict[str, Callable[[], object]] = {}
    for name, how in OURS.items():
        calls[name] = Ours(shapes, *how).step
    for name, (_, optimizer) in rivals(shapes, compile).items():
        calls[name] = optimizer.step
    adam = torch.optim.AdamW(
        parameters(shapes, torch.float32), lr=LR, weight_decay=DECAY, fused=True
    )
    calls["AdamW fused"] = adam.step
    count = sum(a * b for a, b in shapes)
    source, target = torch.ones(10 * count, dtype=torch.uint8), torch.ones(10 * count).byte()
    calls["copy"] = lambda: target.copy_(source)
    return calls


def _turn(step: Callable[[], object]) -> Call:
    def turn(mark: Mark) -> None:
        for kind, count in KINDS.items():
            if kind == "settled":
                for _ in range(SETTLING):
                    step()
                mark()
            for _ in range(count):
                step()
            mark()

    return turn


def _of(kind: str, laps: Mapping[str, list[Sequence[float]]]) -> dict[str, list[float]]:
    """Microseconds of one such step, by way and round."""
    place = {"first step": 0, "next ones": 1, "settled": 3}[kind]
    return {
        name: [1e3 * own[place] / KINDS[kind] for own in rounds] for name, rounds in laps.items()
    }


def _rounded(times: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(one, 1) for one in own] for name, own in times.items()}


def main(argv: list[str] | None = None) -> int:
    """Checks, times, prints; the exit status is 1 where a check fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.sign_momentum", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    if reason := library.missing():
        print(reason, file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    what = lion_pytorch(parameters([(1, 1)], torch.float32))[1]
    conditions = (
        f"cpu ({cpu_vendor()}), {args.threads} threads, torch {torch.__version__}, lion-pytorch: "
        f"{what}, median of {args.rounds}, µs a step"
    )
    print(conditions)
    print(f"{'case':<6} {'way':<20}", *(f"{kind:>24} {'times':>6}" for kind in KINDS))
    figures = {}
    for case in args.case:
        shapes = CASES[case]
        compile = case == "large" and compiles(shapes)
        if wrong := check(shapes, compile):
            print(f"{case}: {'; '.join(wrong)}: nothing is reported", file=sys.stderr)
            return 1
        steps = ways(shapes, compile)
        turns = {name: _turn(step) for name, step in steps.items()}
        laps = take_turns(turns, args.rounds, "cpu", warmup=1).laps
        taken = {kind: _of(kind, laps) for kind in KINDS}
        for name in steps:
            cells = []
            for times in taken.values():
                own = times[name]
                ratio = statistics.median(a / b for a, b in zip(own, times["native"], strict=True))
                cell = f"{statistics.median(own):.0f} ({min(own):.0f}–{max(own):.0f})"
                cells.append(f"{cell:>24} {ratio:>6.2f}")
            print(f"{case:<6} {name:<20}", *cells, flush=True)
        figures[case] = {
            "tensors": len(shapes),
            "parameters": sum(a * b for a, b in shapes),
            "µs": {kind: _rounded(times) for kind, times in taken.items()},
        }
    if args.json:
        text = json.dumps({"conditions": conditions, "cases": figures}, ensure_ascii=False)
        Path(args.json).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
