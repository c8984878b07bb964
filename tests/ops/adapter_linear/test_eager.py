"""The forms that a CPU takes against the reference in float64: values, all gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.ops import adapter_linear, library
from fastlora.ops.adapter_linear import BACKENDS
from fastlora.ops.adapter_linear.reference import adapter_linear_reference
from fastlora.ops.backend import Situation
from fastlora.ops.dropout import draw_seed, keep_scale, philox_keep, stream_keep
from tests.ops.adapter_linear.cases import NAMES, VECTORS, InOneSum, error, exact, operands, vectors

CPU = torch.device("cpu")
RUNNABLE = {
    b.name for b in BACKENDS if b.name != "triton" and not b.cannot(Situation(CPU, torch.float32))
}
FORMS = [pytest.param(name) for name in ("eager", "onednn", "native") if name in RUNNABLE]
if "native" in RUNNABLE:
    FORMS.append(pytest.param(InOneSum("native"), id="native-in-one-sum"))


def test_all_forms_are_under_test_here():
    """oneDNN is part of every x86 build of PyTorch; a skipped form must not pass unseen."""
    assert ("onednn" in RUNNABLE) == torch.backends.mkldnn.is_available() and "eager" in RUNNABLE
    assert ("native" in RUNNABLE) == (library.missing() is None)


def run(tensors, scaling, dy, backend, p=0.0, seed=3, **options):
    torch.manual_seed(seed)
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in tensors.items()}
    y = adapter_linear(scaling=scaling, dropout_p=p, backend=backend, **leaves, **options)
    y.backward(dy)
    return {"y": y.detach()} | {n: t.grad for n, t in leaves.items() if t is not None}


def mask(tensors, p, backend, seed=3):
    """The mask the call above draws."""
    if p == 0.0:
        return {}
    torch.manual_seed(seed)
    x = tensors["x"]
    rows = x.numel() // x.shape[-1]
    shape = (rows, x.shape[-1])
    if backend == "native":
        keep = philox_keep(shape, p, draw_seed("cpu"))
    else:
        keep = stream_keep(shape, p, draw_seed("cpu"), CPU)
    return {"keep": keep.view(x.shape), "keep_scale": keep_scale(p)}


@pytest.mark.parametrize("backend", FORMS)
@given(
    leading=st.sampled_from([(0,), (1,), (7,), (2, 3), (2, 0, 3), (1, 2, 2, 3), (65,), ()]),
    k=st.integers(1, 70),
    n=st.integers(1, 70),
    r=st.sampled_from([1, 2, 8, 12, 33, 100]),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.97]),
    scaling=st.sampled_from([1.0, 0.37, -2.0, 0.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_values_and_gradients(backend, leading, k, n, r, bias, p, scaling, dtype):
    if backend != "eager" and dtype == torch.float64:
        return
    tensors = operands(leading, k, n, r, bias, dtype)
    dy = torch.randn(*leading, n, generator=torch.Generator().manual_seed(9)).to(dtype)
    got = run(tensors, scaling, dy, backend, p)
    expected = exact(tensors, scaling, dy, **mask(tensors, p, backend))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for name, value in expected.items():
        assert got[name].dtype == dtype and got[name].shape == value.shape
        assert error(got[name], value) <= tolerance, name


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize(
    "m, k, n, r", [(300, 576, 1536, 16), (300, 1536, 192, 100), (9, 640, 640, 7)]
)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_at_the_sizes_where_onednn_takes_over(backend, m, k, n, r, p):
    tensors = operands((m,), k, n, r)
    dy = torch.randn(m, n, generator=torch.Generator().manual_seed(9))
    got = run(tensors, 2.0, dy, backend, p)
    for name, value in exact(tensors, 2.0, dy, **mask(tensors, p, backend)).items():
        assert error(got[name], value) <= 1e-5, name


@pytest.mark.parametrize("backend", FORMS)
def test_strided_operands(backend):
    """A transposed weight (Conv1D), every second row of x, a broadcast dy."""
    t = operands((8,), k=24, n=20)
    tensors = t | {
        "x": operands((16,), k=24)["x"][::2],
        "weight": t["weight"].t().contiguous().t(),
        "lora_A": operands(r=4, k=48)["lora_A"][:, ::2],
    }
    dy = torch.ones(1, 1).expand(8, 20)
    got = run(tensors, 1.5, dy, backend)
    for name, value in exact(tensors, 1.5, dy).items():
        assert error(got[name], value) <= 1e-5, name


@pytest.mark.skipif("onednn" not in RUNNABLE, reason="this PyTorch was built without oneDNN")
def test_onednn_is_not_given_a_slice_to_multiply_with(monkeypatch):
    """It would take its reference code: seconds where MKL takes milliseconds."""
    from fastlora.ops.adapter_linear import onednn

    given = []
    own = torch.ops.mkldnn._linear_pointwise

    def watched(a, b, *rest):
        given.append(b.stride())
        return own(a, b, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", watched, raising=False)
    a, wide = torch.randn(80, 300), torch.randn(700, 700)
    for b in (wide[:, :300], wide[:300].t(), wide[:300, 1:].t(), wide[::2, :300]):
        got = onednn.linear(a, b)
        assert error(got, a.double() @ b.double().t()) <= 1e-5
    assert given == [(1, 700)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_half_precision(dtype, adapter_dtype, p):
    """The error stays within twice (backward: three times) the plain formula's in that dtype."""
    tensors = operands((40,), k=96, n=80, r=8, dtype=dtype, adapter_dtype=adapter_dtype)
    dy = torch.randn(40, 80, generator=torch.Generator().manual_seed(9)).to(dtype)
    drawn = mask(tensors, p, "eager")
    got = run(tensors, 2.0, dy, "eager", p)
    expected = exact(tensors, 2.0, dy, **drawn)
    plain = exact_in(tensors, dtype, 2.0, dy, drawn)
    eps = torch.finfo(dtype).eps
    for name, value in expected.items():
        wanted = tensors[name].dtype if name in tensors else dtype
        assert got[name].dtype == wanted, name
        allowed = (2 if name == "y" else 3) * error(plain[name], value) + eps
        assert error(got[name], value) <= allowed, name


