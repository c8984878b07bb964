"""What surrounds the products: sharing, what is saved, unused outputs, compilation, refusals."""

import gc
from functools import partial

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.ops import Member, adapter_group
from fastlora.ops.adapter_group import eager
from tests.ops.adapter_group.cases import (
    TENSORS,
    alone,
    exact,
    gradients_for,
    group,
    member,
    named,
    run,
    shared,
    trained,
)
from tests.ops.adapter_linear.cases import VECTORS, error

K, R, N = 24, 4, 20  # floats a token: of x, of a t, of a y
QKV = ({}, {}, {})


def saved(call, x, members):
    """[(name of the operand or "", bytes)] of every storage kept for backward, each once."""
    known = {t.untyped_storage().data_ptr(): name for name, t in named(x, members).items()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (known.get(storage.data_ptr(), ""), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys = call(x, members)
    assert any(y.requires_grad for y in ys)
    return list(kept.values()), ys


def saved_floats(x, members):
    """Floats a token that one call keeps beside the parameters."""
    found, _ys = saved(partial(adapter_group, backend="eager"), x, members)
    return sum(size for name, size in found if name in ("x", "")) / 4 / x.shape[0]


@pytest.mark.parametrize(
    "names, kinds, floats",
    [
        # x once for all, and a t each
        (None, QKV, K + 3 * R),
        ({f"{i}.{n}" for i in range(3) for n in ("lora_A", "lora_B")}, QKV, K + 3 * R),
        # LoRA-FA: no input is kept
        ({f"{i}.lora_B" for i in range(3)}, QKV, 3 * R),
        ({"x", "0.lora_B"}, QKV, R),
        # one layer's frozen adapter keeps nothing for itself
        ({"1.lora_B"}, QKV, R),
        ({"0.lora_A", "2.lora_B"}, QKV, K + R),
        ({"x"}, QKV, 0),
        ({"1.weight"}, QKV, K),
        # VeRA's vectors
        ({"0.mid_scale", "0.adapter_scale"}, [{"which": VECTORS[1:]}] * 2, R),
        # DoRA's: a y each, once x
        ({f"{i}.out_scale" for i in range(2)}, [{"which": VECTORS[:1]}] * 2, K + 2 * R + 2 * N),
        ({"0.out_scale"}, [{"which": VECTORS[:1]}] * 2, K + R + N),
        ({"0.lora_A", "0.lora_B"}, [{"which": VECTORS[:1]}] * 2, K + R),
        # … and none where it is not to be kept
        (None, [{"which": VECTORS[:1], "keep_output": False}] * 2, K + 2 * R),
        ({"0.out_scale"}, [{"which": VECTORS[:1], "keep_output": False}] * 2, K + R),
        (
            {f"{i}.out_scale" for i in range(2)},
            [{"which": VECTORS[:1], "keep_output": keep} for keep in (True, False)],
            K + 2 * R + N,
        ),
    ],
)
def test_only_what_the_gradients_need_is_saved(names, kinds, floats):
    x, members = trained(*group(*kinds, leading=(50,)), names)
    assert saved_floats(x, members) == floats


@pytest.mark.parametrize("names", [None, {"x", "0.lora_A", "1.lora_B"}, {"0.lora_B"}, {"2.bias"}])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_it_saves_what_separate_calls_save_but_x_once(names, p):
    kinds = ({"p": p, "bias": True}, {"which": VECTORS, "bias": True}, {"bias": True})
    x, members = trained(*group(*kinds, leading=(50,)), names)
    together, _ = saved(partial(adapter_group, backend="eager"), x, members)
    separate, _ = saved(partial(alone, backend="eager"), x, members)
    assert sum(name == "x" for name, _ in together) <= 1
    assert sum(size for _, size in together) == sum(size for _, size in separate)
    assert {name for name, _ in together} <= {name for name, _ in separate}


def test_a_shared_t_is_saved_once():
    """VeRA: frozen projections, of which every layer takes a slice anew."""
    kinds = [{"which": VECTORS[1:]}] * 3
    x, members = group(*kinds, leading=(50,))
    pool = torch.randn(R, 2 * K)
    names = {f"{i}.{n}" for i in range(3) for n in VECTORS[1:]}
    x, members = trained(x, members, names)
    members = [m._replace(lora_A=pool[:, :K]) for m in members]
    assert saved_floats(x, members) == R


def test_an_output_that_is_not_used_costs_nothing(monkeypatch):
    x, members = group({}, {"n": 12}, {"which": VECTORS})
    dys = gradients_for(members, x)
    widths = []
    own = eager.aten_linear

    def watched(a, b, bias=None):
        widths.extend((*a.shape, *b.shape))
        return own(a, b, bias)

    call = partial(adapter_group, backend="eager")
    monkeypatch.setitem(eager.backward.__kwdefaults__, "linear", watched)
    got = run(call, x, members, [dys[0], None, dys[2]])
    assert 12 not in widths
    expected = exact(x, members, [dys[0], None, dys[2]])
    for name, value in expected.items():
        if name.startswith("1."):
            assert got[name] is value is None
        else:
            assert error(got[name], value) <= 1e-5, name
    for index in range(3):
        only = [dy if i == index else None for i, dy in enumerate(dys)]
        got, expected = run(call, x, members, only), exact(x, members, only)
        assert {n for n, v in got.items() if v is None} == {
            n for n, v in expected.items() if v is None
        }
        assert error(got["x"], expected["x"]) <= 1e-5


@pytest.mark.parametrize("names", [None, {"x"}, {"0.lora_A"}, {"1.bias"}, {"2.out_scale"}])
def test_outputs_need_gradients_where_a_layer_by_itself_would(names):
    x, members = trained(*group({}, {"bias": True}, {"which": VECTORS}), names)
    got, plain = (call(x, members) for call in (adapter_group, alone))
    assert [y.requires_grad for y in got] == [y.requires_grad for y in plain]
    assert isinstance(got, tuple)


def test_without_gradients_nothing_is_recorded():
    x, members = group(*QKV)
    assert all(y.grad_fn is None for y in adapter_group(x, members))
    x, members = trained(x, members)
    with torch.no_grad():
        assert all(y.grad_fn is None for y in adapter_group(x, members))
    with torch.inference_mode():
        assert all(y.is_inference() for y in adapter_group(x, members))


# ------------------------------------------------------------------------------------ shared lora_A


def products(monkeypatch, x, members, names=None):
    """The widths of lora_A's products with x forward, and with H backward."""
    down, up = [], []
    linear, update = eager.aten_linear, eager.add_product

    def watch_linear(a, b, bias=None):
        down.append(b.shape[0])
        return linear(a, b, bias)

    def watch_update(out, a, b, *rest):
        up.append(a.shape[1])
        update(out, a, b, *rest)

    monkeypatch.setitem(eager.forward.__kwdefaults__, "linear", watch_linear)
    monkeypatch.setitem(eager.backward.__kwdefaults__, "update", watch_update)
    got = run(partial(adapter_group, backend="eager"), x, members, names=names)
    expected = exact(x, members, names=names)
    for name, value in expected.items():
        assert (got[name] is None) == (value is None), name
        if value is not None:
            assert error(got[name], value) <= 1e-5, name
    widths = {m.weight.shape[0] for m in members}
    return [n for n in down if n not in widths], up


WIDE = ({"n": 21, "r": 5}, {"n": 22, "r": 5}, {"n": 23, "r": 5})
FROZEN = {"x"} | {f"{i}.lora_B" for i in range(3)}


def test_different_lora_A_are_one_product(monkeypatch):
    x, members = group(*WIDE)
    down, up = products(monkeypatch, x, members)
    assert down == [15] and up == [15]


@pytest.mark.parametrize("scalings", [(0.7, 0.7, 0.7), (0.7, 1.0, -2.0), (1.0, 1.0, 0.0)])
@pytest.mark.parametrize("names", [None, FROZEN, {"x"}, {"0.lora_A"}])
def test_the_very_same_lora_A_is_multiplied_once(monkeypatch, scalings, names):
    x, members = group(*[kind | {"scaling": s} for kind, s in zip(WIDE, scalings, strict=True)])
    down, up = products(monkeypatch, x, shared(members), names)
    assert down == [5] and (up == [5] if names != {"0.lora_A"} else not up)


def test_slices_of_a_frozen_pool_are_the_same_lora_A(monkeypatch):
    x, members = group(*WIDE)
    pool = torch.randn(8, 2 * K)
    sliced = [m._replace(lora_A=pool[:5, :K]) for m in members]
    ys = []
    down = []
    own = eager.aten_linear
    monkeypatch.setitem(
        eager.forward.__kwdefaults__,
        "linear",
        lambda a, b, bias=None: down.append(b.shape[0]) or own(a, b, bias),
    )
    ys = adapter_group(x, sliced, backend="eager")
    assert down.count(5) == 1
    other = [m._replace(lora_A=pool[i : 5 + i, :K]) for i, m in enumerate(members)]
    adapter_group(x, other, backend="eager")
    assert down.count(15) == 1
    for y, plain in zip(ys, alone(x, sliced), strict=True):
        torch.testing.assert_close(y, plain)


def test_two_parameters_over_one_memory_get_a_gradient_each():
    x, members = group(*WIDE)
    memory = members[0].lora_A
    members = [m._replace(lora_A=memory.view_as(memory)) for m in members]
    dys = gradients_for(members, x)

    def step(call, which):
        own = [
            m._replace(lora_A=torch.nn.Parameter(m.lora_A, requires_grad=i in which))
            for i, m in enumerate(members)
        ]
        torch.autograd.backward(call(x.clone().requires_grad_(), own), dys)
        return [m.lora_A.grad for m in own]

    for which in ({0, 1, 2}, {1}, {0, 2}):
        together, separate = step(adapter_group, which), step(alone, which)
        for index, (got, plain) in enumerate(zip(together, separate, strict=True)):
            assert (got is not None) == (index in which)
            if got is not None:
                torch.testing.assert_close(got, plain, atol=1e-4, rtol=1e-5)


def test_with_dropout_every_member_has_its_own_product(monkeypatch):
    x, members = group(*[kind | {"p": p} for kind, p in zip(WIDE, (0.5, 0.0, 0.5), strict=True)])
    down = []
    own = eager.aten_linear
    monkeypatch.setitem(
        eager.forward.__kwdefaults__,
        "linear",
        lambda a, b, bias=None: down.append(b.shape[0]) or own(a, b, bias),
    )
    got = run(partial(adapter_group, backend="eager"), x, shared(members))
    assert down.count(5) == 3
    plain = run(partial(alone, backend="eager"), x, shared(members))
    for name, value in plain.items():
        assert error(got[name], value.double()) <= 1e-6, name


# ------------------------------------------------------------------------------ graphs and autocast


def test_float32_adapters_over_a_half_base_get_float32_gradients():
    x, members = group(*QKV, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    got = run(adapter_group, x, members)
    assert got["y0"].dtype == torch.bfloat16
    assert got["0.lora_A"].dtype == got["2.lora_B"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_the_layers_do(dtype):
    x, members = group({"bias": True}, {"which": VECTORS, "bias": True}, {})

    def under(call):
        def wrapped(x, members):
            with torch.autocast("cpu", dtype):
                return call(x, members, backend="eager")

        return wrapped

    dys = [dy.to(dtype) for dy in gradients_for(members, x)]
    got, plain = (run(under(call), x, members, dys) for call in (adapter_group, alone))
    for name, value in plain.items():
        assert got[name].dtype == value.dtype == (dtype if name[0] == "y" else torch.float32)
        assert error(got[name], value.double()) <= 4 * torch.finfo(dtype).eps, name


def test_autocast_leaves_float64_alone():
    x, members = group(*QKV, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter_group(x, members)[0].dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_same_dropout(reentrant):
    kinds = ({"p": 0.4, "which": VECTORS}, {"p": 0.2}, {"p": 0.4, "bias": True})
    x, members = group(*kinds, leading=(30,))

    def wrapped(x, members):
        return checkpoint(lambda x: adapter_group(x, members), x, use_reentrant=reentrant)

    plain, replayed = run(adapter_group, x, members), run(wrapped, x, members)
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)


def test_recomputation_on_another_backend_never_mixes_masks():
    x, members = trained(*group({"p": 0.5}, {}, leading=(9,)))
    with fastlora.use_backend("triton"):
        ys = checkpoint(
            lambda x: adapter_group(x, members), x, use_reentrant=False, determinism_check="none"
        )
    with (
        fastlora.use_backend("eager"),
        pytest.raises(RuntimeError, match=r"recomputed on another backend.*FASTLORA_BACKEND"),
    ):
        sum(y.sum() for y in ys).backward()


def test_a_retained_graph_gives_the_same_gradients_twice():
    x, members = trained(*group({"p": 0.3}, {"which": VECTORS}, {}, leading=(30,)))
    leaves = list(named(x, members).values())
    loss = sum(y.square().sum() for y in adapter_group(x, members))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


def test_one_output_after_the_other():
    """Two backward passes, each through one output, add up to that of both."""
    x, members = group(*QKV)
    dys = gradients_for(members, x)

    def stepwise(x, members):
        ys = adapter_group(x, members)
        for y, dy in zip(ys, dys, strict=True):
            y.backward(dy, retain_graph=True)
        return [y.detach() for y in ys]

    got, expected = run(stepwise, x, members), exact(x, members, dys)
    for name, value in expected.items():
        assert error(got[name], value) <= 1e-5, name


def test_an_operand_changed_in_place_before_backward_is_noticed():
    x, members = trained(*group(*QKV), {"0.lora_A"})
    ys = adapter_group(x, members)
    members[0].lora_B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys[0].sum().backward()


@pytest.mark.parametrize("leading", [(5,), (2, 3), ()])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_an_output_may_be_changed_in_place(leading, backend):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    x, members = group({"which": VECTORS, "bias": True}, {}, leading=leading)
    x = x.to(device)
    members = [Member(*(v.to(device) if torch.is_tensor(v) else v for v in m)) for m in members]
    for name, keep in (("0.lora_B", True), ("0.out_scale", True), ("0.out_scale", False)):
        members[0] = members[0]._replace(keep_output=keep)
        leaf, own = trained(x, members, {"x", name})
        ys = adapter_group(leaf, own, backend=backend)
        # one row: plain PyTorch calls, none of which keeps y
        assert leading == () or not any(y._is_view() for y in ys)
        ys[1].mul_(2)
        ys[0].relu_()
        sum(y.sum() for y in ys).backward()
        plain_x, plain = trained(x, members, {"x", name})
        plain_ys = alone(plain_x, plain)
        (plain_ys[0].relu().sum() + 2 * plain_ys[1].sum()).backward()
        for got, wanted in ((leaf, plain_x), (named(x, own)[name], named(x, plain)[name])):
            torch.testing.assert_close(got.grad, wanted.grad, atol=1e-4, rtol=1e-5)


def test_saved_outputs_are_freed_without_the_garbage_collector():
    x, members = trained(*group({"which": VECTORS}, {}))
    gc.collect()
    gc.disable()
    try:
        ys = adapter_group(x, members)
        memory = [StorageWeakRef(y.untyped_storage()) for y in ys]
        del ys
        assert all(each.expired() for each in memory)
    finally:
        gc.enable()


def test_a_second_derivative_is_refused():
    x, members = trained(*group(*QKV))
    ys = adapter_group(x, members)
    loss = sum(y.square().sum() for y in ys)
    (gradient,) = torch.autograd.grad(loss, members[0].lora_A, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --------------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("keep_output", [True, False])
def test_drop_base_has_the_layers_own_results(p, keep_output):
    x, members = group({"p": p, "which": VECTORS}, {"p": p}, leading=(2, 3))
    members[0] = members[0]._replace(drop_base=True, keep_output=keep_output)
    got, plain = (run(call, x, members) for call in (adapter_group, alone))
    for name, value in plain.items():
        assert error(got[name], value.double()) <= 1e-6, name


def test_drop_base_under_autocast():
    x, members = trained(*group({"p": 0.3, "which": VECTORS}, {}))
    members[0] = members[0]._replace(drop_base=True)
    with torch.autocast("cpu", torch.bfloat16):
        ys = adapter_group(x, members)
    assert all(y.dtype == torch.bfloat16 for y in ys)
    sum(y.float().sum() for y in ys).backward()
    assert x.grad.dtype == torch.float32


def test_transforms_and_odd_tensors_run_the_formula():
    x, members = group({"bias": True}, {"n": 12, "which": VECTORS}, leading=(6,))
    plain = alone(x, members)

    def loss(lora_B):
        own = [members[0]._replace(lora_B=lora_B), members[1]]
        return sum(y.square().sum() for y in adapter_group(x, own))

    gradient = torch.func.grad(loss)(members[0].lora_B)
    leaf = members[0].lora_B.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(gradient, leaf.grad)
    for got in (
        torch.func.vmap(lambda row: adapter_group(row, members))(x),
        torch.jit.trace(lambda x: adapter_group(x, members), x)(x),
    ):
        for y, expected in zip(got, plain, strict=True):
            torch.testing.assert_close(y, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [
            torch.autograd.forward_ad.unpack_dual(y).tangent for y in adapter_group(dual, members)
        ]
    for tangent, moved, y in zip(tangents, alone(x + 1, members), plain, strict=True):
        torch.testing.assert_close(tangent, moved - y, atol=1e-5, rtol=1e-5)
    meta = [
        m._replace(**{n: t.to("meta") for n in TENSORS if (t := getattr(m, n)) is not None})
        for m in members
    ]
    assert [y.shape for y in adapter_group(x.to("meta"), meta)] == [y.shape for y in plain]
    nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    torch.testing.assert_close(adapter_group(nested, members)[1].values(), plain[1])


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_it_compiles_whole(p):
    """torch.compile takes the call without a graph break and without a recompile per length."""
    x, members = group({"p": p, "bias": True}, {"which": VECTORS[1:]}, {"n": 12}, leading=(6,))
    counted = []

    def backend(graph, inputs):
        counted.append(len(graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(adapter_group, backend=backend, fullgraph=True, dynamic=True)
    for rows in (6, 9, 33):
        x = group(leading=(rows,))[0]
        got = run(compiled, x, members)
        assert all(torch.isfinite(value).all() for value in got.values())
        if p == 0.0:
            for name, value in exact(x, members).items():
                assert error(got[name], value) <= 1e-5, name
    assert len(counted) == 1


# ----------------------------------------------------------------------------------------- refusals


def changed(index=1, **changes):
    def make():
        x, members = group(*QKV)
        members[index] = members[index]._replace(**{k: v() for k, v in changes.items()})
        return x, members

    return make


@pytest.mark.parametrize(
    "make, error_type, words",
    [
        (lambda: (torch.randn(3, K), []), ValueError, "at least one member"),
        (
            lambda: (torch.randn(5, 23), group(*QKV)[1]),
            ValueError,
            "member 0: x has shape .* last dimension must be K = 24",
        ),
        (
            lambda: (torch.ones(5, K, dtype=torch.long), group(*QKV)[1]),
            TypeError,
            "member 0: .* floating",
        ),
        (
            changed(weight=lambda: torch.randn(N, 25)),
            ValueError,
            "member 1: x .* must be K = 25",
        ),
        (changed(2, lora_A=lambda: torch.randn(R, 25)), ValueError, "member 2: lora_A has shape"),
        (changed(lora_B=lambda: torch.randn(N, 5)), ValueError, "member 1: lora_B .*must be"),
        (changed(bias=lambda: torch.randn(K)), ValueError, "member 1: bias has shape"),
        (changed(weight=lambda: torch.randn(N, K).double()), TypeError, "member 1: weight and"),
        (changed(lora_A=lambda: torch.randn(R, K).half()), TypeError, "member 1: lora_A is"),
        (
            changed(lora_B=lambda: torch.randn(N, R, device="meta")),
            ValueError,
            "member 1: lora_B is on meta",
        ),
        (changed(scaling=lambda: float("nan")), ValueError, "member 1: scaling must be a finite"),
        (changed(dropout_p=lambda: 1.0), ValueError, r"member 1: dropout_p must be in \[0, 1\)"),
        (changed(out_scale=lambda: torch.ones(K)), ValueError, "member 1: out_scale"),
        (changed(mid_scale=lambda: torch.ones(R).half()), TypeError, "member 1: mid_scale"),
        (
            changed(drop_base=lambda: True),
            ValueError,
            "member 1: drop_base=True needs an out_scale",
        ),
    ],
)
def test_bad_input_is_refused_with_a_sentence(make, error_type, words):
    with pytest.raises(error_type, match=words):
        adapter_group(*make())


def test_an_unknown_backend_is_refused():
    x, members = group(*QKV)
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'.*triton, native, onednn, eager"):
        adapter_group(x, members, backend="cuda")


def test_a_member_is_what_adapter_linear_takes():
    assert Member._fields == (
        *("weight", "lora_A", "lora_B", "scaling", "bias", "dropout_p"),
        *("out_scale", "mid_scale", "adapter_scale", "drop_base", "keep_output"),
    )
    own = member(K)
    assert Member(*own[:4]) == own._replace(bias=None, dropout_p=0.0, drop_base=False)


def test_the_public_names():
    assert fastlora.ops.adapter_group is adapter_group and fastlora.ops.Member is Member
    assert "adapter_group for float32 on cpu" in fastlora.explain("adapter_group")
