"""Times one adapter_group call against an adapter_linear call per layer, over the frozen layers.

    python -m bench.adapter_group [--tokens 256 512 2048] [--backend native onednn eager]
                                  [--rank 16] [--case qkv gate_up vera] [--rounds 30] [--threads 2]
                                  [--patience 1.0] [--again 19] [--json FILE]

A step is forward and backward, with the gradients of x and of every lora_A and lora_B; weights are
frozen. vera is q, k, v with VeRA's one frozen pair of rank 256 for all, of whose two vectors the
gradients are taken. Contestants take turns in one process, each round in another order:

    base            the frozen layers alone, their products by the same library, dx summed by
                    autograd: what both ways of adapting them are measured beyond
    base, in place  the same with dx summed by hand in one accumulator, for comparison
    plain           the frozen layers as in base, and their adapters in plain PyTorch, as peft
                    writes them
    separate        one adapter_linear a layer
    group           one adapter_group

Before anything is timed, y and every gradient of these three are held against float64; where
one is off by more than 1e-5 of its largest element, nothing is reported and the exit status is 1.
"beyond base" is a contestant's time minus base's in the same round. On Linux, a step waits for a
moment in which nothing else runs, and is taken again if the scheduler let one of the process's
threads wait for a processor meanwhile (--patience, --again; where other work never rests, --again 0
ends sooner). The exit status is 1 too where the goal is missed: for q, k, v at 512 tokens on a CPU,
group beyond base is at most 0.6 times plain beyond base. The ratio to separate, which is fused as
well, is printed beside it, with the bound below which no group can be.

On a CPU, q, k, v and gate, up are taken apart as well, since the difference of two long times says
little on a busy machine: the narrow products by themselves, where nothing else of the step is.

    own             what each layer does for itself either way: t Bᵀ onto y, dY B and dYᵀ t
    apart           x Aᵀ, H A onto dx and Hᵀ x of each layer
    together        the same for all layers at once, with what brings A and H together
    product         x Wᵀ of the first layer, which tells the rate of a large product

The bound is (own + what together takes at product's rate) / (own + apart): no group whose own part
is that of separate layers can be below it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import device as here
from bench.measure import as_calls, take_turns
from bench.throughput.operations.linears import Frozen
from fastlora.ops import Member, adapter_group, adapter_linear
from fastlora.ops.adapter_group.contract import BACKENDS
from fastlora.ops.adapter_group.reference import adapter_group_reference
from fastlora.ops.adapter_linear import eager, onednn
from fastlora.ops.backend import Situation, multiplies_with_onednn

CASES = {  # K, (N of each layer)
    "qkv": (2048, (2048, 2048, 2048)),
    "gate_up": (2048, (5632, 5632)),
    "vera": (2048, (2048, 2048, 2048)),
}
VERA_RANK = 256
SCALING = 2.0
TOLERANCE = 1e-5
GOAL = 0.6
GOAL_TOKENS = 512
CONTESTANTS = ("base", "base, in place", "plain", "separate", "group")
ADAPTED = CONTESTANTS[2:]


class Step(NamedTuple):
    """Operands of one training step: what trains requires grad."""

    x: Tensor
    members: list[Member]
    dys: list[Tensor]

    def leaves(self) -> list[Tensor]:
        return [self.x, *(t for m in self.members for t in tensors(m) if t.requires_grad)]


def tensors(member: Member) -> list[Tensor]:
    return [field for field in member if isinstance(field, Tensor)]


def operands(case: str, tokens: int, rank: int, device: str, dtype: torch.dtype) -> Step:
    """Frozen weights, trained adapters, and an x whose gradient is wanted."""
    torch.manual_seed(0)
    k, widths = CASES[case]

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(device, dtype)

    members = []
    shared_A, shared_B = draw(VERA_RANK, k, scale=k**-0.5), draw(max(widths), VERA_RANK)
    for n in widths:
        weight = draw(n, k, scale=k**-0.5)
        if case == "vera":
            d, b = draw(VERA_RANK, scale=0.1), draw(n, scale=0.1)
            own = Member(weight, shared_A, shared_B[:n], SCALING)
            own = own._replace(mid_scale=d.requires_grad_(), adapter_scale=b.requires_grad_())
        else:
            lora_A, lora_B = draw(rank, k, scale=k**-0.5), draw(n, rank, scale=0.1)
            own = Member(weight, lora_A.requires_grad_(), lora_B.requires_grad_(), SCALING)
        members.append(own)
    return Step(draw(tokens, k).requires_grad_(), members, [draw(tokens, n) for n in widths])


def alone(x: Tensor, member: Member, backend: str) -> Tensor:
    """One layer by itself."""
    weight, lora_A, lora_B, scaling = member[:4]
    vectors = {name: getattr(member, name) for name in ("mid_scale", "adapter_scale")}
    return adapter_linear(x, weight, lora_A, lora_B, scaling, **vectors, backend=backend)


def formula(x: Tensor, member: Member) -> Tensor:
    """An adapter's part of its layer's output, by PyTorch's calls."""
    t = torch.nn.functional.linear(x, member.lora_A)
    t = t if member.mid_scale is None else t * member.mid_scale
    y = torch.nn.functional.linear(t, member.lora_B)
    return (y if member.adapter_scale is None else y * member.adapter_scale) * member.scaling


