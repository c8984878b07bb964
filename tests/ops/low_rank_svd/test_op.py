"""svd_lowrank against the full SVD in float64: accuracy, degenerate matrices, scales, the call."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlora.ops import LowRankSVD, svd_lowrank
from fastlora.ops.low_rank_svd import eager, op
from fastlora.ops.low_rank_svd.onednn import ONEDNN
from fastlora.ops.low_rank_svd.reference import svd_lowrank_reference
from tests.ops.low_rank_svd.cases import SPECTRA, matrix, residual, seeded, sound

EPS = torch.finfo(torch.float32).eps
FORMS = {"eager": eager.ATEN}
if torch.backends.mkldnn.is_available():
    FORMS["onednn"] = ONEDNN


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Both ways of multiplying by the matrices, whatever this processor would be given."""
    monkeypatch.setattr(op, "_products", lambda device, dtype: FORMS[request.param])


def optimum(x, q):
    return svd_lowrank_reference(x.double(), q)[3]


# ---------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("shape", [(180, 300), (300, 180), (240, 240)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_within_a_hundredth_of_the_optimum(form, spectrum, shape):
    """float32 resolves nothing below a few units of the largest singular value, 1."""
    x = torch.stack([matrix(*shape, SPECTRA[spectrum], seed=seed) for seed in range(3)])
    result = svd_lowrank(x, 16, generator=seeded())
    assert sound(result)
    assert (residual(x, result) <= 1.01 * optimum(x, 16) + 20 * EPS).all()
    exact = torch.linalg.svdvals(x.double())[:, :16]
    assert (result.S - exact <= 20 * EPS).all()  # a Ritz value is never above the singular value
    # each value's share of the captured energy: what is missing in all is less than 0.01² · tail²·2
    assert (
        (exact.square() - result.S.double().square())
        .sum(-1)
        .le(0.0202 * optimum(x, 16).square() + 40 * EPS)
        .all()
    )


