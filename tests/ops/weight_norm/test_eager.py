"""The PyTorch forms against the reference in float64: values, cancellation, memory.

float32 results are at most 1e-5 off, relatively, in every row: what the operation promises. For
half-precision weights too, because only the operands are rounded, never what is added up.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.ops.backend import Situation
from fastlora.ops.weight_norm import BACKENDS, FLOOR, eager, weight_norm
from tests.ops.weight_norm.cases import SCALING, TOLERANCE, error, exact, laid_out, operands

AT = Situation(torch.device("cpu"), torch.float32)
RUNNABLE = [b for b in BACKENDS if b.name != "triton" and not b.cannot(AT)]
FORMS = [b.name for b in RUNNABLE]
LAYOUTS = st.sampled_from(("rows", "columns", "strided"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def forms(*dtypes):
    """Every form with every dtype that it computes in."""
    at = (AT._replace(dtype=dtype) for dtype in dtypes)
    return [(b.name, to.dtype) for to in at for b in RUNNABLE if not b.cannot(to)]


@pytest.mark.parametrize("form, dtype", forms(*DTYPES))
@given(
    n=st.integers(0, 140),
    k=st.integers(0, 300),
    r=st.integers(1, 40),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    seed=st.integers(0, 99),
)
def test_values(form, n, k, r, dtype, layouts, seed):
    w, a, b = operands(n, k, r, dtype, seed)
    got = weight_norm(*map(laid_out, (w, a, b), layouts), SCALING, backend=form)
    assert got.dtype == torch.float32
    assert error(got, exact(w, a, b)) <= TOLERANCE


@pytest.mark.parametrize("form, dtype", forms(*DTYPES))
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_weights_of_several_chunks(form, layout, dtype, monkeypatch):
    monkeypatch.setattr(eager, "_CPU_CHUNK", 1000)
    monkeypatch.setattr(eager, "_MIN_ROWS", 4)
    w, a, b = operands(61, 83, 5, dtype, lost=(3, 60))
    got = weight_norm(laid_out(w, layout), a, b, SCALING, backend=form)
    assert error(got, exact(w, a, b)) <= TOLERANCE


def test_float64_is_computed_in_float64():
    w, a, b = operands(20, 30, 4, torch.float64)
    got = weight_norm(w, a, b, SCALING)
    assert got.dtype == torch.float64
    assert error(got, exact(w, a, b)) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapters_are_rounded_to_a_half_weight(dtype):
    w, a, b = operands(20, 30, 4)
    w = w.to(dtype)
    got = weight_norm(w, a, b, SCALING)
    assert torch.equal(got, weight_norm(w, a.to(dtype), b.to(dtype), SCALING))
    assert error(got, exact(w, a, b)) <= TOLERANCE


# ------------------------------------------------------------------------------------ cancellation


@pytest.mark.parametrize("form, dtype", forms(*DTYPES))
def test_rows_where_the_adapter_cancels_the_weight(form, dtype):
    """What is left there is rounding noise of W, 10^-3 to 10^-7 of it, and exact nevertheless."""
    w, a, b = operands(64, 512, 8, dtype, lost=range(0, 64, 3))
    expected = exact(w, a, b)
    assert expected[::3].max() < 3e-3 * expected[1::3].min()
    assert error(weight_norm(w, a, b, SCALING, backend=form), expected) <= TOLERANCE


def test_the_expansion_alone_would_be_wrong_there(monkeypatch):
    """The case is real: without the second look the same rows are wrong in every digit."""
    w, a, b = operands(64, 512, 8, lost=range(0, 64, 3))
    monkeypatch.setattr(eager, "recompute", lambda *_: None)
    wrong = weight_norm(w, a, b, SCALING, backend="eager")
    expected = exact(w, a, b)
    assert ((wrong - expected).abs() / expected)[::3].min() > 0.999
    assert error(wrong[1::3], expected[1::3]) <= TOLERANCE


@pytest.mark.parametrize("left", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.2, 0.25, 0.3, 0.4, 0.6])
@pytest.mark.parametrize("r", [1, 16, 128])
@pytest.mark.parametrize("shared", [0.0, 3.0])
def test_every_degree_of_cancellation(left, r, shared):
    """From rows that are computed anew to those just above the threshold, which lie at 0.25 where
    A's rows are independent, and higher where they have a part in common."""
    w, a, b = operands(96, 1030, r)
    a += shared * a.abs().mean()
    generator = torch.Generator().manual_seed(5)
    adapter = (SCALING * b.double() @ a.double()).float()
    noise = torch.randn(96, 1030, generator=generator)
    noise *= adapter.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    w = noise * left - adapter
    assert error(weight_norm(w, a, b, SCALING), exact(w, a, b)) <= TOLERANCE


