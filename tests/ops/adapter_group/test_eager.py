"""The forms that a CPU takes against the reference in float64: values, all gradients."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.ops import adapter_group, library
from fastlora.ops.adapter_group import BACKENDS, gains_nothing
from fastlora.ops.backend import Situation, use_backend
from tests.ops.adapter_group.cases import (
    alone,
    exact,
    gradients_for,
    group,
    masks,
    member,
    named,
    run,
    shared,
)
from tests.ops.adapter_linear.cases import VECTORS, InOneSum, error

CPU = torch.device("cpu")
RUNNABLE = {
    b.name for b in BACKENDS if b.name != "triton" and not b.cannot(Situation(CPU, torch.float32))
}
FORMS = [pytest.param(name) for name in ("eager", "onednn", "native") if name in RUNNABLE]
if "native" in RUNNABLE:
    FORMS.append(pytest.param(InOneSum("native"), id="native-in-one-sum"))

THREE = ({"n": 20, "r": 4, "bias": True}, {"n": 12, "r": 3}, {"n": 20, "r": 4, "scaling": 0.7})


def test_all_forms_are_under_test_here():
    """oneDNN is part of every x86 build of PyTorch; a skipped form must not pass unseen."""
    assert ("onednn" in RUNNABLE) == torch.backends.mkldnn.is_available() and "eager" in RUNNABLE
    assert ("native" in RUNNABLE) == (library.missing() is None)


def compare(got, expected, tolerance, x, members):
    dtypes = {name: tensor.dtype for name, tensor in named(x, members).items()}
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
            continue
        assert got[name].dtype == dtypes.get(name, x.dtype) and got[name].shape == value.shape
        assert error(got[name], value) <= tolerance, name


kinds = st.fixed_dictionaries(
    {
        "n": st.integers(1, 40),
        "r": st.sampled_from([1, 2, 8, 12, 33]),
        "scaling": st.sampled_from([1.0, 0.37, -2.0, 0.0]),
        "bias": st.booleans(),
        "p": st.sampled_from([0.0, 0.0, 0.1, 0.5, 1e-7]),
        "which": st.sampled_from([(), (), VECTORS[:1], VECTORS[1:], VECTORS]),
        "zeros": st.booleans(),
        "keep_output": st.booleans(),
    }
)
names = st.sampled_from(
    [
        *(None, {"x"}, {"0.lora_A"}),
        {"0.lora_B", "1.lora_A", "2.bias"},
        {"x", "0.weight", "1.lora_B"},
        {"0.out_scale", "1.mid_scale", "2.adapter_scale", "2.lora_A"},
    ]
)


@pytest.mark.parametrize("backend", FORMS)
@settings(max_examples=150)
@given(
    leading=st.sampled_from([(0,), (1,), (7,), (2, 3), (2, 0, 3), (65,), ()]),
    k=st.integers(1, 40),
    kinds=st.lists(kinds, min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    same=st.booleans(),
    names=names,
    unused=st.sampled_from([None, 0, 1]),
)
def test_values_and_gradients(backend, leading, k, kinds, dtype, same, names, unused):
    if backend != "eager" and dtype == torch.float64:
        return
    if same:  # one lora_A for all
        kinds = [kind | {"r": kinds[0]["r"]} for kind in kinds]
    x, members = group(*kinds, leading=leading, k=k, dtype=dtype)
    members = shared(members) if same else members
    if names is not None and not names & set(named(x, members)):
        names = None
    dys = gradients_for(members, x)
    if unused is not None and len(dys) > 1:
        dys[unused] = None
    keeps = masks(x, members, backend)
    got = run(partial(adapter_group, backend=backend), x, members, dys, names)
    expected = exact(x, members, dys, keeps, names)
    # rounding of a sum that cancels is relative to its terms: x's gradient has one per member
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    compare(got, expected, tolerance, x, members)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize(
    "m, k, n, r", [(300, 576, 640, 16), (300, 640, 192, 100), (9, 640, 640, 7)]
)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("same", [False, True])
def test_at_the_sizes_where_onednn_takes_over(backend, m, k, n, r, p, same):
    x, members = group({"n": n, "r": r}, {"n": 576, "r": r, "p": p}, {"r": r}, leading=(m,), k=k)
    members = shared(members) if same else members
    got = run(partial(adapter_group, backend=backend), x, members)
    compare(got, exact(x, members, keeps=masks(x, members, backend)), 1e-5, x, members)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias_size", [1.0, 1e4])
@pytest.mark.parametrize("k, n", [(24, 20), (576, 640)])
@pytest.mark.parametrize("same", [False, True])
def test_an_output_that_is_not_kept_changes_no_gradient(backend, dtype, bias_size, k, n, same):
    """All but out_scale's own gradient are the same bits, beside members that keep theirs."""
    if backend != "eager" and dtype == torch.float64:
        return
    kind = {"n": n, "which": VECTORS, "bias": True, "zeros": True}
    x, kept = group(kind, kind, kind | {"p": 0.3}, {}, leading=(300,), k=k, dtype=dtype)
    kept = [m if m.bias is None else m._replace(bias=m.bias * bias_size) for m in kept]
    kept = shared(kept) if same else kept
    members = [m._replace(keep_output=index == 1) for index, m in enumerate(kept)]
    call = partial(adapter_group, backend=backend)
    got, plain = run(call, x, members), run(call, x, kept)
    expected = exact(x, members, keeps=masks(x, members, backend))
    compare(got, expected, 1e-5 if dtype == torch.float32 else 1e-12, x, members)
    for name in expected:
        if name not in ("0.out_scale", "2.out_scale"):
            assert torch.equal(got[name], plain[name]), name


