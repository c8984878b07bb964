"""The process's default dtype and device are for what users make, not for what operations need.

A float32 buffer that came as bfloat16 would be half as long as what a native kernel writes into it.
"""

from contextlib import contextmanager

import pytest
import torch

from fastlora.nn import LoRALinear, VeRALinear
from fastlora.ops import (
    EightBit,
    Member,
    adapter_group,
    adapter_linear,
    library,
    sign_momentum,
    svd_lowrank,
    svd_product,
)
from fastlora.ops.small_solvers import symmetric_eigen
from fastlora.ops.weight_norm import WeightNormCache, weight_norm

BACKENDS = ["eager", *([] if library.missing() else ["native"])]


def draw(*shape, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@contextmanager
def other_defaults(dtype, device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):  # as torch.set_default_device, for a while
            yield
    finally:
        torch.set_default_dtype(before)


def linear(backend):
    found = []
    for p, scale in ((0.0, None), (0.1, None), (0.0, "out"), (0.1, "out"), (0.0, "mid")):
        x, a, b = draw(9, 40), draw(4, 40, seed=1), draw(24, 4, seed=2)
        g = None if scale is None else draw(24 if scale == "out" else 4, seed=3)
        leaves = [t.requires_grad_() for t in (x, a, b, g) if t is not None]
        torch.manual_seed(0)
        vectors = {} if scale is None else {f"{scale}_scale": g}
        y = adapter_linear(
            x, draw(24, 40, seed=4), a, b, 0.5, draw(24, seed=5), p, backend=backend,
            drop_base=scale == "out" and p > 0, **vectors,
        )  # fmt: skip
        found += [y, *torch.autograd.grad(y.square().sum(), leaves)]
    return found


def group(backend):
    x = draw(9, 40).requires_grad_()
    members = [
        Member(draw(24, 40, seed=i), draw(4, 40, seed=i + 10).requires_grad_(),
               draw(24, 4, seed=i + 20).requires_grad_(), 0.5, dropout_p=p)
        for i, p in enumerate((0.0, 0.0, 0.1))
    ]  # fmt: skip
    torch.manual_seed(0)
    ys = adapter_group(x, members, backend=backend)
    leaves = [x, *(t for m in members for t in (m.lora_A, m.lora_B))]
    return [*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)]


def norms(backend):
    w, a, b = draw(40, 70), draw(3, 70, seed=1), draw(40, 3, seed=2)
    w[::7] = -0.5 * b[::7] @ a  # to be computed anew
    cache = WeightNormCache()
    return [weight_norm(w, a, b, 0.5, cache=cache, backend=backend) for _ in range(2)]


def svds(backend):
    x = [draw(128, 160, seed=i) for i in range(2)]
    x += [draw(128, 2) @ draw(2, 160)]  # of rank 2: native leaves it to eager
    start = torch.Generator("cpu").manual_seed(0)
    found = svd_lowrank(x, 8, generator=start, backend=backend)
    product = svd_product(draw(20, 3), draw(3, 30))
    return [*(t for part in found for t in part), *product, *symmetric_eigen(draw(6, 6))]


def momentum(backend):
    params, momenta = [draw(33), draw(5, 7)], [draw(33), EightBit.zeros_like(draw(5, 7))]
    params[0] = params[0].bfloat16()
    grads = [draw(33, seed=3), draw(5, 7, seed=4)]
    grads[1][0, 0] = torch.nan
    lost = sign_momentum(
        params, grads, momenta, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, shrink=(0.5, 0.0),
        relative=["tensor", "rows"], floor=0.1, rounding="stochastic", seed=3, backend=backend,
    )  # fmt: skip
    return [*params, momenta[0], momenta[1].codes, momenta[1].scales, lost]


def layers(backend):
    base = torch.nn.Linear(20, 12, device="cpu", dtype=torch.float32)
    base.weight.data = draw(12, 20)
    base.bias.data = draw(12)
    dora = LoRALinear.from_linear(base, 3, 6, use_dora=True)
    dora.lora_A.weight.data, dora.lora_B.weight.data = draw(3, 20), draw(12, 3)
    vera = VeRALinear.from_linear(base, r=5)
    vera.vera_lambda_b.data = draw(12)
    return [dora(draw(7, 20)), vera(draw(7, 20))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", [linear, group, norms, svds, momentum, layers])
@pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")],
    ids=str,
)
def test_defaults_change_nothing(what, backend, dtype, device):
    expected = what(backend)
    with other_defaults(dtype, device):
        got = what(backend)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.device == other.device
        assert torch.equal(one, other)
