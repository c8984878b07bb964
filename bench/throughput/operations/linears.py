"""What adapter_linear, adapter_group and DoRA's layer share: adapted layers that read one x."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.throughput.case import Cell, Provider, Request, Results, Step, Unavailable, Work
from bench.throughput.providers import compiled, peft_layer, rival
from bench.throughput.shapes import MODELS
from fastlora.ops.adapter_linear.onednn import linear as onednn_linear
from fastlora.ops.adapter_linear.reference import adapter_linear_reference
from fastlora.ops.backend import multiplies_with_onednn
from fastlora.ops.weight_norm.reference import weight_norm_reference

SCALING = 2.0
PASSES = ("forward", "backward")

linear = torch.nn.functional.linear
dropped = torch.nn.functional.dropout


class Layer(NamedTuple):
    weight: Tensor  # [N, K]
    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    magnitude: Tensor | None = None  # [N], DoRA's


class Operands(NamedTuple):
    x: Tensor  # [M, K]
    layers: list[Layer]
    dys: list[Tensor]  # [M, N] each

    def leaves(self) -> dict[str, Tensor]:
        """What trains, by the name of its gradient."""
        found = {"dx": self.x}
        for i, layer in enumerate(self.layers):
            found |= {f"dA{i}": layer.lora_A, f"dB{i}": layer.lora_B}
            if layer.magnitude is not None:
                found[f"dm{i}"] = layer.magnitude
        return found


def single_cells(op: str, request: Request) -> Iterable[Cell]:
    """A layer by itself, for every layer of every model."""
    for model in request.shapes:
        for layer, (n, k) in MODELS[model].layers().items():
            if request.layers is None or layer in request.layers:
                yield from _over(request, op, model, layer, (n,), k)


def group_cells(op: str, request: Request) -> Iterable[Cell]:
    """Layers that read one input; asked for by the first's name."""
    for model in request.shapes:
        for group, (widths, k) in MODELS[model].groups().items():
            if request.layers is None or group.partition(",")[0] in request.layers:
                yield from _over(request, op, model, group, widths, k)


def _over(
    request: Request, op: str, model: str, layer: str, n: tuple[int, ...], k: int
) -> Iterable[Cell]:
    for dtype in request.dtype:
        for m in request.m:
            for rank in request.rank:
                for p in request.dropout:
                    yield Cell(op, model, layer, n, (k,), m, rank, p, dtype, request.device)


def operands(cell: Cell, seed: int, magnitudes: bool = False) -> Operands:
    """A frozen base with adapters of the size that trained ones have, an x and its dY."""
    generator = torch.Generator(cell.device).manual_seed(seed)
    (k,) = cell.k

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        own = torch.randn(*shape, device=cell.device, generator=generator)
        return own.mul_(scale).to(cell.element)

    layers = []
    for n in cell.n:
        weight = draw(n, k, scale=k**-0.5)
        lora_A, lora_B = draw(cell.rank, k, scale=k**-0.5), draw(n, cell.rank, scale=0.02)
        magnitude = None
        if magnitudes:
            norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
            magnitude = norm.mul_(1 + 0.1 * draw(n).float()).to(cell.element).requires_grad_()
        layers.append(Layer(weight, lora_A.requires_grad_(), lora_B.requires_grad_(), magnitude))
    x = draw(cell.m, k).requires_grad_()
    return Operands(x, layers, [draw(cell.m, n) for n in cell.n])


def probe(cell: Cell, member: int, magnitudes: bool = False) -> Operands:
    """Operands by which dx is zero just where the member's dropout acted: W = 0, all else positive.

    The other members' lora_B are zero, so that nothing of theirs is in dx.
    """
    (k,) = cell.k

    def full(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=cell.element, device=cell.device)

    layers = []
    for i, n in enumerate(cell.n):
        b = 1 / (n * cell.rank) if i == member or magnitudes else 0.0
        layers.append(
            Layer(
                full(0.0, n, k),
                full(1.0, cell.rank, k).requires_grad_(),
                full(b, n, cell.rank).requires_grad_(),
                full(1.0, n).requires_grad_() if magnitudes else None,
            )
        )
    dys = [full(1.0 if i == member else 0.0, cell.m, n) for i, n in enumerate(cell.n)]
    return Operands(full(1.0, cell.m, k).requires_grad_(), layers, dys)


def exact(
    cell: Cell, own: Operands, computes: str, masks: list[Tensor] | None, keep_scale: float
) -> Results:
    """Results in float64: "adapted", by the references; "bare", of the frozen layers alone;
    "merged", the adapted values without gradients."""
    x = own.x.detach().double().requires_grad_()
    leaves, ys = {"dx": x}, []
    for i, layer in enumerate(own.layers):
        W = layer.weight.double()
        if computes == "bare":
            ys.append(x @ W.t())
            continue
        A, B = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B))
        leaves |= {f"dA{i}": A, f"dB{i}": B}
        g = None
        if layer.magnitude is not None:
            magnitude = layer.magnitude.detach().double().requires_grad_()
            leaves[f"dm{i}"] = magnitude
            g = magnitude / weight_norm_reference(W, A, B, SCALING).detach()
        keep = None if masks is None else masks[i]
        adapted = adapter_linear_reference(
            x, W, A, B, SCALING, keep=keep, keep_scale=keep_scale, out_scale=g,
            drop_base=g is not None and keep is not None,
        )  # fmt: skip
        ys.append(adapted)
    values = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    if computes == "merged":
        return values
    dys = [dy.double() for dy in own.dys]
    gradients = torch.autograd.grad(ys, list(leaves.values()), dys)
    return values | dict(zip(leaves, gradients, strict=True))


