"""Times DoRA's weight norm against peft's way and against a dense B @ A.

    python -m bench.weight_norm [--n 4096] [--k 4096] [--rank 16] [--dtype float32] [--threads 2]
                                [--device cpu] [--rounds 15] [--json FILE]

All ways run interleaved in one process, each round in another order; a row is the median, with the
fastest and slowest round, and the ratio to peft's and to the dense way. Before anything is timed,
every way of ours is held against float64, also with rows in which the adapter nearly cancels the
weight, gradients included; where one is off by more than 1e-5 (a gradient: by more than a unit of
the dtype it comes in), nothing is reported and the exit status is 1. It is 1 too where a goal is
missed (at least 4 times peft's way and twice the dense, fp32 on the CPU). "peak" is the memory that
one call holds at most beyond its operands.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.measure import whole
from fastlora.ops.backend import Situation, cpu_vendor
from fastlora.ops.weight_norm import WeightNormCache, weight_norm
from fastlora.ops.weight_norm.contract import BACKENDS
from fastlora.ops.weight_norm.reference import weight_norm_reference

SCALING = 2.0
TOLERANCE = 1e-5
GOALS = {"peft": 4.0, "dense": 2.0}


def peft_way(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """What peft 0.21 computes in a training step: BA through an identity matrix, then a norm."""
    linear = torch.nn.functional.linear
    eye = torch.eye(weight.shape[1], dtype=lora_A.dtype, device=lora_A.device)
    product = linear(linear(eye, lora_A), lora_B).T
    return torch.linalg.norm(weight + SCALING * product, dim=1).to(weight.dtype)


def dense_way(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The same with B @ A."""
    return torch.linalg.norm(weight + SCALING * (lora_B @ lora_A), dim=1)


def operands(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """A weight and a trained adapter of the sizes that models have."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape) * scale).to(args.device, dtype)

    weight = draw(args.n, args.k, scale=args.k**-0.5)
    return weight, draw(args.rank, args.k, scale=args.k**-0.5), draw(args.n, args.rank, scale=0.02)


def check(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple[float, float]:
    """The largest relative errors against float64: (of any norm, of the full gradients)."""
    weight = weight.clone()
    lost = slice(0, None, 97)  # in these rows only rounding noise is left
    product = SCALING * lora_B[lost].double() @ lora_A.double()
    weight[lost] = (-product).to(weight.dtype)
    a, b = (t.double().requires_grad_() for t in (lora_A, lora_B))
    exact = weight_norm_reference(weight.double(), a, b, SCALING)
    worst = 0.0
    cache = WeightNormCache()
    calls = [partial(weight_norm, weight, lora_A, lora_B, SCALING, cache=cache)] * 2
    for name in ours(weight):
        calls.append(partial(weight_norm, weight, lora_A, lora_B, SCALING, backend=name))
    for call in calls:
        norm = call()
        worst = max(worst, ((norm.double() - exact).abs() / exact).max().item())
    # where a row is noise, so is its gradient's direction in float32: they are left out
    share = torch.ones_like(exact)
    share[lost] = 0.0
    exact_grads = torch.autograd.grad(exact, (a, b), share)
    leaves = [t.detach().clone().requires_grad_() for t in (lora_A, lora_B)]
    norm = weight_norm(weight, leaves[0], leaves[1], SCALING, differentiable=True)
    grads = torch.autograd.grad(norm, leaves, share.to(norm.dtype))
    errors = [
        ((g.double() - e).abs().max() / e.abs().max()).item()
        for g, e in zip(grads, exact_grads, strict=True)
    ]
    return worst, max(errors)


def ours(weight: Tensor) -> list[str]:
    """The backends that compile for this device and dtype."""
    at = Situation(weight.device, weight.dtype)
    names = [b.name for b in BACKENDS if not b.cannot(at)]
    return [n for n in names if n != "triton" or weight.is_cuda]


def ways(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    found: dict[str, Callable[[], object]] = {
        "read W once (vector_norm)": lambda: torch.linalg.vector_norm(weight, dim=1),
        "peft": lambda: peft_way(weight, lora_A, lora_B),
        "dense": lambda: dense_way(weight, lora_A, lora_B),
    }
    for name in ours(weight):
        found[f"{name}, cold"] = partial(weight_norm, weight, lora_A, lora_B, SCALING, backend=name)
        cache = WeightNormCache()

        def stepped(cache: WeightNormCache = cache, name: str = name) -> Tensor:
            lora_B[0, 0] += 1e-3  # as an optimizer would: another norm, the same weight
            return weight_norm(weight, lora_A, lora_B, SCALING, cache=cache, backend=name)

        found[f"{name}, ‖W‖² cached"] = stepped
    found["nothing changed"] = partial(
        weight_norm, weight, lora_A, lora_B.clone(), SCALING, cache=WeightNormCache()
    )
    return found


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """What one call holds at most at a time, temporaries inside operators included."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main(argv: list[str] | None = None) -> int:
    """Checks, times, prints; the exit status is 1 where a check or a goal fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.weight_norm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    tensors = operands(args)
    norm_error, gradient_error = check(*tensors)
    unit = max(TOLERANCE, torch.finfo(tensors[0].dtype).eps)
    sound = norm_error <= TOLERANCE and gradient_error <= unit
    print(f"largest error: norms {norm_error:.1e}, full gradients {gradient_error:.1e}")
    if not sound:
        print("wrong values: nothing is timed", file=sys.stderr)
        return 1

    calls = ways(*tensors)
    rounds = whole(calls, args.rounds, args.device)
    peaks = {name: peak_bytes(call, args.device) / 2**20 for name, call in calls.items()}
    medians = {name: statistics.median(values) for name, values in rounds.items()}

    machine = torch.cuda.get_device_name() if args.device == "cuda" else cpu_vendor()
    conditions = (
        f"N={args.n} K={args.k} r={args.rank} {args.dtype}, {args.device} ({machine}), "
        f"{args.threads} threads, torch {torch.__version__}, median of {args.rounds}"
    )
    print(conditions)
    print(
        f"{'way':<28} {'ms':>9} {'min':>9} {'max':>9} {'× peft':>8} {'× dense':>8} {'peak MiB':>9}"
    )
    for name, values in rounds.items():
        print(
            f"{name:<28} {medians[name]:>9.3f} {min(values):>9.3f} {max(values):>9.3f} "
            f"{medians['peft'] / medians[name]:>8.1f} {medians['dense'] / medians[name]:>8.1f} "
            f"{peaks[name]:>9.2f}"
        )
    if args.json:
        figures: dict[str, object] = {
            "conditions": conditions,
            "errors": [norm_error, gradient_error],
        }
        figures |= {"ms": rounds, "peak MiB": peaks}
        Path(args.json).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")

    automatic = next(name for name in calls if name.endswith(", cold"))
    missed = [
        f"{automatic} is {medians[way] / medians[automatic]:.1f} times {way}, not {goal}"
        for way, goal in GOALS.items()
        if args.device == "cpu"
        and args.dtype == "float32"
        and medians[way] < goal * medians[automatic]
    ]
    print("; ".join(missed) or "goals met")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
