"""Counts the bytes that kernels ask for and move, against the least they could; no GPU is needed.

    python -m bench.traffic [--card h100] [--m 4096] [--n 4096] [--k 4096] [--rank 16]
                            [--dtype float16] [--only shrink,weight-norm] [--no-gemm] [--json FILE]

The Triton kernels run in the interpreter, in the tiles they take on the card, with every load and
store counted. "times" is how often the kernels ask for what they stream (x, dY, y or W), a multiple
of its size: it must be once for every tile of ranks. "moved" is what a model of the card's L2 cache
(least recently used goes first) lets through to memory, all launches of a call together; "× floor"
sets it against every operand once. At most 1.05 of each is allowed; above, a call holds only if
what is beyond the floor is the partial sums its own grid leaves, written and read once, and the
table says why they are there. The exit status is 1 where a row does not hold.

A second table has the GEMM in each of its tiles: bytes moved by the model of its re-reads, and the
time below which the card's datasheet keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch

from bench import cards, names
from bench.traffic import gemm
from bench.traffic.cache import replay
from bench.traffic.cases import PROVIDERS
from bench.traffic.cases.case import Case, Shape, bytes_of
from bench.traffic.counting import counted
from fastlora.ops.adapter_linear import tiles

FORMAT = "fastlora.bench.traffic/1"
LIMIT = 1.05
RESIDENT = 2  # programs a multiprocessor holds at a time

_MIB = 1 << 20


@dataclass
class Row:
    """What one call was found to do; bytes."""

    case: str
    floor: int
    asked: int  # of all loads, and stored, wherever they come from and go to
    moved: int
    parts: int
    times: float  # the largest input asked for, over its size and its passes
    passes: int
    why: str
    problems: list[str]

    @property
    def over(self) -> float:
        return self.moved / self.floor


def count(case: Case, card: cards.Card) -> Row:
    """Runs a case and judges what it did."""
    with counted(case.inputs) as launches:
        results = list(case.run())
    if not launches:
        raise RuntimeError(f"{case.name!r} launched no kernel")
    floor = bytes_of(list(case.inputs.values())) + bytes_of(results)
    asked = sum((sum(one.asked.values()) + sum(one.stored.values())) for one in launches)
    cache = replay(launches, card.l2_bytes, RESIDENT * card.sm_count)
    problems = []
    worst, passes = 0.0, 1
    for name, often in case.passes.items():
        size = bytes_of([case.inputs[name]])
        times = sum(one.asked[name] for one in launches) / size / often
        if times > worst:
            worst, passes = times, often
        if times > LIMIT:
            problems.append(f"{name} is asked for {times * often:.2f} times, not {often}")
    row = Row(case.name, floor, asked, cache.moved, case.parts, worst, passes, "", problems)
    if row.over > LIMIT:
        row.why = case.why
        if cache.moved > LIMIT * floor + 2 * case.parts:
            problems.append(
                f"moves {row.over:.2f} of the floor; with its parts it would be "
                f"{(floor + 2 * case.parts) / floor:.2f}"
            )
    return row


def table(rows: list[Row]) -> str:
    """The kernels' table, and below it why some are above the floor."""
    lines = [
        f"{'call':<22}{'floor MiB':>10}{'asked MiB':>10}{'times':>8}{'moved MiB':>10}"
        f"{'parts MiB':>10}{'× floor':>8}  verdict"
    ]
    reasons: list[str] = []
    for row in rows:
        verdict = "; ".join(row.problems) or "holds"
        if row.why and not row.problems:
            if row.why not in reasons:
                reasons.append(row.why)
            verdict = f"its parts [{reasons.index(row.why) + 1}]"
        times = f"{row.times * row.passes:.2f}" + (f"/{row.passes}" if row.passes > 1 else "")
        lines.append(
            f"{row.case:<22}{row.floor / _MIB:>10.2f}{row.asked / _MIB:>10.2f}{times:>8}"
            f"{row.moved / _MIB:>10.2f}{row.parts / _MIB:>10.2f}{row.over:>8.3f}  {verdict}"
        )
    lines += [f"[{number}] {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join(lines)


def gemm_rows(shape: Shape) -> list[dict[str, object]]:
    """The GEMM of y in each tile it may take on the card."""
    one = gemm.Gemm(shape.m, shape.n, shape.k, shape.r, shape.dtype)
    chosen = tiles.choose("main", shape.dtype, shape.m, shape.n, shape.k, shape.r, shape.card.arch)
    found: list[dict[str, object]] = []
    for tile in tiles.candidates("main", shape.dtype, shape.card.arch):
        cost = gemm.cost(one, tile, shape.card)
        found.append(
            {
                "tile": tile_name(tile),
                "chosen": tile == chosen,
                "floor": one.floor,
                "moved": cost.moved,
                "filled": cost.filled,
                "seconds": cost.seconds,
            }
        )
    return found


def tile_name(tile: tiles.Tile) -> str:
    """ "128x256x64 r16 w8 s4": M, N, K, ranks, warps, stages."""
    sides = "x".join(str(side) for side in (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K) if side)
    return f"{sides} r{tile.BLOCK_R} w{tile.num_warps} s{tile.num_stages}"


def gemm_table(rows: list[dict[str, object]]) -> str:
    """Their table."""
    lines = [f"{'GEMM tile':<24}{'moved MiB':>10}{'× floor':>8}{'filled':>8}{'at least µs':>12}"]
    for row in rows:
        moved, floor = float(str(row["moved"])), float(str(row["floor"]))
        mark = "  taken" if row["chosen"] else ""
        lines.append(
            f"{row['tile']:<24}{moved / _MIB:>10.1f}{moved / floor:>8.2f}"
            f"{float(str(row['filled'])):>8.2f}{float(str(row['seconds'])) * 1e6:>12.1f}{mark}"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--card", default="h100", help=", ".join(cards.CARDS))
    for name, size in (("m", 4096), ("n", 4096), ("k", 4096), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dtype", default="float16", help="float16 (as bfloat16) or float32")
    parser.add_argument("--only", help="these calls, separated by commas")
    parser.add_argument("--no-gemm", action="store_true", help="leave out the second table")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    for name in ("m", "n", "k", "rank"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    try:
        args.card = cards.find(args.card)
        # the interpreter multiplies bfloat16 wrongly, and the bytes are float16's
        args.dtype = names.check("dtype", args.dtype, ("float16", "float32"))
    except names.UnknownName as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    """Counts, prints, returns the exit status."""
    args = parse(argv)
    torch.set_num_threads(1)
    shape = Shape(args.m, args.n, args.k, args.rank, getattr(torch, args.dtype), args.card)
    rows = []
    wanted: list[str] | None = None
    todo = [(case, provider.on) for provider in PROVIDERS for case in provider.cases(shape)]
    if args.only:
        try:
            wanted = names.several("call", args.only, [case.name for case, _ in todo])
        except names.UnknownName as error:
            print(f"bench.traffic: {error}", file=sys.stderr)
            return 2
        todo = [(case, on) for case, on in todo if case.name in wanted]
    conditions = (
        f"x [{args.m}, {args.k}], W [{args.n}, {args.k}], r {args.rank}, {args.dtype}; tiles and "
        f"cache of {args.card.title} ({args.card.l2_bytes // _MIB} MiB count)"
    )
    print(conditions)
    for number, (case, on) in enumerate(todo, start=1):
        print(f"\r{number}/{len(todo)} {case.name:<30}", end="", file=sys.stderr, flush=True)
        with on(args.card):
            rows.append(count(case, args.card))
    print(file=sys.stderr)
    print(table(rows))
    gemms = [] if args.no_gemm else gemm_rows(shape)
    if gemms:
        print(gemm_table(gemms))
    if args.json:
        result = {
            "format": FORMAT,
            "conditions": conditions,
            "calls": [asdict(row) for row in rows],
            "gemm": gemms,
        }
        Path(args.json).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    bad = [row.case for row in rows if row.problems]
    print(f"{len(rows)} calls, {len(bad)} do not hold{': ' + ', '.join(bad) if bad else ''}")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
