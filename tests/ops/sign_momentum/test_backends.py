"""Every backend leaves the bytes that the reference leaves."""

import pytest
import torch

from fastlora.ops import apply_momentum, fold_gradients, library, sign_momentum
from tests.ops.sign_momentum.cases import OPTIONS, SHAPES, by_reference, held, lists, steps

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STORED = (torch.float32, torch.bfloat16, "8-bit")
BACKENDS = ("eager", "native", "triton")
if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)


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
    from fastlora.ops.sign_momentum import native

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
