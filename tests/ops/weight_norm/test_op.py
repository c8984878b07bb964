"""What surrounds the backends: checks, gradients, autocast, inference mode, torch.compile."""

import pytest
import torch
from torch.autograd import forward_ad as fwAD
from torch.utils.checkpoint import checkpoint

from fastlora.ops.weight_norm import FLOOR, WeightNormCache, eager, weight_norm
from fastlora.ops.weight_norm.reference import weight_norm_reference
from tests.ops.weight_norm.cases import SCALING, TOLERANCE, error, exact, operands


def gradients(w, a, b, dn, **options):
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    weight_norm(w, a, b, SCALING, differentiable=True, **options).backward(dn)
    return a.grad, b.grad


def exact_gradients(w, a, b, dn):
    a, b = (t.detach().to(w.dtype).double().requires_grad_() for t in (a, b))
    weight_norm_reference(w.double(), a, b, SCALING).backward(dn.double())
    return a.grad, b.grad


# --------------------------------------------------------------------------------------- gradients


def test_it_is_a_constant_unless_asked():
    w, a, b = (t.requires_grad_() for t in operands(5, 7, 2))
    norm = weight_norm(w, a, b, SCALING)
    assert not norm.requires_grad and norm.grad_fn is None


@pytest.mark.parametrize("trained", ["ab", "a", "b"])
def test_the_full_gradient_agrees_with_finite_differences(trained):
    w, a, b = operands(6, 9, 3, torch.float64)
    a.requires_grad_("a" in trained)
    b.requires_grad_("b" in trained)
    assert torch.autograd.gradcheck(
        lambda a, b: weight_norm(w, a, b, SCALING, differentiable=True), (a, b)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1 << 20, 100])
def test_gradients_are_those_of_the_reference(dtype, chunk, monkeypatch):
    monkeypatch.setattr(eager, "_CPU_CHUNK", chunk)
    monkeypatch.setattr(eager, "_MIN_ROWS", 3)
    w, a, b = operands(37, 50, 6)
    w = w.to(dtype)
    dn = torch.randn(37, generator=torch.Generator().manual_seed(2))
    got, expected = gradients(w, a, b, dn), exact_gradients(w, a, b, dn)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine.double() - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_gradients_come_in_the_adapters_dtype():
    w, a, b = operands(7, 8, 2, torch.bfloat16)
    assert [g.dtype for g in gradients(w, a, b, torch.ones(7))] == [torch.bfloat16] * 2


def test_at_the_floor_the_gradient_is_zero():
    w, a, b = operands(4, 6, 2)
    w[1], b[1] = 0, 0
    dA, dB = gradients(w, a, b, torch.ones(4))
    assert torch.isfinite(dA).all()
    assert dB[1].eq(0).all() and dB[0].ne(0).all()


