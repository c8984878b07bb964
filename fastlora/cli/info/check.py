"""One small step of every operation on every backend that can run, against its formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastlora.cli.errors import first_line
from fastlora.cli.facts import situations
from fastlora.ops.adapter_group import Member, adapter_group
from fastlora.ops.adapter_group.reference import adapter_group_reference
from fastlora.ops.adapter_linear import adapter_linear
from fastlora.ops.adapter_linear.reference import adapter_linear_reference
from fastlora.ops.backend import Situation
from fastlora.ops.explain import OPERATIONS
from fastlora.ops.low_rank_svd import svd_lowrank
from fastlora.ops.low_rank_svd.reference import svd_lowrank_reference
from fastlora.ops.sign_momentum import sign_momentum
from fastlora.ops.small_solvers import small_svd, symmetric_eigen
from fastlora.ops.weight_norm import weight_norm
from fastlora.ops.weight_norm.reference import weight_norm_reference

# Largest error allowed, relative to the largest element: a few units in the last place of what is
# stored; the half types also round the [M, r] product between the two small matrices.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

Errors = dict[str, float]


def check_everything() -> list[dict[str, Any]]:
    """A row for every (operation, device, dtype, backend) that can run."""
    rows = []
    for op, operation in OPERATIONS.items():
        for device in (at.device for at in situations()):
            for dtype, tolerance in TOLERANCES.items():
                at = Situation(device, dtype)
                rows += [_row(op, at, name, tolerance) for name in operation.runnable(at)]
    return rows


def _row(op: str, at: Situation, backend: str, tolerance: float) -> dict[str, Any]:
    row = {
        "operation": op,
        "device": str(at.device),
        "dtype": str(at.dtype).removeprefix("torch."),
        "backend": backend,
        "tolerance": tolerance,
    }
    try:
        errors = STEPS[op](at, backend)
    except Exception as error:  # whatever a driver or compiler raises is this command's finding
        return row | {"ok": False, "detail": f"{type(error).__name__}: {first_line(error)}"}
    name, worst = max(errors.items(), key=lambda item: _order(item[1]))
    detail = f"largest relative error {worst:.1e} (in {name}), allowed {tolerance:.0e}"
    return row | {
        "ok": all(value <= tolerance for value in errors.values()),
        "max_relative_error": worst if worst == worst else None,
        "detail": detail,
    }


def _order(value: float) -> float:
    return value if value == value else float("inf")


def _adapter_linear(at: Situation, backend: str) -> Errors:
    # 96 × 176 × 160 multiply-adds are enough for every backend to run its own product
    k, n, r, scaling = 176, 160, 12, 1.5
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(at.dtype).to(at.device)

    operands = {
        "x": draw(2, 48, k),
        "weight": draw(n, k) / 13,
        "lora_A": draw(r, k) / 13,
        "lora_B": draw(n, r),
        "bias": draw(n),
    }
    dy = draw(2, 48, n)
    got = _step(
        lambda x, weight, lora_A, lora_B, bias: adapter_linear(
            x, weight, lora_A, lora_B, scaling, bias, backend=backend
        ),
        operands,
        dy,
    )
    exact = _step(
        lambda x, weight, lora_A, lora_B, bias: adapter_linear_reference(
            x, weight, lora_A, lora_B, scaling, bias
        ),
        {name: value.double() for name, value in operands.items()},
        dy.double(),
    )
    return {name: _relative(got[name], exact[name]) for name in exact}


def _adapter_group(at: Situation, backend: str) -> Errors:
    k, scaling = 176, 1.5
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(at.dtype).to(at.device)

    x = draw(2, 48, k)
    members = [
        Member(draw(n, k, scale=1 / 13), draw(r, k, scale=1 / 13), draw(n, r), scaling, bias)
        for n, r, bias in ((160, 12, draw(160)), (128, 8, None))
    ]
    dys = [draw(2, 48, member.weight.shape[0]) for member in members]
    names = ["x", *(f"{name}[{i}]" for i in range(2) for name in ("lora_A", "lora_B"))]

    def step(function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
        def own(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.detach().to(dtype)

        group = [
            Member(own(m.weight), own(m.lora_A), own(m.lora_B), m.scaling, own(m.bias))
            for m in members
        ]
        leaves = [own(x), *(t for m in group for t in (m.lora_A, m.lora_B))]
        for leaf in leaves:
            leaf.requires_grad_()
        ys = function(leaves[0], group)
        gradients = torch.autograd.grad(ys, leaves, [dy.to(dtype) for dy in dys])
        values = {f"y[{i}]": y.detach() for i, y in enumerate(ys)}
        return values | {f"d{name}": g for name, g in zip(names, gradients, strict=True)}

    got = step(lambda x, group: adapter_group(x, group, backend=backend), at.dtype)
    exact = step(adapter_group_reference, torch.float64)
    return {name: _relative(got[name], exact[name]) for name in exact}


def _weight_norm(at: Situation, backend: str) -> Errors:
    k, n, r, scaling = 176, 160, 12, 1.5
    generator = torch.Generator().manual_seed(0)
    weight, lora_A, lora_B = (
        torch.randn(shape, generator=generator).to(at.dtype).to(at.device)
        for shape in ((n, k), (r, k), (n, r))
    )
    ours = {"A": lora_A.requires_grad_(), "B": lora_B.requires_grad_()}
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in ours.items()}
    got = weight_norm(weight, ours["A"], ours["B"], scaling, differentiable=True, backend=backend)
    exact = weight_norm_reference(weight.double(), wide["A"], wide["B"], scaling)
    got.sum().backward()
    exact.sum().backward()
    errors = {"norm": _relative(got.detach(), exact.detach())}
    for name, leaf in ours.items():
        expected = wide[name].grad
        assert leaf.grad is not None and expected is not None
        errors[f"dlora_{name}"] = _relative(leaf.grad, expected)
    return errors


def _sign_momentum(at: Situation, backend: str) -> Errors:
    # the formula in float64 is as short as a call, and a sign near zero may be either
    lr, weight_decay, betas = 0.25, 0.5, (0.9, 0.99)
    generator = torch.Generator().manual_seed(0)
    theta, g, m = (
        torch.randn(160, 176, generator=generator).to(at.dtype).to(at.device) for _ in range(3)
    )
    m = m.float()
    exact_m = betas[1] * m.double() + (1 - betas[1]) * g.double()
    mixed = betas[0] * m.double() + (1 - betas[0]) * g.double()
    exact = theta.double() - lr * (mixed.sign() + weight_decay * theta.double())
    sign_momentum([theta], [g], [m], lr=lr, betas=betas, weight_decay=weight_decay, backend=backend)
    clear = mixed.abs() > 1e-5
    return {"theta": _relative(theta[clear], exact[clear]), "momentum": _relative(m, exact_m)}


def _svd_lowrank(at: Situation, backend: str) -> Errors:
    # singular values that halve: four of them are all but exact, and q small enough for 'native'
    n, k, q = 160, 176, 4
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q
        for m in (n, k)
    )
    x = ((u * 0.5 ** torch.arange(n)) @ v.T).to(at.dtype).to(at.device)
    fixed = torch.Generator().manual_seed(1)
    got = svd_lowrank(x, q, generator=fixed, backend=backend)
    exact = svd_lowrank_reference(x.double(), q)
    return {
        "singular values": _relative(got.S, exact[1]),
        "product": _relative(_product(*(t.double() for t in got[:3])), _product(*exact[:3])),
    }


def _symmetric_eigen(at: Situation, backend: str) -> Errors:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 12, 12, generator=generator).to(at.dtype).to(at.device)
    a = a + a.mT
    w, v = symmetric_eigen(a, backend=backend)
    exact = torch.linalg.eigvalsh(a.double())
    product = _product(v.double(), w.double(), v.double().mT)
    return {"eigenvalues": _relative(w, exact), "product": _relative(product, a.double())}


def _small_svd(at: Situation, backend: str) -> Errors:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 16, 12, generator=generator).to(at.dtype).to(at.device)
    u, s, vh = small_svd(a, backend=backend)
    exact = torch.linalg.svdvals(a.double())
    product = _product(u.double(), s.double(), vh.double())
    return {"singular values": _relative(s, exact), "product": _relative(product, a.double())}


def _product(u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    return (u * s.unsqueeze(-2)) @ vh


def _step(
    function: Callable[..., Tensor], operands: dict[str, Tensor], dy: Tensor
) -> dict[str, Tensor]:
    """The output and the gradient of every operand but the frozen weight."""
    leaves = {
        name: value.detach().clone().requires_grad_(name != "weight")
        for name, value in operands.items()
    }
    y = function(**leaves)
    y.backward(dy)
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y.detach(), **gradients}


def _relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max())


STEPS: dict[str, Callable[[Situation, str], Errors]] = {
    "adapter_linear": _adapter_linear,
    "adapter_group": _adapter_group,
    "weight_norm": _weight_norm,
    "sign_momentum": _sign_momentum,
    "svd_lowrank": _svd_lowrank,
    "symmetric_eigen": _symmetric_eigen,
    "small_svd": _small_svd,
}
