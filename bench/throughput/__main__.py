"""Times every operation over the shapes of named models, against honest baselines and the floor.

    python -m bench.throughput [--op adapter_linear,…] [--shapes llama3-8b,…] [--layers q,gate,…]
                               [--m 1,128,…] [--rank 16,…] [--dropout 0,0.1] [--dtype float32,…]
                               [--providers bare,peft,fastlora,…] [--device cpu|cuda] [--threads N]
                               [--quick] [--seconds S] [--rounds N] [--compare OLD.json]
                               [--out FOLDER]

All providers of a cell take turns in one process, each round in another order, each call on
operands that are not in the cache. Before one is timed, its values and every gradient are held
against float64, by the ladder of the tests (bench/throughput/check.py); who is off has no number.
A speed-up is the median of the ratios within a round, with quartiles.

    bare          the frozen layer alone, in plain PyTorch (bare-onednn: by oneDNN, where ours are)
    merged        the layer with B A added to its weight: forward only
    plain         the formula as peft writes it; compiled: the same through torch.compile
    peft, …       other packages' own layers, where they are installed
    adamw-fused   torch's AdamW(fused=True), beside Lion; copy: as many bytes, copied
    fastlora-X    ours on backend X; * marks what is taken automatically

"floor" is the larger of flops / rate and bytes / bandwidth, both measured here first, each operand
moved once. Results go to bench/results/<device>/throughput.json and .png; what that file has of
other cells, of the same code on the same device, stays there. It is written after every cell, so
that an interruption loses nothing.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import device as here
from bench.throughput import picture, providers, report, run
from bench.throughput.case import Cell, Operation, Request
from bench.throughput.operations import OPERATIONS
from bench.throughput.shapes import MODELS
from fastlora.cli.errors import UserError, near

RESULTS = Path(__file__).parent.parent / "results"
FILE, PICTURE = "throughput.json", "throughput.png"
DTYPES = ("float32", "float16", "bfloat16")
LAYERS = ("q", "k", "o", "gate", "down", "block")

# What is timed where nobody says otherwise, by (on a GPU, --quick): requests one after the other,
# of which each option given replaces its own part.
DEFAULTS: dict[tuple[bool, bool], list[dict[str, Any]]] = {
    (False, False): [
        {"shapes": ["smollm2-135m"], "m": [1, 128, 512], "dropout": [0.0, 0.1]},
        {"shapes": ["qwen2.5-7b", "llama3-8b"], "layers": ["q", "k"], "m": [1, 64]},
    ],
    (False, True): [{"shapes": ["smollm2-135m"], "layers": ["q", "gate", "block"], "m": [1, 128]}],
    (True, False): [
        {
            "shapes": ["smollm2-135m", "qwen2.5-7b", "llama3-8b"],
            "m": [1, 16, 128, 1024, 4096, 16384],
            "dropout": [0.0, 0.1],
        },
        {"shapes": ["llama3-8b"], "layers": ["q", "gate"], "m": [4096], "rank": [8, 64, 256]},
    ],
    (True, True): [
        {"shapes": ["llama3-8b"], "m": [1, 2048, 8192], "dropout": [0.0, 0.1]},
        {"shapes": ["qwen2.5-7b"], "layers": ["q", "gate"], "m": [4096]},
        {"shapes": ["llama3-8b"], "layers": ["q"], "m": [8192], "rank": [64, 256]},
    ],
}
USUAL: dict[str, Any] = {"layers": None, "rank": [16], "dropout": [0.0]}
SECONDS = {(False, False): 1.0, (False, True): 0.5, (True, False): 0.5, (True, True): 0.2}


def main(argv: list[str] | None = None) -> int:
    """Checks, times, prints, writes; the exit status is 1 where something of ours is wrong."""
    try:
        return _main(argv)
    except UserError as error:
        print(f"bench.throughput: {error}", file=sys.stderr)
        return 2


def _main(argv: list[str] | None) -> int:
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    # what a compiler or another package says of itself belongs to no figure
    warnings.filterwarnings("ignore")
    torch._dynamo.config.recompile_limit = 64
    old = None
    if args.compare:
        try:
            old = report.read(Path(args.compare))
        except UserError as error:
            print(f"not compared: {error}", file=sys.stderr)
    conditions = here.conditions(args.device)
    cells = [
        (op, cell)
        for op in args.op
        for cell in dict.fromkeys(cell for asked in args.requests for cell in op.cells(asked))
    ]
    if not cells:
        raise UserError("nothing to time: no layer of these models is asked for")
    dtypes = dict.fromkeys(cell.dtype for _, cell in cells)
    measured = {dtype: here.measure_roof(args.device, getattr(torch, dtype)) for dtype in dtypes}
    print(_title(conditions), report.roofs(measured), sep="\n", flush=True)

    folder = Path(args.out) if args.out else RESULTS / here.folder_name(args.device)
    before = report.kept(folder / FILE, conditions)
    roofs = {dtype: here.as_data(roof) for dtype, roof in measured.items()}
    roofs |= {f"{card} (datasheet)": here.as_data(roof) for card, roof in here.DATASHEETS.items()}

    def save(rows: list[run.Row], skipped: dict[str, str]) -> None:
        whole = [*report.others(before, rows), *rows]
        report.write(folder / FILE, conditions, roofs, whole, skipped)

    rows, skipped = _run(args, cells, measured, save)
    save(rows, skipped)
    kept = report.others(before, rows)
    print(report.table(rows))
    for text in (report.remarks(rows, skipped), report.summary(rows)):
        print("\n" + text if text else "")
    if old is not None:
        print("\n" + report.compare(conditions, rows, old))
    beside = f" beside {len(kept)} rows of the same code and device" if kept else ""
    print(f"\nwritten {folder}/{FILE}{beside}", end="")
    try:
        if rows:
            picture.draw(folder / PICTURE, conditions, measured, [*kept, *rows])
            print(f", {PICTURE}")
    except ModuleNotFoundError as error:
        print(f"; no picture: {error}")
    return 1 if any(name.startswith("fastlora") for row in rows for name in row.wrong) else 0


def _run(
    args: argparse.Namespace,
    cells: list[tuple[Operation, Cell]],
    measured: dict[str, here.Roof],
    save: Callable[[list[run.Row], dict[str, str]], None],
) -> tuple[list[run.Row], dict[str, str]]:
    """Rows, and who was skipped for what; ``save`` is called after every cell."""
    rows: list[run.Row] = []
    skipped: dict[str, str] = {}
    try:
        for operation, cell in _progress(cells):
            found = run.measure(
                operation, cell, measured[cell.dtype], args.wanted, args.seconds, args.rounds
            )
            if isinstance(found, str):
                skipped[cell.title] = found
            else:
                rows += found
            save(rows, skipped)
    except KeyboardInterrupt:
        print("interrupted: what follows is what was measured until then", file=sys.stderr)
    return rows, skipped


def _progress(cells: list[tuple[Operation, Cell]]) -> Any:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return cells
    seldom = 0.5 if sys.stderr.isatty() else 30.0
    bar = tqdm(cells, unit="cell", ncols=100, mininterval=seldom)

    def told() -> Any:
        for operation, cell in bar:
            bar.set_description(f"{cell.op} {cell.model} {cell.layer} M={cell.m}", refresh=False)
            yield operation, cell

    return told()


def _title(conditions: dict[str, Any]) -> str:
    versions = conditions["versions"]
    said = [conditions["device"], f"{conditions['threads']} threads"]
    said += [f"driver {conditions['driver']}"] if conditions["driver"] else []
    said += [f"{name} {versions[name]}" for name in ("torch", "triton", "peft") if name in versions]
    return ", ".join([*map(str, said), f"commit {conditions['commit']}"])


# --- the command line --------------------------------------------------------------------------


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", default=",".join(OPERATIONS))
    parser.add_argument("--shapes", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--layers", help=f"of {', '.join(LAYERS)}; all, if left out")
    parser.add_argument("--m", help="tokens, comma-separated")
    parser.add_argument("--rank")
    parser.add_argument("--dropout")
    parser.add_argument("--dtype", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--providers", help=f"of {', '.join(providers.NAMES)}; all, if left out")
    parser.add_argument("--device", help="cuda where there is one, if left out")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="fewer shapes, fewer rounds")
    parser.add_argument("--seconds", type=float, help="for the rounds of a cell")
    parser.add_argument("--rounds", type=int, help="just so many, whatever they take")
    parser.add_argument("--compare", metavar="OLD.json", help="say what has changed since")
    parser.add_argument("--out", metavar="FOLDER")
    args = parser.parse_args(argv)

    args.device = _device(args.device)
    at = args.device != "cpu", args.quick
    args.op = [OPERATIONS[name] for name in _names("operation", args.op, OPERATIONS)]
    asked = {
        "shapes": _names("shape", args.shapes, MODELS),
        "layers": _names("layer", args.layers, LAYERS),
        "m": _numbers("--m", args.m, int, 1, 1 << 20),
        "rank": _numbers("--rank", args.rank, int, 1, 1 << 14),
        "dropout": _numbers("--dropout", args.dropout, float, 0.0, 0.99),
        "dtype": _names("dtype", args.dtype, DTYPES),
    }
    usual = USUAL | {"dtype": [default_dtype(args.device)]}
    given = {name: value for name, value in asked.items() if value is not None}
    args.requests = []
    for own in DEFAULTS[at]:
        args.requests.append(Request(**(usual | own | given), device=args.device))
    wanted = _names("provider", args.providers, providers.NAMES)
    args.wanted = lambda name: (
        wanted is None or name in wanted or ("fastlora" in wanted and name.startswith("fastlora"))
    )
    if args.seconds is None:
        args.seconds = SECONDS[at]
    if args.rounds is not None and args.rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {args.rounds}")
    return args


def default_dtype(device: str) -> str:
    """What models are trained in."""
    return "float32" if device == "cpu" else "bfloat16"


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UserError(f"there is no device {name}; {near(name, ('cpu', 'cuda'))}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU that this PyTorch can use; --device cpu needs none")
    return name


def _names(what: str, given: str | None, known: Any) -> Any:
    """The names of a list, each of which is ``known``; None where none was given."""
    if given is None:
        return None
    names = [name.strip() for name in given.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(f"there is no {what} {name}; {near(name, known)}")
    if not names:
        raise UserError(f"no {what} is named")
    return list(dict.fromkeys(names))


def _numbers(option: str, given: str | None, kind: type, least: float, most: float) -> Any:
    if given is None:
        return None
    try:
        numbers = [kind(part) for part in given.split(",")]
    except ValueError:
        raise UserError(f"{option} takes numbers, not {given}") from None
    for number in numbers:
        if not least <= number <= most:
            raise UserError(f"{option} must be from {least:g} to {most:g}, not {number:g}")
    return list(dict.fromkeys(numbers))


if __name__ == "__main__":
    raise SystemExit(main())
