"""Times a training step of every method of the family on a real model, beside peft's.

    python -m bench.family [--methods lora,dora,…] [--steps 9] [--batch 2] [--seq-len 128]
                           [--threads 2] [--backend eager] [--model X] [--json FILE]

All models (frozen; peft's and ours of each method) share one set of base weights and take turns in
one process, each round in another order; a figure is the median of the steps after the first, with
the interquartile range. A step is forward + backward with the gradient of every layer's input.
"saved" is what is alive between forward and backward. Before anything is timed, the loss and every
gradient of ours are held against peft's from the same adapter; where one is off, nothing is
reported and the exit status is 1.

The frozen model and peft multiply with PyTorch's default library; so do ours with --backend eager.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastlora.adapters import LoRAConfig, layers
from fastlora.cli.demo import contest, data, memory, model, report
from fastlora.cli.demo.methods import METHODS, Method, Recipe
from fastlora.cli.facts import devices, versions

TOLERANCE = 1e-4  # relative to a gradient's largest element: fp32 sums in two libraries' orders


def _dora(recipe: Recipe, keep: bool | list[str]) -> LoRAConfig:
    return LoRAConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        use_dora=True,
        dora_keep_output=keep,
    )


# where both sides start alike
ALL: dict[str, Method] = {
    name: method for name, method in METHODS.items() if method.own_start is None
} | {
    "dora_lean": dataclasses.replace(
        METHODS["dora"],
        title="DoRA, q and k recomputed",
        ours=partial(_dora, keep=["o_proj", "down_proj"]),
    ),
    "dora_recomputed": dataclasses.replace(
        METHODS["dora"], title="DoRA, outputs recomputed", ours=partial(_dora, keep=False)
    ),
}
del ALL["lora_pro"]  # its forward and backward are LoRA's


def largest_error(pair: dict[str, contest.Contestant], batch: torch.Tensor) -> float:
    """Of the loss and of every gradient, relative to the largest element; nothing is changed."""
    found: list[tuple[float, dict[Any, Any]]] = []
    for name in (contest.PEFT, contest.FASTLORA):
        contestant = pair[name]
        loss = float(contest.backward(contestant, batch).detach())
        own = {
            (layer.name, part): tensor.grad
            for layer in layers(contestant.model)
            for part, tensor in layer.tensors.items()
        }
        found.append((loss, own))
        contestant.model.zero_grad(set_to_none=True)
    (loss, wanted), (own_loss, got) = found[0], found[1]
    errors: list[float] = [float(abs(own_loss - loss) / abs(loss))]
    for key, gradient in wanted.items():
        mine = got[key]
        if gradient is None or mine is None:
            errors.append(0.0 if gradient is mine else float("inf"))
        elif gradient.abs().max() > 0:
            errors.append(float((mine - gradient).abs().max() / gradient.abs().max()))
        else:
            errors.append(float(mine.abs().max()))
    return max(errors)


def main(argv: list[str] | None = None) -> int:
    """Checks, times, prints; the exit status is 1 where a check fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.family", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--methods", default=",".join(ALL))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", choices=("native", "onednn", "eager"))
    parser.add_argument("--model", help="as for the demo")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    names = args.methods.split(",")
    if unknown := [name for name in names if name not in ALL]:
        parser.error(f"there is no method {unknown[0]}; there is {', '.join(ALL)}")
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    device = torch.device("cpu")

    source = model.find(args.model)
    tokenizer = model.load_tokenizer(source)
    corpus = data.read(None)
    batches = data.batches(corpus, tokenizer, args.steps, args.batch, args.seq_len, 0).training
    base = model.load(source, device, torch.float32)
    frozen: contest.Contestant | None = None
    contestants: dict[str, contest.Contestant] = {}
    errors = {}
    for name in names:
        method = ALL[name]
        recipe = Recipe(
            method, method.rank, 32.0, 0.0, method.lr, args.steps, "inject", args.backend
        )
        pair, _ = contest.enter(base, recipe, 0, batches)
        errors[name] = largest_error(pair, batches[0])
        print(f"{name}: largest error {errors[name]:.1e}", file=sys.stderr, flush=True)
        if not errors[name] <= TOLERANCE:
            print("wrong values: nothing is timed", file=sys.stderr)
            return 1
        frozen = frozen or pair[contest.FROZEN]
        for side in (contest.PEFT, contest.FASTLORA):
            contestants[f"{name} {side}"] = pair[side]
    assert frozen is not None
    everyone = {"frozen": frozen} | contestants
    contest.measure_memory(list(everyone.values()), batches[0], device)
    contest.train(list(everyone.values()), batches, device)
    figures = {
        name: {
            "seconds": report.median(one.seconds),
            "spread": report.spread(one.seconds),
            "saved_mib": one.saved_bytes / 2**20,
            "step_seconds": one.seconds,
        }
        for name, one in everyone.items()
    }
    conditions = {
        "model": source.title,
        "tokens": f"{args.batch} x {args.seq_len}",
        "device": devices()[0]["name"],
        "threads": args.threads,
        "backend": args.backend or "chosen",
        "steps": args.steps,
        "saved": memory.CPU_METHOD,
        "versions": versions(),
    }
    print(table(names, figures))
    print(", ".join(f"{key} {value}" for key, value in conditions.items() if key != "versions"))
    if args.json:
        result = {"conditions": conditions, "errors": errors, "figures": figures}
        Path(args.json).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 0


def table(names: list[str], figures: dict[str, dict[str, Any]]) -> str:
    """A row a method. "adds": above the frozen model, ours as a multiple of peft's; each the median
    over the rounds of the difference within the round, for a machine's speed drifts."""
    floor = figures["frozen"]["step_seconds"]
    ours_lora = figures.get("lora fastlora", {}).get("seconds")
    lines = [
        f"frozen {figures['frozen']['seconds']:.3f} ± {figures['frozen']['spread']:.3f} s, "
        f"{figures['frozen']['saved_mib']:.0f} MiB saved",
        f"{'method':<16}{'peft s':>16}{'ours s':>16}{'peft/ours':>10}{'adds':>7}"
        f"{'× our LoRA':>11}{'peft MiB':>9}{'ours MiB':>9}{'ratio':>7}",
    ]
    for name in names:
        peft, ours = (figures[f"{name} {side}"] for side in (contest.PEFT, contest.FASTLORA))
        adds = _above(ours["step_seconds"], floor) / _above(peft["step_seconds"], floor)
        beside_lora = f"{ours['seconds'] / ours_lora:.2f}" if ours_lora else "–"
        lines.append(
            f"{name:<16}"
            f"{peft['seconds']:>8.3f} ± {peft['spread']:.3f}"
            f"{ours['seconds']:>8.3f} ± {ours['spread']:.3f}"
            f"{peft['seconds'] / ours['seconds']:>10.2f}{adds:>7.2f}{beside_lora:>11}"
            f"{peft['saved_mib']:>9.0f}{ours['saved_mib']:>9.0f}"
            f"{ours['saved_mib'] / peft['saved_mib']:>7.2f}"
        )
    return "\n".join(lines)


def _above(steps: list[float], floor: list[float]) -> float:
    """The first step warms up, as everywhere."""
    return statistics.median(a - b for a, b in zip(steps[1:], floor[1:], strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
