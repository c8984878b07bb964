"""Times an optimizer's step as a training loop meets it, each optimizer in a process of its own.

    python -m bench.steps_in_training [--case small large] [--rows 256] [--rounds 5]
                                      [--steps 9] [--threads 2] [--json FILE]

``bench.sign_momentum`` times steps back to back in one process, which keeps the memory that it
frees. Here a process trains a chain of linear layers with one optimizer, as a user has it: with
PyTorch's allocator as it comes, gradients made anew in every step (``zero_grad`` lets go of them),
and caches as a backward pass leaves them. What an optimizer allocates in its step may then come
from the system page by page and go back to it, or not, by what else the training has allocated.
"pages" are those that the system had to bring in during a step.

Cases: ``small``, 120 frozen layers of 576 x 576 with LoRA adapters (r = 16, 240 tensors, 2.2M
parameters); ``large``, four layers of 2048 x 2048, all trained. --rows are those of the batch.
Optimizers, in fp32 throughout:

    fastlora                fastlora.optim.Lion
    lion-pytorch            lion_pytorch.Lion
    lion-pytorch foreach    lion_pytorch.foreach.Lion
    AdamW fused             torch.optim.AdamW(fused=True)

In a round each of them trains once, in another order. A process makes three steps that do not
count, and answers with the medians of the others. A row has the median over rounds in milliseconds,
the fastest and slowest round, and how many times fastlora's that is, as the median of the ratios
within the rounds. Before a case is reported, the losses under fastlora and lion-pytorch must agree
to 1e-4; where they do not, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora.ops import adapter_linear, library
from fastlora.ops.backend import cpu_vendor
from fastlora.optim import Lion

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LR, BETAS, DECAY = 1e-4, (0.9, 0.99), 0.1
OPTIMIZERS = ("fastlora", "lion-pytorch", "lion-pytorch foreach", "AdamW fused")
WARMUP = 3
TOLERANCE = 1e-4


class Adapted(nn.Module):
    """A frozen layer and its adapter."""

    weight: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(width, width) * width**-0.5)
        self.lora_A = nn.Parameter(torch.randn(16, width) * width**-0.5)
        self.lora_B = nn.Parameter(torch.randn(width, 16) * 1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return adapter_linear(x, self.weight, self.lora_A, self.lora_B, 1.0)


CASES: dict[str, tuple[int, int, Callable[[int], nn.Module]]] = {  # layers, width, a layer
    "small": (120, 576, Adapted),
    "large": (4, 2048, lambda width: nn.Linear(width, width, bias=False)),
}


class Trained(NamedTuple):
    """What a process tells: medians of a step, and the loss after the last."""

    milliseconds: float
    pages: float | None
    loss: float


def train(case: str, optimizer: str, rows: int, steps: int, threads: int) -> Trained:
    """Trains from the same start on the same rows at every call."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layers, width, layer = CASES[case]
    model = nn.Sequential(*(layer(width) for _ in range(layers)))
    x, target = torch.randn(2, rows, width).unbind()
    stepper = _optimizer(optimizer, model.parameters())
    times, pages = [], []
    for step in range(WARMUP + steps):
        loss = (model(x) - target).square().mean()
        loss.backward()
        before, started = _pages(), time.perf_counter()
        stepper.step()
        took = 1e3 * (time.perf_counter() - started)
        if step >= WARMUP:
            times.append(took)
            pages.append(_pages() - before)
        stepper.zero_grad()
    return Trained(
        statistics.median(times), statistics.median(pages) if resource else None, loss.item()
    )


def _optimizer(name: str, params: Any) -> Any:
    if name == "AdamW fused":
        return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)
    if name == "fastlora":
        return Lion(params, lr=LR, betas=BETAS, weight_decay=DECAY)
    if name == "lion-pytorch":
        from lion_pytorch import Lion as Theirs
    else:
        from lion_pytorch.foreach import Lion as Theirs
    return Theirs(params, lr=LR, betas=BETAS, weight_decay=DECAY)


def _pages() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def measure(
    case: str, rows: int, rounds: int, steps: int, threads: int
) -> dict[str, list[Trained]]:
    """By optimizer and round; every entry from a new process."""
    taken: dict[str, list[Trained]] = {name: [] for name in OPTIMIZERS}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for number in range(rounds):
            order = list(OPTIMIZERS)
            random.Random(number).shuffle(order)
            for name in order:
                taken[name].append(pool.apply(train, (case, name, rows, steps, threads)))
    return taken


def wrong(taken: dict[str, list[Trained]]) -> str | None:
    """What forbids a report, as a sentence."""
    ours, theirs = taken["fastlora"][0].loss, taken["lion-pytorch"][0].loss
    if abs(ours - theirs) <= TOLERANCE * abs(theirs):
        return None
    return f"the last loss is {ours} under fastlora and {theirs} under lion-pytorch"


def main(argv: list[str] | None = None) -> int:
    """Trains, checks, prints; the exit status is 1 where the check fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.steps_in_training", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rows", nargs="+", type=int, default=[256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=9, help="that count, in a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    if min(*args.rows, args.rounds, args.steps, args.threads) < 1:
        parser.error("--rows, --rounds, --steps and --threads are 1 or more")
    if reason := library.missing():
        print(reason, file=sys.stderr)
        return 1
    if find_spec("lion_pytorch") is None:
        print("lion-pytorch is not installed: pip install 'fastlora[bench]'", file=sys.stderr)
        return 1
    conditions = (
        f"cpu ({cpu_vendor()}), {args.threads} threads, torch {torch.__version__}, {args.rounds} "
        f"processes each, {args.steps} steps after {WARMUP}, ms a step"
    )
    print(conditions)
    print(f"{'case':<6} {'rows':>5} {'optimizer':<21} {'ms':>24} {'times':>6} {'pages':>7}")
    figures: dict[str, dict[int, Any]] = {}
    failed = False
    for case in args.case:
        for rows in args.rows:
            taken = measure(case, rows, args.rounds, args.steps, args.threads)
            if said := wrong(taken):
                print(f"{case}, {rows} rows: {said}: nothing is reported", file=sys.stderr)
                failed = True
                continue
            _print(case, rows, taken)
            figures.setdefault(case, {})[rows] = {
                name: [one._asdict() for one in own] for name, own in taken.items()
            }
    if args.json:
        text = json.dumps({"conditions": conditions, "cases": figures}, ensure_ascii=False)
        Path(args.json).write_text(text + "\n")
    return int(failed)


def _print(case: str, rows: int, taken: dict[str, list[Trained]]) -> None:
    for name, own in taken.items():
        times = [one.milliseconds for one in own]
        ratio = statistics.median(
            one.milliseconds / ours.milliseconds
            for one, ours in zip(own, taken["fastlora"], strict=True)
        )
        pages = [one.pages for one in own if one.pages is not None]
        print(
            f"{case:<6} {rows:>5} {name:<21} "
            f"{f'{statistics.median(times):.2f} ({min(times):.2f}–{max(times):.2f})':>24} "
            f"{ratio:>6.2f} {f'{statistics.median(pages):.0f}' if pages else '-':>7}",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
