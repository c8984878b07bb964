"""How many training steps each method takes to LoRA's loss, on a real model and real text.

    python -m bench.convergence --runs FILE.jsonl [--methods lora,pissa,…] [--rates 2e-5,…]
                                [--steps 60] [--seeds 3] [--optimizer adamw] [--stop-after SECONDS]
                                [--json FILE] [--png FILE]

Every method starts at the same function and sees the same batches in the same order; scalings are
those of the papers, and the learning rate is each method's own: from the middle of ``--rates``, all
try the neighbours of the best rate so far until neither is better, on data order 0. The rate with
the lowest held-out loss at the last step runs again from ``--seeds`` other seeds (of the data's
order and of what is drawn at the start), and these runs alone are reported. Half of the held-out
batches choose the rate, the other half gives the losses reported. Rates rise over the first steps,
then stay, so that a loss at any step is that of a run of this many steps.

Each finished run is a line of ``--runs``, and a run that stands there is not run again: a sweep
that was interrupted, or stopped by ``--stop-after``, goes on. The table needs all of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.adapters import LoRAConfig, inject, layers
from fastlora.cli.demo import data, model
from fastlora.cli.facts import devices, versions
from fastlora.methods import LoRAPro, lora_ga

RATES = "2e-5,8e-5,3.2e-4,1.28e-3,5.12e-3"
WARM_UP = 5  # steps
START_BATCHES = 8  # that LoRA-GA takes its gradient from
EVERY = 10  # steps between two held-out losses of a reported run
WINDOW = 10  # steps that a training loss is averaged over
LOST = 2.0  # above the first loss, a run is given up

Run = dict[str, Any]


# --- contenders --------------------------------------------------------------------------------


def _inject(adapted: nn.Module, config: LoRAConfig, batches: Sequence[Tensor]) -> None:
    inject(adapted, config)


def _from_gradient(adapted: nn.Module, config: LoRAConfig, batches: Sequence[Tensor]) -> None:
    lora_ga(adapted, config, batches[:START_BATCHES], loss_of)


@dataclass(frozen=True)
class Contender:
    """A method: its configuration for a rank, how it starts, and LoRA-Pro's mode if it is that.

    ``scaling`` says whose setting the configuration's is.
    """

    title: str
    scaling: str
    config: Callable[[int], LoRAConfig]
    put_in: Callable[[nn.Module, LoRAConfig, Sequence[Tensor]], None] = _inject
    pro: str | None = None


def _lora(r: int) -> LoRAConfig:
    return LoRAConfig(r=r, lora_alpha=2 * r)


def _pissa(r: int) -> LoRAConfig:
    return LoRAConfig(r=r, lora_alpha=r, init_lora_weights="pissa_niter_4")


def _rslora(r: int) -> LoRAConfig:
    return LoRAConfig(r=r, lora_alpha=16, use_rslora=True)


CONTENDERS = {
    "lora": Contender("LoRA", "α = 2r", _lora),
    "rslora": Contender("rsLoRA", "α = 16, s = α/√r: LoRA with the next ones' s", _rslora),
    "pissa": Contender("PiSSA", "α = r", _pissa),
    "lora_ga": Contender("LoRA-GA", "α = 16, s = α/√r, γ = 16", _rslora, _from_gradient),
    "lora_pro": Contender("LoRA-Pro, efficient", "α = 16, s = α/√r", _rslora, pro="efficient"),
    "lora_pro_full": Contender("LoRA-Pro, full", "α = 16, s = α/√r", _rslora, pro="full"),
    "lora_pro_ga": Contender(
        "LoRA-Pro, efficient, from LoRA-GA's start",
        "α = 16, s = α/√r, γ = 16",
        _rslora,
        _from_gradient,
        pro="efficient",
    ),
}
MAIN = "lora,rslora,pissa,lora_ga,lora_pro,lora_pro_full"

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], float], torch.optim.Optimizer]] = {
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
}


def optimizer_of(
    contender: Contender, adapted: nn.Module, name: str, lr: float
) -> torch.optim.Optimizer:
    """The optimizer ``name`` over what is trained, with the method on its hooks.

    LoRA-Pro in mode "full" is AdamW itself, and its step is taken by SGD.
    """
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    if contender.pro == "full":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=lr)
    else:
        optimizer = OPTIMIZERS[name](parameters, lr)
    if contender.pro:
        LoRAPro(contender.pro).attach(adapted, optimizer)
    return optimizer


# --- one run -----------------------------------------------------------------------------------


def loss_of(adapted: Any, batch: Tensor) -> Tensor:
    return adapted(input_ids=batch, labels=batch, use_cache=False).loss


@torch.no_grad()
def held_out_loss(adapted: nn.Module, batches: Sequence[Tensor]) -> float:
    return statistics.fmean(float(loss_of(adapted, batch)) for batch in batches)


class Start:
    """A method put into a copy of the base model; each run begins from the same adapters."""

    def __init__(
        self, base: nn.Module, contender: Contender, r: int, seed: int, batches: Sequence[Tensor]
    ) -> None:
        self.contender, self.model = contender, copy.deepcopy(base)
        torch.manual_seed(seed)
        contender.put_in(self.model, contender.config(r), batches)
        self._first = [parameter.detach().clone() for parameter in self._trained()]

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def scaling(self) -> float:
        return layers(self.model)[0].scaling

    def run(
        self,
        lr: float,
        batches: Sequence[Tensor],
        held_out: Sequence[Tensor],
        every: int,
        optimizer: str = "adamw",
        after_step: Callable[[float], None] = lambda loss: None,
    ) -> Run:
        """Train once: ``loss`` of each step, ``held_out`` loss by the number of steps taken.

        A run whose loss leaves the numbers, or rises by ``LOST``, ends there as ``lost``.
        """
        with torch.no_grad():
            for parameter, first in zip(self._trained(), self._first, strict=True):
                parameter.copy_(first)
        stepper = optimizer_of(self.contender, self.model, optimizer, lr)
        losses: list[float] = []
        seen = {0: held_out_loss(self.model, held_out)} if every < len(batches) else {}
        for step, batch in enumerate(batches, start=1):
            for group in stepper.param_groups:
                group["lr"] = lr * min(1.0, step / WARM_UP)
            stepper.zero_grad(set_to_none=True)
            loss = loss_of(self.model, batch)
            losses.append(float(loss.detach()))
            if not losses[-1] < losses[0] + LOST:
                return {"loss": losses[:-1], "held_out": seen, "lost": step}
            loss.backward()
            stepper.step()
            after_step(losses[-1])
            if step % every == 0 or step == len(batches):
                seen[step] = held_out_loss(self.model, held_out)
        stepper.zero_grad(set_to_none=True)
        last = seen[len(batches)]
        lost = None if last < losses[0] + LOST else len(batches)
        return {"loss": losses, "held_out": seen, "lost": lost}


# --- the file of runs --------------------------------------------------------------------------


def read_runs(path: Path, settings: dict[str, Any]) -> list[Run]:
    """The runs under these settings; a last line that was cut off is left out of it."""
    if not path.exists():
        return []
    runs = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            path.write_text("".join(lines[:-1]), encoding="utf-8")
            break
        run = json.loads(line)
        if run["settings"] == settings:
            run["held_out"] = {int(step): loss for step, loss in run["held_out"].items()}
            runs.append(run)
    return runs


def write_run(path: Path, run: Run) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run, ensure_ascii=False) + "\n")


def find_run(runs: Iterable[Run], method: str, lr: float, seed: int) -> Run | None:
    for run in runs:
        if (run["method"], run["seed"]) == (method, seed) and math.isclose(run["lr"], lr):
            return run
    return None


def final(run: Run) -> float:
    return math.inf if run["lost"] else run["held_out"][max(run["held_out"])]


def tuned(runs: Iterable[Run], method: str, rates: Sequence[float]) -> dict[float, float]:
    """Learning rate → held-out loss at the end of the runs that choose it, of those tried."""
    runs = list(runs)
    found = ((rate, find_run(runs, method, rate, 0)) for rate in rates)
    return {rate: final(run) for rate, run in found if run is not None}


def next_rate(losses: dict[float, float], rates: Sequence[float]) -> float | None:
    """The rate to try next, of an ascending grid; None where no neighbour of the best is left."""
    if not losses:
        return rates[len(rates) // 2]
    best = rates.index(min(losses, key=lambda rate: losses[rate]))
    for place in (best + 1, best - 1):
        if 0 <= place < len(rates) and rates[place] not in losses:
            return rates[place]
    return None


# --- the sweep ---------------------------------------------------------------------------------


class Sweep:
    """The runs of all methods, those in the file left out."""

    def __init__(
        self, args: argparse.Namespace, base: nn.Module, tokenizer: Any, settings: dict[str, Any]
    ) -> None:
        self.args, self.base, self.settings = args, base, settings
        self.runs = read_runs(args.runs, settings)
        self.began = time.monotonic()
        corpus = data.read(args.data)
        self.batches = [
            data.batches(corpus, tokenizer, args.steps, args.batch, args.seq_len, seed).training
            for seed in range(args.seeds + 1)
        ]
        # wider ones, which take less time
        held_out = data.batches(corpus, tokenizer, 1, 2 * args.batch, args.seq_len, 0).held_out
        self.choosing, self.reported = held_out[::2], held_out[1::2]
        self._start: tuple[tuple[str, int], Start] | None = None

    def all(self) -> bool:
        """Whether every run is there now; rates first, then one seed after the other."""
        best = {}
        for name in self.args.methods:
            losses = tuned(self.runs, name, self.args.rates)
            while (rate := next_rate(losses, self.args.rates)) is not None:
                if not self._run(name, rate, 0):
                    return False
                losses = tuned(self.runs, name, self.args.rates)
            best[name] = min(losses, key=lambda rate: losses[rate])
        seeds = range(1, self.args.seeds + 1)
        return all(self._run(name, best[name], seed) for seed in seeds for name in best)

    def _run(self, name: str, lr: float, seed: int) -> bool:
        if find_run(self.runs, name, lr, seed) is not None:
            return True
        if time.monotonic() - self.began > self.args.stop_after:
            return False
        from tqdm import tqdm

        start = self._started(name, seed)
        title = f"{name}, lr {lr:g}, seed {seed}"
        began = time.monotonic()
        with tqdm(total=self.args.steps, desc=title, unit="step", ncols=100) as bar:

            def shown(loss: float) -> None:
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()

            held_out, every = (self.reported, EVERY) if seed else (self.choosing, self.args.steps)
            run = start.run(lr, self.batches[seed], held_out, every, self.args.optimizer, shown)
        run |= {
            "method": name,
            "lr": lr,
            "seed": seed,
            "scaling": start.scaling,
            "seconds": round(time.monotonic() - began, 1),
            "settings": self.settings,
        }
        write_run(self.args.runs, run)
        self.runs.append(run)
        return True

    def _started(self, name: str, seed: int) -> Start:
        if self._start is None or self._start[0] != (name, seed):
            self._start = None  # its memory goes first
            start = Start(self.base, CONTENDERS[name], self.args.rank, seed, self.batches[seed])
            self._start = ((name, seed), start)
        return self._start[1]


# --- what comes out ----------------------------------------------------------------------------


def steps_to(target: float, held_out: dict[int, float]) -> float | None:
    """The number of steps at which the loss first falls to ``target``, between two measurements
    as if it fell evenly; None where it never does."""
    before: tuple[int, float] | None = None
    for step, loss in sorted(held_out.items()):
        if loss <= target:
            if before is None:
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = (step, loss)
    return None


def smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of each step's loss and those before it, of ``WINDOW`` steps at most."""
    return [
        statistics.fmean(losses[max(0, step - WINDOW) : step]) for step in range(1, len(losses) + 1)
    ]


