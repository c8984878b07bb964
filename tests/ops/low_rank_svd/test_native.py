"""Block Lanczos on every instruction set there is here, against the full SVD in float64."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.ops import library

if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)

from fastlora.ops import svd_lowrank
from fastlora.ops.backend import BackendError
from fastlora.ops.low_rank_svd import native, op
from fastlora.ops.low_rank_svd.reference import svd_lowrank_reference
from tests.ops.low_rank_svd.cases import SPECTRA, matrix, residual, seeded, sound

ISAS = library.core().isas()
EPS = torch.finfo(torch.float32).eps
Q = 20


def optimum(x, q=Q):
    return svd_lowrank_reference(x.double(), q)[3]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """The operation on this instruction set; what was given up is counted in it."""
    plain, given_up = native.forward, []

    def forward(*args):
        found = plain(*args, isa=request.param)
        given_up.append(int((~found.found).sum()))
        return found

    monkeypatch.setattr(op.native, "forward", forward)
    return given_up


@pytest.mark.parametrize("shape", [(240, 420), (420, 240), (301, 333)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_within_a_hundredth_of_the_optimum(isa, spectrum, shape):
    x = torch.stack([matrix(*shape, SPECTRA[spectrum], seed=seed) for seed in range(3)])
    result = svd_lowrank(x, Q, generator=seeded(), backend="native")
    assert isa == [3 if spectrum == "steep" else 0]  # σ_20 is 6·10^-5 of σ_1 there
    assert sound(result)
    assert (residual(x, result) <= 1.01 * optimum(x) + 20 * EPS).all()
    exact = torch.linalg.svdvals(x.double())[:, :Q]
    assert (result.S - exact <= 20 * EPS).all()  # no Ritz value is above the singular value
    off = (result.error.double() - residual(x, result)).abs()
    assert (off <= 0.005 * residual(x, result) + 20 * EPS).all()


@pytest.mark.parametrize("niter", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("spectrum", [*SPECTRA, "flat"])
def test_no_further_from_the_matrix_than_torch_at_equal_niter(spectrum, niter):
    if spectrum == "flat":
        x = torch.randn(4, 300, 450, generator=seeded())
    else:
        x = torch.stack([matrix(300, 450, SPECTRA[spectrum], seed=seed) for seed in range(4)])
    ours = residual(x, svd_lowrank(x, Q, niter, generator=seeded(), backend="native"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(x, q=Q, niter=niter)
    assert ours.mean() <= residual(x, (u, s, v.mT)).mean() + 5 * EPS


@pytest.mark.parametrize("niter", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("q", [8, 16, 24, 32, 48, 64])
def test_noise_is_left_as_torch_leaves_it(q, niter):
    """The rule for the number of passes, by what is above the optimum."""
    n = 300 if q <= 16 else 640
    x = torch.randn(4, n, n + 60, generator=seeded())
    assert native.plan(n, n + 60, q, niter, 0) is not None
    ours = residual(x, svd_lowrank(x, q, niter, generator=seeded(), backend="native"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(x, q=q, niter=niter)
    least = torch.linalg.svdvals(x.double())[:, q:].square().sum(1)
    above = [each.square() - least for each in (ours, residual(x, (u, s, v.mT)))]
    assert above[0].mean() <= 1.05 * above[1].mean()


def krylov_values(x, start, plan, q):
    """The space's singular values, by QR in float64 throughout."""
    x, first = x.double(), start[: plan.width].double().T
    basis = torch.empty(x.shape[1], 0, dtype=torch.float64)
    block = x.T @ (first if plan.left else x @ first)
    for _ in range(plan.blocks):
        for _ in range(2):
            block = block - basis @ (basis.T @ block)
        block = torch.linalg.qr(block).Q
        basis = torch.cat([basis, block], 1)
        block = x.T @ (x @ block)
    return torch.linalg.svdvals(x @ basis)[:q]


@pytest.mark.parametrize("instructions", ISAS)
@pytest.mark.parametrize(
    "q, niter, left",
    [(8, 2, False), (10, 2, True), (20, 3, True), (20, 4, False), (32, 4, False), (48, 1, True)],
)
def test_the_space_is_the_one_that_is_planned(q, niter, left, instructions):
    x = matrix(480, 480, SPECTRA["slow"])
    plan = native.plan(480, 480, q, niter, 0)
    assert plan is not None and plan.left == left
    start = torch.randn(plan.starts, 480, generator=seeded())
    s = native.forward([x], q, plan, start, (1e-12, 1e12), instructions, rounded_least=1.0).S[0]
    torch.testing.assert_close(s, krylov_values(x, start, plan, q), rtol=1e-5, atol=0)