@pytest.mark.parametrize("backend", FORMS)
def test_strided_operands(backend):
    """A transposed weight (Conv1D), every second row of x, slices, a broadcast dy."""
    _, members = group(*THREE)
    members[0] = members[0]._replace(weight=members[0].weight.t().contiguous().t())
    members[1] = members[1]._replace(lora_A=member(48, r=3).lora_A[:, ::2])
    members[2] = members[2]._replace(weight=member(60, n=20).weight[:, 7:31])
    x = group(leading=(16,), k=30)[0][::2, 3:27]
    dys = [torch.ones(1, 1).expand(8, m.weight.shape[0]) for m in members]
    got = run(partial(adapter_group, backend=backend), x, members, dys)
    compare(got, exact(x, members, dys), 1e-5, x, members)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("which", [(), VECTORS])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("keep", [True, False])
def test_half_precision(dtype, adapter_dtype, p, which, same, keep):
    """The error stays within twice (backward: three times) the plain formula's in that dtype."""
    kinds = ({"n": 80, "r": 8, "p": p}, {"n": 64, "r": 8}, {"n": 80, "r": 8, "scaling": 2.0})
    kinds = [kind | {"which": which, "bias": True, "keep_output": keep} for kind in kinds]
    x, members = group(*kinds, leading=(40,), k=96, dtype=dtype, adapter_dtype=adapter_dtype)
    members = shared(members) if same else members
    keeps = masks(x, members)
    got = run(partial(adapter_group, backend="eager"), x, members)
    expected = exact(x, members, keeps=keeps)
    plain = exact(x, members, keeps=keeps, dtype=dtype)
    eps = torch.finfo(dtype).eps
    tensors = named(x, members)
    for name, value in expected.items():
        assert got[name].dtype == (tensors[name].dtype if name in tensors else dtype), name
        allowed = (2 if name.startswith("y") else 3) * error(plain[name], value) + eps
        assert error(got[name], value) <= allowed, name


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("names", [None, {"x"}, {"x", "1.lora_A"}, {"0.lora_B", "2.lora_A"}])
def test_no_unwritten_memory_shows(backend, dtype, p, names, poison):
    if backend != "eager" and dtype != torch.float32:
        return
    kinds = [{"n": 67, "r": 3, "p": p}, {"n": 35, "r": 5}, {"n": 67, "r": 3, "which": VECTORS}]
    x, members = group(*kinds, leading=(70,), k=65, dtype=dtype)
    got = run(partial(adapter_group, backend=backend), x, members, names=names)
    for name, value in got.items():
        assert value is None or torch.isfinite(value).all(), name


