"""Lists of tensors, and what a call leaves in them."""

import copy

import torch

from fastlora.ops import EightBit, sign_momentum
from fastlora.ops.sign_momentum import op, reference

SHAPES = [(16, 576), (33, 1100), (97,), (5, 16), (3,), (), (0, 4), (2, 3, 11)]
OPTIONS = {
    "plain": {},
    "tensor": {"relative": "tensor", "floor": 0.01},
    "rows": {"relative": "rows"},
    "shrink": {"shrink": (0.99, 1.0)},
    "stochastic": {"rounding": "stochastic", "seed": 5},
    "masked": {"rows": True},
    "masked momentum": {"rows": True, "mask_momentum_rows": True},
    "all at once": {
        "relative": ["rows", "tensor", None, "rows", "tensor", "rows", "rows", "rows"],
        "floor": 0.01,
        "rows": True,
        "mask_momentum_rows": True,
        "shrink": (0.99, 1.0),
        "rounding": "stochastic",
        "seed": 5,
    },
}


def lists(param=torch.float32, momentum=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(shape, generator=generator).to(param) for shape in shapes]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    if momentum == "8-bit":
        return params, [EightBit.from_float(value) for value in values]
    return params, [value.to(momentum) for value in values]


def by_reference(monkeypatch, call):
    """``call()`` with the reference in place of any backend."""
    with monkeypatch.context() as patch:
        patch.setattr(op._backend, "select", lambda *_: reference)
        return call()


def held(params, momenta):
    parts = [m for m in momenta if isinstance(m, torch.Tensor)]
    parts += [part for m in momenta if isinstance(m, EightBit) for part in (m.codes, m.scales)]
    return [part.detach().contiguous().view(-1).view(torch.uint8).tolist() for part in
            [*parts, *params]]  # fmt: skip


def steps(monkeypatch, backend, option, param, grad, momentum, count=2):
    """What a backend leaves, and what the reference leaves."""
    own, plain = lists(param, momentum), lists(param, momentum)
    options = dict(OPTIONS[option])
    generator = torch.Generator().manual_seed(1)
    if "rows" in options:
        options["rows"] = [
            torch.rand(shape[:-1], generator=generator) > 0.5 if len(shape) > 1 else None
            for shape in SHAPES
        ]
    for _ in range(count):
        grads = [torch.randn(shape, generator=generator).to(grad) for shape in SHAPES]
        if "shrink" in options:
            grads[0][0, 0], grads[1][3, 5] = float("nan"), float("inf")
        same = dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, **options)
        lost = sign_momentum(own[0], grads, own[1], backend=backend, **same)
        want = by_reference(
            monkeypatch, lambda g=grads, s=same: sign_momentum(plain[0], g, plain[1], **s)
        )
        if "shrink" in options:
            assert lost.tolist() == want.tolist()
            assert lost.tolist()[:3] == [True, True, False]
    return held(*own), held(*plain)


def copies(tensors):
    return copy.deepcopy(tensors)
