"""What surrounds the kernels: checks, what is saved, autocast, checkpointing, graph reuse."""

import gc
import itertools

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.ops import adapter_linear
from fastlora.ops.adapter_linear import scaled
from fastlora.ops.adapter_linear.reference import adapter_linear_reference
from fastlora.ops.dropout import draw_seed, keep_scale, philox_keep
from tests.ops.adapter_linear.cases import NAMES, VECTORS, error, exact, operands, vectors


def saved_bytes(dropout_p=0.0, drop_base=False, keep_output=True, **tensors):
    """Bytes kept for backward by one call, the parameters' own storages not counted."""
    parameters = {
        t.untyped_storage().data_ptr() for n, t in tensors.items() if n != "x" and t is not None
    }
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = adapter_linear(
            scaling=2.0,
            dropout_p=dropout_p,
            drop_base=drop_base,
            keep_output=keep_output,
            backend="eager",
            **tensors,
        )
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    "trained, floats_per_token",
    [
        ({"lora_A", "lora_B"}, 24 + 4),  # x and x Aᵀ
        ({"lora_B"}, 4),  # LoRA-FA: no input is kept
        ({"lora_A"}, 24),
        ({"x"}, 0),
        ({"bias"}, 0),
        ({"weight"}, 24),
        ({"x", "lora_B"}, 4),
    ],
)
def test_only_what_the_gradients_need_is_saved(trained, floats_per_token):
    tensors = {n: t.requires_grad_(n in trained) for n, t in operands((50,)).items()}
    assert saved_bytes(**tensors) == 50 * floats_per_token * 4


X, T, Y = 24, 4, 20  # floats a token: the input, the product of rank 4, an [M, N]


@pytest.mark.parametrize(
    "trained, given, p, drop_base, floats_per_token",
    [
        # VeRA: no input is kept, whether or not x itself has a gradient
        ({"mid_scale", "adapter_scale"}, {"mid_scale", "adapter_scale"}, 0.0, False, T),
        ({"x", "mid_scale", "adapter_scale"}, {"mid_scale", "adapter_scale"}, 0.0, False, T),
        ({"adapter_scale"}, {"adapter_scale"}, 0.0, False, T),
        # AdaLoRA: what LoRA keeps
        ({"lora_A", "lora_B", "mid_scale"}, {"mid_scale"}, 0.0, False, X + T),
        # DoRA: y besides, which the next layer mostly keeps anyway
        ({"x", "lora_A", "lora_B", "out_scale"}, {"out_scale"}, 0.0, False, X + T + Y),
        ({"x", "lora_A", "lora_B", "out_scale"}, {"out_scale"}, 0.3, False, X + T + Y),
        ({"x", "lora_A", "lora_B", "out_scale"}, {"out_scale"}, 0.3, True, X + T + Y),
        ({"out_scale"}, {"out_scale"}, 0.3, True, Y),
        ({"out_scale"}, {"out_scale"}, 0.0, True, X + T + Y),  # drop_base means nothing here
        # an out_scale that is not trained keeps nothing of its own
        ({"lora_A", "lora_B"}, {"out_scale"}, 0.0, False, X + T),
        ({"lora_A", "lora_B"}, {"out_scale"}, 0.3, True, X + T),
        # LoRA-FA with AdaLoRA's vector; nothing but the input's gradient; the bias alone
        ({"lora_B", "mid_scale"}, {"mid_scale"}, 0.0, False, T),
        ({"x"}, {"out_scale", "mid_scale", "adapter_scale"}, 0.0, False, 0),
        ({"bias"}, {"out_scale", "mid_scale", "adapter_scale"}, 0.0, False, 0),
    ],
)
def test_with_vectors_only_what_the_gradients_need_is_saved(
    trained, given, p, drop_base, floats_per_token
):
    tensors = operands((50,))
    tensors |= vectors(tensors, sorted(given))
    tensors = {n: t.requires_grad_(n in trained) for n, t in tensors.items()}
    seed = 8 if p else 0
    assert saved_bytes(p, drop_base, **tensors) == 50 * floats_per_token * 4 + seed