def summary(
    runs: list[Run], names: Sequence[str], rates: Sequence[float], seeds: int
) -> dict[str, Any]:
    """The figures of each method, over the seeds that are reported.

    ``to_lora``: by seed, the steps to the held-out loss that LoRA has at the end from that seed.
    ``below_lora``: by seed, how far the last held-out loss is below LoRA's.
    """
    found: dict[str, Any] = {}
    chosen: dict[str, list[Run]] = {}
    for name in names:
        losses = tuned(runs, name, rates)
        best = min(losses, key=lambda rate: losses[rate])
        every = [find_run(runs, name, best, seed) for seed in range(1, seeds + 1)]
        chosen[name] = [run for run in every if run is not None]
        if len(chosen[name]) < seeds:
            raise ValueError(f"{name} lacks runs")
        found[name] = {
            "title": CONTENDERS[name].title,
            "scaling": chosen[name][0]["scaling"],
            "setting": CONTENDERS[name].scaling,
            "lr": best,
            "tuning": {f"{rate:g}": losses[rate] for rate in sorted(losses)},
            "best_rate_is_at_the_end": best in (min(rates), max(rates)),
            "held_out": [run["held_out"] for run in chosen[name]],
            "training": [run["loss"] for run in chosen[name]],
            "lost": [run["lost"] for run in chosen[name]],
        }
    for name in names if "lora" in names else ():
        pairs = list(zip(chosen[name], chosen["lora"], strict=True))
        found[name]["to_lora"] = [steps_to(final(lora), run["held_out"]) for run, lora in pairs]
        found[name]["below_lora"] = [final(lora) - final(run) for run, lora in pairs]
    return found