@pytest.mark.parametrize("backend", FORMS)
def test_it_is_deterministic(backend):
    x, members = group(*[{"n": 520, "r": 16, "p": p} for p in (0, 0.1, 0)], leading=(129,), k=600)
    first, second = (run(partial(adapter_group, backend=backend), x, members) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", FORMS)
def test_one_member_is_the_layer_itself(backend):
    x, members = group({"n": 40, "r": 4, "bias": True, "p": 0.2, "which": VECTORS}, leading=(2, 3))
    got = run(partial(adapter_group, backend=backend), x, members)
    plain = run(partial(alone, backend=backend), x, members)
    for name, value in plain.items():
        assert error(got[name], value.double()) <= 1e-6, name


@pytest.mark.parametrize("backend", FORMS)
def test_masks_are_those_of_separate_calls(backend):
    """The same generator state gives the same masks, and leaves the same state behind."""
    kinds = [{"n": 40, "p": p} for p in (0.5, 0.0, 0.2, 1e-7, 0.5)]
    x, members = group(*kinds, leading=(3, 5))
    after = []

    def states(call):
        def wrapped(x, members):
            ys = call(x, members, backend=backend)
            after.append(torch.get_rng_state())
            return ys

        return wrapped

    got, plain = (run(states(call), x, members) for call in (adapter_group, alone))
    assert torch.equal(*after)
    for name, value in plain.items():
        assert error(got[name], value.double()) <= 1e-6, name
    assert not torch.equal(got["0.lora_A"], got["4.lora_A"])


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_the_gradient_of_out_scale_where_y_does_not_show_it(size, bias, same):
    """Those columns are computed again, also where t is shared and carries no scaling."""
    kinds = [{"which": ("out_scale",), "bias": bias, "scaling": s} for s in (2.0, 0.5)]
    x, members = group(*kinds, leading=(30,))
    members = shared(members) if same else members
    dys = gradients_for(members, x)
    for m, dy in zip(members, dys, strict=True):
        m.out_scale[::4] *= size
        dy[:, m.out_scale.abs() > 1e20] *= 1e-20  # leaves the other gradients finite
    got = run(partial(adapter_group, backend="eager"), x, members, dys)
    expected = exact(x, members, dys)
    for index, dy in enumerate(dys):
        wanted = expected[f"{index}.out_scale"]
        allowed = 1e-5 * wanted.abs().max() * dy.double().abs().amax(0)
        assert ((got[f"{index}.out_scale"].double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("leading", [(1,), (2, 2)])
def test_members_of_few_rows_go_one_by_one_with_the_same_results(backend, leading):
    x, members = group({"p": 0.3}, {"n": 33, "bias": True}, {"p": 0.5}, leading=leading, k=70)
    got = run(partial(adapter_group, backend=backend), x, members)
    compare(got, exact(x, members, keeps=masks(x, members, backend)), 1e-5, x, members)
    leaf = x.detach().requires_grad_()
    names = [y.grad_fn.name() for y in adapter_group(leaf, members, backend=backend)]
    assert not any("AdapterGroup" in name for name in names)
    _, scaled = group({"which": ("mid_scale", "out_scale")}, {}, leading=leading, k=70)
    names = [y.grad_fn.name() for y in adapter_group(leaf, scaled, backend=backend)]
    assert not any("AdapterGroup" in name for name in names)
    compare(
        run(partial(adapter_group, backend=backend), x, scaled), exact(x, scaled), 1e-5, x, scaled
    )


@pytest.mark.skipif("native" not in RUNNABLE, reason="needs the native core")
def test_members_that_are_one_call_each_go_one_by_one(monkeypatch):
    from fastlora.ops.adapter_linear import native

    monkeypatch.setattr(native, "_sums", native._SUMS["AuthenticAMD", "avx512"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    plain = {"n": 70, "p": 0.3}, {"n": 90, "bias": True}

    def together(*kinds, rows=9, dtype=torch.float32):
        x, members = group(*kinds, leading=(rows,), k=80, dtype=dtype)
        got = run(partial(adapter_group, backend="native"), x, members)
        compare(got, exact(x, members, keeps=masks(x, members, "native")), 1e-5, x, members)
        leaf = x.detach().requires_grad_()
        names = {y.grad_fn.name() for y in adapter_group(leaf, members, backend="native")}
        assert len(names) == 1
        alone_ = [gains_nothing(x, member) for member in members]
        return "AdapterGroup" in names.pop(), alone_

    assert together(*plain) == (False, [True, True])
    assert together(*plain, {"n": 70, "which": ("out_scale",)}) == (True, [True, True, False])
    assert together(*plain, {"n": 20}) == (True, [True, True, False])  # half a strip
    assert together(*plain, {"n": 70, "r": 65}) == (True, [True, True, False])
    assert together(*plain, rows=300) == (True, [False, False])
    x, (member, _) = group(*plain, leading=(9,), k=80)
    with torch.autocast("cpu"):
        assert not gains_nothing(x, member)
    assert not gains_nothing(x.double(), member) and gains_nothing(x, member)
    with use_backend("eager"):
        assert not gains_nothing(x, member)


@pytest.mark.skipif("native" not in RUNNABLE, reason="needs the native core")
@pytest.mark.parametrize("leading", [(1,), (2, 2)])
def test_few_rows_of_large_members_go_through_natives_function(monkeypatch, leading):
    from fastlora.ops.adapter_linear import native

    monkeypatch.setattr(native, "_sums", native._SUMS["AuthenticAMD", "avx512"])
    kinds = {"n": 700, "p": 0.3}, {"n": 1100, "bias": True, "which": ("out_scale",)}, {"n": 20}
    x, members = group(*kinds, leading=leading, k=1800)
    got = run(partial(adapter_group, backend="native"), x, members)
    compare(got, exact(x, members, keeps=masks(x, members, "native")), 1e-5, x, members)
    leaf = x.detach().requires_grad_()
    names = [y.grad_fn.name() for y in adapter_group(leaf, members, backend="native")]
    assert all("AdapterGroup" in name for name in names)