def test_adapters_that_cancel_within_themselves():
    """BA is small though B and A are large: found by ‖A_r‖, not by ‖BA‖."""
    w, a, b = operands(32, 256, 2)
    a[1] = a[0] * (1 + 1e-4)
    b[:, 1] = -b[:, 0]
    a *= 1e3
    assert error(weight_norm(w * 1e-2, a, b, SCALING), exact(w * 1e-2, a, b)) <= TOLERANCE


# -------------------------------------------------------------------------------- zero, huge, NaN


@pytest.mark.parametrize("form, dtype", forms(*DTYPES, torch.float64))
def test_zero_rows_give_the_floor(form, dtype):
    w, a, b = operands(6, 10, 2, dtype)
    w[1], b[1], w[4], b[4] = 0, 0, 0, 0
    norm = weight_norm(w, a, b, SCALING, backend=form)
    assert norm[1] == norm[4] == torch.tensor(FLOOR, dtype=norm.dtype)
    assert torch.isfinite(torch.ones_like(norm) / norm).all()
    assert error(norm, exact(w, a, b)) <= TOLERANCE


def test_squares_beyond_float32_are_taken_in_float64():
    w, a, b = operands(5, 12, 2)
    w[0] *= 1e25
    a *= 1e15
    assert error(weight_norm(w, a, b, SCALING), exact(w, a, b)) <= TOLERANCE


def test_nan_and_infinity_stay_in_their_row():
    w, a, b = operands(5, 12, 2)
    w[1, 3], w[2, 0] = float("nan"), float("inf")
    norm = weight_norm(w, a, b, SCALING)
    assert norm[1].isnan() and norm[2].isinf()
    rest = [0, 3, 4]
    assert error(norm[rest], exact(w, a, b)[rest]) <= TOLERANCE


# ------------------------------------------------------------------------------------------ memory


class _Largest(TorchDispatchMode):
    """The most elements of any tensor made inside, views not counted."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else (result,)
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        for t in outputs:
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                self.elements = max(self.elements, t.numel())
        return result


@pytest.mark.parametrize("form, dtype", forms(torch.float32, torch.bfloat16))
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_nothing_of_the_size_of_the_weight_is_made(form, layout, dtype):
    w, a, b = operands(2048, 1536, 8, dtype, lost=range(2048))
    w = laid_out(w, layout)
    for leaf in (a, b):
        leaf.requires_grad_()
    with _Largest() as made:
        norm = weight_norm(w, a, b, SCALING, differentiable=True, backend=form)
        norm.sum().backward()
    assert made.elements <= eager._CPU_CHUNK < w.numel() / 2


def test_peak_memory_is_a_chunk():
    """What the allocator saw, temporaries inside operators included; dense takes [N, K] twice."""
    w, a, b = operands(4096, 2048, 16)
    assert _peak(lambda: weight_norm(w, a, b, SCALING)) < 0.2 * w.nbytes
    assert _peak(lambda: torch.linalg.norm(w + SCALING * (b @ a), dim=1)) >= 2 * w.nbytes


def _peak(call):
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    )
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# --------------------------------------------------------------------------------- other promises


@pytest.mark.parametrize("form", FORMS)
def test_the_same_call_gives_the_same_bits_and_leaves_its_operands(form):
    tensors = operands(300, 400, 12, lost=(7,))
    before = [t.clone() for t in tensors]
    first, second = (weight_norm(*tensors, SCALING, backend=form) for _ in range(2))
    assert torch.equal(first, second)
    assert all(map(torch.equal, before, tensors))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_no_unwritten_memory_is_read(form, layout, poison):
    w, a, b = operands(33, 45, 5, lost=(2,))
    assert error(weight_norm(laid_out(w, layout), a, b, SCALING, backend=form), exact(w, a, b)) < (
        TOLERANCE
    )
