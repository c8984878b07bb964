"""What the operation promises: the published rules, and what it refuses."""

import pytest
import torch

from fastlora.ops import EightBit, apply_momentum, fold_gradients, sign_momentum
from tests.ops.sign_momentum.cases import copies, held, lists


def test_the_published_rule_of_lion():
    """google/automl's and lion-pytorch's: decay, sign of the interpolation, then momentum."""
    params, momenta = lists(shapes=[(16, 33)])
    p, m = params[0].clone(), momenta[0].clone()
    for step in range(100):
        g = torch.randn(16, 33, generator=torch.Generator().manual_seed(step))
        sign_momentum(params, [g], momenta, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        p = p * (1 - 1e-3 * 0.1)
        p = p - 1e-3 * torch.sign(m * 0.9 + g * (1 - 0.9))
        m = m * 0.99 + g * (1 - 0.99)
    torch.testing.assert_close(params[0], p, rtol=1e-6, atol=1e-6)


def test_tiger_is_lion_with_equal_betas_and_folding_is_its_accumulation():
    """Where every operation is exact, k micro-steps are one step with the mean, to the bit."""
    params, momenta = lists(shapes=[(4, 8)])
    momenta[0].copy_(torch.arange(32.0).view(4, 8) - 16)
    other, kept = copies(params), copies(momenta)
    grads = [(torch.arange(32.0).view(4, 8) * (i + 1) % 7 - 3) for i in range(4)]
    for i, g in enumerate(grads):
        fold_gradients(momenta, [g], decay=0.5 if i == 0 else 1.0, weight=0.5 / 4)
    apply_momentum(params, momenta, lr=1e-2, weight_decay=0.1)
    mean = sum(grads) / 4
    sign_momentum(other, [mean], kept, lr=1e-2, betas=(0.5, 0.5), weight_decay=0.1)
    assert held(params, momenta) == held(other, kept)


def test_the_last_fold_and_the_step_are_one_pass():
    params, momenta = lists()
    other, kept = copies(params), copies(momenta)
    grads = [torch.randn_like(p) for p in params]
    fold_gradients(momenta, grads, decay=1.0, weight=0.01)
    apply_momentum(params, momenta, lr=1e-2)
    sign_momentum(other, grads, kept, lr=1e-2, coefficients=(1.0, 0.01, 1.0, 0.01))
    assert held(params, momenta) == held(other, kept)


def test_a_gradient_that_is_not_finite_shrinks_its_tensor_alone():
    params, momenta = lists(shapes=[(4, 4), (4, 4)])
    before, kept = copies(params), copies(momenta)
    grads = [torch.full((4, 4), float("inf")), torch.ones(4, 4)]
    lost = fold_gradients(
        momenta, grads, decay=0.9, weight=0.1, params=params, shrink=(0.5, [1.0, 0.0])
    )
    assert lost.tolist() == [True, False]
    assert torch.equal(params[0], (before[0] - 1) * 0.5 + 1) and torch.equal(momenta[0], kept[0])
    assert torch.equal(params[1], before[1]) and not torch.equal(momenta[1], kept[1])
    here = copies(params)
    apply_momentum(params, momenta, lr=1.0, skip=lost)
    assert torch.equal(params[0], here[0]) and not torch.equal(params[1], here[1])


def test_rows_that_do_not_move_keep_their_bytes():
    params, momenta = lists(torch.bfloat16, shapes=[(6, 5)])
    before = params[0].clone()
    mask = torch.tensor([True, False, True, False, False, True])
    sign_momentum(
        params, [torch.randn(6, 5)], momenta, lr=0.1, betas=(0.9, 0.99), weight_decay=0.5,
        rows=[mask],
    )  # fmt: skip
    assert torch.equal(params[0][~mask], before[~mask])
    assert (params[0][mask] != before[mask]).any(dim=1).all()


def test_strides():
    params, momenta = lists(shapes=[(6, 5)])
    turned = params[0].t().contiguous().t()
    other = copies(momenta)
    g = torch.randn(6, 5)
    for p, m in ((params, momenta), ([turned], other)):
        sign_momentum(p, [g], m, lr=0.1, betas=(0.9, 0.99), relative="rows")
    assert torch.equal(turned, params[0]) and torch.equal(other[0], momenta[0])


def test_eight_bit_keeps_signs_and_what_was_decoded():
    values = torch.randn(1000)
    coded = EightBit.from_float(values)
    back = coded.to_float()
    assert torch.equal(EightBit.from_float(back).codes, coded.codes)
    assert (back - values).abs().max() < values.abs().max() / 100
    assert (back.sign() == values.sign())[values.abs() > values.abs().max() / 64000].all()
    again = EightBit.from_state_dict(coded.state_dict())
    assert torch.equal(again.to_float(), back)
    assert EightBit.from_float(torch.tensor([1.0, float("nan")])).to_float().isnan().all()


@pytest.mark.parametrize(
    "change, error",
    [
        ({"lr": -1.0}, ValueError),
        ({"lr": float("nan")}, ValueError),
        ({"betas": (0.9, 1.1)}, ValueError),
        ({"weight_decay": [0.1]}, ValueError),
        ({"relative": "column"}, ValueError),
        ({"rounding": "stochastic"}, ValueError),
        ({"rows": [torch.ones(3, dtype=torch.bool), None]}, ValueError),
    ],
)
def test_refused_numbers(change, error):
    params, momenta = lists(shapes=[(4, 4), (3,)])
    before = held(params, momenta)
    with pytest.raises(error):
        sign_momentum(
            params, [torch.ones(4, 4), torch.ones(3)], momenta,
            **({"lr": 0.1, "betas": (0.9, 0.99)} | change),
        )  # fmt: skip
    assert held(params, momenta) == before


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("kind", ["shape", "complex", "integer", "sparse", "twice", "expanded"])
def test_refused_tensors(kind, backend):
    params, momenta = lists(shapes=[(4, 4), (3,)])
    grads = [torch.ones(4, 4), torch.ones(3)]
    before = held(params, momenta)
    given = list(params)
    if kind == "shape":
        grads[1] = torch.ones(4)
    elif kind == "complex":
        grads[1] = torch.ones(3, dtype=torch.complex64)
    elif kind == "integer":
        grads[1] = torch.ones(3, dtype=torch.int64)
    elif kind == "sparse":
        grads[0] = grads[0].to_sparse()
    elif kind == "twice":
        given, momenta = [params[0], params[0]], [momenta[0], torch.zeros(4, 4)]
        grads[1] = torch.ones(4, 4)
        before = held(params, momenta)
    else:
        given[1] = torch.ones(1).expand(3)
    with pytest.raises((ValueError, TypeError)):
        sign_momentum(given, grads, momenta, lr=0.1, betas=(0.9, 0.99), backend=backend)
    assert held(params, momenta) == before


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_check_only_writes_nothing_and_raises_all_the_same(backend):
    params, momenta = lists(shapes=[(4, 4), (3,)])
    grads = [torch.ones(4, 4), torch.ones(3)]
    before = held(params, momenta)
    options = {"check_only": True, "backend": backend}
    assert sign_momentum(params, grads, momenta, lr=0.1, betas=(0.9, 0.99), **options) is None
    fold_gradients(momenta, grads, decay=0.5, weight=0.5, **options)
    apply_momentum(params, momenta, lr=0.1, **options)
    with pytest.raises(ValueError, match="shape"):
        fold_gradients(momenta, [grads[0], torch.ones(4)], decay=0.5, weight=0.5, **options)
    assert held(params, momenta) == before


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_lazily_negated_tensors(backend):
    """torch's negative bit: the memory of such a tensor holds its negative."""
    params, momenta = [torch.zeros(3)], [torch.zeros(3)]
    negated = torch._neg_view(torch.full((3,), -1.0))
    options = {"lr": 0.5, "betas": (0.5, 0.5), "backend": backend}
    sign_momentum(params, [negated], momenta, **options)
    assert params[0].tolist() == [-0.5] * 3 and momenta[0].tolist() == [0.5] * 3
    for given in (([negated], momenta), (params, [negated])):
        with pytest.raises(TypeError, match="negated view"):
            sign_momentum(given[0], [torch.ones(3)], given[1], **options)


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_a_strided_skip(backend):
    params, momenta = [torch.zeros(3) for _ in range(3)], [torch.ones(3) for _ in range(3)]
    skip = torch.tensor([True, False, False, False, True, False])[::2]
    apply_momentum(params, momenta, lr=1.0, skip=skip, backend=backend)
    assert [float(p[0]) for p in params] == [0.0, -1.0, 0.0]


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_rows_of_what_shrinks_may_be_others_than_of_momentum(backend):
    params, momenta = [torch.ones(3, 2), torch.ones(3, 2)], [torch.ones(3, 2), torch.ones(3, 2)]
    grads = [torch.full((3, 2), float("nan")), torch.zeros(3, 2)]
    mask = torch.tensor([False, True, False])
    fold_gradients(
        momenta, grads, decay=0.5, weight=1.0, params=params, shrink=(0.5, 0.0),
        rows=[mask, mask], mask_momentum_rows=False, backend=backend,
    )  # fmt: skip
    assert params[0][:, 0].tolist() == [1.0, 0.5, 1.0] and torch.equal(params[1], torch.ones(3, 2))
    assert momenta[0].eq(1.0).all() and momenta[1].eq(0.5).all()


def test_float64_gradients_are_folded_into_any_momentum():
    momenta = [torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)]
    fold_gradients(momenta, [torch.ones(3, dtype=torch.float64)] * 2, decay=1.0, weight=0.5)
    assert all(m.eq(0.5).all() for m in momenta)