@pytest.mark.parametrize(
    "trained, p, drop_base, floats_per_token",
    [
        ({"x", "lora_A", "lora_B", "out_scale"}, 0.0, False, X + T),  # DoRA: what LoRA keeps
        ({"x", "lora_A", "lora_B", "bias", "out_scale"}, 0.3, False, X + T),
        ({"out_scale"}, 0.0, True, X + T),  # drop_base means nothing here
        ({"x", "lora_A", "lora_B", "out_scale"}, 0.3, True, X + T),
        ({"out_scale"}, 0.3, True, X + T),
        ({"lora_A", "lora_B"}, 0.0, False, X + T),  # no effect: out_scale is not trained
        ({"x"}, 0.0, False, 0),
    ],
)
def test_no_output_is_saved_that_is_not_to_be_kept(trained, p, drop_base, floats_per_token):
    tensors = operands((50,))
    tensors |= vectors(tensors, ("out_scale",))
    tensors = {n: t.requires_grad_(n in trained) for n, t in tensors.items()}
    kept = saved_bytes(p, drop_base, keep_output=False, **tensors)
    assert kept == 50 * floats_per_token * 4 + (8 if p else 0)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_kernels_give_only_the_gradients_asked_for(p):
    """Through the public call, so that operands nobody needs are really gone in backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {n: t.to(device) for n, t in operands((2, 3)).items()}
    dy = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(9)).to(device)
    drawn = {}
    if p:
        torch.manual_seed(3)
        keep = philox_keep((6, 24), p, draw_seed(device)).view(2, 3, 24)
        drawn = {"keep": keep, "keep_scale": keep_scale(p)}
    expected = exact(tensors, 2.0, dy, **drawn)
    for wanted in itertools.product([False, True], repeat=len(NAMES)):
        if not any(wanted):
            continue
        flags = zip(NAMES, wanted, strict=True)
        leaves = {n: tensors[n].detach().requires_grad_(w) for n, w in flags}
        torch.manual_seed(3)
        y = adapter_linear(scaling=2.0, dropout_p=p, backend="triton", **leaves)
        assert error(y.detach(), expected["y"]) <= 1e-5
        y.backward(dy)
        for name, asked in zip(NAMES, wanted, strict=True):
            assert (leaves[name].grad is not None) == asked
            if asked:
                assert error(leaves[name].grad, expected[name]) <= 1e-5, (name, wanted)


def test_dropout_saves_a_seed_and_no_mask():
    tensors = {n: t.requires_grad_(n != "weight") for n, t in operands((50,)).items()}
    assert saved_bytes(dropout_p=0.1, **tensors) == 50 * (24 + 4) * 4 + 8


def test_without_gradients_nothing_is_recorded():
    tensors = operands((5,))
    assert adapter_linear(scaling=1.0, **tensors).grad_fn is None
    tensors["lora_B"].requires_grad_()
    with torch.no_grad():
        assert adapter_linear(scaling=1.0, **tensors).grad_fn is None


def test_float32_adapters_over_a_half_base_get_float32_gradients():
    t = operands((33,), dtype=torch.bfloat16, adapter_dtype=torch.float32)
    t["lora_B"].requires_grad_()
    y = adapter_linear(scaling=1.0, **t)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert t["lora_B"].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_linear_does(dtype):
    t = operands((9,))
    for name in ("x", "lora_A", "lora_B"):
        t[name].requires_grad_()
    with torch.autocast("cpu", dtype):
        y = adapter_linear(scaling=2.0, **t)
        plain = torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
    assert y.dtype == plain.dtype == dtype
    y.float().sum().backward()
    half = {n: v.detach().to(dtype) for n, v in t.items()}
    direct = adapter_linear(scaling=2.0, **half)
    assert torch.equal(y, direct)
    for name in ("x", "lora_A", "lora_B"):
        assert t[name].grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter_linear(scaling=1.0, **operands(dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_same_dropout(reentrant):
    def run(wrap):
        t = {n: v.requires_grad_() for n, v in operands((30,)).items()}
        torch.manual_seed(5)

        def call(x):
            return adapter_linear(x, *list(t.values())[1:4], 2.0, t["bias"], 0.4)

        y = checkpoint(call, t["x"], use_reentrant=reentrant) if wrap else call(t["x"])
        y.square().sum().backward()
        return [y.detach()] + [v.grad for v in t.values()]

    for plain, replayed in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, replayed)


def test_recomputation_on_another_backend_never_mixes_masks():
    """The context has ended when backward recomputes. Without dropout the result is right; with
    it, two kinds of masks would meet, which torch's check or ours refuses."""
    t = {n: v.requires_grad_(n in ("x", "lora_A", "lora_B")) for n, v in operands((9,)).items()}

    def run(p, **options):
        with fastlora.use_backend("triton"):
            y = checkpoint(
                lambda x: adapter_linear(x, *list(t.values())[1:4], 2.0, t["bias"], p),
                t["x"],
                use_reentrant=False,
                **options,
            )
        with fastlora.use_backend("eager"):
            y.sum().backward()

    run(0.0)
    expected = exact(t, 2.0, torch.ones(9, 20))
    for name in ("x", "lora_A", "lora_B"):
        assert error(t[name].grad, expected[name]) <= 1e-5, name
    with pytest.raises(torch.utils.checkpoint.CheckpointError, match="different metadata"):
        run(0.5)
    with pytest.raises(RuntimeError, match=r"recomputed on another backend.*FASTLORA_BACKEND"):
        run(0.5, determinism_check="none")