def exact_in(tensors, dtype, scaling, dy, drawn, drop_base=False):
    """The reference computed in ``dtype`` all the way: the same-dtype eager of the error rule."""
    from fastlora.ops.adapter_linear.reference import adapter_linear_reference

    leaves = {
        n: None if t is None else t.detach().to(dtype).requires_grad_() for n, t in tensors.items()
    }
    y = adapter_linear_reference(scaling=scaling, drop_base=drop_base, **leaves, **drawn)
    y.backward(dy)
    return {"y": y.detach()} | {n: t.grad for n, t in leaves.items() if t is not None}


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_the_gradients_asked_for(backend, p):
    tensors = operands((6,))
    dy = torch.randn(6, 20, generator=torch.Generator().manual_seed(9))
    expected = exact(tensors, 2.0, dy, **mask(tensors, p, backend))
    for wanted in itertools.product([False, True], repeat=len(NAMES)):
        if not any(wanted):
            continue
        leaves = {
            n: tensors[n].detach().requires_grad_(w) for n, w in zip(NAMES, wanted, strict=True)
        }
        torch.manual_seed(3)
        adapter_linear(scaling=2.0, dropout_p=p, backend=backend, **leaves).backward(dy)
        for name, asked in zip(NAMES, wanted, strict=True):
            assert (leaves[name].grad is not None) == asked
            if asked:
                assert error(leaves[name].grad, expected[name]) <= 1e-5, (name, wanted)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_unwritten_memory_shows(backend, p, poison):
    tensors = operands((70,), k=65, n=67, r=3)
    got = run(tensors, 2.0, torch.ones(70, 67), backend, p)
    for name, value in got.items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("backend", FORMS)