@pytest.mark.parametrize("niter", [1, 4])
@pytest.mark.parametrize("spectrum", ["power", "flat"])
@pytest.mark.parametrize("q, width, n", [(65, 32, 600), (96, 32, 720), (128, 32, 880)])
def test_wide_blocks_are_no_further_than_torch(q, width, n, spectrum, niter):
    """The rule for the number of passes, of q from 65 to 128."""
    plan = native.plan(n, n + 60, q, niter, 0)
    assert plan is not None and plan.width == width
    if spectrum == "flat":
        x = torch.randn(2, n, n + 60, generator=seeded())
    else:
        x = torch.stack([matrix(n, n + 60, SPECTRA[spectrum], seed=seed) for seed in range(2)])
    result = svd_lowrank(x, q, niter, generator=seeded(), backend="native")
    assert sound(result)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(x, q=q, niter=niter)
    assert residual(x, result).mean() <= residual(x, (u, s, v.mT)).mean() + 5 * EPS


def tail(i, first, height=0.2):
    return height * (i - first + 1).clamp_min(1) ** -0.5


CLUSTERS = {
    "as many as a block has, and one": lambda i: torch.where(i < 9, 1.0, tail(i, 9)),
    "12, just above the rest": lambda i: torch.where(i < 12, 1.0, tail(i, 12, 0.7)),
    "exactly q": lambda i: torch.where(i < Q, 1.0, tail(i, Q)),
    "32": lambda i: torch.where(i < 32, 1.0, tail(i, 32)),
    "32 within a hundredth": lambda i: torch.where(i < 32, 1 - i / 3200, tail(i, 32)),
    "60": lambda i: torch.where(i < 60, 1.0, tail(i, 60)),
    "all": lambda i: torch.ones_like(i),
    "behind others": lambda i: torch.where(
        i < 5, 3 - 0.3 * i, torch.where(i < 30, 1.0, tail(i, 30, 0.3))
    ),
}


@pytest.mark.parametrize("niter", [1, 4])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_repeated_values_beyond_what_a_block_can_find(isa, cluster, niter):
    x = torch.stack([matrix(300, 420, CLUSTERS[cluster], seed=seed) for seed in range(2)])
    result = svd_lowrank(x, Q, niter, generator=seeded(), backend="native")
    assert sound(result)
    bound = 1.01 * optimum(x) + 20 * EPS
    if niter == 1:  # which leaves more, of as many copies as a block finds
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(x, q=Q, niter=niter)
        bound = torch.maximum(bound, residual(x, (u, s, v.mT)))
    assert (residual(x, result) <= bound).all()
    exact = torch.linalg.svdvals(x.double())[:, :Q]
    torch.testing.assert_close(
        result.S.double()[exact > 0.9], exact[exact > 0.9], rtol=2e-3, atol=0
    )


def test_the_check_is_what_finds_them(monkeypatch):
    """Without it the last of 20 equal values are found by half here; what bfloat16 rounds away
    would lead to them."""
    x = matrix(300, 420, CLUSTERS["exactly q"])
    monkeypatch.setattr(native, "_ALIKE", 0.0)
    monkeypatch.setattr(op.native, "forward", partial(native.forward, rounded_least=1.0))
    assert residual(x, svd_lowrank(x, Q, generator=seeded(), backend="native")) > 1.03 * optimum(x)


def both_ways(x, q):
    """Triples with a basis from products in bfloat16, where that may be, and without."""
    plan = native.plan(*x.shape[1:], q, 4, 0)
    start = torch.randn(plan.starts, max(x.shape[1:]), generator=seeded())
    return [
        native.forward(list(x), q, plan, start, (1e-12, 1e12), rounded_least=least)
        for least in (0.1, 1.0)
    ]


rounds = pytest.mark.skipif(
    not library.core().has_bfloat16(), reason="needs AVX-512's products of bfloat16"
)


@rounds
@pytest.mark.parametrize("columns", [641, 720])
@pytest.mark.parametrize("q", [8, 20, 48, 64])  # blocks of 8, 16, 24, 32
@pytest.mark.parametrize("spectrum", ["slow", "flat"])
def test_a_basis_from_products_in_bfloat16_is_as_good(spectrum, q, columns):
    if spectrum == "flat":
        x = torch.randn(3, 600, columns, generator=seeded())
    else:
        x = torch.stack([matrix(600, columns, SPECTRA[spectrum], seed=seed) for seed in range(3)])
    rounded, exact = both_ways(x, q)
    assert rounded.found.all() and exact.found.all() and sound(rounded[:3])
    assert not torch.equal(rounded.S, exact.S)  # it was made so
    assert (residual(x, rounded[:3]) <= (1 + 2e-5) * residual(x, exact[:3])).all()
    best, one, other = (
        (t[0].double() * t[1].double().unsqueeze(-2)) @ t[2].double()
        for t in (svd_lowrank_reference(x.double(), q), rounded, exact)
    )
    off, left = (torch.linalg.matrix_norm(m - other) for m in (one, best))
    assert (off <= 0.05 * left).all()  # of the triples, what is left to find is far more


