"""Lion and Tiger beside AdamW on a real model: losses at tuned rates, momentum in few bits.

    python -m bench.optimizers --runs FILE.jsonl [--steps 40] [--seeds 2] [--batch 2] [--seq-len 96]
                               [--threads 2] [--stop-after SECONDS] [--json FILE] [--png FILE]

LoRA (r 16, α 32, all linear layers) on the demo's model and text. Every optimizer gets the rates of
a grid of its own, on data order 0; the one with the lowest held-out loss at the
last step runs again on other orders, and these runs alone are reported; there Lion and Tiger run
with momentum in bfloat16 and in 8 bits too. Half of the held-out batches choose the rate, the
others give the losses reported. Rates rise over five steps and fall to zero on a line; no weight
decay.

Each finished run is a line of ``--runs``, and what stands there is not run again. Without all of
them no table is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters import LoRAConfig, inject
from fastlora.cli.demo import data, model
from fastlora.cli.facts import devices, versions
from fastlora.optim import Lion, Tiger, param_groups

WARM_UP = 5
TOLERANCE, STATE_TOLERANCE = 0.03, 0.01

Make = Callable[[nn.Module, float], torch.optim.Optimizer]


def _adamw(net: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr, weight_decay=0.0)


def _lion(state: str) -> Make:
    return lambda net, lr: Lion(param_groups(net), lr, state_dtype=state)


def _tiger(state: str) -> Make:
    return lambda net, lr: Tiger(param_groups(net), lr, weight_decay=0.0, state_dtype=state)


STATES = ("float32", "bfloat16", "8bit")
MAKE: dict[str, Make] = {
    "adamw": _adamw,
    **{f"lion {state}": _lion(state) for state in STATES},
    **{f"tiger {state}": _tiger(state) for state in STATES},
}
GRIDS = {
    "adamw": (5e-4, 1e-3, 2e-3, 4e-3),
    "lion float32": (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3),
    "tiger float32": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
}


# --- one run -----------------------------------------------------------------------------------


def factor(step: int, steps: int) -> float:
    """Of the rate at a step, counted from 0: up over the first ones, then down to zero."""
    return min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)


def loss_of(net: Any, batch: Tensor) -> Tensor:
    return net(input_ids=batch, labels=batch, use_cache=False).loss


@torch.no_grad()
def mean_loss(net: nn.Module, batches: list[Tensor]) -> float:
    return statistics.fmean(float(loss_of(net, batch)) for batch in batches)


def train(
    net: nn.Module, make: Make, lr: float, batches: list[Tensor], held_out: list[Tensor]
) -> dict[str, Any]:
    """Train from what ``net`` is; {"loss" of each step, "held_out", "optimizer_bytes"}."""
    optimizer = make(net, lr)
    losses = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * factor(step, len(batches))
        loss = loss_of(net, batch)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()["state"]
    return {
        "loss": losses,
        "held_out": mean_loss(net, held_out),
        "state_bytes": _bytes(state),
    }


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value.values())) if isinstance(value, dict) else 0


# --- the sweep ---------------------------------------------------------------------------------


def read(path: Path, settings: dict[str, Any]) -> dict[tuple[str, float, int], dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    runs = [json.loads(line) for line in lines]
    return {(r["name"], r["lr"], r["seed"]): r for r in runs if r["settings"] == settings}


def best(runs: dict[tuple[str, float, int], dict[str, Any]], name: str) -> float | None:
    """The rate with the lowest loss; None while one of the grid's is missing."""
    found = [(runs.get((name, lr, 0)), lr) for lr in GRIDS[name]]
    if any(run is None for run, _ in found):
        return None
    return min((run["held_out"], lr) for run, lr in found if run is not None)[1]


def wanted(
    runs: dict[tuple[str, float, int], dict[str, Any]], seeds: int
) -> list[tuple[str, float, int]]:
    """What is still to be run, as far as it is known."""
    todo = [(name, lr, 0) for name, grid in GRIDS.items() for lr in grid]
    for name in MAKE:
        lr = best(runs, name if name == "adamw" else f"{name.split()[0]} float32")
        if lr is not None:
            todo += [(name, lr, seed) for seed in range(1, seeds + 1)]
    return [key for key in todo if key not in runs]


def summary(
    runs: dict[tuple[str, float, int], dict[str, Any]], seeds: int
) -> dict[str, dict[str, Any]]:
    found = {}
    for name in MAKE:
        lr = best(runs, name if name == "adamw" else f"{name.split()[0]} float32")
        assert lr is not None
        own = [runs[name, lr, seed] for seed in range(1, seeds + 1)]
        found[name] = {
            "lr": lr,
            "held_out": [run["held_out"] for run in own],
            "loss": [run["loss"] for run in own],
            "state_bytes": own[0]["state_bytes"],
        }
        for beside in ("adamw", f"{name.split()[0]} float32"):
            if beside in found:
                # each order's own ratio: the data make more difference than the optimizer
                found[name][f"to {beside}"] = max(
                    (a / b for a, b in zip(found[name]["held_out"], found[beside]["held_out"],
                                           strict=True)), key=lambda ratio: abs(ratio - 1),
                )  # fmt: skip
    return found


