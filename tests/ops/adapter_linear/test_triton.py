"""The Triton kernels against the formula in float64: on a GPU, or in Triton's interpreter.

Tolerances. fp32: the largest error is at most 1e-5 of the largest element. fp16: at most twice (a
gradient: three times) the error of the same formula written plainly in fp16, plus one unit in the
last place of the largest element, which is what rounding the result itself may cost.
bf16 is left to a GPU: the interpreter's bf16 ``tl.dot`` is wrong.
"""

import os
from functools import partial
from unittest import mock

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

triton = pytest.importorskip("triton")
if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
    pytest.skip("triton was imported without its interpreter", allow_module_level=True)

import triton.language as tl  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fastlora.ops import dropout  # noqa: E402
from fastlora.ops.adapter_linear import tiles  # noqa: E402
from fastlora.ops.adapter_linear import triton as backend  # noqa: E402
from fastlora.ops.adapter_linear.contract import Needs  # noqa: E402
from fastlora.ops.adapter_linear.reference import adapter_linear_reference  # noqa: E402
from fastlora.ops.triton_dropout import philox_keep_tile  # noqa: E402

ALL = Needs(x=True, weight=True, lora_A=True, lora_B=True, bias=True)
SCALING = 0.75
HALVES = (torch.float16,) if DEVICE == "cpu" else (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def exact_fp32():
    """No TF32 in cuBLAS or in the kernels, whatever ran before."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def laid_out(matrix, layout):
    """The same values in another layout: "rows", "columns" (transposed) or "strided"."""
    if layout == "columns":
        return matrix.t().contiguous().t()
    if layout == "strided":
        wide = matrix.new_full((matrix.shape[0], 2 * matrix.shape[1] + 3), float("nan"))
        wide[:, 1 : 1 + 2 * matrix.shape[1] : 2] = matrix
        return wide[:, 1 : 1 + 2 * matrix.shape[1] : 2]
    return matrix.contiguous()


def operands(M, N, K, r, dtype, seed=0):
    """(x, weight, lora_A, lora_B, bias), dy with entries of the sizes that a model has."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        values = torch.randn(*shape, generator=generator) * scale
        return values.to(dtype).to(DEVICE)

    down, across = max(K, 1) ** -0.5, r**-0.5
    matrices = normal(M, K), normal(N, K, scale=down), normal(r, K, scale=down)
    return (*matrices, normal(N, r, scale=across), normal(N)), normal(M, N)


def formula(inputs, dy, p, seed, dtype):
    """y and the gradients of every input, by autograd through the reference in ``dtype``."""
    leaves = [v.detach().to(dtype).requires_grad_() for v in inputs]
    x, weight, lora_A, lora_B, bias = leaves
    keep, scale = None, 1.0
    if p > 0:
        keep, scale = dropout.philox_keep(tuple(x.shape), p, seed), dropout.keep_scale(p)
    y = adapter_linear_reference(x, weight, lora_A, lora_B, SCALING, bias, keep, scale)
    return y.detach(), torch.autograd.grad(y, leaves, dy.to(dtype))


def assert_close(got, exact, plain, factor, what, least=0.0):
    """The rule in this module's docstring; elements count as being of size ``least`` at least."""
    assert got.shape == exact.shape, what
    if exact.numel() == 0:
        return
    size = max(exact.abs().max().item(), least)
    error = (got.double() - exact).abs().max().item()
    assert error == error, f"{what} holds NaN"
    if plain.dtype == torch.float32:
        assert error <= 1e-5 * size, f"{what}: error {error:.3g} of {size:.3g}"
    else:
        eager = (plain.double() - exact).abs().max().item()
        allowed = factor * eager + torch.finfo(plain.dtype).eps * size
        assert error <= allowed, f"{what}: error {error:.3g}, eager {eager:.3g} of {size:.3g}"


def poisoned_empty(*args, make=torch.empty, **kwargs):
    made = make(*args, **kwargs)
    return made.fill_(float("nan")) if made.is_floating_point() else made


def check(M, N, K, r, dtype, p, needs, algorithm, layouts=("rows",) * 5, data=0, bias=True):
    """Runs forward and backward on poisoned memory, and compares all that ``needs`` asks for."""
    inputs, dy = operands(M, N, K, r, dtype, data)
    seed = torch.tensor(0x1234_5678_9ABC_DEF0 + data, device=DEVICE) if p > 0 else None
    x, weight, lora_A, lora_B = map(laid_out, inputs[:4], layouts)
    dy = laid_out(dy, layouts[4])
    own_bias = inputs[4] if bias else None
    with (
        mock.patch.object(torch, "empty", poisoned_empty),
        mock.patch.object(tiles, "algorithm", lambda *_: algorithm),
    ):
        y, t = backend.forward(
            x, weight, lora_A, lora_B, SCALING, own_bias, p, seed, need_t=needs.lora_B
        )
        grads = backend.backward(
            dy,
            x if needs.lora_A or needs.weight else None,
            weight,
            lora_A,
            lora_B,
            t if needs.lora_B else None,
            SCALING,
            p,
            seed,
            needs,
        )
    if not bias:
        inputs = (*inputs[:4], torch.zeros_like(inputs[4]))
    exact, exact_grads = formula(inputs, dy, p, seed, torch.float64)
    plain, plain_grads = formula(inputs, dy, p, seed, dtype)
    assert y.dtype == dtype
    # a single element may cancel: it is off by what its parts are off by
    wide = [v.double() for v in inputs]
    assert_close(y, exact, plain, 2, "y", largest(wide[0] @ wide[1].t(), wide[4]))
    for name, got, want, eager in zip(Needs._fields, grads, exact_grads, plain_grads, strict=True):
        assert (got is not None) == getattr(needs, name), name
        if got is not None:
            assert got.dtype == (dtype if name in ("x", "weight") else torch.float32), name
            assert_close(got, want, eager, 3, f"gradient of {name}")


def largest(*parts):
    return max(part.abs().max().item() if part.numel() else 0.0 for part in parts)


def test_an_element_whose_parts_cancel():
    """y is 0.005 there, of parts about 1."""
    check(1, 1, 1, 1, torch.float32, 0.0, Needs(*[True] * 5), "fused", data=960)


sizes = st.one_of(st.sampled_from((1, 8, 16, 32, 33)), st.integers(1, 70))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    M=st.one_of(st.sampled_from((0, 1)), sizes),
    N=sizes,
    K=sizes,
    r=st.sampled_from((1, 2, 8, 12, 16, 33, 100)),
    dtype=st.sampled_from((torch.float32, *HALVES)),
    p=st.sampled_from((0.0, 0.1, 0.5)),
    needs=st.builds(Needs, *[st.booleans()] * 5),
    algorithm=st.sampled_from(tiles.ALGORITHMS),
    layouts=st.tuples(*[st.sampled_from(("rows", "columns", "strided"))] * 5),
    data=st.integers(0, 1000),
    bias=st.booleans(),
)
def test_any_call_agrees_with_the_formula(**call):
    check(**call)