def test_it_is_deterministic(backend):
    tensors = operands((129,), k=600, n=520, r=16)
    dy = torch.randn(129, 520, generator=torch.Generator().manual_seed(9))
    first, second = (run(tensors, 2.0, dy, backend, 0.1) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------- calls with vectors

VECTOR_SETS = [w for n in (1, 2, 3) for w in itertools.combinations(VECTORS, n)]


@pytest.mark.parametrize("backend", FORMS)
@settings(max_examples=100)
@given(
    leading=st.sampled_from([(0,), (1,), (7,), (2, 3), (2, 0, 3), (65,), ()]),
    k=st.integers(1, 40),
    n=st.integers(1, 40),
    r=st.sampled_from([1, 2, 8, 33]),
    bias=st.booleans(),
    which=st.sampled_from(VECTOR_SETS),
    zeros=st.booleans(),
    p=st.sampled_from([0.0, 0.1, 0.5]),
    drop_base=st.booleans(),
    keep_output=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_vectors(backend, leading, k, n, r, bias, which, zeros, p, drop_base, keep_output, dtype):
    if backend != "eager" and dtype == torch.float64:
        return
    drop_base = drop_base and "out_scale" in which
    tensors = operands(leading, k, n, r, bias, dtype)
    tensors |= vectors(tensors, which, zeros=zeros)
    dy = torch.randn(*leading, n, generator=torch.Generator().manual_seed(9)).to(dtype)
    got = run(tensors, 0.7, dy, backend, p, drop_base=drop_base, keep_output=keep_output)
    expected = exact(tensors, 0.7, dy, **mask(tensors, p, backend), drop_base=drop_base)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for name, value in expected.items():
        assert got[name].dtype == dtype and got[name].shape == value.shape
        assert error(got[name], value) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vector_dtype", [None, torch.float32])
@pytest.mark.parametrize("p, drop_base", [(0.0, False), (0.25, False), (0.25, True)])
@pytest.mark.parametrize("bias_size, x_size", [(0.0, 1.0), (1.0, 1.0), (30.0, 1.0), (1.0, 0.02)])
@pytest.mark.parametrize("keep_output", [True, False])
def test_vectors_in_half_precision(
    dtype, vector_dtype, p, drop_base, bias_size, x_size, keep_output
):
    """The error stays within twice (backward: three times) the plain formula's in that dtype.

    Also where the bias is so large that y, rounded, no longer shows what out_scale multiplied.
    """
    tensors = operands((40,), k=96, n=80, r=8, dtype=dtype, adapter_dtype=vector_dtype)
    tensors["bias"] = tensors["bias"] * bias_size if bias_size else None
    tensors["x"] *= x_size
    tensors |= vectors(tensors, dtype=vector_dtype, zeros=True)
    dy = torch.randn(40, 80, generator=torch.Generator().manual_seed(9)).to(dtype)
    drawn = mask(tensors, p, "eager")
    got = run(tensors, 2.0, dy, "eager", p, drop_base=drop_base, keep_output=keep_output)
    expected = exact(tensors, 2.0, dy, **drawn, drop_base=drop_base)
    plain = exact_in(tensors, dtype, 2.0, dy, drawn, drop_base)
    eps = torch.finfo(dtype).eps
    for name, value in expected.items():
        assert got[name].dtype == (tensors[name].dtype if name in tensors else dtype), name
        allowed = (2 if name == "y" else 3) * error(plain[name], value) + eps
        assert error(got[name], value) <= allowed, name


@pytest.mark.parametrize("backend", FORMS)
@given(
    wanted=st.tuples(*[st.booleans()] * 8).filter(any),
    p=st.sampled_from([0.0, 0.3]),
    drop_base=st.booleans(),
    keep=st.booleans(),
)
def test_only_the_gradients_asked_for_with_vectors(backend, wanted, p, drop_base, keep):
    tensors = operands((6,))
    tensors |= vectors(tensors, zeros=True)
    dy = torch.randn(6, 20, generator=torch.Generator().manual_seed(9))
    expected = exact(tensors, 2.0, dy, **mask(tensors, p, backend), drop_base=drop_base)
    flags = dict(zip(tensors, wanted, strict=True))
    leaves = {n: t.detach().requires_grad_(flags[n]) for n, t in tensors.items()}
    torch.manual_seed(3)
    switches = {"drop_base": drop_base, "keep_output": keep}
    y = adapter_linear(scaling=2.0, dropout_p=p, backend=backend, **switches, **leaves)
    y.backward(dy)
    for name, asked in flags.items():
        assert (leaves[name].grad is not None) == asked
        if asked:
            assert error(leaves[name].grad, expected[name]) <= 1e-5, (name, wanted)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e30])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep_output", [True, False])
