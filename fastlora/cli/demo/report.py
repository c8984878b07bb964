"""What came out: the numbers as data, as a table and as a picture."""

from __future__ import annotations

import json
import math
import os
import statistics
import textwrap
from pathlib import Path
from typing import Any

LOSS_TOLERANCE = 1e-4
ROUNDTRIP_TOLERANCE = 1e-4
ROUNDTRIP_HALF_SHARE = 0.05

_COLOURS = {"frozen": "#9aa3ad", "peft": "#f2b179", "fastlora": "#1f5fbf"}
_INK, _MUTED = "#22262b", "#6b737c"


# --- numbers -----------------------------------------------------------------------------------


def counted(seconds: list[float]) -> list[float]:
    """The steps that count: the first one warms up, unless it is the only one."""
    return seconds[1:] or seconds


def median(seconds: list[float]) -> float:
    return statistics.median(counted(seconds))


def spread(seconds: list[float]) -> float:
    """The interquartile range of the steps that count."""
    values = counted(seconds)
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def compare(result: dict[str, Any]) -> dict[str, Any]:
    """What follows from the measured times and losses, under the names of result.json."""
    frozen, peft, ours = (median(result[n]["step_seconds"]) for n in ("frozen", "peft", "fastlora"))
    return {
        "speedup": peft / ours,
        "overhead_ratio": (ours - frozen) / (peft - frozen) if peft != frozen else math.nan,
        "largest_loss_difference": max(
            _relative(a, b)
            for a, b in zip(result["fastlora"]["loss"], result["peft"]["loss"], strict=True)
        ),
    }


def failures(result: dict[str, Any]) -> list[str]:
    """Sentences on what the run was to show and did not."""
    found = []
    single = result["dtype"] == "float32"
    difference, what = result["largest_loss_difference"], "losses differ"
    if result.get("own_start"):  # of equal functions, which then go their own ways
        ours, theirs = (result[name]["loss"][0] for name in ("fastlora", "peft"))
        difference, what = _relative(ours, theirs), "first loss differs"
    if single and result["dropout"] == 0 and not difference <= LOSS_TOLERANCE:
        found.append(
            f"fastlora's {what} from peft's by {difference:.1e} (relative), more than "
            f"{LOSS_TOLERANCE:.0e}"
        )
    limit = ROUNDTRIP_TOLERANCE if single else ROUNDTRIP_HALF_SHARE * result["largest_logit"]
    if not result["roundtrip_max_abs"] <= limit:
        found.append(
            f"loaded into peft, the saved adapter gives logits that differ by "
            f"{result['roundtrip_max_abs']:.1e}, more than {limit:.0e}"
        )
    if not result["adapter_on_disk_is_equal"]:
        found.append("the adapter on disk is not the one that was trained")
    if not result["base_unchanged"]:
        found.append("training changed the frozen base weights")
    return found


def _relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b) if math.isfinite(a) and math.isfinite(b) and b else math.nan


# --- table -------------------------------------------------------------------------------------


