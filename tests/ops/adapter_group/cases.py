"""Groups for adapter_group's tests, and the reference's values and gradients for them."""

from __future__ import annotations

import torch

from fastlora.ops import Member, adapter_linear
from fastlora.ops.adapter_group.reference import adapter_group_reference
from fastlora.ops.dropout import draw_seed, philox_keep, stream_keep
from tests.ops.adapter_linear.cases import VECTORS, operands, vectors

TENSORS = ("weight", "lora_A", "lora_B", "bias", *VECTORS)


def member(
    k, n=20, r=4, scaling=0.7, p=0.0, which=(), bias=False, zeros=False, keep_output=True, seed=0,
    **dtypes,
):  # fmt: skip
    """One layer of width n and rank r over K = k; ``which`` vectors it has."""
    tensors = operands((1,), k, n, r, bias, seed=seed, **dtypes)
    tensors |= vectors(tensors, which, dtypes.get("adapter_dtype"), zeros, seed=seed + 50)
    del tensors["x"]
    return Member(**tensors, scaling=scaling, dropout_p=p, keep_output=keep_output)


def group(*kinds, leading=(7,), k=24, dtype=torch.float32, adapter_dtype=None):
    """(x, members), a member for every dict of ``member``'s options."""
    x = operands((*leading,), k, dtype=dtype, seed=99)["x"]
    both = {"dtype": dtype, "adapter_dtype": adapter_dtype}
    return x, [member(k, seed=i, **both, **kind) for i, kind in enumerate(kinds)]


def shared(members, lora_A=None):
    """The same members, all with one lora_A."""
    lora_A = members[0].lora_A if lora_A is None else lora_A
    return [m._replace(lora_A=lora_A) for m in members]


def named(x, members):
    """{"x": x, "0.weight": …, …}: every tensor of a call by name."""
    found = {"x": x}
    for index, own in enumerate(members):
        for name in TENSORS:
            if getattr(own, name) is not None:
                found[f"{index}.{name}"] = getattr(own, name)
    return found


def trained(x, members, names=None, to=None):
    """(x, members) anew, of which the tensors named (all, if None) require gradients.

    A tensor that occurs twice is one leaf; it trains if one of its names is given.
    """
    leaves = {}
    wanted = {id(t) for n, t in named(x, members).items() if names is None or n in names}

    def leaf(tensor):
        if tensor is not None and id(tensor) not in leaves:
            value = tensor.detach() if to is None else tensor.detach().to(to)
            leaves[id(tensor)] = value.requires_grad_(id(tensor) in wanted)
        return None if tensor is None else leaves[id(tensor)]

    return leaf(x), [m._replace(**{n: leaf(getattr(m, n)) for n in TENSORS}) for m in members]


def gradients_for(members, x, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*x.shape[:-1], m.weight.shape[0], generator=generator).to(x.device, x.dtype)
        for m in members
    ]


def collect(ys, x, members):
    """{"y0": …, "x": its gradient, …}."""
    values = {f"y{index}": y.detach() for index, y in enumerate(ys)}
    return values | {name: leaf.grad for name, leaf in named(x, members).items()}


def backward(ys, dys):
    """An output whose dy is None is not used; nor is one that needs none."""
    used = [(y, dy) for y, dy in zip(ys, dys, strict=True) if dy is not None and y.requires_grad]
    if used:
        torch.autograd.backward([y for y, _ in used], [dy for _, dy in used])


def run(call, x, members, dys=None, names=None, seed=3):
    """Values and gradients of ``call(x, members)``; an output whose dy is None is not used."""
    dys = gradients_for(members, x) if dys is None else dys
    x, members = trained(x, members, names)
    torch.manual_seed(seed)
    ys = call(x, members)
    backward(ys, dys)
    return collect(ys, x, members)


def alone(x, members, backend=None):
    """Each member by itself."""
    return [
        adapter_linear(
            x,
            m.weight,
            m.lora_A,
            m.lora_B,
            m.scaling,
            m.bias,
            m.dropout_p,
            out_scale=m.out_scale,
            mid_scale=m.mid_scale,
            adapter_scale=m.adapter_scale,
            drop_base=m.drop_base,
            keep_output=m.keep_output,
            backend=backend,
        )
        for m in members
    ]


def masks(x, members, backend="eager", seed=3):
    """The masks that ``run`` draws with this seed, in x's shape; None where there is no dropout."""
    torch.manual_seed(seed)
    rows = (x.numel() // max(1, x.shape[-1]), x.shape[-1])
    found = []
    for own in members:
        if own.dropout_p == 0.0:
            found.append(None)
        elif backend in ("triton", "native"):
            found.append(philox_keep(rows, own.dropout_p, draw_seed(x.device)).view(x.shape))
        else:
            drawn = stream_keep(rows, own.dropout_p, draw_seed("cpu"), x.device)
            found.append(drawn.view(x.shape))
    return found


def exact(x, members, dys=None, keeps=None, names=None, dtype=torch.float64):
    """``run`` by the reference in ``dtype``."""
    dys = gradients_for(members, x) if dys is None else dys
    x, members = trained(x, members, names, dtype)
    ys = adapter_group_reference(x, members, keeps)
    backward(ys, [None if dy is None else dy.to(dtype) for dy in dys])
    return collect(ys, x, members)