@pytest.mark.parametrize("spectrum", ["slow", "power", "exponential"])
@pytest.mark.parametrize("niter", [1, 4, 8])
def test_no_further_from_the_matrix_than_torch_at_equal_niter(spectrum, niter):
    x = torch.stack([matrix(200, 320, SPECTRA[spectrum], seed=seed) for seed in range(4)])
    ours = residual(x, svd_lowrank(x, 20, niter, generator=seeded()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(x, q=20, niter=niter)
    assert ours.mean() <= residual(x, (u, s, v.mT)).mean() + EPS


def test_a_flat_tail(form):
    """Singular values of noise: the slowest convergence there is."""
    x = torch.randn(3, 200, 320, generator=seeded())
    result = svd_lowrank(x, 20, generator=seeded())
    assert sound(result)
    assert (residual(x, result) <= 1.01 * optimum(x, 20)).all()


@pytest.mark.parametrize("copies", [2, 20, 30, 60])
def test_repeated_singular_values(form, copies):
    def values(i):
        return torch.where(i < copies, 1.0, 0.2 * (i - copies + 2).clamp_min(1) ** -0.5)

    x = matrix(150, 220, values)
    result = svd_lowrank(x, 20, generator=seeded())
    assert sound(result)
    assert residual(x, result) <= 1.01 * optimum(x, 20)
    same = min(copies, 20)  # every copy is found
    torch.testing.assert_close(result.S[:same], torch.ones(same), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rank", [0, 1, 5, 20, 40])
def test_rank_deficient(form, rank):
    x = matrix(150, 220, lambda i: torch.where(i < rank, 1.0 + i, 0.0))
    result = svd_lowrank(x, 20, generator=seeded())
    assert sound(result)
    exact = torch.linalg.svdvals(x.double())[:20]
    assert (result.S - exact).abs().max() <= (5e-3 if rank > 20 else 20 * EPS) * max(exact[0], 1.0)
    assert residual(x, result) <= 1.01 * optimum(x, 20) + 20 * EPS * exact.norm()


def test_columns_that_are_exactly_dependent_take_the_householder_path(form, monkeypatch):
    """Beyond two elements lie zeros: no rounding noise fills the missing directions."""
    x = torch.zeros(3, 60, 80)
    x[0] = matrix(60, 80, SPECTRA["power"])
    x[1, 0, 0], x[1, 1, 1] = 3.0, 2.0
    taken = []
    plain = torch.linalg.qr

    def counting(y, *args):
        taken.append(tuple(y.shape))
        return plain(y, *args)

    monkeypatch.setattr(torch.linalg, "qr", counting)
    result = svd_lowrank(x, 8, generator=seeded())
    assert sound(result)
    torch.testing.assert_close(result.S[1], torch.tensor([3.0, 2, 0, 0, 0, 0, 0, 0]))
    assert (result.S[2] == 0).all()
    assert {shape[0] for shape in taken} == {2}  # the sound matrix does not


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-38, 3e37])
def test_scales_at_which_squares_leave_float32(form, scale):
    x = matrix(60, 90, SPECTRA["power"])
    plain = svd_lowrank(x, 8, generator=seeded())
    for stack in (x * scale, torch.stack([x, x * scale])):
        result = svd_lowrank(stack, 8, generator=seeded())
        last = LowRankSVD(*(t[-1] for t in result)) if stack.dim() == 3 else result
        assert sound(last)
        rtol = 1e-5 if scale > 1e-37 else 1e-2  # 1e-38 · 0.01 has two digits in float32
        torch.testing.assert_close(last.S / scale, plain.S, rtol=rtol, atol=0)
        torch.testing.assert_close(last.error / scale, plain.error, rtol=rtol, atol=0)


def test_a_zero_matrix_among_others(form):
    x = torch.stack([matrix(30, 40, SPECTRA["power"]), torch.zeros(30, 40)])
    result = svd_lowrank(x, 5)
    assert sound(result)
    assert (result.S[1] == 0).all() and result.error[1] == 0 and result.S[0, 0] > 0.9


# ------------------------------------------------------------------------------------------- error


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("q", [4, 16, 60])
def test_the_error_is_that_of_the_result(form, spectrum, q):
    """Also where ‖X‖² and ΣS² agree to all of float32's digits."""
    x = matrix(60, 100, SPECTRA[spectrum])
    result = svd_lowrank(x, q, generator=seeded())
    exact = residual(x, result)
    # float32 itself cannot tell U diag(S) Vh from its neighbours by less
    assert abs(result.error.double() - exact) <= 0.005 * exact + 10 * EPS * x.norm()


def test_the_error_in_float64():
    x = matrix(60, 100, SPECTRA["steep"], torch.float64)
    result = svd_lowrank(x, 40, generator=seeded())
    assert sound(result, 1e-13) and result.U.dtype == torch.float64
    exact = residual(x, result)
    assert exact < 1e-8 and abs(result.error - exact) <= 0.005 * exact
    assert exact <= 1.01 * optimum(x, 40)


# -------------------------------------------------------------------------------------------- call


@given(
    n=st.integers(1, 60),
    k=st.integers(1, 60),
    share=st.floats(0, 1),
    niter=st.integers(0, 5),
    oversample=st.sampled_from((None, 0, 3)),
    batch=st.sampled_from(((), (1,), (3,), (2, 2))),
    layout=st.sampled_from(("rows", "columns", "strided")),
    products=st.sampled_from(sorted(FORMS)),
    seed=st.integers(0, 99),
)
def test_any_shape(n, k, share, niter, oversample, batch, layout, products, seed):
    q = 1 + int(share * (min(n, k) - 1))
    x = torch.randn(*batch, n, k, generator=seeded(seed))
    x = laid_out(x, layout)
    before = x.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_products", lambda device, dtype: FORMS[products])
        result = svd_lowrank(x, q, niter, oversample=oversample, generator=seeded(seed))
    assert torch.equal(x, before)
    assert result.U.shape == (*batch, n, q) and result.S.shape == (*batch, q)
    assert result.Vh.shape == (*batch, q, k) and result.error.shape == batch
    assert sound(result)
    exact = residual(x, result)
    size = torch.linalg.matrix_norm(x.double())
    assert ((result.error.double() - exact).abs() <= 0.005 * exact + 20 * EPS * size).all()
    assert (exact >= optimum(x, q) - 20 * EPS * size).all()
    if q == min(n, k):
        assert (exact <= 20 * EPS * size).all()


def laid_out(x, layout):
    if layout == "columns":
        return x.mT.contiguous().mT
    if layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"))
        wide[..., 1 : 1 + 2 * x.shape[-1] : 2] = x
        return wide[..., 1 : 1 + 2 * x.shape[-1] : 2]
    return x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(form, dtype):
    x = torch.stack([matrix(50, 70, SPECTRA["power"], seed=seed) for seed in range(2)]).to(dtype)
    got = svd_lowrank(x, 6, generator=seeded())
    assert got.U.dtype == got.S.dtype == got.Vh.dtype == got.error.dtype == torch.float32
    wide = svd_lowrank(x.float(), 6, generator=seeded())
    assert all(map(torch.equal, got, wide))


def test_a_list_of_mixed_shapes_comes_back_in_its_order(form):
    shapes = [(30, 50), (50, 30), (30, 50), (12, 12), (50, 30)]
    xs = [matrix(*shape, SPECTRA["power"], seed=i) for i, shape in enumerate(shapes)]
    xs.append(xs[0].double())
    results = svd_lowrank(xs, 5, generator=seeded())
    assert isinstance(results, list) and len(results) == len(xs)
    for x, result in zip(xs, results, strict=True):
        assert isinstance(result, LowRankSVD) and result.U.dtype == x.dtype
        assert result.U.shape == (x.shape[0], 5) and result.Vh.shape == (5, x.shape[1])
        assert sound(result) and residual(x, result) <= 1.01 * optimum(x, 5)


def test_a_list_and_a_tuple_give_what_the_stack_gives(form):
    x = torch.randn(3, 30, 50, generator=seeded())
    stack = svd_lowrank(x, 5, generator=seeded(7))
    for members in (list(x), tuple(x)):
        for i, one in enumerate(svd_lowrank(members, 5, generator=seeded(7))):
            assert all(torch.equal(a, b[i]) for a, b in zip(one, stack, strict=True))


def test_an_empty_stack():
    result = svd_lowrank(torch.zeros(0, 30, 50), 5)
    assert [tuple(t.shape) for t in result] == [(0, 30, 5), (0, 5), (0, 5, 50), (0,)]


def test_a_generator_decides_everything_and_spares_the_global_one(form):
    x = torch.randn(2, 80, 60, generator=seeded())
    state = torch.get_rng_state()
    first, again, other = (svd_lowrank(x, 5, 1, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first.S, other.S)
    svd_lowrank(x, 5, 1)
    assert not torch.equal(state, torch.get_rng_state())


def test_without_gradients_in_inference_mode_and_under_autocast(form):
    x = torch.randn(30, 50, generator=seeded(), requires_grad=True)
    plain = svd_lowrank(x, 5, generator=seeded())
    assert not any(t.requires_grad for t in plain)
    with torch.inference_mode():
        assert all(map(torch.equal, plain, svd_lowrank(x, 5, generator=seeded())))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, plain, svd_lowrank(x, 5, generator=seeded())))