def table(result: dict[str, Any], folder: Path) -> str:
    header = ("", "final loss", "s a step", "above frozen", "tokens/s", "saved MiB", "peak MiB")
    floor = median(result["frozen"]["step_seconds"])
    rows = [header]
    for name in ("frozen", "peft", "fastlora"):
        measured = result[name]
        seconds = median(measured["step_seconds"])
        rows.append(
            (
                name,
                f"{measured['loss'][-1]:.4f}" if name != "frozen" else "–",
                f"{seconds:.3f} ± {spread(measured['step_seconds']):.3f}",
                f"{seconds - floor:+.3f} s" if name != "frozen" else "–",
                f"{result['tokens_per_step'] / seconds:.0f}",
                f"{measured['saved_bytes'] / 2**20:.0f}",
                f"{measured['peak_bytes'] / 2**20:.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [title(result), ""]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "   ".join(cells))
    lines += ["", *_paragraph(" ".join(_remarks(result)))]
    lines += ["", *_outcome(result, folder), "", *_paragraph(conditions(result))]
    return "\n".join(lines)


def title(result: dict[str, Any]) -> str:
    alpha = "" if result["alpha"] is None else f"α {result['alpha']:g}, "
    return (
        f"{result['model']}: {result['method']} r {result['rank']}, {alpha}dropout "
        f"{result['dropout']:g} on {len(result['report']['fused'])} linear layers"
    )


def conditions(result: dict[str, Any]) -> str:
    versions = result["versions"]
    count = result["threads"]
    threads = f", {count} thread{'s' if count > 1 else ''}" if count else ""
    steps = result["steps"]
    chosen = result.get("optimizer", "adamw")
    optimizer = "" if chosen == "adamw" else f"{chosen.capitalize()}, lr {result['lr']:g}; "
    return (
        f"{result['device_name']}{threads}, {result['dtype']}; {optimizer}{result['batch']} × "
        f"{result['seq_len']} tokens, {steps} step{'s' if steps > 1 else ''}; via "
        f"{result['via']}, backend {result['backend']}; fastlora {versions['fastlora']}, torch "
        f"{versions['torch']}, peft {versions['peft']}, transformers {versions['transformers']}."
    )


def _remarks(result: dict[str, Any]) -> list[str]:
    said = [
        "Steps are interleaved; s a step is forward + backward, median ± interquartile range"
        + (", the first step left out." if result["steps"] > 1 else " (of one step: no warm-up).")
    ]
    ratio = result["overhead_ratio"]
    gained = f"fastlora is {result['speedup']:.2f}× as fast as peft"
    frozen, peft, ours = (median(result[n]["step_seconds"]) for n in ("frozen", "peft", "fastlora"))
    if peft <= frozen:
        said.append(f"{gained}; peft's step was not above the frozen model's: too noisy to divide.")
    elif ours > frozen:
        said.append(f"{gained} and adds {ratio:.2f}× the time peft adds to the frozen model.")
    else:
        cause = "" if result["backend"] == "onednn" else ", which is noise"
        said.append(f"{gained} and faster even than the frozen model{cause}.")
    if result["backend"] == "onednn":
        said.append(
            "It runs the base layers' own products through oneDNN, where the frozen model and peft "
            "use PyTorch's default (MKL), slower on this processor; --backend eager puts all "
            "three on the same library."
        )
    difference = f"{result['largest_loss_difference']:.1e}"
    if result.get("own_start"):
        said.append(
            f"Losses differ from peft's by up to {difference} (relative), as {result['own_start']}."
        )
    elif result["dropout"] > 0:
        said.append(
            f"Losses differ by up to {difference} (relative) because peft and fastlora draw "
            "different dropout masks."
        )
    else:
        said.append(f"Losses agree with peft's to {difference} (relative) at every step.")
    said.append("Saved is what autograd keeps for backward; peak is above the resident weights.")
    return said


def _outcome(result: dict[str, Any], folder: Path) -> list[str]:
    report, prompt = result["report"], result["samples"]["prompt"]
    peft = result["peft"]
    return [
        f"  held-out loss   {result['eval_loss_before']:.4f} → {result['eval_loss_after']:.4f}"
        f"   (peft {peft['eval_loss_before']:.4f} → {peft['eval_loss_after']:.4f})",
        f"  sample before   {_sample(prompt, result['samples']['before'])}",
        f"  sample after    {_sample(prompt, result['samples']['after'])}",
        f"  round trip      loaded in peft, logits differ by {result['roundtrip_max_abs']:.1e} on "
        f"the eager backend, by {result['roundtrip_max_abs_as_trained']:.1e}",
        f"                  on {result['backend']} (rounding; the largest logit is "
        f"{result['largest_logit']:.1f})",
        f"  layers          {len(report['fused'])} fused, {len(report['skipped'])} left as they "
        "were (listed in result.json)",
        f"  written         {folder}/result.json, result.png, adapter/",
    ]


def _sample(prompt: str, text: str) -> str:
    flat = " ".join(text.split())
    return ("\n" + " " * 18).join(textwrap.wrap(f"{' '.join(prompt.split())} | {flat}", 74))


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, 92, initial_indent="  ", subsequent_indent="  ")


# --- files -------------------------------------------------------------------------------------


def write_json(result: dict[str, Any], path: Path) -> None:
    """Written beside and renamed; a number that is not finite is written as null."""
    text = json.dumps(_finite(result), indent=2, ensure_ascii=False, allow_nan=False)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text + "\n", encoding="utf-8")
    os.replace(beside, path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def draw(result: dict[str, Any], path: Path) -> None:
    """Losses overlaid, bars of time with the frozen model's marked, bars of memory."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    names = ("frozen", "peft", "fastlora")
    figure = Figure(figsize=(12, 4.6), dpi=150, facecolor="white")
    losses, times, saved = figure.subplots(1, 3, width_ratios=(2.1, 1, 1))

    steps = range(1, result["steps"] + 1)
    marker = {"marker": "o"} if result["steps"] < 3 else {}
    losses.plot(
        steps, result["peft"]["loss"], color=_COLOURS["peft"], lw=7, label="peft",
        solid_capstyle="round", **marker,
    )  # fmt: skip
    losses.plot(
        steps, result["fastlora"]["loss"], color=_COLOURS["fastlora"], lw=1.8, label="fastlora",
        **marker,
    )  # fmt: skip
    losses.set_xlabel("step", color=_MUTED)
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.legend(frameon=False, labelcolor=_INK)
    _title(losses, _loss_title(result))

    medians = [median(result[name]["step_seconds"]) for name in names]
    spreads = [spread(result[name]["step_seconds"]) / 2 for name in names]
    unit, scale = ("s", 1.0) if max(medians) >= 0.1 else ("ms", 1000.0)
    values = [value * scale for value in medians]
    times.bar(
        names, values, yerr=[value * scale for value in spreads], width=0.62, ecolor=_MUTED,
        color=[_COLOURS[n] for n in names], capsize=3, error_kw={"lw": 1},
    )  # fmt: skip
    times.axhline(values[0], color=_INK, lw=1, ls=(0, (4, 3)), label="the frozen model's time")
    times.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="upper left", borderaxespad=0)
    _title(times, f"{unit} a step, forward + backward")
    tops = [value + error * scale for value, error in zip(values, spreads, strict=True)]
    _label(times, tops, [f"{value:#.3g}" for value in values])

    saved_mib = [result[name]["saved_bytes"] / 2**20 for name in names]
    peak_mib = [result[name]["peak_bytes"] / 2**20 for name in names]
    places = range(len(names))
    colours = [_COLOURS[n] for n in names]
    saved.bar([p - 0.2 for p in places], saved_mib, width=0.36, color=colours)
    saved.bar(
        [p + 0.2 for p in places], peak_mib, width=0.36, color="none", edgecolor=colours, lw=1.6
    )
    saved.set_xticks(list(places), names)
    for offset, column in ((-0.2, saved_mib), (0.2, peak_mib)):
        for place, value in enumerate(column):
            saved.annotate(
                f"{value:.0f}", (place + offset, value), (0, 3), textcoords="offset points",
                ha="center", fontsize=8, color=_INK,
            )  # fmt: skip
    saved.set_ylim(0, max(peak_mib + saved_mib) * 1.22 or 1)
    _title(saved, "MiB a step")
    saved.legend(
        handles=[
            Patch(facecolor=_MUTED, label="saved for backward"),
            Patch(facecolor="none", edgecolor=_MUTED, lw=1.6, label="peak"),
        ],
        frameon=False, fontsize=8, labelcolor=_INK, ncols=2, loc="upper left",
        borderaxespad=0, handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip

    for axes in (losses, times, saved):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c9ced4")
        axes.tick_params(colors=_MUTED, labelsize=9)
    for axes in (times, saved):
        axes.tick_params(axis="x", length=0, labelcolor=_INK)
    losses.grid(axis="y", color="#eceff2")
    losses.set_axisbelow(True)
    figure.suptitle(title(result), x=0.012, ha="left", fontsize=12.5, color=_INK, weight="bold")
    caption = "\n".join(textwrap.wrap(conditions(result), 170))
    figure.text(0.012, 0.015, caption, fontsize=7.5, color=_MUTED, va="bottom")
    figure.tight_layout(rect=(0, 0.06, 1, 0.97), w_pad=2.5)
    beside = path.with_name("." + path.name)
    figure.savefig(beside, format="png")
    os.replace(beside, path)


def _loss_title(result: dict[str, Any]) -> str:
    before, after = result["eval_loss_before"], result["eval_loss_after"]
    return f"training loss (held out: {before:.3f} → {after:.3f})"


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10.5, color=_INK)


def _label(axes: Any, tops: list[float], labels: list[str]) -> None:
    for place, (top, label) in enumerate(zip(tops, labels, strict=True)):
        axes.annotate(
            label, (place, top), (0, 3), textcoords="offset points", ha="center",
            fontsize=9, color=_INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    axes.set_ylim(0, max(tops) * 1.22)
