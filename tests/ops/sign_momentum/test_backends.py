"""Every backend leaves the bytes that the reference leaves."""

import pytest
import torch

from fastlora.ops import (
    SignMomentumCache,
    apply_momentum,
    fold_gradients,
    library,
    sign_momentum,
)
from tests.ops.sign_momentum.cases import (
    OPTIONS,
    SHAPES,
    by_reference,
    copies,
    held,
    lists,
    steps,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STORED = (torch.float32, torch.bfloat16, "8-bit")
BACKENDS = ("eager", "native", "triton")
if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)
from fastlora.ops.sign_momentum import native  # noqa: E402


@pytest.mark.parametrize("momentum", STORED, ids=str)
@pytest.mark.parametrize("param", FLOATS, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_are_the_reference_s(monkeypatch, backend, option, param, momentum):
    if backend == "triton":
        pytest.importorskip("triton")
    own, plain = steps(monkeypatch, backend, option, param, param, momentum)
    assert own == plain


@pytest.mark.parametrize("momentum", STORED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_steps_of_masked_rows(monkeypatch, backend, momentum):
    """Lazy rows over micro-steps: each folds its own rows, the last moves the union of all."""
    if backend == "triton":
        pytest.importorskip("triton")
    own, plain = lists(torch.bfloat16, momentum), lists(torch.bfloat16, momentum)
    generator = torch.Generator().manual_seed(2)
    seen = [torch.zeros(shape[:-1], dtype=torch.bool) if len(shape) > 1 else None
            for shape in SHAPES]  # fmt: skip
    for step in range(3):
        rows = [None if s is None else torch.rand(s.shape, generator=generator) > 0.7 for s in seen]
        seen = [None if s is None else s | r for s, r in zip(seen, rows, strict=True)]
        grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
        same = dict(decay=1.0 if step else 0.9, weight=0.1 / 3, rows=rows)
        fold_gradients(own[1], grads, backend=backend, **same)
        by_reference(monkeypatch, lambda g=grads, s=same: fold_gradients(plain[1], g, **s))
    skip = torch.tensor([i == 1 for i in range(len(SHAPES))])
    same = dict(lr=1e-2, weight_decay=0.1, relative="rows", rows=seen, skip=skip)
    apply_momentum(*own, backend=backend, **same)
    by_reference(monkeypatch, lambda: apply_momentum(*plain, **same))
    assert held(*own) == held(*plain)


@pytest.mark.parametrize("isa", library.core().isas())
@pytest.mark.parametrize("momentum", STORED, ids=str)
@pytest.mark.parametrize("param", FLOATS, ids=str)
def test_every_instruction_set(monkeypatch, isa, param, momentum):
    whole = native.update
    monkeypatch.setattr(native, "update", lambda job, table: whole(job, table, isa))
    for option in ("tensor", "stochastic"):
        own, plain = steps(monkeypatch, "native", option, param, torch.float32, momentum)
        assert own == plain


def test_a_thousand_steps(monkeypatch):
    own, plain = lists(shapes=[(16, 33), (7,)]), lists(shapes=[(16, 33), (7,)])
    generator = torch.Generator().manual_seed(3)
    for _ in range(1000):
        grads = [torch.randn(p.shape, generator=generator) for p in own[0]]
        same = dict(lr=3e-3, betas=(0.95, 0.98), weight_decay=0.01)
        sign_momentum(own[0], grads, own[1], backend="native", **same)
        by_reference(monkeypatch, lambda g=grads, s=same: sign_momentum(plain[0], g, plain[1], **s))
    assert held(*own) == held(*plain)


def test_threads_do_not_matter():
    left = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            params, momenta = lists(torch.bfloat16, shapes=[(300, 400), (5,)])
            grads = [torch.ones_like(p) for p in params]
            sign_momentum(
                params, grads, momenta, lr=1e-2, betas=(0.9, 0.9), relative="tensor",
                rounding="stochastic", seed=7, backend="native",
            )  # fmt: skip
            left.append(held(params, momenta))
    finally:
        torch.set_num_threads(threads)
    assert left[0] == left[1]


# --- lists that are called with again ------------------------------------------------------------


@pytest.fixture(params=["table", "attributes"])
def reading(request, monkeypatch):
    """Both ways in which the core reads tensors."""
    if request.param == "attributes":
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)


def lion(params, grads, momenta, **options):
    return sign_momentum(params, grads, momenta, lr=1e-2, betas=(0.9, 0.99), **options)


def same_as_reference(monkeypatch, params, grads, momenta, cache, **options):
    plain = copies((params, momenta))
    lion(params, grads, momenta, cache=cache, backend="native", **options)
    by_reference(monkeypatch, lambda: lion(plain[0], grads, plain[1], **options))
    assert held(params, momenta) == held(*plain)


@pytest.mark.parametrize("momentum", STORED, ids=str)
def test_other_tensors_with_the_cache_of_earlier_ones(monkeypatch, reading, momentum):
    cache = SignMomentumCache()
    for seed, shapes in enumerate([SHAPES, SHAPES[:3], SHAPES, [(70_000,), (3, 4)], SHAPES]):
        params, momenta = lists(torch.float32, momentum, shapes=shapes, seed=seed)
        for _ in range(2):
            grads = [torch.randn(shape) for shape in shapes]
            same_as_reference(monkeypatch, params, grads, momenta, cache)


def test_other_shapes_and_dtypes_at_the_same_addresses(monkeypatch, reading):
    size = 80_000
    memory = [torch.randn(size), torch.randn(size), torch.randn(size)]
    cache = SignMomentumCache()
    for shape, dtype in [
        ((size,), torch.float32),
        ((4, 50), torch.float32),
        ((400, 200), torch.float32),
        ((400, 200), torch.bfloat16),
        ((200, 400), torch.bfloat16),
        ((0,), torch.bfloat16),
        ((size,), torch.float32),
    ]:
        count = torch.Size(shape).numel()
        param, grad, kept = (one.view(dtype)[:count].view(shape) for one in memory)
        for one in (param, grad, kept):
            one.copy_(torch.randn(shape))
        relative = "rows" if len(shape) > 1 else None
        for how in (None, relative, "tensor"):
            same_as_reference(monkeypatch, [param], [grad], [kept], cache, relative=how)


def test_a_tensor_whose_memory_is_exchanged(monkeypatch, reading):
    params, momenta = lists()
    cache = SignMomentumCache()
    grads = [torch.randn(shape) for shape in SHAPES]
    same_as_reference(monkeypatch, params, grads, momenta, cache)
    params[0].data = torch.randn(SHAPES[0])
    same_as_reference(monkeypatch, params, grads, momenta, cache)
    params[0].data, params[3].data = params[3].data, params[0].data
    with pytest.raises(ValueError, match="shape"):
        lion(params, grads, momenta, cache=cache, backend="native")
    params[0].data, params[3].data = params[3].data, params[0].data
    same_as_reference(monkeypatch, params, grads, momenta, cache)


@pytest.mark.parametrize("first", ["good", "refused"])
def test_lists_that_overlap_later_are_refused(reading, first):
    params, momenta = lists(shapes=[(4, 4), (3,), (3,)])
    grads = [torch.ones_like(param) for param in params]
    cache = SignMomentumCache()
    if first == "good":
        lion(params, grads, momenta, cache=cache, backend="native")
    else:
        with pytest.raises(TypeError):
            lion(params, [*grads[:2], grads[2].to(torch.int64)], momenta, cache=cache,
                 backend="native")  # fmt: skip
    before = held(params, momenta)
    twice = [params[0], params[1], params[1]]
    for _ in range(2):
        with pytest.raises(ValueError, match="twice"):
            lion(twice, grads, momenta, cache=cache, backend="native")
        with pytest.raises(ValueError, match="twice"):
            lion(params, grads, [momenta[0], momenta[1], params[1]], cache=cache, backend="native")
    assert held(params, momenta) == before
    lion(params, grads, momenta, cache=cache, backend="native")


@pytest.mark.parametrize("momentum", STORED, ids=str)
@pytest.mark.parametrize("count", [1, 70])
def test_autograd_is_told_of_every_tensor_written(count, momentum):
    params, momenta = lists(torch.float32, momentum, shapes=[(3,)] * count)
    lion(params, [torch.ones(3)] * count, momenta, backend="native")
    written = [*params, *(m for m in momenta if isinstance(m, torch.Tensor))]
    assert all(tensor._version == 1 for tensor in written)
