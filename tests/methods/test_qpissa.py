"""QPiSSA's rounds with a quantiser that rounds to a grid."""

import pytest
import torch

from fastlora.methods import qpissa


def grid(matrix):
    """Symmetric, 4 bits, one step a row."""
    step = matrix.abs().amax(1, keepdim=True) / 7
    return (matrix / step).round() * step


def weight(dtype=torch.float64):
    """A spectrum that falls, as trained weights' does."""
    generator = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(48, 64, generator=generator, dtype=torch.float64))
    return (U * (torch.arange(48) + 1.0) ** -1 @ Vh[:48]).to(dtype)


@pytest.mark.parametrize("niter", [None, 4])
@pytest.mark.parametrize("scaling", [1.0, 1.5])
def test_the_error_shrinks(scaling, niter):
    W = weight()
    found = qpissa(W, 8, scaling, grid, n_iter=5, niter=niter)
    assert len(found.errors) == 6
    plain, first, last = found.errors[0], found.errors[1], found.errors[-1]
    assert first < 0.7 * plain  # what PiSSA is for: the residual's range is less
    assert all(b < a for a, b in zip(found.errors, found.errors[1:], strict=False))
    assert last < 0.9 * first
    rest = W - found.weight - scaling * found.lora_B @ found.lora_A
    assert torch.linalg.matrix_norm(rest).item() == pytest.approx(last, rel=1e-9)
    assert plain == pytest.approx(torch.linalg.matrix_norm(W - grid(W)).item(), rel=1e-12)


def test_the_base_is_a_quantised_weight_and_the_adapter_balanced():
    found = qpissa(weight(), 8, 1.5, grid)
    torch.testing.assert_close(grid(found.weight), found.weight, atol=1e-12, rtol=1e-12)
    A, B = found.lora_A, found.lora_B
    torch.testing.assert_close(A @ A.T, B.T @ B, atol=1e-12, rtol=1e-12)
    assert A.shape == (8, 64) and B.shape == (48, 8)


def test_one_round_is_pissa_and_then_quantisation():
    W = weight()
    found = qpissa(W, 8, 2.0, grid, n_iter=1)
    U, S, Vh = torch.linalg.svd(W)
    principal = (U[:, :8] * S[:8]) @ Vh[:8]
    product = 2.0 * found.lora_B @ found.lora_A
    torch.testing.assert_close(product, principal, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.weight, grid(W - principal), atol=1e-12, rtol=1e-12)


def test_half_precision_is_decomposed_in_float32_and_the_weight_left_alone():
    W = weight(torch.bfloat16)
    before = W.clone()
    found = qpissa(W, 4, 1.0, lambda m: m.mul_(1))  # an exact one that writes into what it gets
    assert torch.equal(W, before) and found.weight.dtype == torch.float32
    assert found.errors == [0.0] * 6


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"r": 0}, "r must be a whole number"),
        ({"r": 49}, "no such rank"),
        ({"n_iter": 0}, "n_iter must be"),
        ({"scaling": 0.0}, "scaling must be above 0"),
        ({"weight": torch.zeros(3)}, "floating matrix"),
        ({"weight": torch.zeros(9, 9, dtype=torch.int8)}, "floating matrix"),
        ({"weight": torch.full((9, 9), torch.nan)}, "the weight has NaN"),
        ({"quantise": lambda m: m[:-1]}, r"quantise made \[47, 64\]"),
        ({"quantise": lambda m: m * torch.inf}, "quantise made NaN"),
    ],
)
def test_refusals(change, match):
    options = {"weight": weight(), "r": 8, "scaling": 1.0, "quantise": grid} | change
    with pytest.raises(ValueError, match=match):
        qpissa(**options)