def test_more_iterations_and_more_columns_come_closer():
    x = torch.randn(4, 200, 300, generator=seeded())
    by_niter = [residual(x, svd_lowrank(x, 10, n, generator=seeded())).mean() for n in (0, 2, 6)]
    assert by_niter[0] > by_niter[1] > by_niter[2]
    by_columns = [
        residual(x, svd_lowrank(x, 10, 2, oversample=p, generator=seeded())).mean()
        for p in (0, 10, 40)
    ]
    assert by_columns[0] > by_columns[1] > by_columns[2]


# --------------------------------------------------------------------------------------- bad input


def spoiled(value, dtype=torch.float32):
    x = torch.ones(2, 6, 8, dtype=dtype)
    x[1, 2, 3] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_matrix_that_is_not_finite_is_named(form, value, dtype):
    x = spoiled(value, dtype)
    with pytest.raises(ValueError, match=r"matrices\[1\] holds NaN or infinity"):
        svd_lowrank(x, 2)
    with pytest.raises(ValueError, match=r"matrices\[2\] holds NaN or infinity"):
        svd_lowrank([torch.ones(3, 3), x[0], x[1]], 2)
    with pytest.raises(ValueError, match=r"matrices holds NaN or infinity"):
        svd_lowrank(x[1], 2)


