"""Times svd_lowrank against torch.svd_lowrank, and svd_product against the SVD of formed products.

    python -m bench.low_rank_svd [--case 576 2048 product] [--niter 4] [--dtype float32]
                                 [--device cpu] [--threads 2] [--rounds 9] [--json FILE]

    576      8 matrices 576 × 1536, q = 32
    2048     4 matrices 2048 × 2048, q = 64
    product  the adapters of a llama of 30 blocks, width 576 (SmolLM2-135M), rank 16 on all seven
             linears: 210 products BA. Forming and decomposing them takes so long that it is done
             for one block a round, and its time multiplied by 30

The matrices of a case have singular values i^-½ ("power law"), or are Gaussian ("flat": the slowest
convergence there is). Rivals take turns in one process, each round in another order; a row is the
median with the fastest and the slowest round. torch.svd_lowrank is called in a loop, one matrix at
a time, with the same q and niter.

Before anything is timed, each decomposition of ours is checked: orthonormal to 1e-5, ``error``
right to 1 %, and the mean of ‖X - USVh‖ over the matrices and three random starts no more than
torch's; for a product, every singular value right to 1e-6 of the largest. Where one is not, nothing
is timed and the exit status is 1. It is 1 too where a goal is missed: 3 times torch.svd_lowrank, 10
times the formed product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.measure import whole
from fastlora.ops import svd_lowrank, svd_product
from fastlora.ops.backend import cpu_vendor
from fastlora.ops.low_rank_svd.reference import svd_product_reference

CASES = {"576": (8, 576, 1536, 32), "2048": (4, 2048, 2048, 64)}
BLOCK = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
BLOCKS, RANK = 30, 16
STARTS = 3
ORTHOGONAL, ESTIMATE, PRODUCT = 1e-5, 0.01, 1e-6
GOALS = {"torch.svd_lowrank": 3.0, "formed product": 10.0}
Ways = dict[str, Callable[[], object]]


def spectra(n: int, rows: int, columns: int) -> dict[str, Tensor]:
    """Stacks [n, rows, columns] of each kind."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    p = min(rows, columns)
    u, v = (torch.linalg.qr(draw(m, p)).Q for m in (rows, columns))
    values = (torch.arange(p) + 1.0) ** -0.5
    # other pairs of the same vectors make other matrices
    orders = [torch.randperm(p, generator=generator) for _ in range(n)]
    power = torch.stack([(u[:, order] * values) @ v.T for order in orders])
    return {"power law": power, "flat": draw(n, rows, columns)}