def test_the_gradient_of_out_scale_where_y_does_not_show_it(size, bias, keep_output):
    """g zero, tiny or huge beside the bias: those columns are computed again, the rest read off."""
    tensors = operands((30,), bias=bias)
    tensors |= vectors(tensors, ("out_scale",))
    tensors["out_scale"][::4] *= size
    dy = torch.randn(30, 20, generator=torch.Generator().manual_seed(9))
    dy[:, tensors["out_scale"].abs() > 1e20] *= 1e-20  # leaves the other gradients finite
    got = run(tensors, 2.0, dy, "eager", keep_output=keep_output)["out_scale"].double()
    expected = exact(tensors, 2.0, dy)["out_scale"]
    size_of_dy = dy.double().abs().amax(0)
    assert ((got - expected).abs() <= 1e-5 * expected.abs().max() * size_of_dy).all()


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias_size", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("m, k, n", [(30, 24, 20), (300, 576, 640)])
def test_an_output_that_is_not_kept_changes_no_gradient(backend, dtype, bias_size, p, m, k, n):
    """At sizes of MKL and of oneDNN. All but out_scale's gradient are the same bits; that one is as
    exact as the sums it consists of, however large the bias."""
    if backend != "eager" and dtype == torch.float64:
        return
    tensors = operands((m,), k, n, bias=bias_size > 0, dtype=dtype)
    if bias_size:
        tensors["bias"] *= bias_size
    tensors |= vectors(tensors, zeros=True)
    dy = torch.randn(m, n, generator=torch.Generator().manual_seed(9)).to(dtype)
    kept, got = (run(tensors, 0.7, dy, backend, p, keep_output=k) for k in (True, False))
    own, read = got.pop("out_scale"), kept.pop("out_scale")
    assert got.keys() == kept.keys() and all(torch.equal(got[n], kept[n]) for n in got)
    expected = exact(tensors, 0.7, dy, **mask(tensors, p, backend))["out_scale"]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    assert error(own, expected) <= tolerance
    assert error(read, expected) <= 10 * tolerance


@pytest.mark.parametrize("size", [1e-7, 3e4])
def test_the_gradient_of_out_scale_where_float16_has_no_room_for_y(size):
    tensors = operands((30,), dtype=torch.float16, bias=False)
    tensors |= vectors(tensors, ("out_scale",), dtype=torch.float32)
    tensors["out_scale"] *= size
    dy = torch.randn(30, 20, generator=torch.Generator().manual_seed(9)).half()
    got, again = (
        run(tensors, 2.0, dy, "eager", keep_output=keep)["out_scale"] for keep in (True, False)
    )
    plain = exact_in(tensors, torch.float16, 2.0, dy, {})["out_scale"]
    expected = exact(tensors, 2.0, dy)["out_scale"]
    allowed = 3 * error(plain, expected) + torch.finfo(torch.float16).eps
    assert error(got, expected) <= allowed and error(again, expected) <= allowed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_out_scale_that_is_not_finite_spoils_its_own_row_only(value):
    tensors = operands((6,))
    tensors |= vectors(tensors, ("out_scale",))
    tensors["out_scale"][3] = value
    dy = torch.randn(6, 20, generator=torch.Generator().manual_seed(9))
    got = run(tensors, 2.0, dy, "eager")
    expected = exact(tensors, 2.0, dy)
    others = torch.arange(20) != 3
    assert torch.isfinite(got["y"][:, others]).all() and not torch.isfinite(got["y"][:, 3]).any()
    assert error(got["out_scale"], expected["out_scale"]) <= 1e-5
    assert torch.isfinite(got["lora_B"][others]).all()


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("drop_base", [False, True])
def test_no_unwritten_memory_shows_with_vectors(backend, drop_base, poison):
    tensors = operands((70,), k=65, n=67, r=3)
    tensors |= vectors(tensors, zeros=True)
    got = run(tensors, 2.0, torch.ones(70, 67), backend, 0.3, drop_base=drop_base)
    for name, value in got.items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("leading", [(1,), (4,), (2, 2), (1, 3), ()])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_few_rows_are_plain_pytorch_or_one_call(monkeypatch, backend, leading, bias, p):
    without_sums(monkeypatch)
    tensors = operands(leading, k=130, n=70, r=5, bias=bias)
    dy = torch.randn(*leading, 70, generator=torch.Generator().manual_seed(9))
    got = run(tensors, 2.0, dy, backend, p)
    for name, value in exact(tensors, 2.0, dy, **mask(tensors, p, backend)).items():
        assert error(got[name], value) <= 1e-5, name
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in tensors.items()}
    y = adapter_linear(scaling=2.0, dropout_p=p, backend=backend, **leaves)
    assert ("AdapterLinear" in nodes(y)) == isinstance(backend, InOneSum)