def work(cell: Cell, which: str, dora: bool = False) -> Work:
    """Forward: x, W, A, B read, y written. Backward: dY, x, W, A, B, t read, dx, dA, dB written."""
    m, (k,), r = cell.m, cell.k, cell.rank
    size = cell.element.itemsize
    flops = moved = 0.0
    for n in cell.n:
        adapter = r * (k + n)
        if which == "forward":
            flops += 2 * m * (n * k + adapter) + (2 * n * k * r if dora else 0)
            moved += n * k + adapter + m * n
        else:
            flops += 2 * m * (n * k + 2 * adapter)
            moved += n * k + 2 * adapter + m * (n + r)
    moved += m * k if which == "forward" else 2 * m * k
    return Work(flops, moved * size)


def set_bytes(cell: Cell) -> int:
    """Operands, results and a merged weight."""
    (k,), m = cell.k, cell.m
    elements = sum(2 * n * k + 2 * cell.rank * (n + k) + 2 * m * n for n in cell.n) + 2 * m * k
    return elements * cell.element.itemsize


# --- providers that are not ours ---------------------------------------------------------------


def plain_layer(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, dropout: float
) -> Tensor:
    """As peft writes it."""
    inner = dropped(x, dropout) if dropout else x
    return linear(x, weight) + linear(linear(inner, lora_A), lora_B) * SCALING


class Frozen(torch.autograd.Function):
    """A frozen linear layer whose products oneDNN makes."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return onednn_linear(x, weight)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return onednn_linear(dy, weight.t()), None


def baselines(cell: Cell, layer: Callable[..., Tensor] = plain_layer) -> list[Provider]:
    """The frozen layers, the merged ones, the formula in plain PyTorch and that compiled."""
    found = [Provider("bare", partial(_bare, frozen=linear), computes="bare")]
    if cell.device == "cpu" and cell.dtype == "float32" and multiplies_with_onednn():
        found.append(Provider("bare-onednn", partial(_bare, frozen=Frozen.apply), "bare"))
    if not cell.dropout:
        found.append(Provider("merged", _merged, computes="merged"))
    return [
        *found,
        Provider("plain", partial(_plain, layer=layer)),
        Provider("compiled", partial(_compiled, layer=layer)),
    ]


def _bare(cell: Cell, own: Operands, frozen: Callable[..., Tensor]) -> Step:
    return Step(lambda: [frozen(own.x, layer.weight) for layer in own.layers], {"dx": own.x})


@torch.no_grad()
def _merged(cell: Cell, own: Operands) -> Step:
    weights = []
    for layer in own.layers:
        weight = torch.addmm(layer.weight, layer.lora_B, layer.lora_A, alpha=SCALING)
        if layer.magnitude is not None:
            norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
            weight = (weight * (layer.magnitude / norm)[:, None]).to(weight.dtype)
        weights.append(weight)
    return Step(lambda: [linear(own.x, weight) for weight in weights])


def arguments(layer: Layer) -> list[Tensor]:
    return [tensor for tensor in layer if tensor is not None]


def _plain(cell: Cell, own: Operands, layer: Callable[..., Tensor]) -> Step:
    return Step(
        lambda: [layer(own.x, *arguments(each), cell.dropout) for each in own.layers], own.leaves()
    )


def _compiled(cell: Cell, own: Operands, layer: Callable[..., Tensor]) -> Step:
    whole = compiled(_together(layer))
    parts = [arguments(each) for each in own.layers]
    return Step(lambda: whole(own.x, parts, cell.dropout), own.leaves())


_made: dict[Callable[..., Tensor], Callable[..., list[Tensor]]] = {}


def _together(layer: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """All layers as one function, the same one for the same ``layer``."""

    def together(x: Tensor, parts: Sequence[Sequence[Tensor]], dropout: float) -> list[Tensor]:
        return [layer(x, *part, dropout) for part in parts]

    return _made.setdefault(layer, together)


def peft_step(cell: Cell, own: Operands, **options: Any) -> Step:
    """peft's layer for each, called one after the other."""
    modules = []
    leaves = {"dx": own.x}
    for i, layer in enumerate(own.layers):
        module = peft_layer(*layer[:3], SCALING, cell.dropout, **options)
        leaves[f"dA{i}"] = module.lora_A["default"].weight
        leaves[f"dB{i}"] = module.lora_B["default"].weight
        if layer.magnitude is not None:
            vector = module.lora_magnitude_vector["default"]
            vector.weight = torch.nn.Parameter(layer.magnitude.detach())
            leaves[f"dm{i}"] = vector.weight
        modules.append(module)
    return Step(lambda: [module(own.x) for module in modules], leaves)


def unsloth_step(cell: Cell, own: Operands) -> Step:
    """Unsloth's function for one projection; it takes [batch, tokens, K] and has no dropout."""
    module = rival("unsloth")
    if cell.dropout:
        raise Unavailable("unsloth's kernels have no dropout")

    def forward() -> list[Tensor]:
        x = own.x.unsqueeze(0)
        found = [
            module.LoRA_W.apply(x, each.weight, None, each.lora_A, each.lora_B, SCALING)
            for each in own.layers
        ]
        return [y.squeeze(0) for y in found]

    return Step(forward, own.leaves())


def liger_step(cell: Cell, own: Operands) -> Step:
    rival("liger")
    raise Unavailable("Liger-Kernel has no LoRA layer")