def loop(x: Tensor, q: int, niter: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What there is without this package; V comes untransposed."""
    found = [torch.svd_lowrank(matrix, q=q, niter=niter) for matrix in x]
    return [(u, s, v.mT) for u, s, v in found]


def distance(x: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    """‖X - U diag(S) Vh‖ / ‖X‖ [n], in float64."""
    wide = x.double()
    off = torch.linalg.matrix_norm(wide - (u.double() * s.double().unsqueeze(-2)) @ vh.double())
    return off / torch.linalg.matrix_norm(wide)


def off_orthogonal(columns: Tensor) -> float:
    eye = torch.eye(columns.shape[-1], dtype=torch.float64, device=columns.device)
    return (columns.double().mT @ columns.double() - eye).abs().max().item()


def check_lowrank(x: Tensor, q: int, niter: int) -> tuple[float, float, list[str]]:
    """(mean relative error of ours, of torch's, what is wrong)."""
    ours, theirs, wrong = [], [], []
    wide = x.float()  # torch.svd_lowrank takes no half precision
    for start in range(STARTS):
        torch.manual_seed(start)
        u, s, vh = (torch.stack(parts) for parts in zip(*loop(wide, q, niter), strict=True))
        theirs.append(distance(x, u, s, vh).mean().item())
        result = svd_lowrank(x, q, niter, generator=torch.Generator().manual_seed(start))
        exact = distance(x, *result[:3])
        ours.append(exact.mean().item())
        orthogonal = max(off_orthogonal(result.U), off_orthogonal(result.Vh.mT))
        if not orthogonal <= ORTHOGONAL:
            wrong.append(f"orthonormal to {orthogonal:.1e} only")
        estimated = result.error.double() / torch.linalg.matrix_norm(x.double())
        if not ((estimated / exact - 1).abs() <= ESTIMATE).all():
            wrong.append("error is not what is left")
    mine, yours = statistics.mean(ours), statistics.mean(theirs)
    if not mine <= yours:
        wrong.append(f"error {mine:.6f}, torch's {yours:.6f}")
    return mine, yours, wrong


def adapters(args: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    """(B's, A's) of all linears, block after block, of the sizes that trained ones have."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    shapes = BLOCK * BLOCKS
    b = [torch.randn(n, RANK, generator=generator) * 0.02 for n, _ in shapes]
    a = [torch.randn(RANK, k, generator=generator) * k**-0.5 for _, k in shapes]
    return [m.to(args.device, dtype) for m in b], [m.to(args.device, dtype) for m in a]


def check_product(b: list[Tensor], a: list[Tensor]) -> tuple[float, list[str]]:
    """(largest error of a singular value or of the product, relative; what is wrong)."""
    worst, wrong = 0.0, []
    results = svd_product(b, a)
    for i in range(0, len(b), 10):  # reaches every linear of a block
        u, s, vh = (t.double() for t in results[i])
        exact = svd_product_reference(b[i].double(), a[i].double())[1]
        worst = max(worst, ((s - exact).abs().max() / exact[0]).item())
        off = torch.linalg.matrix_norm((u * s) @ vh - b[i].double() @ a[i].double())
        worst = max(worst, (off / torch.linalg.vector_norm(exact)).item())
        if not max(off_orthogonal(u), off_orthogonal(vh.mT)) <= ORTHOGONAL:
            wrong.append(f"factors of {i} are not orthonormal")
    if not worst <= PRODUCT:
        wrong.append(f"off by {worst:.1e}")
    return worst, wrong


def main(argv: list[str] | None = None) -> int:
    """Checks, times, prints; the exit status is 1 where a check or a goal fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.low_rank_svd", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    cases = [*CASES, "product"]
    parser.add_argument("--case", nargs="+", choices=cases, default=cases)
    parser.add_argument("--niter", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    machine = torch.cuda.get_device_name() if args.device == "cuda" else cpu_vendor()
    conditions = (
        f"niter={args.niter} {args.dtype}, {args.device} ({machine}), {args.threads} threads, "
        f"torch {torch.__version__}, median of {args.rounds}"
    )
    print(conditions)
    figures: dict[str, object] = {"conditions": conditions}
    missed: list[str] = []
    for case in args.case:
        found = product_case(args) if case == "product" else lowrank_case(args, case)
        for title, wrong, facts, rounds in found:
            if wrong:
                print(f"{title}: {'; '.join(wrong)}; nothing is timed", file=sys.stderr)
                return 1
            print(f"{title}: {facts}")
            medians = {name: statistics.median(values) for name, values in rounds.items()}
            ours, rival = rounds  # in this order
            for name, values in rounds.items():
                spread = f"{min(values):>10.2f} {max(values):>10.2f}"
                print(f"  {name:<20} {medians[name]:>10.2f} {spread} ms")
            ratio = medians[rival] / medians[ours]
            print(f"  {ratio:.2f} times {rival}")
            if ratio < GOALS[rival]:
                missed.append(f"{title}: {ratio:.2f} times {rival}, not {GOALS[rival]:.0f}")
            figures[title] = {"facts": facts, "ms": rounds, "ratio": ratio}
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(["goals missed:", *missed]) if missed else "goals met")
    return 1 if missed else 0


Found = list[tuple[str, list[str], str, dict[str, list[float]]]]


def lowrank_case(args: argparse.Namespace, case: str) -> Found:
    """(title, what is wrong, errors, rounds) by kind of matrices."""
    n, rows, columns, q = CASES[case]
    found: Found = []
    for kind, x in spectra(n, rows, columns).items():
        x = x.to(args.device, getattr(torch, args.dtype))
        wide = x.float()
        mine, yours, wrong = check_lowrank(x, q, args.niter)
        ways: Ways = {
            "svd_lowrank": lambda x=x: svd_lowrank(x, q, args.niter),  # type: ignore[misc]
            "torch.svd_lowrank": lambda x=wide: loop(x, q, args.niter),  # type: ignore[misc]
        }
        rounds = {} if wrong else whole(ways, args.rounds, args.device, by_host=True)
        title = f"{n} × ({rows} × {columns}), q={q}, {kind}"
        facts = f"relative error {mine:.6f}, torch's {yours:.6f}"
        found.append((title, wrong, facts, rounds))
    return found


def product_case(args: argparse.Namespace) -> Found:
    """The same of the 210 products."""
    b, a = adapters(args)
    worst, wrong = check_product(b, a)
    one = len(BLOCK)

    def formed() -> None:
        for i in range(one):
            torch.linalg.svd(b[i].float() @ a[i].float(), full_matrices=False)

    ways: Ways = {"svd_product": lambda: svd_product(b, a), "formed product": formed}
    rounds = {} if wrong else whole(ways, args.rounds, args.device, by_host=True)
    if rounds:
        rounds["formed product"] = [took * BLOCKS for took in rounds["formed product"]]
    title = f"{len(b)} products, r={RANK}"
    return [(title, wrong, f"off by {worst:.1e} at most", rounds)]


if __name__ == "__main__":
    raise SystemExit(main())
