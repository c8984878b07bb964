"""LoRA-FA (arXiv 2308.03303): A is frozen, and B's gradient is corrected before the step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastlora.adapters.view import AdapterLayer, layers
from fastlora.methods.hooks import (
    StepMethod,
    inner_optimizer,
    overflowed,
    refuse_closure,
    refuse_no_gradients,
    unscale,
)

_DAMPING = 1e-8


class LoRAFA(StepMethod):
    """Before each step of an optimizer, g_B ← s⁻² · g_B (A Aᵀ + 1e-8 I)⁻¹.

    Of all updates of B this makes s · g_B A the nearest to the full weight gradient G: it becomes
    G P, with P the projection onto A's rows. With A Aᵀ = I and s = 1 nothing changes. The damping
    is peft's (``create_lorafa_optimizer``), whose own step is Adam's with eps 1e-6 and no decay.

    It hangs on the optimizer's own hooks, so it works in any loop that calls ``optimizer.step()``
    with the gradients there (not with a closure). It has no state to save: A does not change.
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None
        self._layers: list[AdapterLayer] = []
        self._inverses: list[tuple[int, Tensor]] = []

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> LoRAFA:
        """Freeze every A of ``model`` (fastlora's or peft's) and correct B's gradients from now on.

        Raises RuntimeError if it, or another method on these layers, is attached already;
        ValueError for a model without LoRA layers or with adapters that this correction is not made
        for (AdaLoRA, VeRA, DoRA, embeddings), and for a B that is not the optimizer's. A step at
        which no B has a gradient raises RuntimeError.
        """
        if self._handle is not None:
            raise RuntimeError("it is attached already; detach it first, or make another")
        found = layers(model)
        if not found:
            raise ValueError("the model has no LoRA layers")
        for layer in found:
            if reason := _cannot(layer):
                raise ValueError(f"LoRA-FA cannot correct the gradient of {layer.name}: {reason}")
        optimizer = inner_optimizer(optimizer, found, ["lora_B.weight"])
        for layer in found:
            layer.lora_A.requires_grad_(False)
        self._layers = found
        self._inverses = [_inverse(layer) for layer in found]
        self._handle = optimizer.register_step_pre_hook(self._correct)
        return self

    def detach(self) -> None:
        """Leave the optimizer's steps alone again; A stays frozen. Raises RuntimeError if it is
        not attached."""
        if self._handle is None:
            raise RuntimeError("it is not attached")
        self._handle.remove()
        self._handle, self._layers, self._inverses = None, [], []

    @torch.no_grad()
    def _correct(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        refuse_closure("LoRA-FA", args, kwargs)
        if overflowed(optimizer):
            return
        unscale(optimizer)
        trained = [
            (index, layer, layer.lora_B.grad)
            for index, layer in enumerate(self._layers)
            if layer.lora_B.grad is not None
        ]
        refuse_no_gradients("LoRA-FA", trained)
        for index, layer, gradient in trained:
            if self._inverses[index][0] != layer.lora_A._version:  # loaded anew, perhaps
                self._inverses[index] = _inverse(layer)
            inverse = self._inverses[index][1].to(gradient.device)
            rows = gradient.flatten(1).to(inverse.dtype) @ inverse
            gradient.copy_(rows.view(gradient.shape))


def _cannot(layer: AdapterLayer) -> str | None:
    if layer.method != "LORA":
        return f"it is an adapter of {layer.method}"
    if "lora_magnitude_vector" in layer.tensors:
        return "it computes DoRA, whose magnitudes the correction leaves out"
    if layer.kind == "embedding":
        return "an embedding's A starts at zero, and so cannot be frozen"
    return None


def _inverse(layer: AdapterLayer) -> tuple[int, Tensor]:
    """(A's version, (A Aᵀ + δI)⁻¹ / s² [r, r], float32 or wider)."""
    rows = layer.lora_A.detach().flatten(1).double()
    gram = rows @ rows.t()
    gram.diagonal().add_(_DAMPING)
    inverse = torch.linalg.pinv(gram, hermitian=True) / layer.scaling**2
    return layer.lora_A._version, inverse.to(torch.promote_types(layer.lora_A.dtype, torch.float32))
