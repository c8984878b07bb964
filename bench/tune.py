"""Measures which backend, algorithm and tile is fastest on a device, and writes its table.

    python -m bench.tune [--device cuda|cpu] [--shapes llama3-8b,…] [--m 16,512,8192] [--rank 16,64]
                         [--dtype bfloat16,…] [--what "backend,forward,tile main"] [--seconds 120]
                         [--out FILE] [--results FOLDER] [--dry-run]
    python -m bench.tune --predict h200 [...]

For every shape the candidates of a choice are run on the same operands in turns, each round in
another order. One whose results differ from the present choice's by more than a few units of the
dtype is left out. An entry is written only where another candidate beats the choice that is made
without a table in nine rounds of ten and by 2 % in the median: a table has nothing but what was
measured here. The operations read it from fastlora/ops/tables (``fastlora.ops.tuned``); the times
behind it go to bench/results/<device>/tune.json.

``--dry-run`` lists what would be measured, with the present choice. ``--predict`` does so for a
card that is not here, with the time below which its datasheet and a model of its L2 cache keep each
tile of the GEMM. Shapes for which time or memory do not suffice are said and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import cards, names
from bench import device as here
from bench.measure import whole
from bench.throughput.shapes import MODELS
from bench.traffic import gemm
from fastlora.ops import adapter_linear, backend, tuned, weight_norm
from fastlora.ops.adapter_linear import tiles
from fastlora.ops.adapter_linear.contract import BACKENDS
from fastlora.ops.weight_norm import tiles as norm_tiles
from fastlora.ops.weight_norm.contract import BACKENDS as NORM_BACKENDS

FORMAT = "fastlora.bench.tune/1"
RESULTS = Path(__file__).parent / "results"
TILED = ("main", "shrink", "bwd_dy", "bwd_da")
WHATS = ("backend", *tiles.PARTS, *(f"tile {kernel}" for kernel in TILED), "tile rows")
ROUNDS = 20
GAIN, SHARE = 0.98, 0.9  # at most of the present choice's time, in so many of the rounds
UNITS = 32.0  # of the dtype's rounding, by which results may differ, relative to the largest

Take = str | tiles.Tile


@dataclass(frozen=True)
class Question:
    """One choice at one shape. ``sizes`` are (M, N, K, r), 1 where it does not depend on one."""

    operation: str
    what: str
    dtype: torch.dtype
    sizes: tuple[int, int, int, int]
    shape: tuple[int, int, int, int]  # that of the operands
    candidates: tuple[Take, ...]
    present: Take

    @property
    def title(self) -> str:
        m, n, k, r = self.shape
        sizes = f"M={m} N={n} K={k} r={r}"
        return f"{self.operation} {self.what}, {sizes} {tiles.name_of(self.dtype)}"


@dataclass
class Answer:
    """What was measured: milliseconds by candidate and round, and what is taken from now on."""

    question: Question
    ms: dict[str, list[float]]
    wrong: list[str]
    take: Take


def label(take: Take) -> str:
    """A candidate's name in a table."""
    if isinstance(take, str):
        return take
    sides = {"m": take.BLOCK_M, "n": take.BLOCK_N, "k": take.BLOCK_K, "r": take.BLOCK_R}
    blocks = " ".join(f"{side}{size}" for side, size in sides.items() if size)
    return f"{blocks} w{take.num_warps} s{take.num_stages}"


# --------------------------------------------------------------------------------- what is asked


def questions(args: argparse.Namespace, arch: tiles.Arch | None) -> Iterator[Question]:
    """Every choice there is at the shapes asked for; without ``arch``, a processor's."""
    layers = [shape for model in args.shapes for shape in MODELS[model].layers().values()]
    shapes = list(dict.fromkeys(layers))
    for dtype in (getattr(torch, name) for name in args.dtype):
        for what in args.what:
            if what == "backend":
                if arch is None:
                    yield from _backends(args, dtype, shapes[:1])
                continue
            if arch is None:
                continue
            seen: set[tuple[Any, ...]] = set()
            for n, k in shapes:
                for m in args.m:
                    for r in args.rank:
                        question = _question(what, dtype, m, n, k, r, arch)
                        key = (question.sizes, question.candidates)
                        if key in seen or len(question.candidates) < 2:
                            continue
                        seen.add(key)
                        yield question


