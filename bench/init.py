"""Times PiSSA's start of a whole model by ``fastlora.inject`` against peft's.

    python -m bench.init [--model X] [--rank 16] [--niter 4] [--rounds 3] [--threads 2] [--whole]
                         [--json FILE]

All linears of the model (SmolLM2-135M unless named otherwise: 210) get
init_lora_weights="pissa_niter_4", by both, on copies of one model in float32. The two take turns in
one process, each round in another order; a figure is the median with the fastest and the slowest
round, the ratio the median of the rounds'. Copying the model is not timed. --whole adds ours
without iteration, "pissa".

Before anything is timed, ours is checked on every layer: W_res + sBA is the weight to 1e-6 of its
largest entry, ‖W_res‖_F is no more than peft's on any layer, and the logits are the model's to 1e-4
of the largest. Where one is not, nothing is timed and the exit status is 1; it is 1 too where ours
is not three times as fast.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import fastlora
from bench.measure import take_turns
from fastlora import LoRAConfig
from fastlora.adapters import layers
from fastlora.cli.demo.model import find, load
from fastlora.ops.backend import cpu_vendor

GOAL = 3.0
EXACT, LOGITS = 1e-6, 1e-4


def ours(model: Any, rank: int, init: str) -> Any:
    fastlora.inject(model, LoRAConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=init))
    return model


def theirs(model: Any, rank: int, init: str) -> Any:
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=init
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return peft.get_peft_model(model, config)


@torch.no_grad()
def check(base: Any, mine: Any, other: Any) -> list[str]:
    """What is wrong with ours."""
    wrong = []
    rivals = {layer.name: layer for layer in layers(other)}
    weights = dict(base.named_parameters())
    left = right = 0.0
    nearer = 0
    for layer in layers(mine):
        W = weights[f"{layer.name}.weight"]
        back = torch.addmm(layer.weight, layer.lora_B, layer.lora_A, alpha=layer.scaling)
        off = float((back - W).abs().max() / W.abs().max())
        if not off <= EXACT:
            wrong.append(f"{layer.name}: W_res + sBA is off by {off:.1e}")
        residuals = [float(torch.linalg.matrix_norm(o.weight)) for o in (layer, rivals[layer.name])]
        if not residuals[0] <= residuals[1]:
            wrong.append(f"{layer.name}: ‖W_res‖ is {residuals[0]:.6f}, peft's {residuals[1]:.6f}")
        nearer += residuals[0] <= residuals[1]
        left, right = left + residuals[0] ** 2, right + residuals[1] ** 2
    ids = torch.arange(64).view(1, 64) * 37 % base.config.vocab_size
    expected = base.eval()(input_ids=ids).logits
    off = float((mine.eval()(input_ids=ids).logits - expected).abs().max() / expected.abs().max())
    if not off <= LOGITS:
        wrong.append(f"the logits are off by {off:.1e}")
    if not left <= right:
        wrong.append(f"‖W_res‖ of all is {left**0.5:.6f}, peft's {right**0.5:.6f}")
    print(
        f"{len(rivals)} layers; logits off by {off:.1e}; ‖W_res‖ of all {left**0.5:.4f}, peft's "
        f"{right**0.5:.4f}; less than peft's on {nearer}"
    )
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Checks, times, prints; the exit status is 1 where a check or the goal fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.init", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--niter", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    source = find(args.model)
    base = load(source, torch.device("cpu"), torch.float32)
    init = f"pissa_niter_{args.niter}"
    conditions = (
        f"{source.title}, r={args.rank}, {init}, float32, cpu ({cpu_vendor()}), {args.threads} "
        f"threads, torch {torch.__version__}, median of {args.rounds}"
    )
    print(conditions)
    pair = [way(copy.deepcopy(base), args.rank, init) for way in (ours, theirs)]
    if wrong := check(base, *pair):
        print("; ".join(wrong[:5]) + "; nothing is timed", file=sys.stderr)
        return 1
    del pair
    inits = {"fastlora": (ours, init), "peft": (theirs, init)}
    if args.whole:
        inits["fastlora, pissa"] = (ours, "pissa")
    fresh: list[Any] = []

    def before(name: str) -> None:
        fresh.clear()
        fresh.append(copy.deepcopy(base))

    calls = {
        name: (lambda mark, start=start, how=how: start(fresh[0], args.rank, how))
        for name, (start, how) in inits.items()
    }
    taken = take_turns(calls, args.rounds, "cpu", warmup=1, before=before).totals()
    rounds = {name: [one / 1e3 for one in own] for name, own in taken.items()}
    for name, seconds in rounds.items():
        spread = f"{min(seconds):>8.2f} {max(seconds):>8.2f}"
        print(f"  {name:<16} {statistics.median(seconds):>8.2f} {spread} s")
    pairs = zip(rounds["peft"], rounds["fastlora"], strict=True)
    ratio = statistics.median(theirs_ / ours_ for theirs_, ours_ in pairs)
    print(f"  {ratio:.2f} times peft")
    if args.json:
        figures = {"conditions": conditions, "s": rounds, "ratio": ratio}
        Path(args.json).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