def without_sums(monkeypatch):
    """As on a processor whose products have not been measured."""
    if "native" in RUNNABLE:
        from fastlora.ops.adapter_linear import native

        monkeypatch.setattr(native, "_sums", None)


def nodes(y):
    """The names of all nodes of y's graph."""
    found, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            found.add(node.name())
            todo += [following for following, _ in node.next_functions]
    return " ".join(found)


@pytest.mark.parametrize("backend", FORMS)
def test_more_rows_or_another_dtype_go_through_the_function(monkeypatch, backend):
    without_sums(monkeypatch)

    def graph(rows, dtype=torch.float32, which=()):
        tensors = operands((rows,), dtype=dtype)
        tensors |= vectors(tensors, which) if which else {}
        leaves = {n: t.requires_grad_() for n, t in tensors.items()}
        return nodes(adapter_linear(scaling=2.0, backend=backend, **leaves))

    assert ("AdapterLinear" in graph(4)) == isinstance(backend, InOneSum)
    assert "AdapterLinear" in graph(5)
    for which in (["mid_scale"], ["out_scale"]):
        assert "AdapterLinear" not in graph(4, which=which)
        assert "AdapterLinear" in graph(5, which=which)
    if backend == "eager":
        assert "AdapterLinear" in graph(1, torch.float64)


@pytest.mark.skipif("native" not in RUNNABLE, reason="needs the native core")
@pytest.mark.parametrize("leading", [(1,), (4,), (2, 1), ()])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("which", [(), ("out_scale",), ("mid_scale", "adapter_scale"), VECTORS])
def test_few_rows_of_a_large_weight_go_through_natives_function(monkeypatch, leading, p, which):
    from fastlora.ops.adapter_linear import native

    monkeypatch.setattr(native, "_sums", native._SUMS["AuthenticAMD", "avx512"])
    tensors = operands(leading, k=1100, n=1000, r=5)
    tensors |= vectors(tensors, which) if which else {}
    dy = torch.randn(*leading, 1000, generator=torch.Generator().manual_seed(9))
    for drop_base in {False, "out_scale" in which}:
        got = run(tensors, 2.0, dy, "native", p, drop_base=drop_base)
        kept = mask(tensors, p, "native")
        for name, value in exact(tensors, 2.0, dy, **kept, drop_base=drop_base and p > 0).items():
            assert error(got[name], value) <= 1e-5, name
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in tensors.items()}
    assert "AdapterLinear" in nodes(adapter_linear(scaling=2.0, backend="native", **leaves))
    monkeypatch.setattr(native, "_sums", None)  # where nothing was measured
    assert "AdapterLinear" not in nodes(adapter_linear(scaling=2.0, backend="native", **leaves))


def test_only_few_rows_have_a_second_derivative():
    for count in (4, 5):
        tensors = operands((count,), bias=False)
        leaves = {n: t.requires_grad_() for n, t in tensors.items() if t is not None}
        y = adapter_linear(scaling=2.0, bias=None, **leaves)
        (dx,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
        if count == 5:
            with pytest.raises(RuntimeError, match="differentiate twice"):
                dx.sum().backward()
            continue
        (got,) = torch.autograd.grad(dx.square().sum(), leaves["lora_A"])
        wide = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
        exactly = adapter_linear_reference(scaling=2.0, bias=None, **wide)
        (dx,) = torch.autograd.grad(exactly.square().sum(), wide["x"], create_graph=True)
        (expected,) = torch.autograd.grad(dx.square().sum(), wide["lora_A"])
        assert error(got, expected) <= 1e-5
