"""``sign_momentum``: Lion's step of all of a model's LoRA tensors."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.sign_momentum import Foreach, as_reference, lion_pytorch
from bench.throughput.case import Cell, Operation, Provider, Request, Step, Verdict, Work
from bench.throughput.providers import backends, chosen, rival
from bench.throughput.shapes import MODELS
from fastlora.ops.sign_momentum import SignMomentumCache, sign_momentum
from fastlora.ops.sign_momentum.contract import BACKENDS

# A rate of which bfloat16, too, shows whether a step was right.
RULE: dict[str, Any] = {"lr": 0.5, "betas": (0.9, 0.99), "weight_decay": 0.1}
ADAM_EPS = 1e-8
CHECKED = 2  # steps, of which the second finds a momentum
ROUNDINGS = 4.0  # of the largest parameter, that two steps may be off


class Layers(NamedTuple):
    """All tensors of a model, with the gradients that stand in them."""

    params: list[nn.Parameter]

    @property
    def grads(self) -> list[Tensor]:
        return [param.grad for param in self.params if param.grad is not None]

    def momenta(self) -> list[Tensor]:
        """Zeros: float16 parameters have theirs in float32."""
        half = self.params[0].dtype == torch.float16
        return [torch.zeros_like(p, dtype=torch.float32 if half else p.dtype) for p in self.params]


def _cells(request: Request) -> Iterable[Cell]:
    if request.layers is not None and "block" not in request.layers:
        return
    for model in request.shapes:
        n, k = zip(*MODELS[model].block() * MODELS[model].blocks, strict=True)
        for dtype in request.dtype:
            for rank in request.rank:
                yield Cell(
                    "sign_momentum", model, "model", n, k, 0, rank, 0.0, dtype, request.device
                )


def _operands(cell: Cell, seed: int) -> Layers:
    generator = torch.Generator(cell.device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        made = torch.randn(size, device=cell.device, generator=generator)
        return made.to(cell.element)

    params = []
    for n, k in zip(cell.n, cell.k, strict=True):
        for size in ((cell.rank, k), (n, cell.rank)):
            params.append(nn.Parameter(draw(*size)))
            params[-1].grad = draw(*size)
    return Layers(params)


def _count(cell: Cell) -> int:
    return cell.rank * (sum(cell.n) + sum(cell.k))


def _moved(cell: Cell) -> int:
    """Parameters and momentum read and written, gradients read."""
    momentum = 4 if cell.element == torch.float16 else cell.element.itemsize
    return _count(cell) * (3 * cell.element.itemsize + 2 * momentum)


def _stepping(optimizer: Any, own: Layers) -> Step:
    def forward() -> list[nn.Parameter]:
        optimizer.step()
        return own.params

    return Step(forward)


def _plain(cell: Cell, own: Layers) -> Step:
    return _stepping(Foreach(own.params, **RULE), own)


def _lion_pytorch(cell: Cell, own: Layers) -> Step:
    rival("lion-pytorch")
    return _stepping(lion_pytorch(own.params, **RULE)[0], own)


def _adamw(cell: Cell, own: Layers) -> Step:
    return _stepping(torch.optim.AdamW(own.params, **RULE, eps=ADAM_EPS, fused=True), own)


def _copy(cell: Cell, own: Layers) -> Step:
    size = _moved(cell) // 2  # once read, once written
    source, target = (torch.ones(size, dtype=torch.uint8, device=cell.device) for _ in range(2))
    return Step(lambda: [target.copy_(source)])


def _ours(cell: Cell, own: Layers, backend: str) -> Step:
    momenta, cache = own.momenta(), SignMomentumCache()

    def forward() -> list[nn.Parameter]:
        sign_momentum(own.params, own.grads, momenta, **RULE, cache=cache, backend=backend)
        return own.params

    return Step(forward)


def _exact(own: Layers, adamw: bool) -> list[Tensor]:
    """The parameters after CHECKED steps, in float64."""
    lr, (first, second), decay = RULE["lr"], RULE["betas"], RULE["weight_decay"]
    params = [param.detach().double() for param in own.params]
    for p, g in zip(params, (grad.double() for grad in own.grads), strict=True):
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for step in range(1, CHECKED + 1):
            p *= 1 - lr * decay
            if adamw:
                m, v = torch.lerp(g, m, first), torch.lerp(g * g, v, second)
                root = (v / (1 - second**step)).sqrt() + ADAM_EPS
                p -= lr * m / (1 - first**step) / root
            else:
                p -= lr * torch.lerp(g, m, first).sign()
                m = torch.lerp(g, m, second)
    return params


def _check(cell: Cell, own: Layers, steps: dict[str, Step]) -> dict[str, Verdict]:
    """Two steps of each from the same parameters: by the formula in float64, ours to the bit too.

    A copy has to be one.
    """
    start = [param.detach().clone() for param in own.params]
    exact = {adamw: _exact(own, adamw) for adamw in (False, True)}

    def after(step: Step) -> list[Tensor]:
        with torch.no_grad():
            for param, first in zip(own.params, start, strict=True):
                param.copy_(first)
            for _ in range(CHECKED):
                step.forward()
        return [param.detach().clone() for param in own.params]

    with as_reference():
        reference = after(_ours(cell, own, "eager"))
    verdicts = {}
    for name, step in steps.items():
        if name == "copy":
            with torch.no_grad():
                right = all(bool((target == 1).all()) for target in step.forward())
            verdicts[name] = Verdict({}, None if right else "it has not copied")
            continue
        found = after(step)
        off = 0.0
        for got, want in zip(found, exact[name == "adamw-fused"], strict=True):
            off = max(off, float((got.double() - want).abs().max() / want.abs().max()))
        wrong = None
        if not off <= ROUNDINGS * torch.finfo(cell.element).eps:
            wrong = f"parameters are off by {off:.1e}"
        elif name.startswith("fastlora") and not all(map(torch.equal, found, reference)):
            wrong = "not the reference to the bit"
        verdicts[name] = Verdict({"parameters": off}, wrong)
    return verdicts


def _providers(cell: Cell) -> list[Provider]:
    return [
        Provider("copy", _copy),
        Provider("plain", _plain),
        Provider("lion-pytorch", _lion_pytorch),
        Provider("adamw-fused", _adamw),
        *(
            Provider(f"fastlora-{name}", partial(_ours, backend=name))
            for name in backends(BACKENDS, cell.device, cell.element)
        ),
    ]


OPERATION = Operation(
    name="sign_momentum",
    about="Lion's step of a model's LoRA tensors; plain is lion-pytorch's rule in torch._foreach, "
    "copy moves as many bytes",
    passes=("step",),
    rival="plain",
    cells=_cells,
    operands=_operands,
    providers=_providers,
    chosen=lambda cell: chosen("sign_momentum", BACKENDS, cell.device, cell.element),
    work=lambda cell, which: Work(8 * _count(cell), _moved(cell)),
    set_bytes=lambda cell: 3 * _count(cell) * 4,
    check=_check,
)