@pytest.mark.parametrize("p, drop_base", [(0.0, False), (0.5, True)])
def test_the_formula_under_transforms_takes_vectors_too(p, drop_base):
    t = operands((6,))
    t |= vectors(t)
    torch.manual_seed(2)
    plain = adapter_linear(scaling=2.0, **t)
    rows = torch.func.vmap(
        lambda x: adapter_linear(scaling=2.0, dropout_p=p, drop_base=drop_base, **(t | {"x": x})),
        randomness="different",
    )(t["x"].expand(4000, 6, 24))
    assert rows.shape == (4000, 6, 20)
    spread = 5 * rows.std(0) / 4000**0.5 + 1e-5
    assert ((rows.mean(0) - plain).abs() <= spread).all()


def test_transforms_and_odd_tensors_run_the_formula():
    t = operands((6,))
    x, rest = t["x"], (t["weight"], t["lora_A"], t["lora_B"], 2.0, t["bias"])
    plain = adapter_linear(x, *rest)

    def loss(lora_B):
        return adapter_linear(x, t["weight"], t["lora_A"], lora_B, 2.0, t["bias"]).square().sum()

    gradient = torch.func.grad(loss)(t["lora_B"])
    leaf = t["lora_B"].clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(gradient, leaf.grad)
    by_row = torch.func.vmap(lambda row: adapter_linear(row, *rest))(x)
    torch.testing.assert_close(by_row, plain)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(adapter_linear(dual, *rest)).tangent
    linear = adapter_linear(x + torch.ones_like(x), *rest) - plain
    torch.testing.assert_close(tangent, linear, atol=1e-5, rtol=1e-5)
    traced = torch.jit.trace(lambda x: adapter_linear(x, *rest), x)
    torch.testing.assert_close(traced(x), plain)
    meta = {n: v.to("meta") for n, v in t.items()}
    assert adapter_linear(scaling=2.0, dropout_p=0.1, **meta).shape == plain.shape
    nested = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    torch.testing.assert_close(adapter_linear(nested, *rest).values(), plain)