def mean_curve(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    shared = set.intersection(*(set(curve) for curve in curves))
    return {step: statistics.fmean(curve[step] for curve in curves) for step in sorted(shared)}


def table(found: dict[str, Any], steps: int) -> str:
    marks = [step for step in (10, 20, 40, steps // 2) if step < steps and step % EVERY == 0]
    marks = [*sorted(set(marks)), steps]
    lines = [
        f"{'method':<42}{'s':>5}{'lr':>9}"
        + "".join(f"{f'at {mark}':>8}" for mark in marks)
        + f"{'below LoRA':>19}{'steps to LoRA':>22}"
    ]
    for figures in found.values():
        mean = mean_curve(figures["held_out"])
        lines.append(
            f"{figures['title']:<42}{figures['scaling']:>5.3g}{figures['lr']:>9.2g}"
            + "".join(f"{mean.get(mark, math.nan):>8.3f}" for mark in marks)
            + f"{_differences(figures['below_lora']):>19}{_reached(figures['to_lora']):>22}"
        )
    return "\n".join(lines)


def rates_table(found: dict[str, Any]) -> str:
    """What each learning rate came to on the half that chooses; "lost" where a run was given up."""
    rates = sorted({float(rate) for figures in found.values() for rate in figures["tuning"]})
    lines = [f"{'held-out loss at rate':<42}" + "".join(f"{rate:>10.3g}" for rate in rates)]
    for figures in found.values():
        tuning = {float(rate): loss for rate, loss in figures["tuning"].items()}
        cells = [f"{tuning[rate]:.3f}" if rate in tuning else "–" for rate in rates]
        cells = ["lost" if cell == "inf" else cell for cell in cells]
        lines.append(f"{figures['title']:<42}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def _differences(values: list[float]) -> str:
    return f"{statistics.fmean(values):+.3f} ({min(values):+.3f}…)"


def _reached(steps: list[float | None]) -> str:
    return ", ".join("never" if step is None else f"{step:.0f}" for step in steps)


def draw(found: dict[str, Any], conditions: dict[str, Any], path: Path) -> None:
    """Held-out losses with the seeds' range, training losses, and the losses of the rates."""
    from matplotlib.figure import Figure

    ink, muted = "#22262b", "#6b737c"
    colours = ("#22262b", "#9aa3ad", "#e08a3c", "#1f5fbf", "#2f9e6e", "#b0413e", "#8e5bb5")
    figure = Figure(figsize=(13, 4.8), dpi=150, facecolor="white")
    held, training, rates = figure.subplots(1, 3, width_ratios=(1.4, 1.2, 1))
    for (name, figures), colour in zip(found.items(), colours, strict=False):
        width = 2.4 if name == "lora" else 1.6
        mean = mean_curve(figures["held_out"])
        curves = [[curve[step] for step in mean] for curve in figures["held_out"]]
        ends = [[pick(at) for at in zip(*curves, strict=True)] for pick in (min, max)]
        label = f"{figures['title']} (lr {figures['lr']:.2g})"
        held.plot(list(mean), list(mean.values()), color=colour, lw=width, label=label)
        held.fill_between(list(mean), *ends, color=colour, alpha=0.12, lw=0)
        smooth = [
            statistics.fmean(at)
            for at in zip(*(smoothed(losses) for losses in figures["training"]), strict=False)
        ]
        training.plot(range(1, len(smooth) + 1), smooth, color=colour, lw=width)
        tuning = [(float(rate), loss) for rate, loss in figures["tuning"].items()]
        tuning = [(rate, loss) for rate, loss in tuning if math.isfinite(loss)]
        rates.plot(*zip(*tuning, strict=True), color=colour, lw=width, marker="o", ms=3)
    if "lora" in found:
        last = mean_curve(found["lora"]["held_out"])
        held.axhline(last[max(last)], color=ink, lw=0.8, ls=(0, (4, 3)))
        lowest = min(found["lora"]["tuning"].values())
        rates.set_ylim(lowest - 0.1, lowest + 0.45)
    rates.set_xscale("log")
    for axes, heading, below in (
        (held, "held-out loss, mean and range of the seeds", "step"),
        (training, f"training loss, mean of {WINDOW} steps and all seeds", "step"),
        (rates, "held-out loss of the rates tried", "learning rate"),
    ):
        axes.set_title(heading, loc="left", fontsize=10.5, color=ink)
        axes.set_xlabel(below, color=muted)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c9ced4")
        axes.tick_params(colors=muted, labelsize=9)
        axes.grid(axis="y", color="#eceff2")
        axes.set_axisbelow(True)
    held.legend(frameon=False, fontsize=8, labelcolor=ink)
    caption = ", ".join(f"{key} {value}" for key, value in conditions.items() if key != "versions")
    figure.text(
        0.012, 0.012, "\n".join(textwrap.wrap(caption, 200)), fontsize=7.5, color=muted, va="bottom"
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1), w_pad=2)
    part = path.with_name("." + path.name)
    figure.savefig(part, format="png")
    os.replace(part, path)


def _write_json(result: dict[str, Any], path: Path) -> None:
    def finite(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 5) if math.isfinite(value) and value > 0.01 else _rare(value)
        if isinstance(value, dict):
            return {key: finite(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [finite(entry) for entry in value]
        return value

    part = path.with_name(path.name + ".part")
    text = json.dumps(finite(result), indent=1, ensure_ascii=False, allow_nan=False)
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def _rare(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- command -----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing, then tabulates; the exit status is 3 where runs are still missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.convergence", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--runs", type=Path, required=True, metavar="FILE")
    parser.add_argument("--methods", default=MAIN, help=", ".join(CONTENDERS))
    parser.add_argument("--rates", default=RATES, help="the grid they are chosen from")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--model", help="as for the demo")
    parser.add_argument("--data", help="as for the demo")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    args.methods = args.methods.split(",")
    if unknown := [name for name in args.methods if name not in CONTENDERS]:
        parser.error(f"there is no method {unknown[0]}; there is {', '.join(CONTENDERS)}")
    args.rates = sorted(float(rate) for rate in args.rates.split(","))
    if args.seeds < 1:
        parser.error("at least one seed is needed")
    torch.set_num_threads(args.threads)

    source = model.find(args.model)
    settings = {
        "model": source.title,
        "data": data.read(args.data).title,
        "tokens": f"{args.batch} × {args.seq_len}",
        "steps": args.steps,
        "rank": args.rank,
        "optimizer": args.optimizer,
        "warm_up": WARM_UP,
        "start_batches": START_BATCHES,
    }
    base = model.load(source, torch.device("cpu"), torch.float32)
    sweep = Sweep(args, base, model.load_tokenizer(source), settings)
    if not sweep.all():
        print("runs are still missing; the same command goes on with them", file=sys.stderr)
        return 3
    found = summary(sweep.runs, args.methods, args.rates, args.seeds)
    conditions = settings | {
        "seeds": args.seeds,
        "held_out_tokens": sum(batch.numel() for batch in sweep.reported),
        "device": devices()[0]["name"],
        "threads": args.threads,
        "versions": versions(),
    }
    if "lora" in found:
        print(table(found, args.steps) + "\n")
    print(rates_table(found))
    if args.json:
        _write_json({"conditions": conditions, "methods": found}, args.json)
    if args.png:
        draw(found, conditions, args.png)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