@rounds
@pytest.mark.parametrize(
    "values",
    [
        pytest.param(SPECTRA["power"], id="σ_20 is a twentieth of σ_1"),
        pytest.param(SPECTRA["exponential"], id="an eighth, but all have converged"),
    ],
)
def test_where_bfloat16_is_too_coarse_it_is_done_again(values):
    x = torch.stack([matrix(300, 420, values, seed=seed) for seed in range(2)])
    rounded, exact = both_ways(x, Q)
    assert rounded.found.all()
    assert all(map(torch.equal, rounded, exact))


@pytest.mark.parametrize("rank", [0, 1, 5, 20, 60])
def test_rank_deficient(isa, rank):
    x = matrix(300, 420, lambda i: torch.where(i < rank, 1.0 + i, 0.0))
    result = svd_lowrank(torch.stack([x, torch.zeros_like(x)]), Q, generator=seeded())
    assert sound(result)
    assert (result.S[1] == 0).all() and result.error[1] == 0
    exact = torch.linalg.svdvals(x.double())[:Q]
    assert (result.S[0] - exact).abs().max() <= (5e-3 if rank > Q else 20 * EPS) * max(
        exact[0], 1.0
    )


@pytest.mark.parametrize("scale", [1e-30, 1e-11, 1e9, 1e30])
def test_scales(isa, scale):
    x = matrix(240, 320, SPECTRA["slow"])
    result = svd_lowrank(x * scale, 8, generator=seeded())  # beyond 10^±12 by the eager form
    assert sound(result)
    back = (result.U, result.S.double() / scale, result.Vh)
    assert residual(x, back) <= 1.01 * optimum(x, 8)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=15)
@given(
    n=st.integers(1, 5),
    rows=st.integers(200, 330),
    columns=st.integers(200, 330),
    q=st.integers(1, 20),
    columns_first=st.booleans(),
    padding=st.sampled_from((0, 3, 16)),
    seed=st.integers(0, 99),
)
def test_any_shape_and_number_of_threads(isa, n, rows, columns, q, columns_first, padding, seed):
    plan = native.plan(rows, columns, q, 2, 0)
    assert plan is not None
    x = torch.randn(n, rows, columns, generator=seeded(seed))
    start = torch.randn(plan.starts, max(rows, columns), generator=seeded(seed))
    given_ = torch.nn.functional.pad(x, (0, padding), value=float("nan"))[..., :columns]
    members = [m.t().contiguous().t() if columns_first else m for m in given_]
    was, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native.forward(members, q, plan, start, (1e-12, 1e12), isa))
    finally:
        torch.set_num_threads(was)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    u, s, vh, squares, found = results[0]
    assert found.all() and sound((u, s, vh))
    torch.testing.assert_close(squares, x.double().square().sum((1, 2)), rtol=1e-6, atol=0)
    assert (residual(x, (u, s, vh)) <= 1.03 * optimum(x, q)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_named(isa, value):
    x = [torch.randn(200, 300, generator=seeded(i)) for i in range(3)]
    x[1][150, 299] = value
    with pytest.raises(ValueError, match=r"matrices\[1\] holds NaN or infinity"):
        svd_lowrank(x, 8)


def test_what_is_given_up_comes_back_in_its_place(isa):
    x = torch.stack([matrix(240, 320, SPECTRA[name]) for name in ("slow", "steep", "power")])
    whole = svd_lowrank(x, 16, generator=seeded())
    assert isa == [1]
    for i, one in enumerate(x):
        alone = svd_lowrank(one, 16, generator=seeded())
        for a, b in zip(alone, whole, strict=True):
            torch.testing.assert_close(a, b[i], rtol=0, atol=0)


def test_oversample_widens_the_space():
    x = torch.randn(3, 400, 500, generator=seeded())
    spaces = [native.plan(400, 500, 10, 2, more) for more in (0, 10, 40)]
    assert [p.blocks for p in spaces] == [spaces[0].blocks + more for more in (0, 2, 5)]
    errors = [
        residual(x, svd_lowrank(x, 10, 2, oversample=p, generator=seeded())).mean()
        for p in (0, 10, 40)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_who_cannot_run_says_so():
    with pytest.raises(BackendError, match="too small"):
        svd_lowrank(torch.randn(30, 40), 8, backend="native")
    with pytest.raises(BackendError, match="float64"):
        svd_lowrank(torch.randn(300, 400).double(), 8, backend="native")
    with pytest.raises(BackendError, match="no backend 'triton'"):
        svd_lowrank(torch.randn(300, 400), 8, backend="triton")