def _backends(
    args: argparse.Namespace, dtype: torch.dtype, shapes: list[tuple[int, int]]
) -> Iterator[Question]:
    """The choice of a backend knows no sizes: it is put to the first shape, M and rank."""
    at = backend.Situation(torch.device(args.device), dtype)
    n, k = shapes[0]
    for operation, known in (("adapter_linear", BACKENDS), ("weight_norm", NORM_BACKENDS)):
        able = [one for one in known if not one.cannot(at) and one.name != "triton"]
        ready = [one for one in able if not one.rather_not(at)]
        if len(able) > 1:
            shape = (max(args.m), n, k, args.rank[0])
            candidates = tuple(one.name for one in able)
            yield Question(
                operation, "backend", dtype, (1, 1, 1, 1), shape, candidates, ready[0].name
            )


def _question(
    what: str, dtype: torch.dtype, m: int, n: int, k: int, r: int, arch: tiles.Arch
) -> Question:
    shape = (m, n, k, r)
    unnamed = tiles.Arch(arch.capability, arch.sm_count, arch.shared_bytes)  # has no table
    if what in tiles.PARTS:
        present: Take = tiles.algorithm(what, dtype, *shape, unnamed)
        return Question("adapter_linear", what, dtype, shape, shape, tiles.ALGORITHMS, present)
    kernel = what.removeprefix("tile ")
    if kernel == "rows":
        found = norm_tiles.candidates(kernel, dtype, arch)
        present = norm_tiles.choose(kernel, dtype, r, unnamed)
        return Question("weight_norm", what, dtype, (1, 1, 1, r), shape, _once(found), present)
    sizes = {
        "main": shape,
        "shrink": (m, 1, k, r),
        "bwd_dy": (m, n, 1, r),
        "bwd_da": (m, 1, k, r),
    }[kernel]
    found = tiles.candidates(kernel, dtype, arch)
    asked = tuple(0 if size == 1 else size for size in sizes[1:3])
    present = tiles.choose(kernel, dtype, m, *asked, r, unnamed)
    return Question("adapter_linear", what, dtype, sizes, shape, _once(found), present)


def _once(found: tuple[tiles.Tile, ...]) -> tuple[tiles.Tile, ...]:
    return tuple(dict.fromkeys(found))


# ------------------------------------------------------------------------------- how it is asked


def operands(question: Question, device: str, sets: int) -> list[dict[str, Tensor]]:
    """Sets of x [M, K], W [N, K], A [r, K], B [N, r] and dY [M, N]."""
    m, n, k, r = question.shape
    made = []
    for seed in range(sets):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0, own: torch.Generator = generator) -> Tensor:
            return (torch.randn(*shape, generator=own) * scale).to(device, question.dtype)

        made.append(
            {
                "x": draw(m, k), "w": draw(n, k, scale=k**-0.5), "a": draw(r, k, scale=k**-0.5),
                "b": draw(n, r, scale=0.1), "dy": draw(m, n), "t": draw(m, r),
            }
        )  # fmt: skip
    return made


def bytes_of(question: Question) -> int:
    """Of one set of operands with its results."""
    m, n, k, r = question.shape
    return question.dtype.itemsize * (2 * m * k + 2 * m * n + 2 * n * k + 3 * r * (m + n + k))


def runner(question: Question) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    """What is run for a question: the launcher whose choice it is, on a set of operands."""
    if question.what == "backend":
        if question.operation == "weight_norm":
            return lambda s: [weight_norm(s["w"], s["a"], s["b"], 1.0)]
        return _step
    if question.operation == "weight_norm":
        from fastlora.ops.weight_norm import triton as norms

        return lambda s: [norms.forward(s["w"], s["a"], s["b"], 1.0, None)[0]]
    from fastlora.ops.adapter_linear import triton as kernels

    ways: dict[str, Callable[[dict[str, Tensor]], list[Tensor]]] = {
        "forward": lambda s: [kernels.up(s["x"], s["w"].t(), s["t"], s["b"].t(), None, "forward")],
        "dx": lambda s: [kernels.up(s["dy"], s["w"], s["t"], s["a"], None, "dx")],
        "tile main": lambda s: [
            kernels.main(s["x"], s["w"].t(), s["t"], s["b"].t(), None, 0, None)
        ],
        "tile shrink": lambda s: [kernels.shrink(s["x"], s["a"], 1.0, 0, None)],
        "tile bwd_dy": lambda s: [
            one for one in kernels.bwd_dy(s["dy"], s["b"], s["t"], 1.0)[:2] if one is not None
        ],
        "tile bwd_da": lambda s: [kernels.bwd_da(s["t"], s["x"], 0, None)],
    }
    return ways[question.what]


def _step(s: dict[str, Tensor]) -> list[Tensor]:
    """Forward and backward of a layer whose A and B train."""
    x, a, b = (s[name].detach().requires_grad_() for name in ("x", "a", "b"))
    y = adapter_linear(x, s["w"], a, b, 1.0)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), s["dy"])]