def ways(step: Step, backend: str) -> dict[str, Callable[[], None]]:
    """What is timed, by name."""
    x, members, dys = step
    by_onednn = backend == "onednn" or (backend == "native" and multiplies_with_onednn())
    frozen = Frozen.apply if by_onednn else torch.nn.functional.linear
    linear = onednn.linear if by_onednn else eager.aten_linear
    leaves = step.leaves()

    def backward(ys: Any) -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(list(ys), dys)

    def base() -> None:
        backward([frozen(x, m.weight) for m in members])

    def base_in_place() -> None:
        with torch.no_grad():
            for m in members:
                linear(x, m.weight)
            dx = linear(dys[0], members[0].weight.t())
            for m, dy in zip(members[1:], dys[1:], strict=True):
                if by_onednn:
                    dx.add_(linear(dy, m.weight.t()))
                else:
                    dx.addmm_(dy, m.weight)
            x.grad = dx

    def plain() -> None:
        backward([frozen(x, m.weight) + formula(x, m) for m in members])

    def separate() -> None:
        backward([alone(x, m, backend) for m in members])

    def group() -> None:
        backward(adapter_group(x, members, backend=backend))

    return dict(zip(CONTESTANTS, (base, base_in_place, plain, separate, group), strict=True))


def parts(step: Step, backend: str) -> dict[str, Callable[[], object]]:
    """The narrow products of a step, by name; for members with nothing but A and B."""
    module = importlib.import_module(f"fastlora.ops.adapter_linear.{backend}")
    linear = getattr(module, "linear", eager.aten_linear)
    update = getattr(module, "update", eager.add_product)
    output_pass = getattr(module, "output_pass", eager.read_output)
    x, dys = step.x.detach(), step.dys
    As = [member.lora_A.detach() for member in step.members]
    Bs = [member.lora_B.detach() for member in step.members]
    ts, hs = ([linear(x, A, None) for A in As] for _ in range(2))
    ys, dx = [dy.clone() for dy in dys], torch.zeros_like(x)

    def own() -> None:
        for y, t, B, dy in zip(ys, ts, Bs, dys, strict=True):
            update(y, t, B.t())
            output_pass(dy, B, t, SCALING, linear)

    def apart() -> None:
        for A, h in zip(As, hs, strict=True):
            linear(x, A, None)
            update(dx, h, A)
            eager.reduce(linear, h, x)

    def together() -> None:
        A, h = torch.cat(As), torch.cat(hs, 1)
        linear(x, A, None)
        update(dx, h, A)
        eager.reduce(linear, h, x)

    def product() -> Tensor:
        return linear(x, step.members[0].weight, None)

    calls = (own, apart, together, product)
    return {call.__name__: torch.no_grad()(call) for call in calls}


def bound(step: Step, taken: dict[str, list[float]]) -> tuple[float, float]:
    """(group / separate of the parts, and the least it could be), from medians."""
    own, apart, together, product = (
        statistics.median(taken[name]) for name in ("own", "apart", "together", "product")
    )
    ranks = sum(member.lora_A.shape[0] for member in step.members)
    least = 3 * product * ranks / step.members[0].weight.shape[0]
    return (own + together) / (own + apart), (own + least) / (own + apart)


def check(step: Step, backend: str) -> float:
    """The largest error of plain, separate and group, as a share of the largest element."""
    wide = {id(t): t.detach().double().requires_grad_(t.requires_grad) for t in step.leaves()}

    def own(field: Any) -> Any:
        if not isinstance(field, Tensor):
            return field
        return wide.setdefault(id(field), field.detach().double())

    exact_step = Step(
        own(step.x), [Member(*map(own, m)) for m in step.members], [own(dy) for dy in step.dys]
    )
    ys = adapter_group_reference(exact_step.x, exact_step.members)
    exact = [*ys, *torch.autograd.grad(ys, exact_step.leaves(), exact_step.dys)]
    worst = 0.0
    for way in (
        adapter_group(step.x, step.members, backend=backend),
        tuple(alone(step.x, m, backend) for m in step.members),
        tuple(
            torch.nn.functional.linear(step.x, m.weight) + formula(step.x, m) for m in step.members
        ),
    ):
        got = [*way, *torch.autograd.grad(way, step.leaves(), step.dys)]
        for ours, theirs in zip(got, exact, strict=True):
            error = (ours.double() - theirs).abs().max() / theirs.abs().max()
            worst = max(worst, error.item())
    return worst


