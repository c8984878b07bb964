"""The Triton kernels against the formula in float64: on a GPU, or in Triton's interpreter.

Every row of a result is at most 1e-5 off, relatively, in every dtype: products of half-precision
operands are exact in float32, and nothing is rounded to half precision on the way.
bf16 is left to a GPU: the interpreter's bf16 ``tl.dot`` is wrong.
"""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

triton = pytest.importorskip("triton")
if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
    pytest.skip("triton was imported without its interpreter", allow_module_level=True)

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fastlora.ops.weight_norm import FLOOR, WeightNormCache, tiles, weight_norm  # noqa: E402
from fastlora.ops.weight_norm import triton as backend  # noqa: E402
from tests.ops.weight_norm.cases import (  # noqa: E402
    SCALING,
    TOLERANCE,
    error,
    exact,
    laid_out,
    operands,
)

HALVES = (torch.float16,) if DEVICE == "cpu" else (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
LAYOUTS = st.sampled_from(("rows", "columns", "strided"))


def on_device(*tensors):
    return tuple(t.to(DEVICE) for t in tensors)


def norm_of(w, a, b, layouts=("rows",) * 3, scaling=SCALING):
    tensors = map(laid_out, on_device(w, a, b), layouts)
    return weight_norm(*tensors, scaling, backend="triton").cpu()


@given(
    n=st.integers(0, 40),
    k=st.integers(0, 150),
    r=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    seed=st.integers(0, 99),
)
def test_values(n, k, r, dtype, layouts, seed):
    w, a, b = operands(n, k, r, dtype, seed)
    assert error(norm_of(w, a, b, layouts), exact(w, a, b)) <= TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [1, 12, 16, 17, 70])
def test_several_splits_and_rank_tiles(dtype, r, poison):
    n, k = (40, 500) if DEVICE == "cpu" else (4100, 4104)
    w, a, b = operands(n, k, r, dtype, lost=(0, 17, n - 1))
    arch = backend._arch(torch.device(DEVICE))
    tile = tiles.choose("rows", dtype, r, arch)
    assert tiles.splits(tile, n, k, arch)[0] > 1
    assert error(norm_of(w, a, b), exact(w, a, b)) <= TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_rows_where_the_adapter_cancels_the_weight(dtype, layout):
    w, a, b = operands(50, 90, 5, dtype, lost=range(0, 50, 3))
    assert error(norm_of(w, a, b, (layout,) * 3), exact(w, a, b)) <= TOLERANCE


@pytest.mark.parametrize("left", [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.2, 0.25, 0.3])
def test_every_degree_of_cancellation(left):
    w, a, b = operands(20, 300, 8)
    adapter = (SCALING * b.double() @ a.double()).float()
    noise = torch.randn(20, 300, generator=torch.Generator().manual_seed(5))
    noise *= adapter.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    w = noise * left - adapter
    assert error(norm_of(w, a, b), exact(w, a, b)) <= TOLERANCE


def test_a_scaling_that_float32_cannot_hold_keeps_its_digits():
    """Where the adapter cancels the weight to 1e-7, a rounded scaling would show."""
    w, a, b = operands(20, 40, 3)
    for scaling in (0.1, 1 / 3, 2.0000000001):
        w = (-scaling * b.double() @ a.double()).float()
        assert error(norm_of(w, a, b, scaling=scaling), exact(w, a, b, scaling)) <= TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_give_the_floor(dtype):
    w, a, b = operands(20, 33, 4, dtype)
    w[3], b[3] = 0, 0
    norm = norm_of(w, a, b)
    assert norm[3] == torch.tensor(FLOOR, dtype=torch.float32)
    assert error(norm, exact(w, a, b)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy, in the interpreter
def test_squares_beyond_float32_and_nan():
    w, a, b = operands(20, 33, 4)
    w[0] *= 1e25
    w[5, 2] = float("nan")
    norm, expected = norm_of(w, a, b), exact(w, a, b)
    assert norm[5].isnan()
    norm[5] = expected[5] = 1.0
    assert error(norm, expected) <= TOLERANCE


def test_the_same_call_gives_the_same_bits_and_leaves_its_operands():
    tensors = on_device(*operands(40, 300, 20, lost=(4,)))
    before = [t.clone() for t in tensors]
    first, second = (weight_norm(*tensors, SCALING, backend="triton") for _ in range(2))
    assert torch.equal(first, second)
    assert all(map(torch.equal, before, tensors))


def test_with_a_cache_and_with_gradients():
    w, a, b = on_device(*operands(20, 30, 4))
    b.requires_grad_()
    cache = WeightNormCache()
    got = []
    for options in ({"cache": cache}, {"cache": cache, "differentiable": True}):
        norm = weight_norm(w, a, b, SCALING, backend="triton", **options)
        got.append(norm)
    assert torch.equal(*got)
    (grad,) = torch.autograd.grad(got[1].sum(), b)
    plain = weight_norm(w, a, b, SCALING, backend="eager", differentiable=True)
    torch.testing.assert_close(grad, torch.autograd.grad(plain.sum(), b)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("n, k, r", [(4096, 4096, 16), (8192, 8192, 384), (576, 1536, 64)])
def test_on_a_gpu_at_the_sizes_of_models(dtype, n, k, r):
    w, a, b = operands(n, k, r, dtype, lost=(5, n - 2))
    assert error(norm_of(w, a, b), exact(w, a, b)) <= TOLERANCE