GOOD = torch.ones(6, 8)


@pytest.mark.parametrize(
    "call, raised, sentence",
    [
        (dict(matrices=[]), ValueError, "empty list"),
        (dict(matrices=[GOOD, 3]), TypeError, "list of matrices"),
        (dict(matrices=3), TypeError, "list of matrices"),
        (dict(matrices=torch.ones(6)), ValueError, r"must be \[..., N, K\]"),
        (dict(matrices=[GOOD, torch.ones(2, 6, 8)]), ValueError, r"matrices\[1\] has shape"),
        (dict(matrices=torch.ones(0, 8), q=1), ValueError, "no elements"),
        (dict(matrices=GOOD.to(torch.complex64)), TypeError, "complex64; it must be real"),
        (dict(matrices=GOOD.long()), TypeError, "int64; it must be real"),
        (dict(matrices=[GOOD, GOOD.bool()]), TypeError, r"matrices\[1\] is torch.bool"),
        (dict(matrices=[GOOD, GOOD.to("meta")]), ValueError, r"matrices\[1\] is on meta"),
        (dict(q=7), ValueError, "at most 6 singular values"),
        (dict(matrices=[GOOD, torch.ones(1, 4)]), ValueError, r"matrices\[1\] has shape \[1, 4\]"),
        (dict(q=0), ValueError, "q must be at least 1"),
        (dict(q=2.0), TypeError, "q must be an integer"),
        (dict(q=True), TypeError, "q must be an integer"),
        (dict(niter=-1), ValueError, "niter must be at least 0"),
        (dict(niter=None), TypeError, "niter must be an integer"),
        (dict(oversample=-1), ValueError, "oversample must be at least 0"),
        (dict(oversample=1.5), TypeError, "oversample must be an integer"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, raised, sentence):
    with pytest.raises(raised, match=sentence):
        svd_lowrank(**(dict(matrices=GOOD, q=2) | call))


def test_bad_input_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(eager, "forward", None)
    state = torch.get_rng_state()
    for members in ([GOOD, spoiled(float("nan"))[1]], [GOOD, torch.ones(1, 9)]):
        with pytest.raises(ValueError):
            svd_lowrank(members, 2)
    assert torch.equal(state, torch.get_rng_state())


# --------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_on_a_gpu(spectrum):
    x = torch.stack([matrix(300, 500, SPECTRA[spectrum], seed=seed) for seed in range(3)])
    x[2] *= 1e30
    result = svd_lowrank(x.cuda(), 16, generator=seeded())  # a CPU generator serves any device
    assert result.U.is_cuda
    result = LowRankSVD(*(t.cpu() for t in result))
    assert sound(result)
    size = torch.linalg.matrix_norm(x.double())
    assert (residual(x, result) <= 1.01 * optimum(x, 16) + 20 * EPS * size).all()