@contextlib.contextmanager
def taking(question: Question, take: Take) -> Iterator[None]:
    """Inside, the choice in question is ``take``; all others are as ever."""
    if question.what == "backend":
        with backend.use_backend(str(take)):
            yield
        return
    module = norm_tiles if question.operation == "weight_norm" else tiles
    name = "algorithm" if question.what in tiles.PARTS else "choose"
    kernel = question.what.removeprefix("tile ")
    usual = getattr(module, name)

    def chosen(first: str, *args: Any, **options: Any) -> Any:
        return take if first == kernel else usual(first, *args, **options)

    with mock.patch.object(module, name, chosen):
        yield


def ask(question: Question, device: str, rounds: int = ROUNDS) -> Answer:
    """Runs the candidates in turns, those whose results are right, and decides."""
    least = 2 * here.cache_bytes(device)
    sets = operands(question, device, max(2, min(8, -(-least // bytes_of(question)))))
    run = runner(question)
    wanted: list[Tensor] = []
    wrong = []
    calls: dict[str, Callable[[], object]] = {}
    order = sorted(question.candidates, key=lambda take: take != question.present)
    for take in order:
        try:
            with taking(question, take):
                got = run(sets[0])
        except Exception as error:  # a candidate that cannot run here is no candidate
            wrong.append(f"{label(take)}: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        wanted = wanted or got
        if difference(got, wanted) > UNITS * torch.finfo(question.dtype).eps:
            wrong.append(f"{label(take)}: other results")
            continue
        calls[label(take)] = _call(question, take, run, sets)
    ms = whole(calls, rounds, device) if len(calls) > 1 else {}
    by_label = {label(take): take for take in order}
    present = label(question.present)
    return Answer(question, ms, wrong, by_label[decide(ms, present) if ms else present])


def _call(
    question: Question,
    take: Take,
    run: Callable[[dict[str, Tensor]], list[Tensor]],
    sets: list[dict[str, Tensor]],
) -> Callable[[], object]:
    turn = 0

    def call() -> object:
        nonlocal turn
        turn += 1
        with taking(question, take):
            return run(sets[turn % len(sets)])

    return call


def difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest, relative to the largest element; infinite where something is not finite."""
    worst = 0.0
    for one, other in zip(got, wanted, strict=True):
        scale = other.float().abs().max().clamp(min=1e-30)
        worst = max(worst, float((one.float() - other.float()).abs().max() / scale))
        if not bool(one.isfinite().all()):
            return float("inf")
    return worst


def decide(ms: dict[str, list[float]], present: str) -> str:
    """The fastest if it beats the present choice clearly, else that."""
    if present not in ms:  # which cannot run: the fastest of the others
        return min(ms, key=lambda name: statistics.median(ms[name]))
    best = present
    for name, taken in ms.items():
        ratios = [own / other for own, other in zip(taken, ms[present], strict=True)]
        faster = sum(ratio < 1.0 for ratio in ratios) >= SHARE * len(ratios)
        if faster and statistics.median(ratios) <= GAIN:
            best = min(best, name, key=lambda one: statistics.median(ms[one]))
    return best


def entry(answer: Answer) -> tuned.Entry | None:
    """What a table has of it; None where the choice made without one stays."""
    question, take = answer.question, answer.take
    if take == question.present:
        return None
    own = take if isinstance(take, str) else tuple(asdict(take).items())
    name = tiles.name_of(question.dtype)
    return tuned.Entry(question.operation, question.what, name, question.sizes, own)


# --------------------------------------------------------------------------------------- output


def predicted(question: Question, card: cards.Card) -> dict[str, float]:
    """Seconds that each tile of the GEMM takes at least on a card; {} of other questions."""
    if question.what != "tile main":
        return {}
    one = gemm.Gemm(*question.shape, question.dtype)
    return {
        label(tile): gemm.cost(one, tile, card).seconds
        for tile in question.candidates
        if isinstance(tile, tiles.Tile)
    }


def show(question: Question, seconds: dict[str, float]) -> str:
    """What would be measured."""
    lines = [question.title]
    for take in question.candidates:
        least = seconds.get(label(take))
        says = "" if least is None else f"  at least {least * 1e6:.1f} µs"
        lines.append(f"  {'*' if take == question.present else ' '} {label(take)}{says}")
    return "\n".join(lines)


def report(answer: Answer) -> str:
    """What was measured, a line a candidate."""
    lines = [answer.question.title]
    base = answer.ms.get(label(answer.question.present))
    for name, taken in answer.ms.items():
        median = statistics.median(taken)
        ratio = f"{median / statistics.median(base):>6.2f}" if base else ""
        mark = "  <- taken" if name == label(answer.take) else ""
        present = "*" if name == label(answer.question.present) else " "
        spread = f"({min(taken):.4f}–{max(taken):.4f})"
        lines.append(f"  {present} {name:<28}{median:>10.4f} ms {spread:<22}{ratio}{mark}")
    return "\n".join([*lines, *(f"    {reason}" for reason in answer.wrong)])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, names checked."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--predict", metavar="CARD", help=", ".join(cards.CARDS))
    parser.add_argument("--shapes", default="llama3-8b")
    parser.add_argument("--m", default=None, help="tokens; 16,512,8192, on a processor 256")
    parser.add_argument("--rank", default="16,64")
    parser.add_argument("--dtype", default=None, help="bfloat16, on a processor float32")
    parser.add_argument("--what", default=",".join(WHATS))
    parser.add_argument("--seconds", type=float, default=120.0, help="then the rest is left out")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", metavar="FILE", help="the table, if not in fastlora/ops/tables")
    parser.add_argument("--results", metavar="FOLDER", help="if not bench/results/<device>")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = args.device == "cuda" or args.predict is not None
    try:
        args.card = None if args.predict is None else cards.find(args.predict)
        args.shapes = names.several("model", args.shapes, MODELS)
        args.what = names.several("choice", args.what, WHATS)
        dtypes = args.dtype or ("bfloat16" if on_gpu else "float32")
        args.dtype = names.several("dtype", dtypes, tuned.DTYPES[:3])
        args.m = [int(part) for part in (args.m or ("16,512,8192" if on_gpu else "256")).split(",")]
        args.rank = [int(part) for part in args.rank.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if min(*args.m, *args.rank, args.rounds) < 1:
        parser.error("--m, --rank and --rounds must be at least 1")
    if args.device == "cuda" and not args.predict and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --predict CARD needs none")
    return args


def main(argv: list[str] | None = None) -> int:
    """Asks, prints, writes; the exit status is 1 where a candidate gave other results."""
    args = parse(argv)
    arch: tiles.Arch | None = None
    name = backend.device_name(torch.device(args.device))
    if args.card is not None:
        arch, name = args.card.arch, args.card.title
    elif args.device == "cuda":
        from fastlora.ops.adapter_linear import triton as kernels

        arch = kernels.arch_of(torch.device("cuda", torch.cuda.current_device()))
    todo = list(questions(args, arch))
    print(f"{name}: {len(todo)} choices, {sum(len(one.candidates) for one in todo)} candidates")
    if args.dry_run or args.card is not None:
        for question in todo:
            print(show(question, {} if args.card is None else predicted(question, args.card)))
        print("nothing was measured; * is the present choice")
        return 0

    answers: list[Answer] = []
    left_out: list[str] = []
    started = time.monotonic()
    for number, question in enumerate(todo, start=1):
        needed, free = 4 * bytes_of(question), here.free_bytes(args.device)
        if time.monotonic() - started > args.seconds:
            left_out.append(f"{question.title}: left out, {args.seconds:.0f} s are over")
        elif needed > free:
            left_out.append(
                f"{question.title}: left out, it needs {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} are free"
            )
        else:
            print(f"\r{number}/{len(todo)} {question.title:<70}", end="", file=sys.stderr)
            answers.append(ask(question, args.device, args.rounds))
            print("\r", end="", file=sys.stderr, flush=True)
            print(report(answers[-1]), flush=True)
    for reason in left_out:
        print(reason)
    found = [own for own in map(entry, answers) if own is not None]
    _write(args, name, found, answers, left_out)
    return 1 if any("other results" in reason for one in answers for reason in one.wrong) else 0


def _write(
    args: argparse.Namespace,
    name: str,
    found: list[tuned.Entry],
    answers: list[Answer],
    left_out: list[str],
) -> None:
    conditions = here.conditions(args.device)
    folder = Path(args.results) if args.results else RESULTS / here.folder_name(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    times = [
        {
            "choice": one.question.title,
            "present": label(one.question.present),
            "take": label(one.take),
            "ms": one.ms,
            "wrong": one.wrong,
        }
        for one in answers
    ]
    result = {"format": FORMAT, "conditions": conditions, "answers": times, "left_out": left_out}
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (folder / "tune.json").write_text(text + "\n")
    path = Path(args.out) if args.out else tuned.TABLES / tuned.device_file(name)
    if not found:
        print(f"{len(answers)} choices measured, none of another candidate: no table is written")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tuned.table(name, conditions, found), indent=1) + "\n")
    print(f"{len(answers)} choices measured, {len(found)} of another candidate: {path.name}")


if __name__ == "__main__":
    raise SystemExit(main())