@pytest.mark.parametrize("algorithm", tiles.ALGORITHMS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("p", (0.0, 0.25))
def test_every_gradient_at_once(algorithm, dtype, p):
    check(37, 45, 70, 12, dtype, p, ALL, algorithm)


@pytest.mark.parametrize("r", (100, 300))
def test_ranks_of_several_tiles(r):
    check(18, 35, 24, r, torch.float32, 0.1, ALL, "fused")


def test_more_rows_than_one_chunk_and_more_columns_than_one_split():
    """Partial sums of H, dB, dA and t, of H more than the sum adds in one step."""
    M, N, K = (130, 150, 200) if DEVICE == "cpu" else (4100, 1030, 4104)
    check(M, N, K, 8, torch.float32, 0.1, ALL, "fused")
    check(1, N, K, 8, torch.float32, 0.1, ALL, "fused")


@pytest.mark.parametrize("M, N, K", [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_empty(M, N, K):
    check(M, N, K, 4, torch.float32, 0.1, ALL, "fused")


def test_an_expanded_gradient():
    """y.sum().backward() hands over one element, expanded."""
    inputs, dy = operands(5, 33, 20, 4, torch.float32)
    dy = torch.ones((), device=DEVICE).expand(5, 33)
    _, t = backend.forward(*inputs[:4], SCALING, None, 0.0, None, need_t=True)
    grads = backend.backward(dy, inputs[0], *inputs[1:4], t, SCALING, 0.0, None, ALL)
    exact, plain = (formula(inputs, dy, 0.0, None, d)[1] for d in (torch.float64, torch.float32))
    for name, *values in zip(Needs._fields, grads, exact, plain, strict=True):
        assert_close(*values, 3, name)


# ----------------------------------------------------------------------------------------- dropout


@triton.jit
def _keep_kernel(
    out_ptr, seed_ptr, row, M, K, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    offsets = tl.arange(0, BLOCK_M)
    rows = row + offsets.to(tl.int64)
    column = tl.program_id(0) * BLOCK_K
    keep = philox_keep_tile(tl.load(seed_ptr), rows, column, K, threshold, BLOCK_K)
    ks = column + tl.arange(0, BLOCK_K)
    mask = (offsets < M)[:, None] & (ks < K)[None, :]
    tl.store(out_ptr + offsets[:, None] * K + ks[None, :], keep.to(tl.int8), mask=mask)


def kernel_keep(M, K, p, seed, row=0, block=16):
    out = torch.full((M, K), 2, dtype=torch.int8, device=DEVICE)
    _keep_kernel[(tiles.cdiv(K, block),)](
        out, seed, row, M, K, dropout.threshold(p), BLOCK_M=32, BLOCK_K=block
    )
    return out


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    M=st.integers(1, 32),
    K=st.integers(1, 70),
    p=st.sampled_from((0.001, 0.1, 0.5, 0.999, 1.0)),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_tile_is_philox_keep_bit_for_bit(M, K, p, seed):
    seed = torch.tensor(seed, device=DEVICE)
    assert torch.equal(
        kernel_keep(M, K, p, seed), dropout.philox_keep((M, K), p, seed).to(torch.int8)
    )


def test_a_draw_that_equals_the_threshold_is_kept():
    """One draw in 65536 does; two thresholds a level apart show that some here are among them."""
    seed, p = torch.tensor(3, device=DEVICE), 0.25
    kept, next_kept = (kernel_keep(32, 8192, q, seed, block=256) for q in (p, p + 2**-16))
    assert torch.equal(kept, dropout.philox_keep((32, 8192), p, seed).to(torch.int8))
    assert (kept > next_kept).any()


def philox_words(call, key):
    """Philox4x32-7 of one call number, in Python's own integers."""
    low = 0xFFFFFFFF
    c, k = [call & low, call >> 32, 0, 0], [key & low, key >> 32]
    for _ in range(dropout.PHILOX_ROUNDS):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def test_call_numbers_beyond_32_bits():
    """A long input's later rows use the counter's second word."""
    K, row, p, key = 21, 2**33 + 5, 0.3, 0x0FED_CBA9_8765_4321
    got = kernel_keep(3, K, p, torch.tensor(key, device=DEVICE), row).cpu()
    for m in range(3):
        for k in range(K):
            word = philox_words((row + m) * 3 + k // 8, key)[k % 8 // 2]
            draw = word >> 16 if k % 2 else word & 0xFFFF
            assert got[m, k] == (draw >= dropout.threshold(p)), (m, k)


@pytest.mark.parametrize("K", (7, 8, 37, 61))
@pytest.mark.parametrize("algorithm", tiles.ALGORITHMS)
def test_one_seed_gives_one_mask_in_every_kernel(K, algorithm, monkeypatch):
    """Identities and ones in the other operands make each kernel print the mask it uses."""
    monkeypatch.setattr(tiles, "algorithm", lambda *_: algorithm)
    M, p = 34, 0.4
    seed = torch.tensor(987654321987654321, device=DEVICE)
    expected = dropout.philox_keep((M, K), p, seed)
    ones, eye = torch.ones(M, K, device=DEVICE), torch.eye(M, device=DEVICE)
    rows = torch.eye(K, device=DEVICE)  # lora_A of rank K: t is the dropped x
    _, t = backend.forward(
        ones, torch.zeros(3, K, device=DEVICE), rows, torch.zeros(3, K, device=DEVICE),
        1.0, None, p, seed, need_t=True,
    )  # fmt: skip
    assert torch.equal(t, expected * torch.tensor(dropout.keep_scale(p), device=DEVICE))
    dx, _, da, _, _ = backend.backward(
        eye, ones, torch.zeros(M, K, device=DEVICE), ones, eye, None, 1.0, p, seed,
        Needs(x=True, weight=False, lora_A=True, lora_B=False, bias=False),
    )  # fmt: skip
    assert torch.equal(da, t)
    assert torch.equal(dx, t)


def test_two_seeds_give_two_masks_and_the_rate_is_p():
    p, shape = 0.25, (32, 512)
    masks = [kernel_keep(*shape, p, torch.tensor(s, device=DEVICE)) for s in (1, 2)]
    assert not torch.equal(*masks)
    # 16384 draws: five standard deviations are 0.017
    assert all(abs(1 - m.float().mean().item() - p) < 0.017 for m in masks)


def test_dropout_without_a_seed_is_refused():
    inputs, _ = operands(2, 3, 4, 1, torch.float32)
    with pytest.raises(ValueError, match="seed"):
        backend.forward(*inputs[:4], 1.0, None, 0.1, None, need_t=False)


def test_the_seed_follows_the_generator():
    torch.manual_seed(5)
    first = backend.draw_seed(DEVICE)
    assert first.dtype == torch.int64 and first.shape == (1,) and first.device.type == DEVICE
    assert not torch.equal(first, backend.draw_seed(DEVICE))
    torch.manual_seed(5)
    assert torch.equal(first, backend.draw_seed(DEVICE))


# --------------------------------------------------------------------------------- other promises


@pytest.mark.parametrize("algorithm", tiles.ALGORITHMS)
def test_the_same_call_gives_the_same_bits(algorithm, monkeypatch):
    monkeypatch.setattr(tiles, "algorithm", lambda *_: algorithm)
    inputs, dy = operands(70, 66, 90, 12, torch.float32)
    seed = torch.tensor(77, device=DEVICE)

    def run():
        y, t = backend.forward(*inputs[:4], SCALING, inputs[4], 0.1, seed, need_t=True)
        return y, t, *backend.backward(dy, *inputs[:4], t, SCALING, 0.1, seed, ALL)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_operands_are_left_as_they_were():
    inputs, dy = operands(9, 17, 20, 4, torch.float32)
    before = [v.clone() for v in (*inputs, dy)]
    for algorithm in tiles.ALGORITHMS:
        with mock.patch.object(tiles, "algorithm", lambda *_, name=algorithm: name):
            _, t = backend.forward(*inputs[:4], SCALING, inputs[4], 0.0, None, need_t=True)
            kept = t.clone()
            backend.backward(dy, *inputs[:4], t, SCALING, 0.0, None, ALL)
        assert torch.equal(t, kept)
    assert all(map(torch.equal, before, (*inputs, dy)))


def test_tf32_only_where_torch_allows_it():
    assert backend._input_precision(torch.float16) == "ieee"
    assert backend._input_precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert backend._input_precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "r, sizes, rows, others, expected",
    [
        (16, (64,), [(64, 1)], [(64, 1)], True),
        (16, (64,), [(64, 1)], [(1, 64)], True),  # a transposed weight
        (16, (64,), [(1, 64)], [], False),  # transposed activations: M is never specialised
        (16, (60,), [(64, 1)], [], False),
        (16, (64,), [(60, 1)], [], False),
        (16, (64,), [(64, 2)], [], False),
        (16, (64,), [(64, 1)], [(128, 2)], False),
        (8, (64,), [(64, 1)], [], True),
        (24, (64,), [(64, 1)], [], False),
        (48, (64,), [(64, 1)], [], True),
    ],
)
def test_what_counts_as_regular(r, sizes, rows, others, expected):
    def tensors(strides):
        return tuple(torch.empty_strided((2, 2), s, device=DEVICE) for s in strides)

    assert backend._regular(r, sizes, tensors(rows), tensors(others)) is expected


def test_an_address_between_16_bytes_is_irregular():
    flat = torch.empty(64 * 2 + 1, device=DEVICE)
    assert backend._regular(8, (64,), (flat[:128].view(2, 64),), ())
    assert not backend._regular(8, (64,), (flat[1:].view(2, 64),), ())


# --------------------------------------------------------------------------------- with out_scale


def scaled_formula(inputs, g, dy, p, seed, drop_base, dtype):
    """y and the gradients of every input and of out_scale, by the reference in ``dtype``."""
    leaves = [v.detach().to(dtype).requires_grad_() for v in (*inputs, g)]
    x, weight, lora_A, lora_B, bias, scale = leaves
    drawn = {}
    if p > 0:
        keep = dropout.philox_keep(tuple(x.shape), p, seed)
        drawn = {"keep": keep, "keep_scale": dropout.keep_scale(p)}
    y = adapter_linear_reference(
        x, weight, lora_A, lora_B, SCALING, bias, **drawn, out_scale=scale, drop_base=drop_base
    )
    return y.detach(), torch.autograd.grad(y, leaves, dy.to(dtype))


def check_scaled(
    M, N, K, r, dtype, p, drop_base, needs, need_g, algorithm, scale_dtype=None,
    layouts=("rows",) * 5, data=0, bias=True, hidden=0.3, bias_size=1.0, keep_output=True,
):  # fmt: skip
    """As ``check``, with an out_scale; ``hidden`` is the share of it that is zero."""
    inputs, dy = operands(M, N, K, r, dtype, data)
    inputs = (*inputs[:4], inputs[4] * bias_size)
    generator = torch.Generator().manual_seed(data + 1)
    g = torch.rand(N, generator=generator) + 0.5
    g[torch.rand(N, generator=generator) < hidden] = 0.0
    g = g.to(scale_dtype or dtype).to(DEVICE)
    seed = torch.tensor(0x1234_5678_9ABC_DEF0 + data, device=DEVICE) if p > 0 else None
    drop_base = drop_base and p > 0
    x, weight, lora_A, lora_B = map(laid_out, inputs[:4], layouts)
    dy = laid_out(dy, layouts[4])
    own_bias = inputs[4] if bias else None
    whole = need_g and not (drop_base and keep_output)
    reads_y = need_g and not drop_base and keep_output
    need_z = need_g and keep_output
    with (
        mock.patch.object(torch, "empty", poisoned_empty),
        mock.patch.object(torch, "empty_like", partial(poisoned_empty, make=torch.empty_like)),
        mock.patch.object(tiles, "algorithm", lambda *_: algorithm),
    ):
        y, t, z = backend.scaled_forward(
            x, weight, lora_A, lora_B, SCALING, own_bias, p, seed,
            out_scale=g, drop_base=drop_base, need_t=needs.lora_B or whole, need_z=need_z,
        )  # fmt: skip
        assert (z is not None) == (drop_base and need_z)
        grads = backend.scaled_backward(
            dy,
            x if needs.lora_A or needs.weight or whole else None,
            weight if needs.x or whole else None,
            lora_A if needs.x else None,
            lora_B if needs.x or needs.lora_A or whole else None,
            t,
            SCALING,
            p,
            seed,
            needs,
            out_scale=g,
            drop_base=drop_base,
            bias=own_bias if reads_y else None,
            read=y if reads_y else z,
            need_out_scale=need_g,
        )
    if not bias:
        inputs = (*inputs[:4], torch.zeros_like(inputs[4]))
    exact, exact_grads = scaled_formula(inputs, g, dy, p, seed, drop_base, torch.float64)
    plain, plain_grads = scaled_formula(inputs, g, dy, p, seed, drop_base, dtype)
    assert y.dtype == dtype
    assert_close(y, exact, plain, 2, "y")
    asked = needs._asdict() | {"out_scale": need_g}
    for name, got, want, eager in zip(asked, grads, exact_grads, plain_grads, strict=True):
        assert (got is not None) == asked[name], name
        if got is not None:
            # a column's sum over rows is as large as this, unless its terms happen to cancel
            usual = 0.0
            if name == "out_scale" and M * N:
                z, _ = scaled_formula(inputs, g * 0 + 1, dy, p, seed, False, torch.float64)
                usual = ((z - inputs[4]) * dy).double().norm(dim=0).max().item()
            assert_close(got, want, eager, 3, f"gradient of {name}", usual)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    M=st.one_of(st.sampled_from((0, 1)), sizes),
    N=sizes,
    K=sizes,
    r=st.sampled_from((1, 8, 12, 33, 100)),
    dtype=st.sampled_from((torch.float32, *HALVES)),
    p=st.sampled_from((0.0, 0.1, 0.5)),
    drop_base=st.booleans(),
    needs=st.builds(Needs, *[st.booleans()] * 5),
    need_g=st.booleans(),
    algorithm=st.sampled_from(tiles.ALGORITHMS),
    scale_dtype=st.sampled_from((None, torch.float32)),
    layouts=st.tuples(*[st.sampled_from(("rows", "columns", "strided"))] * 5),
    data=st.integers(0, 1000),
    bias=st.booleans(),
    hidden=st.sampled_from((0.0, 0.1, 1.0)),
    keep_output=st.booleans(),
)
def test_any_call_with_an_out_scale_agrees_with_the_formula(**call):
    check_scaled(**call)


@pytest.mark.parametrize("algorithm", tiles.ALGORITHMS)
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("p, drop_base", [(0.0, False), (0.25, False), (0.25, True)])
@pytest.mark.parametrize("keep_output", [True, False])
def test_every_gradient_at_once_with_an_out_scale(algorithm, dtype, p, drop_base, keep_output):
    check_scaled(37, 45, 70, 12, dtype, p, drop_base, ALL, True, algorithm, keep_output=keep_output)


@pytest.mark.parametrize("M, bias_size", [(70, 0.05), (70, 30.0), (3, 30.0)])
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("keep_output", [True, False])
def test_a_bias_that_hides_what_out_scale_multiplied(M, bias_size, dtype, keep_output):
    """Where y rounded no longer shows it, the kernel computes it again."""
    check_scaled(
        M, 45, 40, 100, dtype, 0.0, False, ALL, True, "fused",
        hidden=0.0, bias_size=bias_size, keep_output=keep_output,
    )  # fmt: skip


@pytest.mark.parametrize("keep_output", [True, False])
def test_an_out_scale_over_several_chunks_and_rank_tiles(keep_output):
    M, N, K = (130, 150, 200) if DEVICE == "cpu" else (4100, 1030, 4104)
    check_scaled(
        M, N, K, 40, torch.float32, 0.0, False, ALL, True, "fused",
        hidden=0.02, keep_output=keep_output,
    )  # fmt: skip


@pytest.mark.parametrize("M, N, K", [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
@pytest.mark.parametrize("p, drop_base", [(0.0, False), (0.1, True)])
@pytest.mark.parametrize("keep", [True, False])
def test_empty_with_an_out_scale(M, N, K, p, drop_base, keep):
    check_scaled(M, N, K, 4, torch.float32, p, drop_base, ALL, True, "fused", keep_output=keep)
