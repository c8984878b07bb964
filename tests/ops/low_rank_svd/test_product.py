"""svd_product against the full SVD of the formed product in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlora.ops import ProductSVD, svd_product
from fastlora.ops.low_rank_svd.reference import svd_product_reference
from tests.ops.low_rank_svd.cases import ORTHOGONAL, seeded, sound

UNIT = {torch.float32: torch.finfo(torch.float32).eps, torch.float64: 1e-13}


def factors(n, r, k, batch=(), dtype=torch.float32, seed=0):
    generator = seeded(seed)
    shapes = ((*batch, n, r), (*batch, r, k))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def exact(b, a, result):
    """Sound, and B·A to a few units in the last place of its largest singular value."""
    assert sound(result, ORTHOGONAL if result.U.dtype == torch.float32 else 1e-13)
    u, s, vh = (t.double() for t in result)
    product = b.double() @ a.double()
    reference = svd_product_reference(b.double(), a.double())[1]
    assert result.S.shape == reference.shape
    unit = 8 * UNIT[result.S.dtype] * reference[..., :1]
    assert ((s - reference).abs() <= unit).all()
    off = torch.linalg.matrix_norm((u * s.unsqueeze(-2)) @ vh - product)
    return bool((off <= unit[..., 0] * s.shape[-1] ** 0.5).all())


@given(
    n=st.integers(1, 40),
    r=st.integers(1, 20),
    k=st.integers(1, 40),
    batch=st.sampled_from(((), (1,), (4,), (2, 3))),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(n, r, k, batch, dtype, transposed, seed):
    b, a = factors(n, r, k, batch, dtype, seed)
    if transposed:
        b, a = b.mT.contiguous().mT, a.mT.contiguous().mT
    result = svd_product(b, a)
    p = min(n, r, k)
    assert isinstance(result, ProductSVD) and result.U.dtype == dtype
    assert result.U.shape == (*batch, n, p) and result.Vh.shape == (*batch, p, k)
    assert exact(b, a, result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors(dtype):
    b, a = factors(30, 4, 50, dtype=dtype)
    result = svd_product(b, a)
    assert result.S.dtype == torch.float32 and exact(b, a, result)


def test_the_product_is_never_formed(monkeypatch):
    seen = []
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda x, y: seen.append(plain(x, y)) or seen[-1]
    )
    b, a = factors(300, 4, 500)
    svd_product(b, a)
    assert seen and max(t.numel() for t in seen) <= 4 * 500


@pytest.mark.parametrize("which", ["B", "A", "both"])
def test_zero_factors_as_a_new_adapter_has(which):
    b, a = factors(30, 4, 50, (2,))
    if which != "A":
        b[1] = 0
    if which != "B":
        a[1] = 0
    result = svd_product(b, a)
    assert exact(b, a, result) and (result.S[1] == 0).all()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rank_deficient_factors(rank):
    b, a = factors(30, 4, 50)
    b = b[:, :rank] @ factors(rank, 1, 4)[1].expand(rank, 4).contiguous()
    a = torch.cat([a[:2], a[:2]])
    assert exact(b, a, svd_product(b, a))


def test_dependent_to_the_last_bit():
    b, a = torch.ones(6, 3), torch.ones(3, 5)
    result = svd_product(b, a)
    torch.testing.assert_close(result.S, torch.tensor([3 * 30**0.5, 0, 0]))
    assert exact(b, a, result)


@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_factors_that_balance_each_other_badly(condition):
    """B = UΣ, A = Σ⁻¹V with Σ of this condition: BA is as tame as UV."""
    b, a = factors(30, 4, 50, dtype=torch.float64)
    grade = condition ** -torch.linspace(0, 1, 4, dtype=torch.float64)
    b, a = (b * grade), (a / grade[:, None])
    reference = svd_product_reference(b, a)[1]
    got = svd_product(b, a).S
    torch.testing.assert_close(got, reference, rtol=1e-15 * condition * 100, atol=0)


@pytest.mark.parametrize("scales", [(1e30, 1e-30), (1e-30, 1e-5), (1e20, 1e15), (1e-38, 1e38)])
def test_scales(scales):
    b, a = factors(30, 4, 50)
    plain = svd_product(b, a)
    result = svd_product(b * scales[0], a * scales[1])
    assert sound(result)
    torch.testing.assert_close(result.S / (scales[0] * scales[1]), plain.S, rtol=1e-5, atol=0)


def test_lists_of_mixed_shapes_in_their_order():
    shapes = [(30, 4, 20), (8, 2, 9), (30, 4, 20), (3, 5, 4)]
    pairs = [factors(*shape, seed=i) for i, shape in enumerate(shapes)]
    results = svd_product([b for b, _ in pairs], tuple(a for _, a in pairs))
    for (b, a), result in zip(pairs, results, strict=True):
        assert exact(b, a, result)


def test_an_empty_stack():
    result = svd_product(torch.zeros(0, 6, 3), torch.zeros(0, 3, 5))
    assert [tuple(t.shape) for t in result] == [(0, 6, 3), (0, 3), (0, 3, 5)]


def test_it_is_deterministic_and_without_gradients():
    b, a = factors(30, 4, 50)
    b.requires_grad_()
    first = svd_product(b, a)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        again = svd_product(b, a)
    assert all(map(torch.equal, first, again))
    assert not any(t.requires_grad for t in first)


B, A = torch.ones(6, 3), torch.ones(3, 5)


@pytest.mark.parametrize(
    "b, a, raised, sentence",
    [
        ([], [], ValueError, "empty list"),
        ([B], [A, A], ValueError, "holds 1 matrices and lora_A 2"),
        ([B], A, TypeError, "both be tensors or both be lists"),
        (B, torch.ones(4, 5), ValueError, "they must be"),
        (torch.ones(2, 6, 3), torch.ones(3, 3, 5), ValueError, "they must be"),
        ([B, B], [A, torch.ones(2, 5)], ValueError, r"lora_B\[1\] has shape"),
        (B.long(), A.long(), TypeError, "must be real"),
        (B.to(torch.complex64), A, TypeError, "must be real"),
        (B, A.double(), TypeError, "lora_A is torch.float64"),
        (B, A.to("meta"), ValueError, "lora_A is on meta"),
        (torch.ones(6, 0), torch.ones(0, 5), ValueError, "no elements"),
        (B * float("nan"), A, ValueError, "lora_B holds NaN"),
        ([B, B], [A, A * float("inf")], ValueError, r"lora_A\[1\] holds NaN"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(b, a, raised, sentence):
    with pytest.raises(raised, match=sentence):
        svd_product(b, a)


@pytest.mark.gpu
def test_on_a_gpu():
    b, a = factors(300, 16, 500, (5,))
    b[1] = 0
    result = svd_product(b.cuda(), a.cuda())
    assert result.U.is_cuda
    assert exact(b, a, ProductSVD(*(t.cpu() for t in result)))
