"""Whether a provider is right, before it is timed; who is not held to anything is not timed.

The ladder of the tests: of each result, the largest error relative to the largest element of the
float64 result may be twice that of plain PyTorch in the same dtype (a gradient's: three times),
plus a floor: FLOOR units of the dtype, for the result is rounded; and SUM · √L units of float32,
in which its L products are summed. One after the other these partial sums grow as √i, so their
roundings add up to √L/5 units of the result's size; a library that sums in blocks, as plain
PyTorch's may, has less, and must not be the measure of one that does not. SUM allows 2.5 times it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from bench.throughput.case import (
    Cell,
    Operation,
    Provider,
    Results,
    Step,
    Unavailable,
    Verdict,
    run,
)
from fastlora.cli.errors import first_line

TOLERANCES = {"value": 2.0, "gradient": 3.0}
FLOOR = 2.0
SUM = 0.5
# plain PyTorch, which the others are held to, must itself be right to so many units
PLAIN = {torch.float32: 64.0, torch.float64: 64.0, torch.float16: 16.0, torch.bfloat16: 16.0}
KEPT = 6.0  # standard deviations by which the share kept by dropout may be off
SEED = 7

T = TypeVar("T")


def check(
    operation: Operation, cell: Cell, providers: list[Provider]
) -> tuple[dict[str, Verdict], dict[str, str]]:
    """(verdict by provider, why a provider did not run)."""
    own = operation.operands(cell, SEED)
    reasons: dict[str, str] = {}
    if operation.check is not None:
        steps = {}
        for provider in providers:
            build = partial(provider.build, cell, own)
            if step := attempt(build, provider.name, reasons):
                steps[provider.name] = step
        return operation.check(cell, own, steps), reasons
    exactly = operation.exact
    assert exactly is not None
    verdicts: dict[str, Verdict] = {}
    kept: list[tuple[str, float, list[Tensor] | None, Results]] = []  # exact results so far
    bounds: dict[str, float] = {}
    for provider in sorted(providers, key=lambda p: p.name != "plain"):

        def judged(provider: Provider = provider) -> dict[str, float]:
            masks = None
            if cell.dropout and provider.computes == "adapted":
                masks = [mask(operation, cell, provider, i) for i in range(len(cell.n))]
            scale = provider.keep_scale(cell.dropout)
            exact = None
            for computes, other_scale, others, results in kept:
                same = computes == provider.computes and other_scale == scale
                if same and _equal(masks, others):
                    exact = results
            if exact is None:
                exact = exactly(cell, own, provider.computes, masks, scale)
                kept.append((provider.computes, scale, masks, exact))
            step = provider.build(cell, own)
            return errors(called(step, own), exact)

        off = attempt(judged, provider.name, reasons)
        if off is None:
            continue
        if provider.name == "plain":
            wrong = anchored(off, cell)
            if wrong is None:
                bounds = {name: bound(name, error, cell) for name, error in off.items()}
        elif not bounds:
            wrong = "plain PyTorch, which it is held to, gave nothing right"
        else:
            wrong = excess(off, bounds)
        verdicts[provider.name] = Verdict(off, wrong)
    return verdicts, reasons


def attempt(call: Callable[[], T], name: str, reasons: dict[str, str]) -> T | None:
    """What ``call`` gives; None where the provider cannot, or fails, with the reason noted."""
    try:
        return call()
    except Unavailable as reason:
        reasons[name] = str(reason)
    except Exception as error:  # another package's, or a compiler's: said, and the rest goes on
        reasons[name] = f"fails with {type(error).__name__}: {first_line(error)[:200]}"
    return None


def called(step: Step, own: object) -> Results:
    """One call with the check's seed."""
    torch.manual_seed(SEED)
    if step.before is not None:
        step.before()
    return run(step, getattr(own, "dys", ()), lambda: None)


def mask(operation: Operation, cell: Cell, provider: Provider, member: int) -> Tensor:
    """Which elements of x a provider keeps under the check's seed: those whose dx is not zero.

    Raises ArithmeticError where it does not keep about 1 - p of them.
    """
    assert operation.probe is not None
    probe = operation.probe(cell, member)
    kept = called(provider.build(cell, probe), probe)["dx"] != 0
    share, p = kept.double().mean().item(), cell.dropout
    if not abs(share - (1 - p)) <= KEPT * math.sqrt(p * (1 - p) / kept.numel()):
        raise ArithmeticError(f"dropout of {p:g} keeps {share:.3f} of the elements")
    return kept


def errors(got: Results, exact: Results) -> dict[str, float]:
    """The largest error of each result, relative to its largest element."""
    if got.keys() != exact.keys():
        raise ArithmeticError(f"it gives {', '.join(got)} where there are {', '.join(exact)}")
    found = {}
    for name, result in got.items():
        largest = exact[name].abs().max().item()
        found[name] = (result.double() - exact[name]).abs().max().item() / (largest or 1.0)
    return found


def bound(name: str, plain: float, cell: Cell) -> float:
    """What the error of a result may be, where plain PyTorch's is ``plain``; NaN: nothing is."""
    factor = TOLERANCES.get("gradient" if name.startswith("d") else "value", math.nan)
    longest = max(*cell.n, *cell.k, cell.m)
    floor = FLOOR * torch.finfo(cell.element).eps
    floor += SUM * math.sqrt(longest) * torch.finfo(torch.float32).eps
    limit = factor * plain + floor
    return limit if math.isfinite(limit) else math.nan


def anchored(off: dict[str, float], cell: Cell) -> str | None:
    """What is wrong with plain PyTorch itself."""
    limit = PLAIN[cell.element] * torch.finfo(cell.element).eps
    for name, error in off.items():
        if not error <= limit:
            return f"{name} is off by {error:.1e}, more than {limit:.1e}"
        if math.isnan(bound(name, error, cell)):
            return f"there is no tolerance for {name}"
    return None


def excess(off: dict[str, float], bounds: dict[str, float]) -> str | None:
    """What is wrong with a provider's errors."""
    for name, error in off.items():
        limit = bounds.get(name, math.nan)
        if math.isnan(limit):
            return f"there is no tolerance for {name}"
        if not error <= limit:
            return f"{name} is off by {error:.1e}, more than {limit:.1e}"
    return None


def _equal(masks: list[Tensor] | None, others: list[Tensor] | None) -> bool:
    if masks is None or others is None:
        return masks is others
    return all(torch.equal(one, other) for one, other in zip(masks, others, strict=True))