def failures(found: dict[str, dict[str, Any]]) -> list[str]:
    said = []
    for name, one in found.items():
        if name in GRIDS and one["to adamw"] > 1 + TOLERANCE:
            said.append(f"{name}'s loss is {one['to adamw']:.3f} times AdamW's")
        wide = f"{name.split()[0]} float32"
        if wide in found and abs(one[f"to {wide}"] - 1) > STATE_TOLERANCE:
            said.append(
                f"{name}'s loss is {one[f'to {wide}']:.4f} times that with float32 momentum"
            )
    return said


# --- output ------------------------------------------------------------------------------------


def table(found: dict[str, dict[str, Any]], start: float) -> str:
    rows = [("", "lr", "held-out loss", "÷ AdamW's", "÷ float32's", "state MiB")]
    rows.append(("before", "", f"{start:.4f}", "", "", ""))
    for name, one in found.items():
        wide = one.get(f"to {name.split()[0]} float32")
        losses = " ".join(f"{loss:.4f}" for loss in one["held_out"])
        rows.append(
            (name, f"{one['lr']:g}", losses, f"{one['to adamw']:.4f}",
             "" if wide is None else f"{wide:.4f}", f"{one['state_bytes'] / 2**20:.1f}")
        )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def draw(found: dict[str, dict[str, Any]], path: Path, caption: str) -> None:
    from matplotlib.figure import Figure

    colours = {"adamw": "#9aa3ad", "lion": "#f2b179", "tiger": "#1f5fbf"}
    dashes = {"float32": "-", "bfloat16": "--", "8bit": ":"}
    figure = Figure(figsize=(9, 4.8), dpi=150, facecolor="white")
    axes = figure.subplots()
    for name, one in found.items():
        kind, _, state = name.partition(" ")
        mean = [statistics.fmean(each) for each in zip(*one["loss"], strict=True)]
        smooth = [statistics.fmean(mean[max(0, i - 4) : i + 1]) for i in range(len(mean))]
        axes.plot(
            range(1, len(mean) + 1), smooth, color=colours[kind], ls=dashes[state or "float32"],
            lw=1.6, label=f"{name}, lr {one['lr']:g}",
        )  # fmt: skip
    axes.set_xlabel("step")
    axes.set_title("training loss, mean of the orders and of 5 steps", loc="left", fontsize=10.5)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.012, 0.012, caption, fontsize=7, color="#6b737c")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, format="png")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.optimizers", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=16, help="batches, half of which choose")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model")
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args(words)
    began = time.perf_counter()
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    source = model.find(options.model)
    corpus, tokenizer = data.read(None), model.load_tokenizer(source)
    settings = {
        "model": source.title, "method": f"LoRA r {options.rank}, α {2 * options.rank}",
        **{name: getattr(options, name) for name in ("steps", "batch", "seq_len", "held_out")},
        "versions": versions(),
    }  # fmt: skip
    runs = read(options.runs, settings)
    net: Any = None
    while todo := wanted(runs, options.seeds):
        if time.perf_counter() - began > options.stop_after:
            print(f"{len(todo)} runs and more are left", file=sys.stderr)
            return 0
        name, lr, seed = todo[0]
        if net is None:
            net = model.load(source, device, torch.float32)
            torch.manual_seed(0)
            inject(net, LoRAConfig(r=options.rank, lora_alpha=2 * options.rank))
            first = {n: p.detach().clone() for n, p in net.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for n, p in net.named_parameters():
                if n in first:
                    p.copy_(first[n])
        batches = data.batches(
            corpus, tokenizer, options.steps, options.batch, options.seq_len, seed
        )
        half = 0 if seed == 0 else 1  # seed 0 chooses, the others are reported
        held_out = batches.held_out[half : options.held_out : 2]
        start = mean_loss(net, held_out)
        run = train(net, MAKE[name], lr, batches.training, held_out)
        run |= {"name": name, "lr": lr, "seed": seed, "start": start, "settings": settings}
        options.runs.parent.mkdir(parents=True, exist_ok=True)
        with options.runs.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run, ensure_ascii=False) + "\n")
        runs[name, lr, seed] = run
        print(
            f"{name}, lr {lr:g}, order {seed}: {start:.4f} → {run['held_out']:.4f}", file=sys.stderr
        )
    found = summary(runs, options.seeds)
    start = next(run["start"] for key, run in runs.items() if key[2])
    names = {row["device"]: row["name"] for row in devices()}
    caption = (
        f"{settings['model']}, {settings['method']}; {options.batch} × {options.seq_len} tokens, "
        f"{options.steps} steps; {names['cpu']}, {options.threads} threads; fastlora "
        f"{versions()['fastlora']}, torch {versions()['torch']}."
    )
    print(f"{table(found, start)}\n\n{caption}")
    if options.json:
        tuning = {
            name: {f"{lr:g}": runs[name, lr, 0]["held_out"] for lr in grid}
            for name, grid in GRIDS.items()
        }
        result = {"conditions": caption, "settings": settings, "before": start, "tuning": tuning,
                  "results": found, "failures": failures(found)}  # fmt: skip
        beside = options.json.with_name(options.json.name + ".part")
        beside.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, options.json)
    if options.png:
        draw(found, options.png, caption)
    for sentence in failures(found):
        print(f"FAILED: {sentence}", file=sys.stderr)
    return 1 if failures(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
