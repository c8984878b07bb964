"""AdaLoRA (arXiv 2303.10512): which ranks each layer keeps, and factors near singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastlora.adapters.config import AdaLoRAConfig
from fastlora.adapters.view import AdapterLayer, is_peft_layer, layers, unwrap
from fastlora.methods.hooks import (
    StepMethod,
    check_entries,
    first_non_finite,
    has_closure,
    inner_optimizer,
    overflowed,
    unscale,
)
from fastlora.nn import AdaLoRALinear

_PARTS = ("lora_A", "lora_B", "lora_E")
_STATE = ("step", "schedule", "averages", "spreads", "rank_pattern")
_SCHEDULE = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step")


class AdaLoRA(StepMethod):
    """After each step of an optimizer, allot a shrinking budget of ranks to the layers.

    Of every number p of A, E and B the sensitivity |p · ∇p| (p after the step, its gradient from
    before) is averaged with ``beta1``, and its distance from that average with ``beta2``; a
    number's score is the product of the two averages. A triplet's is the score of its E, and the
    means over its row of A and its column of B. All triplets of all layers are ranked together,
    and E becomes 0 wherever the score is not above the (total − budget)-th smallest: ties fall
    together, so that fewer than the budget may remain. Until the end a masked E keeps its gradient
    and may grow back.

    The budget of the t-th step, counted from 1, with T = ``total_step`` − ``tfinal``: all ranks up
    to ``tinit``; then ``target_r`` a layer plus what is above that times
    (1 − (t − tinit) / (T − tinit))³, applied every ``deltaT`` steps; at t = T the last mask is
    taken, and it is applied anew after every later step. As steps are counted from 1, ``tfinal`` 0
    takes it at the very last step (peft, counting as its caller does from 0, then never would). A
    training that ends before T has no last mask and keeps all ranks.

    Names, schedule and arithmetic are those of peft's ``update_and_allocate``, which is not to be
    called beside this. After the last mask ``save_adapter``, or peft's own saving, writes the ranks
    that are left and their rank_pattern.

    ``config``: an ``AdaLoRAConfig`` or peft's; None takes the one that the model was made with.
    """

    def __init__(self, config: Any = None) -> None:
        self.config = config
        self.step = 0
        self._handles: list[RemovableHandle] = []
        self._layers: list[AdapterLayer] = []
        self._of_peft: Any = None
        self._total = 0
        self._options: dict[str, Any] = {}
        self._final = 0
        self._averages: list[Tensor] = []  # of A, B, E of each layer
        self._spreads: list[Tensor] = []
        self._kept: Tensor | None = None  # [total], the layers' ranks in a row; None before a mask

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> AdaLoRA:
        """Allot the ranks of the AdaLoRA layers of ``model`` (fastlora's or peft's) from now on.

        Raises RuntimeError if it, or another one on these layers, is attached already; ValueError
        for a model without AdaLoRA layers to be trained, with ranks cut already, with peft's
        AdaLoRA convolutions or two trained adapters on a layer, for an A, B or E that is not the
        optimizer's, and for a schedule without ``total_step``, with fewer than two steps
        before its last mask, or with ``target_r`` above the initial rank.
        """
        if self._handles:
            raise RuntimeError("it is attached already; detach it first, or make another")
        found = [
            layer
            for layer in layers(model)
            if layer.method == "ADALORA" and layer.tensors["lora_E"].requires_grad
        ]
        if not found:
            raise ValueError("the model has no AdaLoRA layers to be trained")
        _check_rest(model, found)
        of_peft = (getattr(unwrap(model), "peft_config", None) or {}).get(found[0].adapter)
        made_with = of_peft or getattr(found[0].module, "config", None)
        config = self.config or made_with
        if config is None:
            raise ValueError("the layers were made without a configuration: use AdaLoRA(config)")
        options = {name: getattr(config, name) for name in _SCHEDULE}
        if options["total_step"] is None:
            raise ValueError("the allocation needs the configuration's total_step")
        AdaLoRAConfig(**options)  # for its checks
        final = options["total_step"] - options["tfinal"]
        if final < 2:
            raise ValueError("total_step and tfinal leave no step before the last mask to score in")
        for layer in found:
            initial = layer.module.init_r if of_peft is None else of_peft.init_r
            if layer.r != initial:
                raise ValueError(f"{layer.name} is cut already, to {layer.r} of {initial} ranks")
            if options["target_r"] > initial:
                raise ValueError(f"target_r {options['target_r']} is above the {initial} ranks")
        optimizer = inner_optimizer(optimizer, found, _PARTS)
        self._layers, self._of_peft, self._options = found, of_peft, options
        self._total, self._final = sum(layer.r for layer in found), final
        self._forget()
        self.step, self._kept = 0, None
        for layer in found:
            if isinstance(layer.module, AdaLoRALinear):
                layer.module.kept = None  # of an earlier allocation
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        return self

    def detach(self) -> None:
        """Leave the optimizer's steps alone again. What the last mask took stays out of what is
        saved. Raises RuntimeError if it is not attached."""
        if not self._handles:
            raise RuntimeError("it is not attached")
        for handle in self._handles:
            handle.remove()
        self._forget()
        self._handles, self._layers, self._of_peft, self._kept = [], [], None, None

    @property
    def budget(self) -> int:
        """The ranks that the step made last allows."""
        return self._schedule(self.step)[0]

    @property
    def rank_pattern(self) -> dict[str, list[bool]] | None:
        """{"<module>.lora_E": r times True or False} by the latest mask; None before the first."""
        if self._kept is None:
            return None
        kept = iter(self._kept.tolist())
        return {f"{layer.name}.lora_E": list(islice(kept, layer.r)) for layer in self._layers}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the model and its optimizer; tensors are live."""
        names = [f"{layer.name}.{part}" for layer in self._layers for part in _PARTS]
        return {
            "step": self.step,
            "schedule": dict(self._options),
            # no longer there after the last mask
            "averages": dict(zip(names, self._averages, strict=False)),
            "spreads": dict(zip(names, self._spreads, strict=False)),
            "rank_pattern": self.rank_pattern,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another run's ``state_dict`` was taken; call it after ``attach``.

        Raises RuntimeError if it is not attached; ValueError, before anything has changed, for
        another schedule, other layers or other shapes, or a state that lacks an entry.
        """
        if not self._handles:
            raise RuntimeError("attach it first: the state belongs to a model's layers")
        check_entries("the state", state, _STATE)
        check_entries("the state's schedule", state["schedule"], self._options)
        for option, value in self._options.items():
            saved = state["schedule"][option]
            if saved != value:
                raise ValueError(f"the state has {option}={saved}, this run {option}={value}")
        step, final = state["step"], self._final
        names = [f"{layer.name}.{part}" for layer in self._layers for part in _PARTS]
        if not 0 < step < final:
            names = []  # nothing is averaged before the first step and after the last mask
        loaded = []
        for what in ("averages", "spreads"):
            found = state[what]
            _check_keys(what, found, names)
            tensors = []
            for name, place in zip(names, self._parameters(), strict=bool(names)):
                if found[name].shape != place.shape:
                    raise ValueError(
                        f"{what} of {name} have shape {list(found[name].shape)}, the layer has "
                        f"{list(place.shape)}"
                    )
                tensors.append(found[name].to(place.device, _wide(place), copy=True))
            loaded.append(tensors)
        kept, pattern = None, state["rank_pattern"]
        if pattern is None and step >= final:
            raise ValueError(f"the state is of step {step} and lacks the mask of step {final}")
        if pattern is not None:
            _check_keys("rank_pattern", pattern, [f"{x.name}.lora_E" for x in self._layers])
            masks = [pattern[f"{layer.name}.lora_E"] for layer in self._layers]
            if [len(mask) for mask in masks] != [layer.r for layer in self._layers]:
                raise ValueError("rank_pattern is of layers with other ranks")
            device = self._layers[0].lora_A.device
            kept = torch.tensor(list(chain.from_iterable(masks)), device=device)
        self.step, self._kept, (self._averages, self._spreads) = step, kept, loaded
        if step >= final:
            self._hand_over()

    # --- around the step -----------------------------------------------------------------------

    def _before(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if overflowed(optimizer):
            return
        unscale(optimizer)
        if not has_closure(args, kwargs) and self.step + 1 < self._final:
            self._gradients(finite=True)

    @torch.no_grad()
    def _after(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if overflowed(optimizer):
            return
        step = self.step + 1
        if step < self._final:
            # before the step they were looked at, unless a closure has computed them in it
            self._update(self._gradients(finite=has_closure(args, kwargs)))
        self.step = step
        budget, masking = self._schedule(step)
        if step < self._final and masking:
            self._mask(budget)
        elif step == self._final:
            self._mask(budget)
            self._forget()
            self._hand_over()
        elif step > self._final:
            self._apply()

    def _schedule(self, step: int) -> tuple[int, bool]:
        """(budget, whether it is applied now)."""
        options = self._options
        target = options["target_r"] * len(self._layers)
        if step <= options["tinit"]:
            return self._total, False
        if step >= self._final:
            return target, True
        left = 1 - (step - options["tinit"]) / (self._final - options["tinit"])
        return int((self._total - target) * left**3 + target), step % options["deltaT"] == 0

    def _parameters(self) -> list[nn.Parameter]:
        return [layer.tensors[part] for layer in self._layers for part in _PARTS]

    def _gradients(self, finite: bool) -> list[Tensor]:
        """Of ``_parameters``; raises RuntimeError where one is missing, or not finite if asked."""
        gradients = []
        parameters = self._parameters()
        for index, parameter in enumerate(parameters):
            if parameter.grad is None:
                raise RuntimeError(
                    f"{self._named(index)} has no gradient; AdaLoRA ranks all layers together and "
                    "needs every one at every step before the last mask"
                )
            gradients.append(parameter.grad)
        bad = first_non_finite(gradients) if finite else None
        if bad is not None:
            raise RuntimeError(
                f"the gradient of {self._named(bad)} is not finite and would spoil its averages; "
                "leave out this step"
            )
        return gradients

    def _named(self, index: int) -> str:
        return f"{_PARTS[index % len(_PARTS)]} of {self._layers[index // len(_PARTS)].name}"

    def _update(self, gradients: list[Tensor]) -> None:
        beta1, beta2 = self._options["beta1"], self._options["beta2"]
        values = [parameter.detach().to(_wide(parameter)) for parameter in self._parameters()]
        if not self._averages:
            self._averages = [torch.zeros_like(value) for value in values]
            self._spreads = [torch.zeros_like(value) for value in values]
        sensitivities = torch._foreach_mul(values, gradients)
        torch._foreach_abs_(sensitivities)
        _average(self._averages, sensitivities, beta1)
        distances = torch._foreach_sub(sensitivities, self._averages)
        torch._foreach_abs_(distances)
        _average(self._spreads, distances, beta2)

    def _scores(self) -> Tensor:
        """[total], the layers' triplets in a row."""
        elements = torch._foreach_mul(self._averages, self._spreads)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, layer in enumerate(self._layers):
            A, B = layer.lora_A, layer.lora_B
            groups.setdefault((A.shape, B.shape, A.dtype, A.device), []).append(index)
        rows: dict[int, Tensor] = {}
        for group in groups.values():
            of_A, of_B, of_E = (
                torch.stack([elements[len(_PARTS) * index + part] for index in group])
                for part in range(len(_PARTS))
            )
            scores = of_E.flatten(1) + (of_A.mean(2) + of_B.mean(1))  # [L, r]
            rows |= dict(zip(group, scores, strict=True))
        device = self._layers[0].lora_A.device
        return torch.cat([rows[index].to(device) for index in range(len(self._layers))])

    def _mask(self, budget: int) -> None:
        scores = self._scores()
        if budget >= self._total:  # there is no 0-th smallest
            self._kept = torch.ones_like(scores, dtype=torch.bool)
            return
        self._kept = scores > scores.kthvalue(self._total - budget).values
        self._apply()

    def _apply(self) -> None:
        assert self._kept is not None
        values: list[Tensor] = [layer.tensors["lora_E"] for layer in self._layers]
        factors = self._kept.to(values[0].dtype)[:, None].split([layer.r for layer in self._layers])
        torch._foreach_mul_(values, [f.to(E) for f, E in zip(factors, values, strict=True)])

    def _forget(self) -> None:
        self._averages, self._spreads = [], []

    def _hand_over(self) -> None:
        """Tell those who save which triplets are there."""
        pattern = self.rank_pattern
        assert pattern is not None
        if self._of_peft is not None:  # in whose keys the adapter's name stands until it is saved
            adapter = self._layers[0].adapter
            self._of_peft.rank_pattern = {f"{k}.{adapter}": kept for k, kept in pattern.items()}
            return
        for layer in self._layers:
            assert isinstance(layer.module, AdaLoRALinear)
            layer.module.kept = tuple(pattern[f"{layer.name}.lora_E"])


def _average(averages: list[Tensor], values: Sequence[Tensor], beta: float) -> None:
    """averages ← β · averages + (1 − β) · values, rounded as peft's."""
    torch._foreach_mul_(averages, beta)
    torch._foreach_add_(averages, torch._foreach_mul(list(values), 1 - beta))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_rest(model: nn.Module, found: list[AdapterLayer]) -> None:
    """Raise ValueError for what the view does not show, or shows twice."""
    seen: set[int] = set()
    for layer in found:
        if id(layer.module) in seen:
            raise ValueError(f"two adapters of {layer.name} are trained; peft's AdaLoRA takes one")
        seen.add(id(layer.module))
    for name, module in unwrap(model).named_modules():
        if is_peft_layer(module) and id(module) not in seen:
            trained: Any = getattr(module, "lora_E", {})
            if found[0].adapter in trained and trained[found[0].adapter].requires_grad:
                raise ValueError(
                    f"{name} is no linear layer: its ranks can be allotted by peft's own "
                    "update_and_allocate only"
                )


def _check_keys(what: str, found: Any, wanted: list[str]) -> None:
    if differ := sorted(set(wanted) ^ set(found)):
        raise ValueError(f"{what} of the state are of other layers: {differ[0]} is not in both")


def orthogonal_regulariser(model: nn.Module, adapter: str | None = None) -> Tensor:
    """The mean over all A and B of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F; a scalar to add to the loss.

    The unsquared norms are those of the official code and of peft (the paper's eq. 4 squares them),
    to be weighted by ``orth_reg_weight``, 0.5 in peft. A layer that has lost all its ranks counts
    as zero. Factors of one shape are taken at once.

    ``adapter`` names one of peft's adapters; None takes those that are active.

    Raises ValueError for a model without AdaLoRA layers.
    """
    factors: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
    count = 0
    for layer in layers(model, adapter):
        if layer.method != "ADALORA":
            continue
        for rows in (layer.lora_A, layer.lora_B.t()):  # [r, K] and [r, N]: rows to be orthonormal
            factors.setdefault((rows.shape, rows.dtype, rows.device), []).append(rows)
            count += 1
    if not count:
        raise ValueError("the model has no AdaLoRA layers")
    total: Tensor | None = None
    for (shape, dtype, device), group in factors.items():
        stack = torch.stack(group)
        gram = stack @ stack.mT
        identity = torch.eye(shape[0], dtype=dtype, device=device)
        norms = torch.linalg.vector_norm(gram - identity, dim=(1, 2)).sum()
        total = norms if total is None else total + norms.to(total.device)
    assert total is not None
    return total / count
