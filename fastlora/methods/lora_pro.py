"""LoRA-Pro (arXiv 2407.18242): gradients of A and B whose step is nearest to full fine-tuning's."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastlora.adapters.view import AdapterLayer, layers
from fastlora.methods.hooks import (
    StepMethod,
    check_entries,
    check_owned,
    first_non_finite,
    inner_optimizer,
    overflowed,
    refuse_closure,
    refuse_no_gradients,
    unscale,
)
from fastlora.ops.small_solvers import symmetric_eigen

MODES = ("efficient", "full")
CHOICES = ("sylvester", "symmetric", "zero")
_FACTORS = ("lora_A.weight", "lora_B.weight")


class LoRAPro(StepMethod):
    """Before each step of an optimizer, bring s·(B g_A + g_B A) nearest to the full gradient G:

        g_A ← s⁻² (BᵀB)⁻¹ g_A + X A,     g_B ← s⁻² (I − P_B) g_B (AAᵀ)⁻¹ − B X,

    P_B projecting onto B's columns. Neither G [N, K] nor P_B is formed. Whatever X [r, r] is, the
    weight moves along P_B G + (I − P_B) G P_A. ``x`` chooses it: "sylvester" keeps g_A and g_B
    nearest to autograd's own (BᵀB X + X AAᵀ = −s⁻² (BᵀB)⁻¹ g_A Aᵀ), "symmetric" shares G's part in
    both spaces between them (kexue.fm 10266), "zero" gives it to g_A. The authors' old "symmetry"
    multiplies by AAᵀ where its inverse is due, and their s of 2 is α/r of one setting; here s is
    the layer's.

    ``mode`` "efficient": any optimizer goes on with these gradients, its own moments and decay.
    "full": AdamW on the equivalent full gradient, and its update is what the factors follow. It
    keeps two moments of [N, K] for every layer, 8 N K bytes in float32, the memory of full
    fine-tuning, and forms [N, K] a layer at a time; ``optimizer`` must be a plain SGD, which takes
    the step with its lr. ``betas``, ``eps`` and ``weight_decay`` λ are this mode's. λ multiplies A
    and B by √(1 − ηλ), so that BA decays by 1 − ηλ. The frozen base does not decay, as it does in
    the paper: the adapter alone would no longer give the trained model.

    ``damping`` δ: both Gram matrices get δ times the largest eigenvalue of the two. While B is
    zero, g_A = 0 and all the step is B's. A small B then asks for a g_A of the order of ‖G‖/(s‖B‖);
    the damping bounds it by ‖G‖ / (2 s √(δ λ_max)), however small B is. In "full" mode, or with
    SGD, this is still a long step: start from a B that is not zero, or with a small lr. The damping
    moves what it projects onto, by a share of δ λ_max / λ in the direction of an eigenvalue λ. Its
    default covers gradients in float32; those in half precision want about 1e-4. 0 leaves out
    what is singular.

    Adam's second moment remembers those first g_A, so that behind it, from B = 0, "efficient" moves
    A less than plain LoRA does, the more so with a warm-up; a damping of 1e-2 or more, or a start
    with a B that is not zero (LoRA-GA's), keeps A moving. Mode "full" wants a
    lower learning rate than LoRA.

    It hangs on the optimizer's own hooks and so works in any loop that calls ``optimizer.step()``
    with the gradients there (not with a closure). Clip gradients before the step. The gradients
    are taken as those of a loss in BA alone: a penalty on the factors goes through the same form.
    """

    def __init__(
        self,
        mode: str = "efficient",
        *,
        x: str = "sylvester",
        damping: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be {' or '.join(MODES)}, not {mode!r}")
        if x not in CHOICES:
            raise ValueError(f"x must be one of {', '.join(CHOICES)}, not {x!r}")
        if not 0 <= damping < 1:
            raise ValueError(f"damping must be in [0, 1), not {damping!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), not {betas!r}")
        if not (eps > 0 and math.isfinite(eps)):
            raise ValueError(f"eps must be above 0, not {eps!r}")
        if not (weight_decay >= 0 and math.isfinite(weight_decay)):
            raise ValueError(f"weight_decay must not be negative, not {weight_decay!r}")
        if mode == "efficient" and weight_decay:
            raise ValueError("weight_decay is mode 'full's; here the optimizer decays A and B")
        self.mode, self.x, self.damping = mode, x, damping
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self._handle: RemovableHandle | None = None
        self._layers: list[AdapterLayer] = []
        self._moments: dict[str, _Moments] = {}

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> LoRAPro:
        """Correct the gradients of every A and B of ``model`` (fastlora's or peft's) from now on.

        Raises RuntimeError if it, or another method on these layers, is attached already;
        ValueError for a model without LoRA layers or with adapters that this correction is not made
        for (AdaLoRA, VeRA, DoRA, LoRA-FA, embeddings, grouped convolutions, two active ones on a
        layer), for factors that are not the optimizer's, and in mode "full" for an optimizer that
        is not a plain SGD. A step at which no layer has a gradient raises RuntimeError.
        """
        if self._handle is not None:
            raise RuntimeError("it is attached already; detach it first, or make another")
        found = layers(model)
        if not found:
            raise ValueError("the model has no LoRA layers")
        seen: set[str] = set()
        for layer in found:
            reason = "two adapters are active on it" if layer.name in seen else _cannot(layer)
            if reason:
                raise ValueError(f"LoRA-Pro cannot correct the gradient of {layer.name}: {reason}")
            seen.add(layer.name)
        optimizer = inner_optimizer(optimizer, found, _FACTORS)
        if self.mode == "full" and type(optimizer) is not torch.optim.SGD:
            raise ValueError(
                "in mode 'full' LoRA-Pro is AdamW itself, and its step is to be taken by a "
                f"torch.optim.SGD, not by {type(optimizer).__name__}"
            )
        self._rates(found, optimizer)
        self._layers, self._moments = found, {}
        self._handle = optimizer.register_step_pre_hook(self._correct)
        return self

    def detach(self) -> None:
        """Leave the optimizer's steps alone again; moments are dropped. Raises RuntimeError if it
        is not attached."""
        if self._handle is None:
            raise RuntimeError("it is not attached")
        self._handle.remove()
        self._handle, self._layers, self._moments = None, [], {}

    def state_dict(self) -> dict[str, Any]:
        """Mode "full"'s moments by the layers' names, as live tensors; else only the mode."""
        return {
            "mode": self.mode,
            "moments": {name: moments._asdict() for name, moments in self._moments.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another run's ``state_dict`` was taken; call it after ``attach``.

        Raises RuntimeError if it is not attached; ValueError, before anything has changed, for a
        state of another mode, of layers that are not here, of other shapes, or that lacks an entry.
        """
        if self._handle is None:
            raise RuntimeError("attach it first: the state belongs to a model's layers")
        check_entries("the state", state, ("mode", "moments"))
        if state["mode"] != self.mode:
            raise ValueError(f"the state is of mode '{state['mode']}', this is '{self.mode}'")
        here = {layer.name: layer for layer in self._layers}
        loaded: dict[str, _Moments] = {}
        for name, saved in state["moments"].items():
            if name not in here:
                raise ValueError(f"the state has moments of {name}, which is no layer here")
            check_entries(f"what the state has of {name}", saved, _Moments._fields)
            moments = _Moments.of(here[name], int(saved["step"]))
            for part in ("exp_avg", "exp_avg_sq"):
                place, tensor = getattr(moments, part), saved[part]
                if tensor.shape != place.shape:
                    raise ValueError(
                        f"{part} of {name} has shape {list(tensor.shape)}, the layer has "
                        f"{list(place.shape)}"
                    )
                place.copy_(tensor)
            loaded[name] = moments
        self._moments = loaded

    @torch.no_grad()
    def _correct(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        refuse_closure("LoRA-Pro", args, kwargs)
        if overflowed(optimizer):
            return
        unscale(optimizer)
        trained = [layer for layer in self._layers if _has_gradients(layer)]
        refuse_no_gradients("LoRA-Pro", trained)
        _check_finite(trained)
        rates = self._rates(trained, optimizer)
        groups = _alike(trained)
        # what can fail is done before anything is written
        smalls = [_Small.of(group, self.damping) for group in groups]
        for group, small in zip(groups, smalls, strict=True):
            stack = _Stack.of(group)
            if self.mode == "efficient":
                _write(group, *closed_form(stack, small, self.x))
                continue
            decay = [math.sqrt(1 - rates[layer.name] * self.weight_decay) for layer in group]
            # it leaves P_B and P_A as they are, and divides g_A and g_B by itself
            divisor = torch.tensor(decay, dtype=stack.A.dtype, device=stack.A.device).view(-1, 1, 1)
            g_A, g_B = closed_form(self._adam(group, stack, small), small, self.x)
            _write(group, g_A / divisor, g_B / divisor)
            if self.weight_decay:
                for layer, factor in zip(group, decay, strict=True):
                    layer.lora_A.mul_(factor)
                    layer.lora_B.mul_(factor)

    def _adam(self, group: list[AdapterLayer], stack: _Stack, small: _Small) -> _Stack:
        """``stack`` with the gradients that Adam's update of W would have given A and B."""
        g_A, g_B = closed_form(stack, small, "zero")
        beta1, beta2 = self.betas
        of_A, of_B = torch.empty_like(g_A), torch.empty_like(g_B)
        for index, layer in enumerate(group):
            A, B, s = stack.A[index], stack.B[index], layer.scaling
            equivalent = (B @ g_A[index]).addmm_(g_B[index], A).mul_(s)  # [N, K]
            moments = self._moments.get(layer.name) or _Moments.of(layer)
            moments = moments._replace(step=moments.step + 1)
            self._moments[layer.name] = moments
            moments.exp_avg.lerp_(equivalent, 1 - beta1)
            moments.exp_avg_sq.mul_(beta2).addcmul_(equivalent, equivalent, value=1 - beta2)
            root = (moments.exp_avg_sq / (1 - beta2**moments.step)).sqrt_().add_(self.eps)
            update = torch.div(moments.exp_avg, root, out=equivalent)
            update.div_(1 - beta1**moments.step)
            torch.mm(B.mT * s, update, out=of_A[index])
            torch.mm(update, A.mT * s, out=of_B[index])
        return stack._replace(g_A=of_A, g_B=of_B)

    def _rates(
        self, found: list[AdapterLayer], optimizer: torch.optim.Optimizer
    ) -> dict[str, float]:
        """In mode "full" each layer's learning rate, A's and B's being one."""
        if self.mode == "efficient":
            return {}
        check_owned(optimizer, found, _FACTORS)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        rates: dict[str, float] = {}
        for layer in found:
            for factor in (layer.lora_A, layer.lora_B):
                group = groups[id(factor)]
                if group["momentum"] or group["weight_decay"] or group["maximize"]:
                    raise ValueError(
                        "in mode 'full' LoRA-Pro is AdamW itself: the SGD that takes its step must "
                        "have no momentum, weight_decay or maximize of its own"
                    )
                rate = float(group["lr"])
                if rates.setdefault(layer.name, rate) != rate:
                    raise ValueError(f"in mode 'full' A and B of {layer.name} must have one lr")
                if rate * self.weight_decay >= 1:
                    raise ValueError("lr times weight_decay must stay below 1")
        return rates


class _Moments(NamedTuple):
    """Adam's of the equivalent gradient, [N, K] in the factors' dtype, float32 or wider."""

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def of(cls, layer: AdapterLayer, step: int = 0) -> _Moments:
        A, B = layer.lora_A.detach().flatten(1), layer.lora_B
        shape, dtype = (B.shape[0], A.shape[1]), torch.promote_types(A.dtype, torch.float32)
        return cls(step, *(torch.zeros(shape, dtype=dtype, device=A.device) for _ in range(2)))


class _Stack(NamedTuple):
    """L layers of equal shapes: A and g_A [L, r, K], B and g_B [L, N, r], s [L, 1, 1]."""

    A: Tensor
    B: Tensor
    g_A: Tensor
    g_B: Tensor
    s: Tensor

    @classmethod
    def of(cls, group: list[AdapterLayer]) -> _Stack:
        scalings = [layer.scaling for layer in group]
        return cls(
            _stacked([layer.lora_A for layer in group]),
            _stacked([layer.lora_B for layer in group]),
            _stacked([layer.lora_A.grad for layer in group]),
            _stacked([layer.lora_B.grad for layer in group]),
            torch.tensor(scalings, dtype=torch.float64, device=group[0].lora_A.device)[
                :, None, None
            ],
        )


class _Small(NamedTuple):
    """The damped Gram matrices of a stack in float64: BᵀB = U diag(b) Uᵀ, AAᵀ = V diag(a) Vᵀ, and
    their inverses [L, r, r]. U, V [L, r, r]; b, a [L, r]."""

    U: Tensor
    b: Tensor
    V: Tensor
    a: Tensor
    inverse_B: Tensor
    inverse_A: Tensor

    @classmethod
    def of(cls, group: list[AdapterLayer], damping: float) -> _Small:
        A = _stacked([layer.lora_A for layer in group]).double()
        B = _stacked([layer.lora_B for layer in group]).double()
        b, U = symmetric_eigen(B.mT @ B)
        a, V = symmetric_eigen(A @ A.mT)
        largest = torch.maximum(b[:, -1:], a[:, -1:])
        least = torch.finfo(b.dtype).eps * b.shape[-1] * largest
        b, a = (values.clamp(min=0) + damping * largest for values in (b, a))

        def inverse(values: Tensor, vectors: Tensor) -> Tensor:
            return (vectors * _reciprocal(values, least)[:, None, :]) @ vectors.mT

        return cls(U, b, V, a, inverse(b, U), inverse(a, V))


def closed_form(stack: _Stack, small: _Small, x: str) -> tuple[Tensor, Tensor]:
    """LoRA-Pro's (g_A [L, r, K], g_B [L, N, r]); ``x`` is one of ``CHOICES``."""
    A, B, g_A, g_B = stack.A, stack.B, stack.g_A, stack.g_B
    s = stack.s.double()
    inverse_B, inverse_A = small.inverse_B / s**2, small.inverse_A
    # s⁻² (BᵀB)⁻¹ Bᵀ g_B (AAᵀ)⁻¹ [r, r]: of g_B's correction what lies in B's columns
    inside = inverse_B @ (B.mT @ g_B).double() @ inverse_A
    if x == "sylvester":
        right = -(small.U.mT @ inverse_B @ (g_A @ A.mT).double() @ small.V)
        sums = small.b[:, :, None] + small.a[:, None, :]
        X = small.U @ (right * _reciprocal(sums, torch.zeros_like(sums))) @ small.V.mT
    else:
        X = inside * (-0.5 if x == "symmetric" else 0.0)
    wide = A.dtype
    corrected_A = torch.baddbmm(X.to(wide) @ A, inverse_B.to(wide), g_A)
    corrected_B = torch.baddbmm(
        g_B @ (inverse_A / s**2).to(wide), B, (inside + X).to(wide), alpha=-1
    )
    return corrected_A, corrected_B


def _reciprocal(values: Tensor, least: Tensor) -> Tensor:
    """1 / values, and 0 where they are not above ``least``."""
    there = values > least
    return torch.where(there, 1 / torch.where(there, values, 1.0), 0.0)


def _stacked(tensors: list[Any]) -> Tensor:
    """[L, rows, columns] in float32 or wider; of a convolution's factors all but the first
    dimension are columns."""
    stack = torch.stack([tensor.detach().flatten(1) for tensor in tensors])
    return stack.to(torch.promote_types(stack.dtype, torch.float32))


def _write(group: list[AdapterLayer], g_A: Tensor, g_B: Tensor) -> None:
    for index, layer in enumerate(group):
        for parameter, gradient in ((layer.lora_A, g_A), (layer.lora_B, g_B)):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient[index].view(parameter.shape))


def _alike(found: list[AdapterLayer]) -> list[list[AdapterLayer]]:
    """The layers whose factors can be stacked, together."""
    groups: dict[tuple[Any, ...], list[AdapterLayer]] = {}
    for layer in found:
        A, B = layer.lora_A, layer.lora_B
        groups.setdefault((A.shape, B.shape, A.dtype, B.dtype, A.device), []).append(layer)
    return list(groups.values())


def _has_gradients(layer: AdapterLayer) -> bool:
    missing = [factor.grad is None for factor in (layer.lora_A, layer.lora_B)]
    if missing[0] != missing[1]:
        raise RuntimeError(f"of lora_A and lora_B of {layer.name} only one has a gradient")
    return not missing[0]


def _check_finite(found: list[AdapterLayer]) -> None:
    parts = [
        (layer, tensor)
        for layer in found
        for factor in (layer.lora_A, layer.lora_B)
        for tensor in (factor, factor.grad)
        if tensor is not None
    ]
    bad = first_non_finite([tensor for _, tensor in parts])
    if bad is not None:
        raise RuntimeError(
            f"a factor of {parts[bad][0].name} or its gradient is not finite; nothing was changed"
        )


def _cannot(layer: AdapterLayer) -> str | None:
    if layer.method != "LORA":
        return f"it is an adapter of {layer.method}"
    if "lora_magnitude_vector" in layer.tensors:
        return "it computes DoRA, whose magnitudes the correction leaves out"
    if layer.kind == "embedding":
        return "it is an embedding, which the correction is not made for"
    if layer.r != layer.lora_B.shape[1]:
        return "it is a grouped convolution, whose adapter is no product of two matrices"
    if not (layer.lora_A.requires_grad and layer.lora_B.requires_grad):
        return "it trains only one of A and B (LoRA-FA has a correction of its own)"
    return None