# -------------------------------------------------------------------------------------- timing


def measure(
    calls: dict[str, Callable[[], None]], rounds: int, device: str, patience: float, again: int
) -> tuple[dict[str, list[float]], int]:
    """(milliseconds of every call in each round, how many of these were disturbed all the same)."""
    taken = take_turns(as_calls(calls), rounds, device, again=again, patience=patience)
    return taken.totals(), taken.disturbed


def beyond(taken: dict[str, list[float]], name: str, base: str = "base") -> list[float]:
    """Milliseconds by which ``name`` took longer than ``base``, round by round."""
    return [own - bare for own, bare in zip(taken[name], taken[base], strict=True)]


def spread(values: list[float]) -> str:
    """Median, and the quartiles around it."""
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):8.2f} [{low:7.2f}, {high:7.2f}]"


def ours(device: str, dtype: torch.dtype) -> list[str]:
    """The backends that compile for this device and dtype."""
    at = Situation(torch.device(device), dtype)
    names = [b.name for b in BACKENDS if not b.cannot(at)]
    return [n for n in names if n != "triton" or device == "cuda"]


def main(argv: list[str] | None = None) -> int:
    """Checks, times, prints; the exit status is 1 where a check or the goal fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.adapter_group", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, GOAL_TOKENS, 2048])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--backend", nargs="+", help="all that can run, if left out")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--patience", type=float, default=1.0, help="seconds to wait for an idle machine, per step"
    )
    parser.add_argument(
        "--again", type=int, default=19, help="how often a disturbed step is taken again, at most"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)

    machine = here.name(args.device)
    conditions = (
        f"r={args.rank} (vera {VERA_RANK}) {args.dtype}, {args.device} ({machine}), "
        f"{args.threads} threads, torch {torch.__version__}, medians of {args.rounds} rounds with "
        f"quartiles, milliseconds"
    )
    print(conditions)
    rows: list[dict[str, object]] = []
    missed = []
    for case in args.case:
        for backend in args.backend or ours(args.device, dtype):
            for tokens in args.tokens:
                step = operands(case, tokens, args.rank, args.device, dtype)
                error = check(step, backend)
                where = f"{case} M={tokens} {backend}"
                if not error <= max(TOLERANCE, 3 * torch.finfo(dtype).eps):
                    print(f"{where}: off by {error:.1e}: nothing is timed", file=sys.stderr)
                    return 1
                taken, disturbed = measure(
                    ways(step, backend), args.rounds, args.device, args.patience, args.again
                )
                over = {name: beyond(taken, name) for name in ADAPTED}
                medians = {name: statistics.median(values) for name, values in over.items()}
                ratio = medians["group"] / medians["separate"]
                print(f"{where}: largest error {error:.1e}, {disturbed} steps disturbed for good")
                for name in CONTESTANTS:
                    note = f"  beyond base {spread(over[name])}" if name in over else ""
                    print(f"  {name:<15}{spread(taken[name])}{note}")
                of_plain = medians["group"] / medians["plain"]
                print(
                    f"  group / plain, beyond base: {of_plain:.2f}; / separate: {ratio:.2f}",
                    flush=True,
                )
                row: dict[str, object] = {
                    "case": case, "K": CASES[case][0], "N": CASES[case][1], "M": tokens,
                    "backend": backend, "error": error, "disturbed": disturbed,
                    "beyond base": medians, "ratio": ratio, "of plain": of_plain, "ms": taken,
                }  # fmt: skip
                if case != "vera" and args.device == "cpu" and backend != "triton":
                    pieces = take_turns(as_calls(parts(step, backend)), args.rounds, "cpu").totals()
                    of_parts, least = bound(step, pieces)
                    for name, values in pieces.items():
                        print(f"  {name:<15}{spread(values)}")
                    print(f"  group / separate, of the parts: {of_parts:.2f}; bound {least:.2f}")
                    row |= {"parts": of_parts, "bound": least, "ms of parts": pieces}
                rows.append(row)
                if args.json:
                    figures = {"conditions": conditions, "rows": rows}
                    text = json.dumps(figures, indent=1, ensure_ascii=False)
                    Path(args.json).write_text(text + "\n", encoding="utf-8")
                goes_for_goal = case == "qkv" and tokens == GOAL_TOKENS and args.device == "cpu"
                if goes_for_goal and not of_plain <= GOAL:
                    missed.append(f"{where}: {of_plain:.2f} of plain adapters, not {GOAL}")
    print("; ".join(missed) or "goal met")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