def test_no_second_derivative():
    w, a, b = operands(4, 6, 2)
    a.requires_grad_()
    norm = weight_norm(w, a, b, SCALING, differentiable=True)
    (da,) = torch.autograd.grad(norm.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        da.sum().backward()


def test_a_retained_graph_gives_the_same_again():
    w, a, b = operands(4, 6, 2)
    b.requires_grad_()
    norm = weight_norm(w, a, b, SCALING, differentiable=True).sum()
    (first,) = torch.autograd.grad(norm, b, retain_graph=True)
    (second,) = torch.autograd.grad(norm, b)
    assert torch.equal(first, second)


def test_checkpointed():
    w, a, b = operands(8, 6, 2)
    a.requires_grad_()

    def call(a):
        return weight_norm(w, a, b, SCALING, differentiable=True)

    (plain,) = torch.autograd.grad(call(a).sum(), a)
    (again,) = torch.autograd.grad(checkpoint(call, a, use_reentrant=False).sum(), a)
    assert torch.equal(plain, again)


# ------------------------------------------------------------------------------------- surroundings


def test_autocast_changes_nothing():
    w, a, b = operands(9, 30, 4)
    plain = weight_norm(w, a, b, SCALING), *gradients(w, a, b, torch.ones(9))
    with torch.autocast("cpu", torch.bfloat16):
        cast = weight_norm(w, a, b, SCALING), *gradients(w, a, b, torch.ones(9))
    assert all(map(torch.equal, plain, cast))


def test_inference_mode_and_inference_tensors():
    with torch.inference_mode():
        w, a, b = operands(9, 30, 4)
        norm = weight_norm(w, a, b, SCALING)
    assert error(norm, exact(*(t.clone() for t in (w, a, b)))) <= TOLERANCE


@pytest.mark.parametrize("differentiable", [False, True])
def test_transforms_and_forward_mode_run_the_formula(differentiable):
    w, a, b = operands(6, 9, 3)
    direction, many = torch.randn_like(a), torch.stack((a, 2 * a))

    def norm(a):
        return weight_norm(w, a, b, SCALING, differentiable=differentiable)

    full, _ = exact_gradients(w, a, b, torch.ones(6))
    expected = full.float() if differentiable else torch.zeros_like(a)
    torch.testing.assert_close(torch.func.grad(lambda a: norm(a).sum())(a), expected)
    slope = torch.func.jvp(lambda a: norm(a).sum(), (a,), (direction,))[1]
    torch.testing.assert_close(slope, (expected * direction).sum())
    with fwAD.dual_level():
        slope = fwAD.unpack_dual(norm(fwAD.make_dual(a, direction)).sum()).tangent
    assert differentiable or slope is None
    torch.testing.assert_close(slope or torch.zeros(()), (expected * direction).sum())
    torch.testing.assert_close(torch.func.vmap(norm)(many), torch.stack([norm(m) for m in many]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_trace_records_the_formula(dtype, autocast):
    w, a, b = (t.to(dtype) for t in operands(9, 30, 4))

    def norm(b):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return weight_norm(w, a, b, SCALING, cache=WeightNormCache())

    traced = torch.jit.trace(norm, (b,))
    for own in (b, 2 * b, torch.zeros_like(b)):
        assert error(traced(own), exact(w, a, own)) <= TOLERANCE


def test_shapes_alone_can_be_asked_for():
    norm = weight_norm(*(t.to("meta") for t in operands(9, 30, 4)), SCALING)
    assert norm.shape == (9,) and norm.is_meta


def test_compiled_whole_with_the_same_values_and_gradients():
    w, a, b = operands(12, 20, 3)
    b.requires_grad_()

    def step(a, b, differentiable):
        norm = weight_norm(w, a, b, SCALING, differentiable=differentiable)
        return (norm * b.sum(1)).sum(), norm

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for differentiable in (False, True):
        (loss, norm), (own_loss, own) = (f(a, b, differentiable) for f in (compiled, step))
        assert torch.equal(norm, own)
        (grad,), (own_grad,) = (torch.autograd.grad(v, b) for v in (loss, own_loss))
        torch.testing.assert_close(grad, own_grad)


def test_the_registered_operators_keep_torch_librarys_rules():
    from fastlora.ops.weight_norm.registered import backward_op, forward_op

    w, a, b = operands(6, 9, 3)
    a.requires_grad_()
    b.requires_grad_()
    torch.library.opcheck(forward_op, (w, a, b, SCALING, "eager"))
    norm = forward_op(w, a, b, SCALING, "eager").detach()
    arguments = (torch.ones(6), norm, w, a.detach(), b.detach(), SCALING, True, False, "eager")
    torch.library.opcheck(backward_op, arguments)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change, raised, sentence",
    [
        (dict(weight=torch.zeros(6)), ValueError, "must be matrices"),
        (dict(weight=torch.zeros(2, 3, 4)), ValueError, "must be matrices"),
        (dict(lora_A=torch.zeros(3, 8)), ValueError, r"lora_A has shape \[3, 8\]"),
        (
            dict(lora_A=torch.zeros(0, 9), lora_B=torch.zeros(6, 0)),
            ValueError,
            r"must be \[r, 9\] with r ≥ 1",
        ),
        (dict(lora_B=torch.zeros(5, 3)), ValueError, r"it must be \[6, 3\]"),
        (dict(lora_B=torch.zeros(6, 2)), ValueError, r"it must be \[6, 3\]"),
        (dict(weight=torch.zeros(6, 9, dtype=torch.int8)), TypeError, "dequantise it first"),
        (dict(lora_A=torch.zeros(3, 9).half()), TypeError, "lora_A is torch.float16"),
        (dict(lora_B=torch.zeros(6, 3).double()), TypeError, "lora_B is torch.float64"),
        (dict(lora_A=torch.zeros(3, 9, device="meta")), ValueError, "lora_A is on meta"),
        (dict(scaling=float("nan")), ValueError, "finite number, not nan"),
        (dict(scaling=float("inf")), ValueError, "finite number, not inf"),
        (
            dict(weight=torch.zeros(6, 9, requires_grad=True), differentiable=True),
            ValueError,
            r"no gradient with respect to weight: .*requires_grad_\(False\).*dora_simple=True",
        ),
        (dict(backend="cuda"), ValueError, "unknown backend 'cuda'"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(change, raised, sentence):
    w, a, b = operands(6, 9, 3)
    call = dict(weight=w, lora_A=a, lora_B=b, scaling=SCALING) | change
    with pytest.raises(raised, match=sentence):
        weight_norm(**call)


def test_the_floor_keeps_quotients_finite():
    assert torch.isfinite(torch.tensor(torch.finfo(torch.float16).max) / FLOOR)