def test_a_retained_graph_gives_the_same_gradients_twice():
    t = {n: v.requires_grad_() for n, v in operands((30,)).items()}
    y = adapter_linear(scaling=2.0, dropout_p=0.3, **t)
    inputs = list(t.values())
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_operand_changed_in_place_before_backward_is_noticed():
    t = {n: v.requires_grad_(n == "lora_A") for n, v in operands((30,)).items()}
    y = adapter_linear(scaling=2.0, **t)
    t["lora_B"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("leading", [(5,), (2, 3), ()])
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("keep_output", [True, False])
def test_an_output_may_be_changed_in_place(leading, backend, keep_output):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    t = operands(leading)
    t = {n: v.to(device) for n, v in (t | vectors(t, zeros=True)).items()}
    leaves = {n: v.detach().requires_grad_() for n, v in t.items()}
    y = adapter_linear(scaling=2.0, keep_output=keep_output, backend=backend, **leaves)
    assert leading == () or not y._is_view()  # autograd has rules of its own for views
    y.mul_(2)
    y.sum().backward()
    expected = exact(t, 2.0, 2 * torch.ones_like(y))
    for name, leaf in leaves.items():
        assert error(leaf.grad, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_an_output_of_a_compiled_call_may_be_changed_in_place(backend):
    t = operands((5,))
    t = {n: v.requires_grad_() for n, v in (t | vectors(t)).items()}

    def call(*tensors):
        return adapter_linear(**dict(zip(t, tensors, strict=True)), scaling=2.0).mul_(2)

    inputs = list(t.values())
    y = torch.compile(call, backend=backend, fullgraph=True)(*inputs)
    got = torch.autograd.grad(y.sum(), inputs)
    expected = exact(t, 2.0, 2 * torch.ones_like(y))
    for name, gradient in zip(t, got, strict=True):
        assert error(gradient, expected[name]) <= 1e-5, name


def test_an_output_is_read_unless_it_has_been_changed(monkeypatch):
    read, own = [], scaled.backward

    def watching(module, dy, kept, *others):
        read.append(kept.read is not None)
        return own(module, dy, kept, *others)

    monkeypatch.setattr(scaled, "backward", watching)
    t = operands((5,))
    t = {n: v.requires_grad_() for n, v in (t | vectors(t)).items()}
    for change in (lambda y: y, lambda y: y.mul_(2), lambda y: y.detach().mul_(2)):
        y = adapter_linear(scaling=2.0, **t)
        change(y)
        y.sum().backward()
    assert read == [True, False, False]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_holds_no_output_and_lets_it_be_changed(reentrant):
    t = operands((5,))
    t = {n: v.requires_grad_() for n, v in (t | vectors(t)).items()}
    memory = []

    def call(x):
        y = adapter_linear(**t | {"x": x}, scaling=2.0)
        memory.append(StorageWeakRef(y.untyped_storage()))
        return y.relu_().sum()

    inputs = list(t.values())
    loss = checkpoint(call, t["x"], use_reentrant=reentrant)
    assert memory[0].expired()
    loss.backward()
    got = [tensor.grad for tensor in inputs]
    expected = torch.autograd.grad(adapter_linear(**t, scaling=2.0).relu().sum(), inputs)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_without_gradients_an_output_with_vectors_is_plain():
    t = operands((5,))
    t = {n: v.requires_grad_() for n, v in (t | vectors(t)).items()}
    expected = adapter_linear(scaling=2.0, **t)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert torch.equal(adapter_linear(scaling=2.0, **t), expected)


def test_a_saved_output_is_freed_without_the_garbage_collector():
    """y is kept by its own node: no circle of references may hold it."""
    t = operands((5,))
    t = {n: v.requires_grad_() for n, v in (t | vectors(t)).items()}
    gc.collect()
    gc.disable()
    try:
        y = adapter_linear(scaling=2.0, **t)
        memory = StorageWeakRef(y.untyped_storage())
        del y
        assert memory.expired()
    finally:
        gc.enable()


@pytest.mark.parametrize("p, drop_base", [(0.0, False), (0.4, False), (0.4, True)])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("keep_output", [True, False])
def test_checkpointing_with_vectors(reentrant, p, drop_base, keep_output):
    def run(wrap):
        t = operands((30,))
        t = {n: v.requires_grad_() for n, v in (t | vectors(t, zeros=True)).items()}
        torch.manual_seed(5)
        others = {n: v for n, v in t.items() if n != "x"}

        def call(x):
            switches = {"drop_base": drop_base, "keep_output": keep_output}
            return adapter_linear(x, scaling=2.0, dropout_p=p, **switches, **others)

        y = checkpoint(call, t["x"], use_reentrant=reentrant) if wrap else call(t["x"])
        y.square().sum().backward()
        return [y.detach()] + [v.grad for v in t.values()]

    for plain, replayed in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, replayed)


@pytest.mark.parametrize("drop_base", [False, True])
def test_a_retained_graph_with_vectors(drop_base):
    t = operands((30,))
    t = {n: v.requires_grad_() for n, v in (t | vectors(t, zeros=True)).items()}
    y = adapter_linear(scaling=2.0, dropout_p=0.3, drop_base=drop_base, **t)
    inputs = list(t.values())
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_vectors(dtype):
    t = operands((9,))
    t = {n: v.requires_grad_() for n, v in (t | vectors(t)).items()}
    with torch.autocast("cpu", dtype):
        y = adapter_linear(scaling=2.0, **t)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(v.grad.dtype == torch.float32 for v in t.values())
    half = {n: v.detach().to(v.dtype if n in VECTORS else dtype) for n, v in t.items()}
    direct = adapter_linear(scaling=2.0, **half | {"lora_B": t["lora_B"].detach()})
    assert torch.equal(y, direct)


@pytest.mark.parametrize("vector", VECTORS)
def test_a_vector_of_ones_changes_nothing(vector):
    t = operands((9,))
    ones = torch.ones_like(vectors(t)[vector])
    with_ones = adapter_linear(scaling=2.0, **t, **{vector: ones})
    assert error(with_ones, adapter_linear(scaling=2.0, **t).double()) <= 1e-6


@pytest.mark.parametrize("p, drop_base", [(0.0, False), (0.3, False), (0.3, True)])
@pytest.mark.parametrize("keep_output", [True, False])
def test_the_kernels_give_every_gradient_with_vectors(p, drop_base, keep_output):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = operands((2, 3))
    tensors |= vectors(tensors, zeros=True)
    tensors = {n: v.to(device) for n, v in tensors.items()}
    dy = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(9)).to(device)
    drawn = {}
    if p:
        torch.manual_seed(3)
        keep = philox_keep((6, 24), p, draw_seed(device)).view(2, 3, 24)
        drawn = {"keep": keep, "keep_scale": keep_scale(p)}
    expected = exact(tensors, 2.0, dy, **drawn, drop_base=drop_base)
    for wanted in (set(tensors), set(VECTORS), {"out_scale"}, {"x", "mid_scale"}, {"lora_A"}):
        leaves = {n: v.detach().requires_grad_(n in wanted) for n, v in tensors.items()}
        torch.manual_seed(3)
        switches = {"drop_base": drop_base, "keep_output": keep_output}
        y = adapter_linear(scaling=2.0, dropout_p=p, backend="triton", **switches, **leaves)
        assert error(y.detach(), expected["y"]) <= 1e-5
        y.backward(dy)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in wanted)
            if name in wanted:
                assert error(leaf.grad, expected[name]) <= 1e-5, (name, wanted)


