"""``sign_momentum``, ``fold_gradients``, ``apply_momentum``: Lion's and Tiger's update of lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlora.ops import backend as _backend
from fastlora.ops.sign_momentum.contract import BACKENDS, Job, Momentum, Number
from fastlora.ops.sign_momentum.eight_bit import EightBit

PARAMS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RELATIVE = (None, "tensor", "rows")


class SignMomentumCache:
    """What one caller's calls have in common, so that only what has changed is done again.

    One for each list that is called with again and again; not for several threads at once.
    """

    def __init__(self) -> None:
        self.module: ModuleType | None = None
        self.table: Any = None


def sign_momentum(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Momentum],
    *,
    lr: Number | Sequence[Number],
    betas: tuple[float, float] | None = None,
    coefficients: tuple[float, float, float, float] | None = None,
    weight_decay: Number | Sequence[Number] = 0.0,
    maximize: bool = False,
    relative: str | Sequence[str | None] | None = None,
    floor: Number | Sequence[Number] = 0.0,
    rows: Sequence[Tensor | None] | None = None,
    mask_momentum_rows: bool = False,
    shrink: tuple[float, float | Sequence[float]] | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    cache: SignMomentumCache | None = None,
    backend: str | None = None,
    check_only: bool = False,
) -> Tensor | None:
    """One step of Lion or Tiger on a list of tensors, in place, in one pass over memory.

    With u = sign(a·m + b·g) of the old momentum m, m ← c·m + d·g and θ ← θ − η(u + λθ):
    ``betas`` (β₁, β₂) give Lion (arXiv 2302.06675), equal betas Tiger (kexue 9512), whose u is the
    sign of the new m. The order of roundings is in ``contract``: results are the same to the bit in
    every backend and with any number of threads (with ``relative``, but for the order in which a
    backend adds up an RMS in float64).

    Args:
        params: floating tensors, each float32, bfloat16, float16 or float64 (eager only), with any
            strides; zero-dim and empty ones too. All on one device.
        grads: as many, of the same shapes: float32, bfloat16 or float16, or float64 where the
            parameter is.
        momenta: as many, of the same shapes: float32, bfloat16, ``EightBit``, or float64 where the
            parameter is.
        lr, weight_decay: η ≥ 0 and λ ≥ 0; a number, a 0-dim tensor (on the parameters' device it
            is not waited for, and its value not checked), or a sequence of one per tensor.
        betas: each in [0, 1].
        coefficients: (a, b, c, d) in place of betas, which stand for (β₁, 1−β₁, β₂, 1−β₂). Tiger's
            last of k micro-steps: a = c = 1 (or β if k = 1), b = d = (1−β)/k.
        maximize: take −g for g.
        relative: for all tensors, or a sequence of one per tensor: "tensor" multiplies lr by
            max(RMS(θ), floor) of the tensor before the update, "rows" by each row's own, over
            the last axis; None leaves lr as it is. λ is multiplied with it: η(u + λθ).
        floor: as lr; only read where ``relative`` is given.
        rows: one per tensor: None, or a bool mask, of shape θ.shape[:-1] or flat, of the rows (last
            axis) whose θ moves. Rows that do not move keep their bytes.
        mask_momentum_rows: keep the momentum of those rows as well (a block of an ``EightBit``
            that straddles moving rows is encoded anew).
        shrink: (s, center), center a number or one per tensor. A tensor whose gradient holds NaN or
            ±∞ gets Tiger's rule: m stays, and θ ← (θ − center)·s + center. None: m takes what
            comes, as in torch.optim, and where m is NaN θ only decays (torch's sign(NaN) is 0).
        rounding: "nearest" or "stochastic", of bfloat16 parameters; others are rounded to nearest.
        seed: an integer, required for stochastic rounding: element i of tensor j of the list draws
            its bits from (seed, j, i). Take another one for every step.
        cache: of the caller's own.
        backend: 'triton', 'native' or 'eager'; None chooses (see ``fastlora.explain``).
        check_only: raise what the call would raise, and write nothing; returns None.

    Returns:
        With ``shrink`` a bool tensor, one element per tensor: whether its gradient was not finite.
        Else None.

    Raises (before anything is written):
        ValueError: lengths, shapes or devices that do not fit, a tensor that occurs twice or
            overlaps itself, lr or weight_decay negative or not finite, betas outside [0, 1], a
            missing seed.
        TypeError: complex, integer, sparse or otherwise unknown tensors; a parameter or momentum
            with torch's lazy negation (``is_neg()``).
        BackendError: the backend asked for cannot run this call.
    """
    n = len(momenta)
    if (betas is None) == (coefficients is None):
        raise ValueError("give either betas or coefficients")
    if betas is not None:
        first, second = (_beta(beta) for beta in betas)
        coefficients = (first, 1 - first, second, 1 - second)
    assert coefficients is not None
    a, b, c, d = (_finite("coefficients", value) for value in coefficients)
    if maximize:
        b, d = -b, -d
    ratio, centers = _shrink(shrink, n)
    job = Job(
        params, grads, momenta, a, b, c, d,
        *_step(lr, weight_decay, floor, relative, n),
        rows=_rows(rows, momenta), mask_momentum=mask_momentum_rows,
        shrink=ratio, centers=centers, skip=None, moves=True, seed=_seed(rounding, seed),
    )  # fmt: skip
    return _run("sign_momentum", job, cache, backend, check_only)


def fold_gradients(
    momenta: Sequence[Momentum],
    grads: Sequence[Tensor],
    *,
    decay: float,
    weight: float,
    maximize: bool = False,
    rows: Sequence[Tensor | None] | None = None,
    mask_momentum_rows: bool = True,
    params: Sequence[Tensor] | None = None,
    shrink: tuple[float, float | Sequence[float]] | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    cache: SignMomentumCache | None = None,
    backend: str | None = None,
    check_only: bool = False,
) -> Tensor | None:
    """m ← decay·m + weight·g on a list of tensors, in place: a micro-step of Tiger's accumulation.

    Of k micro-steps the first has decay = β, the others 1, and all have weight = (1−β)/k; the
    parameters move by ``apply_momentum`` after the last one (or fold the last one and move in one
    pass, with ``sign_momentum``'s coefficients).

    Args:
        momenta, grads, maximize, cache, backend, check_only: as in ``sign_momentum``; without
            params, float64 gradients of any momentum.
        rows, mask_momentum_rows: as there; but rows whose mask is False keep their momentum unless
            ``mask_momentum_rows`` is False: then rows only say what of a parameter shrinks.
        params, shrink, rounding, seed: only together: a tensor whose gradient is not finite keeps
            its momentum, and its parameter shrinks at once.

    Returns, Raises:
        As ``sign_momentum``. What is returned may be given to ``apply_momentum`` as ``skip``.
    """
    if (params is None) != (shrink is None):
        raise ValueError("params are needed with shrink, and only then")
    ratio, centers = _shrink(shrink, len(momenta))
    decay, weight = _finite("decay", decay), _finite("weight", weight)
    if maximize:
        weight = -weight
    job = Job(
        params, grads, momenta, decay, weight, decay, weight, (), (), (), None,
        rows=_rows(rows, momenta), mask_momentum=mask_momentum_rows,
        shrink=ratio, centers=centers, skip=None, moves=False, seed=_seed(rounding, seed),
    )  # fmt: skip
    return _run("fold_gradients", job, cache, backend, check_only)


def apply_momentum(
    params: Sequence[Tensor],
    momenta: Sequence[Momentum],
    *,
    lr: Number | Sequence[Number],
    weight_decay: Number | Sequence[Number] = 0.0,
    relative: str | Sequence[str | None] | None = None,
    floor: Number | Sequence[Number] = 0.0,
    rows: Sequence[Tensor | None] | None = None,
    skip: Tensor | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
    cache: SignMomentumCache | None = None,
    backend: str | None = None,
    check_only: bool = False,
) -> None:
    """θ ← θ − η(sign(m) + λθ) on a list of tensors, in place: the step after ``fold_gradients``.

    Args:
        skip: bool [tensors], on the parameters' device: True for those that stay as they are, as
            ``fold_gradients`` returns it for the last micro-step.
        Everything else as in ``sign_momentum``.
    """
    job = Job(
        params, None, momenta, 1.0, 0.0, 1.0, 0.0,
        *_step(lr, weight_decay, floor, relative, len(momenta)),
        rows=_rows(rows, momenta), mask_momentum=False,
        shrink=None, centers=None, skip=None if skip is None else skip.contiguous(), moves=True,
        seed=_seed(rounding, seed),
    )  # fmt: skip
    _run("apply_momentum", job, cache, backend, check_only)


def _run(
    name: str, job: Job, cache: SignMomentumCache | None, backend: str | None, check_only: bool
) -> Tensor | None:
    n = len(job.momenta)
    for kind, tensors in (("params", job.params), ("grads", job.grads)):
        if tensors is not None and len(tensors) != n:
            raise ValueError(f"{name} got {len(tensors)} {kind} for {n} momenta")
    if not n:
        return torch.zeros(0, dtype=torch.bool, device="cpu") if job.shrink is not None else None
    _check_masks(job)
    module = _backend.select(name, BACKENDS, job.momenta[0].device, torch.float32, backend)
    cache = cache or SignMomentumCache()
    kept = cache.table if cache.module is module else None
    if kept is None:
        _check_signs(job)
    table = module.read(job, kept)
    # after they have been read, which brings them into the caches one behind the other
    if job.grads is not None and any(map(Tensor.is_neg, job.grads)):
        job.grads = [grad.resolve_neg() for grad in job.grads]
        table = module.read(job, table)
    if table is None:
        dtype = _check(job)
        module = _backend.select(name, BACKENDS, job.momenta[0].device, dtype, backend)
        table = module.read(job, None, checked=True)
    cache.module, cache.table = module, table
    if check_only:
        return None
    return module.update(job, table)


# --- checks -------------------------------------------------------------------------------------


def _check_masks(job: Job) -> None:
    device, n = job.momenta[0].device, len(job.momenta)
    if job.skip is not None and (
        job.skip.dtype != torch.bool or job.skip.shape != (n,) or job.skip.device != device
    ):
        raise ValueError(f"skip must be a bool tensor [{n}] on {device}")
    for i, mask in enumerate(job.rows or ()):
        if mask is not None and mask.device != device:
            raise ValueError(f"rows[{i}] is on {mask.device}, not on {device}")


def _check_signs(job: Job) -> None:
    """Raises where memory holds the negative of what a tensor is, as kernels read memory."""
    for kind, tensors in (("params", job.params or ()), ("momenta", job.momenta)):
        for i, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor) and tensor.is_neg():
                raise TypeError(
                    f"{kind}[{i}] is a negated view (is_neg), which cannot be updated in place: "
                    "pass its resolve_neg()"
                )


def _check(job: Job) -> torch.dtype:
    """Raises where a tensor does not fit; the widest dtype that any is computed in."""
    device, widest = job.momenta[0].device, torch.float32
    seen: set[int] = set()
    for i, momentum in enumerate(job.momenta):
        kept = _kept(i, momentum)
        _like(f"momenta[{i}]", kept, kept.shape, device)
        wide = kept.dtype == torch.float64
        written = [("momenta", kept)]
        if job.params is not None:
            param = job.params[i]
            if param.dtype not in PARAMS:
                raise TypeError(f"params[{i}] is {param.dtype}; parameters are floating tensors")
            if wide and param.dtype != torch.float64:
                raise TypeError(f"momenta[{i}] is float64 but params[{i}] is {param.dtype}")
            wide = param.dtype == torch.float64
            _like(f"params[{i}]", param, kept.shape, device)
            written.append(("params", param))
        if job.grads is not None:
            grad = job.grads[i]
            double = grad.dtype == torch.float64
            if grad.dtype not in PARAMS or (double and not wide and job.params is not None):
                raise TypeError(
                    f"grads[{i}] is {grad.dtype}; gradients are floating tensors, and float64 only "
                    "where their parameters are"
                )
            _like(f"grads[{i}]", grad, kept.shape, device)
            if double:
                widest = torch.float64
        if wide:
            widest = torch.float64
        for kind, tensor in written:
            if not tensor.numel():
                continue
            if any(
                step == 0 and size > 1
                for step, size in zip(tensor.stride(), tensor.shape, strict=True)
            ):
                raise ValueError(f"{kind}[{i}] overlaps itself: it is expanded, and cannot be set")
            if tensor.data_ptr() in seen:
                raise ValueError(f"the memory of {kind}[{i}] occurs twice in the lists")
            seen.add(tensor.data_ptr())
    return widest


def _kept(i: int, momentum: Momentum) -> Tensor:
    if isinstance(momentum, EightBit):
        return momentum.codes
    if momentum.dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise TypeError(
            f"momenta[{i}] is {momentum.dtype}; momentum is float32, bfloat16 or EightBit"
        )
    return momentum


def _like(name: str, tensor: Tensor, shape: Any, device: torch.device) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} is {tensor.layout}: pass it dense")
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, its momentum {list(shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, not on {device}: one device a call")
    if tensor.numel() and not tensor.untyped_storage().nbytes() and device.type != "meta":
        raise ValueError(f"the memory of {name} has been freed")


def _step(
    lr: Any, weight_decay: Any, floor: Any, relative: Any, n: int
) -> tuple[Sequence[Number], Sequence[Number], Sequence[Number], Sequence[str | None] | None]:
    kinds = None if relative is None else _kinds(relative, n)
    return (
        _numbers("lr", lr, n),
        _numbers("weight_decay", weight_decay, n),
        _numbers("floor", floor, n),
        kinds,
    )


def _kinds(relative: Any, n: int) -> list[str | None] | None:
    """One per tensor; None where no rate is relative."""
    kinds: list[str | None] = [relative] * n if isinstance(relative, str) else list(relative)
    if len(kinds) != n:
        raise ValueError(f"relative has {len(kinds)} entries for {n} tensors")
    for kind in set(kinds):
        if kind not in RELATIVE:
            raise ValueError(f"relative is None, 'tensor' or 'rows', not {kind!r}")
    return kinds if any(kinds) else None


def _numbers(name: str, value: Any, n: int) -> list[Number]:
    if isinstance(value, Sequence):
        if len(value) != n:
            raise ValueError(f"{name} has {len(value)} entries for {n} tensors")
        if _plain(value) and min(value) >= 0:
            return list(value)
        return [_number(name, one) for one in value]
    return [_number(name, value)] * n


def _plain(values: Sequence[Any]) -> bool:
    """Whether all are floats and finite, found in a fraction of the time that each takes alone."""
    # a sum is finite only where every summand is
    return set(map(type, values)) == {float} and math.isfinite(sum(values))


def _number(name: str, value: Any) -> Number:
    if isinstance(value, Tensor):
        if value.dim() or not value.dtype.is_floating_point:
            raise ValueError(f"{name} as a tensor is zero-dim and floating")
        if value.device.type != "cpu":
            return value.detach()
        value = value.item()
    value = float(value)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number, at least 0, not {value}")
    return value


def _finite(name: str, value: Any) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    return value


def _beta(value: Any) -> float:
    value = float(value)
    if not 0 <= value <= 1:
        raise ValueError(f"betas must be in [0, 1], not {value}")
    return value


def _shrink(shrink: Any, n: int) -> tuple[float | None, list[float] | None]:
    if shrink is None:
        return None, None
    ratio, center = shrink
    centers = list(center) if isinstance(center, Sequence) else [center] * n
    if len(centers) != n:
        raise ValueError(f"shrink has {len(centers)} centers for {n} tensors")
    if not _plain(centers):
        centers = [_finite("shrink's center", one) for one in centers]
    return _finite("shrink", ratio), centers


def _rows(
    rows: Sequence[Tensor | None] | None, momenta: Sequence[Momentum]
) -> list[Tensor | None] | None:
    """Flat, contiguous masks."""
    if rows is None or all(mask is None for mask in rows):
        return None
    if len(rows) != len(momenta):
        raise ValueError(f"rows has {len(rows)} entries for {len(momenta)} tensors")
    flat: list[Tensor | None] = []
    for i, (mask, momentum) in enumerate(zip(rows, momenta, strict=True)):
        if mask is None:
            flat.append(None)
            continue
        lead = momentum.shape[:-1]
        if mask.dtype != torch.bool or mask.shape not in (lead, (lead.numel(),)):
            raise ValueError(
                f"rows[{i}] must be a bool mask of shape {list(lead)} or [{lead.numel()}], not "
                f"{mask.dtype} {list(mask.shape)}"
            )
        flat.append(mask.reshape(-1).contiguous())
    return flat


def _seed(rounding: str, seed: int | None) -> int | None:
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding is 'nearest' or 'stochastic', not {rounding!r}")
    if rounding == "nearest":
        return None
    if seed is None:
        raise ValueError("stochastic rounding needs a seed, another one for every step")
    return int(seed)