def test_a_second_derivative_is_refused():
    t = {n: v.requires_grad_() for n, v in operands((5,)).items()}
    (gradient,) = torch.autograd.grad(
        adapter_linear(scaling=2.0, **t).square().sum(), t["lora_A"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_graph_frees_what_it_saved():
    t = {n: v.requires_grad_() for n, v in operands((3,)).items()}
    y = adapter_linear(scaling=2.0, **t)
    y.sum().backward()
    node = y.grad_fn
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    del y, node
    gc.collect()


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_it_compiles_whole(p):
    """torch.compile takes the call without a graph break and without a recompile per length."""
    t = operands((6,), k=16, n=12)
    counted = []

    def backend(graph, inputs):
        counted.append(len(graph.graph.nodes))
        return graph

    torch._dynamo.reset()

    def call(x):
        return adapter_linear(x, t["weight"], t["lora_A"], t["lora_B"], 2.0, t["bias"], p) * 2

    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=True)
    for rows in (6, 9, 33):
        x = operands((rows,), k=16)["x"].requires_grad_()
        y = compiled(x)
        y.sum().backward()
        if p == 0.0:
            wide = {n: v.double() for n, v in t.items() if n != "x"}
            expected = 2 * adapter_linear_reference(x.detach().double(), scaling=2.0, **wide)
            assert error(y.detach(), expected) <= 1e-5
        assert torch.isfinite(x.grad).all()
    assert len(counted) == 1


@pytest.mark.parametrize("trained", [{"lora_B"}, {"lora_A", "lora_B"}])
def test_a_compiled_call_saves_no_more_than_an_eager_one(trained):
    """With A frozen, no input is kept here either."""
    torch._dynamo.reset()
    tensors = {n: t.requires_grad_(n in trained) for n, t in operands((50,)).items()}
    sizes = []

    def pack(tensor):
        sizes.append(tuple(tensor.shape))
        return tensor

    compiled = torch.compile(
        lambda t: adapter_linear(scaling=2.0, **t), backend="aot_eager", fullgraph=True
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compiled(tensors).sum().backward()
    assert ((50, 24) in sizes) == ("lora_A" in trained)
    expected = exact(tensors, 2.0, torch.ones(50, 20))
    for name in trained:
        assert error(tensors[name].grad, expected[name]) <= 1e-5


@pytest.mark.parametrize(
    "p, drop_base, keep_output", [(0.0, False, True), (0.0, False, False), (0.2, True, True)]
)
def test_it_compiles_whole_with_vectors(p, drop_base, keep_output):
    t = operands((6,), k=16, n=12)
    t |= vectors(t, zeros=True)
    counted = []

    def backend(graph, inputs):
        counted.append(len(graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    names = [n for n in t if n != "x"]

    def call(x, *others):
        named = dict(zip(names, others, strict=True))
        switches = {"drop_base": drop_base, "keep_output": keep_output}
        return adapter_linear(x, scaling=2.0, dropout_p=p, **switches, **named) * 2

    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=True)
    for rows in (6, 9, 33):
        t["x"] = operands((rows,), k=16)["x"]
        leaves = {n: v.detach().requires_grad_() for n, v in t.items()}
        y = compiled(leaves["x"], *(leaves[n] for n in names))
        dy = torch.randn(rows, 12, generator=torch.Generator().manual_seed(9))
        y.backward(dy)
        if p == 0.0:
            expected = exact(t, 2.0, 2 * dy)
            assert error(y.detach() / 2, expected.pop("y")) <= 1e-5
            for name, value in expected.items():
                assert error(leaves[name].grad, value) <= 1e-5, name
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves.values())
    assert len(counted) == 1


@pytest.mark.parametrize("p, drop_base", [(0.0, False), (0.3, False), (0.3, True)])
@pytest.mark.parametrize("keep_output", [True, False])
def test_a_compiled_call_keeps_its_output_where_an_eager_one_does(p, drop_base, keep_output):
    torch._dynamo.reset()
    t = operands((50,))
    t |= vectors(t, ("out_scale",), zeros=True)
    tensors = {n: v.requires_grad_(n not in ("weight", "bias")) for n, v in t.items()}
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    switches = {"drop_base": drop_base, "keep_output": keep_output}
    compiled = torch.compile(
        lambda t: adapter_linear(scaling=2.0, dropout_p=p, **switches, **t),
        backend="aot_eager",
        fullgraph=True,
    )
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compiled(tensors).sum().backward()
    assert ((50, 20) in shapes) == keep_output
    if p == 0.0:
        expected = exact(t, 2.0, torch.ones(50, 20))
        for name in ("x", "lora_A", "lora_B", "out_scale"):
            assert error(tensors[name].grad, expected[name]) <= 1e-5, name


def change(**changes):
    def make():
        return (
            operands((5,))
            | {"scaling": 1.0, "dropout_p": 0.0}
            | {k: v() for k, v in changes.items()}
        )

    return make


@pytest.mark.parametrize("dynamic", [None, True])
def test_layers_of_different_scaling_compile_without_a_break(dynamic):
    torch._dynamo.reset()
    model = torch.nn.ModuleList(
        fastlora.nn.LoRALinear.from_linear(torch.nn.Linear(8, 8), r=2, lora_alpha=alpha)
        for alpha in (1, 2.5, 7)
    )
    x = torch.randn(4, 8)
    for layer in model:
        torch.nn.init.normal_(layer.lora_B.weight)
        expected = layer(x)
        layer.compile(backend="eager", fullgraph=True, dynamic=dynamic)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("spoiled", ["weight", "x", "bias"])
def test_autocast_does_not_let_integers_in(spoiled):
    t = operands()
    t[spoiled] = torch.ones_like(t[spoiled], dtype=torch.int8)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="int8"):
        adapter_linear(scaling=1.0, **t)


@pytest.mark.parametrize(
    "make, error_type, words",
    [
        (change(x=lambda: torch.randn(5, 23)), ValueError, "last dimension must be K = 24"),
        (change(x=lambda: torch.tensor(1.0)), ValueError, "last dimension"),
        (change(weight=lambda: torch.randn(24)), ValueError, "must be matrices"),
        (change(lora_A=lambda: torch.randn(4, 25)), ValueError, r"lora_A has shape \[4, 25\]"),
        (change(lora_A=lambda: torch.randn(0, 24)), ValueError, "r ≥ 1"),
        (change(lora_B=lambda: torch.randn(20, 5)), ValueError, r"lora_B .* must be \[20, 4\]"),
        (change(bias=lambda: torch.randn(24)), ValueError, "bias has shape"),
        (change(bias=lambda: torch.randn(1, 20)), ValueError, "bias has shape"),
        (
            change(weight=lambda: torch.ones(20, 24, dtype=torch.int8)),
            TypeError,
            "weight is torch.int8",
        ),
        (change(x=lambda: torch.ones(5, 24, dtype=torch.long)), TypeError, "floating"),
        (change(x=lambda: torch.randn(5, 24, dtype=torch.complex64)), TypeError, "floating"),
        (change(x=lambda: torch.randn(5, 24).half()), TypeError, "must have x's dtype"),
        (change(bias=lambda: torch.randn(20).double()), TypeError, "bias torch.float64"),
        (change(lora_A=lambda: torch.randn(4, 24).double()), TypeError, "lora_A is torch.float64"),
        (change(lora_B=lambda: torch.randn(20, 4).half()), TypeError, "lora_B is torch.float16"),
        (change(lora_B=lambda: torch.randn(20, 4, device="meta")), ValueError, "lora_B is on meta"),
        (change(scaling=lambda: float("nan")), ValueError, "scaling must be a finite number"),
        (change(scaling=lambda: float("inf")), ValueError, "scaling must be a finite number"),
        (change(dropout_p=lambda: 1.0), ValueError, r"dropout_p must be in \[0, 1\), not 1.0"),
        (change(dropout_p=lambda: -0.1), ValueError, "dropout_p"),
        (change(dropout_p=lambda: float("nan")), ValueError, "dropout_p"),
        (change(out_scale=lambda: torch.ones(24)), ValueError, r"out_scale .* must be \[20\]"),
        (change(out_scale=lambda: torch.ones(20, 1)), ValueError, r"has shape \[20, 1\]"),
        (change(mid_scale=lambda: torch.ones(20)), ValueError, r"mid_scale .* must be \[4\]"),
        (change(mid_scale=lambda: torch.ones(4, 1)), ValueError, r"mid_scale .* must be \[4\]"),
        (change(adapter_scale=lambda: torch.tensor(1.0)), ValueError, r"has shape \[\]"),
        (
            change(adapter_scale=lambda: torch.ones(20).double()),
            TypeError,
            "adapter_scale is torch.float64; over a torch.float32 base it must be torch.float32",
        ),
        (change(mid_scale=lambda: torch.ones(4).half()), TypeError, "mid_scale is torch.float16"),
        (
            change(out_scale=lambda: torch.ones(20, device="meta")),
            ValueError,
            "out_scale is on meta but x is on cpu",
        ),
        (change(drop_base=lambda: True), ValueError, "drop_base=True needs an out_scale"),
        (
            change(drop_base=lambda: True, dropout_p=lambda: 0.1, mid_scale=lambda: torch.ones(4)),
            ValueError,
            "drop_base=True needs an out_scale",
        ),
    ],
)
def test_bad_input_is_refused_with_a_sentence(make, error_type, words):
    with pytest.raises(error_type, match=words):
        adapter_linear(**make())


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'.*triton, native, onednn, eager"):
        adapter_linear(scaling=1.0, backend="cuda", **operands())


def test_the_public_name_is_the_operation():
    assert fastlora.adapter_linear is fastlora.ops.adapter_linear is adapter_linear


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("needed", [(1, 1, 1, 1, 1), (1, 0, 1, 1, 0), (0, 0, 0, 1, 0)])
def test_the_registered_operators_pass_torchs_own_checks(p, needed):
    from fastlora.ops.adapter_linear.registered import forward_op

    t = operands((2, 3))
    inputs = [v.requires_grad_(bool(w)) for v, w in zip(t.values(), needed, strict=True)]
    seed = draw_seed("cpu") if p else None
    torch.library.opcheck(forward_op, (*inputs, 2.0, p, seed, "eager"))


@pytest.mark.parametrize(
    "which, needed, p, drop_base",
    [
        (VECTORS, range(8), 0.3, True),
        (VECTORS, range(8), 0.0, False),
        (("mid_scale", "adapter_scale"), (6, 7), 0.3, False),
        (("out_scale",), (0, 2, 3, 5), 0.0, False),
    ],
)
@pytest.mark.parametrize("keep_output", [True, False])
def test_the_registered_operators_with_vectors(which, needed, p, drop_base, keep_output):
    from fastlora.ops.adapter_linear.registered import scaled_forward_op

    t = operands((2, 3))
    given = vectors(t, which)
    inputs = [*t.values(), *(given.get(name) for name in VECTORS)]
    inputs = [
        v if v is None else v.detach().requires_grad_(i in needed) for i, v in enumerate(inputs)
    ]
    seed = draw_seed("cpu") if p else None
    switches = (drop_base, drop_base and 5 in needed, keep_output)
    torch.library.opcheck(scaled_forward_op, (*inputs, 2.0, p, seed, *switches, "eager"))
