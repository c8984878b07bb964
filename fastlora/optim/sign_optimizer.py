"""What Lion and Tiger share: their groups, their state, and the lists that one call updates."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlora.ops.sign_momentum import EightBit, SignMomentumCache
from fastlora.optim import adamw, checks, foreign, rows
from fastlora.optim.sharded import is_sharded, local, mesh_of, rms, splits_rows, spread_non_finite

# not hyperparameters: how this run keeps and computes, which a loaded state does not decide
_OF_THIS_RUN = ("state_dtype", "backend", "capturable")
# what groups must have in common to be updated by one call
_ALIKE = ("maximize", "stochastic_rounding", "seed", "steps", "backend")
_PLAIN = {torch.nn.Parameter, Tensor}
_NO_STATE: dict[str, Any] = {}


@dataclass(eq=False)
class Entry:
    """A parameter in this step: what the operation gets of it. ``grad`` None: nothing new."""

    param: Tensor  # as the group holds it
    grad: Tensor | None  # dense, the local shard
    group: dict[str, Any]
    state: dict[str, Any]
    where: str
    moved_rows: Tensor | None = None  # bool, with lazy_rows


class Key(NamedTuple):
    """What tensors have in common that one call updates."""

    what: Any  # of the optimizer's own
    device: torch.device
    maximize: bool
    seed: int | None  # of stochastic rounding
    lazy_momentum: bool
    backend: str | None


@dataclass(eq=False)
class Batch:
    """The lists of one call of the operation."""

    key: Key
    number: int
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    momenta: list[Tensor | EightBit] = field(default_factory=list)
    lr: list[Any] = field(default_factory=list)
    weight_decay: list[Any] = field(default_factory=list)
    relative: list[str | None] = field(default_factory=list)
    floor: list[float] = field(default_factory=list)
    rows: list[Tensor | None] = field(default_factory=list)
    centers: list[float] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)

    def rounding(self) -> dict[str, Any]:
        """How parameters are rounded, as the operation's arguments."""
        seed = self.key.seed
        if seed is None:
            return {"rounding": "nearest", "seed": None}
        return {"rounding": "stochastic", "seed": seed * 64 + self.number}


@dataclass(eq=False)
class Lists:
    """What ``_ordinary`` found, one entry a parameter."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Any] = field(default_factory=list)
    momenta: list[Tensor | EightBit] = field(default_factory=list)
    rounding: dict[str, Any] = field(default_factory=dict)


@dataclass
class Rate:
    """How far a tensor moves: lr, decay, and what lr is relative to."""

    lr: Any
    weight_decay: Any
    relative: str | None = None
    floor: float = 0.0
    center: float = 0.0


class SignOptimizer(torch.optim.Optimizer):
    """The base of ``Lion`` and ``Tiger``; see there."""

    # class attributes, as pickling an optimizer keeps only its groups, state and defaults
    _loading: dict[Tensor, dict[str, Any]] | None = None
    _caches: dict[tuple[str, int], SignMomentumCache] | None = None
    _looked_up: tuple[tuple[list[Any], ...], list[dict[str, Any]]] | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], differentiable: bool) -> None:
        if differentiable:
            raise ValueError(
                "differentiable: the derivative of a sign is zero wherever there is one, so a step "
                "cannot be differentiated through"
            )
        defaults["state_dtype"] = checks.state_dtype(defaults["state_dtype"])
        super().__init__(params, defaults)

    # --- groups --------------------------------------------------------------------------------

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's, with every option checked before the group is there."""
        group = dict(param_group)
        params = group["params"]
        if not isinstance(params, (Tensor, set)):
            params = group["params"] = list(params)
        if "state_dtype" in group:
            group["state_dtype"] = checks.state_dtype(group["state_dtype"])
        self._complete(group)
        merged = {**self.defaults, **group}
        self._check_groups([*self.param_groups, merged])
        if not isinstance(params, set):
            tensors = [params] if isinstance(params, Tensor) else params
            for i, param in enumerate(tensors):
                name, tensor = param if isinstance(param, tuple) else (f"parameter {i}", param)
                checks.parameter(tensor, name)
                if merged["capturable"] and not isinstance(merged["lr"], Tensor):
                    lr = torch.tensor(float(merged["lr"]), device=tensor.device)
                    merged["lr"] = group["lr"] = lr
        super().add_param_group(group)

    def _complete(self, group: dict[str, Any]) -> None:
        """Put in what follows from a group's other options."""
        group.setdefault("steps", self.param_groups[0]["steps"] if self.param_groups else 0)

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            self._check_group(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        checks.common(group)

    # --- one step ------------------------------------------------------------------------------

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; with a closure, after it has computed the loss, which is returned.

        A step that raises has left every parameter and all momentum as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_groups(self.param_groups)
        self._step()
        for group in self.param_groups:
            group["steps"] += 1
        return loss

    def _step(self) -> None:
        raise NotImplementedError

    def _entries(self, pending: Callable[[dict[str, Any]], bool] | None = None) -> list[Entry]:
        """Of every parameter of sign groups with a gradient, or of which ``pending(state)``."""
        found = []
        for number, group in enumerate(self.param_groups):
            if group["algorithm"] != "sign":
                continue
            for i, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None and (
                    pending is None or param not in self.state or not pending(self.state[param])
                ):
                    continue
                found.append(self._entry(param, grad, group, _where(group, number, i)))
        return found

    def _entry(
        self, param: Tensor, grad: Tensor | None, group: dict[str, Any], where: str
    ) -> Entry:
        state = self.state[param]
        if "exp_avg" not in state:
            self._begin(param, group, state)
        _check_fit(param, grad, {"momentum": state["exp_avg"]}, where)
        entry = Entry(param, grad, group, state, where)
        if grad is not None:
            new = local(grad)
            if group["lazy_rows"]:
                entry.moved_rows = rows.touched(new)
            entry.grad = new.to_dense() if new.is_sparse else new
        return entry

    def _begin(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        """The state of a parameter's first step."""
        if group["state_dtype"] == "8bit":
            if is_sharded(param):
                raise ValueError(
                    "8-bit momentum of sharded parameters (DTensor) is not supported: blocks would "
                    "differ from process to process; use bfloat16"
                )
            state["exp_avg"] = EightBit.zeros_like(param)
            return
        state["exp_avg"] = torch.zeros_like(
            param, dtype=_float_dtype(param, group), memory_format=torch.preserve_format
        )

    def _rate(self, entry: Entry) -> Rate:
        raise NotImplementedError

    def _batches(
        self, entries: list[Entry], what: Callable[[Entry], Any], shrinks: bool = False
    ) -> list[Batch]:
        """The entries in lists that one call can take: of one device, of equal what(entry)."""
        batches: dict[Key, Batch] = {}
        for entry in entries:
            group, param = entry.group, entry.param
            key = _key(group, what(entry), param.device)
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = Batch(key, len(batches))
            rate = self._rate_here(entry)
            batch.params.append(local(param))
            batch.momenta.append(local(entry.state["exp_avg"]))
            if entry.grad is not None:
                batch.grads.append(entry.grad)
            batch.lr.append(rate.lr)
            batch.weight_decay.append(rate.weight_decay)
            batch.relative.append(rate.relative)
            batch.floor.append(rate.floor)
            batch.rows.append(entry.moved_rows)
            batch.centers.append(rate.center)
            batch.entries.append(entry)
        if shrinks:
            for batch in batches.values():
                _agree_on_non_finite(batch)
        return list(batches.values())

    def _rate_here(self, entry: Entry) -> Rate:
        """``_rate`` for what lies here of a parameter, whose size is that of the whole."""
        rate, param = self._rate(entry), entry.param
        if rate.relative is None or not is_sharded(param):
            return rate
        if rate.relative == "tensor":
            return replace(rate, lr=rate.lr * rms(param).clamp(min=rate.floor), relative=None)
        if splits_rows(param):
            raise ValueError(
                f"{entry.where}: its rows are sharded over their last axis, so that no process "
                "knows a row's size; shard it over its first axis"
            )
        return rate

    def _cache(self, place: str, number: int = 0) -> SignMomentumCache:
        """The one of all calls at this place, for the batch of this number.

        Not for its hyperparameters, which may be others at every step: the operation looks itself
        at what has changed.
        """
        if self._caches is None:
            self._caches = {}
        return self._caches.setdefault((place, number), SignMomentumCache())

    def _factor(self, group: dict[str, Any]) -> float:
        """What a schedule multiplies the group's lr by."""
        return 1.0

    def _adamw(self, weight: float = 1.0) -> list[Callable[[], None]]:
        """The calls that make the step of the AdamW groups, checked: of each parameter with weight
        times its gradient, beside the sum that was kept."""
        calls: list[Callable[[], None]] = []
        for number, group in enumerate(self.param_groups):
            found = self._adamw_entries(number)
            if not found:
                continue
            calls.append(
                partial(
                    adamw.step,
                    group,
                    _times(group["lr"], self._factor(group)),
                    [entry.param for entry in found],
                    [_summed(entry, weight) for entry in found],
                    [entry.state for entry in found],
                )
            )
        return calls

    def _adamw_entries(self, number: int) -> list[Entry]:
        """Of an AdamW group's parameters with a gradient, or a sum of earlier ones, checked."""
        group, found = self.param_groups[number], []
        for i, param in enumerate(group["params"] if group["algorithm"] == "adamw" else ()):
            grad, where = param.grad, _where(group, number, i)
            if grad is None and "grad_sum" not in self.state.get(param, _NO_STATE):
                continue
            if grad is not None:
                adamw.check_gradient(grad, where)
            state = self.state[param]
            if "exp_avg" not in state:
                state.update(adamw.empty_state(param, group["capturable"]))
            kept = {key: state[key] for key in (*adamw.TENSORS, "grad_sum") if key in state}
            _check_fit(param, grad, kept, where)
            found.append(Entry(param, grad, group, state, where))
        return found

    def _ordinary(self, *alike: str) -> Lists | None:
        """The lists of a step that one call can take, with hardly a look at each tensor: the call
        checks them. None where there may be more to it: groups that differ in ``alike``, AdamW,
        lazy rows, DTensors, a first step, parameters without gradients."""
        made = Lists()
        first = self.param_groups[0]
        for group in self.param_groups:
            if group["algorithm"] != "sign" or group["lazy_rows"]:
                return None
            if group is not first and any(group[key] != first[key] for key in (*_ALIKE, *alike)):
                return None
            made.params += group["params"]
        made.grads = [param.grad for param in made.params]
        if (
            not made.params
            or not _PLAIN.issuperset(map(type, made.params))
            or NoneType in set(map(type, made.grads))
        ):
            return None
        try:
            made.momenta = [state["exp_avg"] for state in self._states_of(made.params)]
        except KeyError:
            return None
        if first["stochastic_rounding"]:
            made.rounding = Batch(_key(first, None, made.params[0].device), 0).rounding()
        return made

    def _states_of(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Each one's state, looked up anew only where a parameter or an entry is another object
        than at the last call, as to find a tensor in a dictionary takes longer than its update."""
        now = params, list(self.state), list(self.state.values())
        kept = self._looked_up
        if kept is None or not all(map(_same, kept[0], now)):
            found = [self.state.get(param, _NO_STATE) for param in params]
            kept = self._looked_up = now, found
        return kept[1]

    # --- saving and loading --------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's; 8-bit momentum is the dictionary {"codes", "scales"} of its tensors."""
        saved = super().state_dict()
        saved["state"] = {
            index: {
                key: value.state_dict() if isinstance(value, EightBit) else value
                for key, value in state.items()
            }
            for index, state in saved["state"].items()
        }
        return saved

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of this class, of lion-pytorch's Lion or of bitsandbytes' Lion or
        Lion8bit. Momentum keeps this optimizer's ``state_dtype``, converted where the saved one had
        another; where it had the same, a resumed run continues exactly.

        Raises ValueError, before anything has changed, for a state that does not fit: other groups,
        shapes or keys.
        """
        # last of the pre-hooks, so that it sees what the user's have made of the state
        handle = self.register_load_state_dict_pre_hook(SignOptimizer._prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def _prepare(self: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check everything, and keep tensors from the base class, which would cast them to their
        parameters' dtypes."""
        missing = [key for key in ("state", "param_groups") if key not in state_dict]
        if missing:
            raise ValueError(f"the state has no {' and no '.join(missing)}")
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if not all("params" in group for group in saved_groups):
            raise ValueError("a group of the state has no params")
        sizes = [len(group["params"]) for group in groups]
        saved_sizes = [len(group["params"]) for group in saved_groups]
        if sizes != saved_sizes:
            raise ValueError(
                f"the state has groups of {saved_sizes} parameters, this optimizer of {sizes}"
            )
        made = []
        for number, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
            merged = {**group, **saved_group}
            for key in _OF_THIS_RUN:
                merged[key] = group[key]
            if merged["algorithm"] != group["algorithm"]:
                raise ValueError(
                    f"group {number} is updated by {group['algorithm']} here, in the state by "
                    f"{merged['algorithm']}"
                )
            if isinstance(group["lr"], Tensor) and not isinstance(merged["lr"], Tensor):
                merged["lr"] = torch.full_like(group["lr"], merged["lr"])
            made.append(merged)
        self._check_groups(made)
        loading: dict[Tensor, dict[str, Any]] = {}
        left = {index for index, state in state_dict["state"].items() if state}
        for number, (group, merged) in enumerate(zip(groups, made, strict=True)):
            places = zip(merged["params"], group["params"], strict=True)
            for i, (index, param) in enumerate(places):
                if index not in left:
                    continue
                left.remove(index)
                saved = foreign.unwrapped(state_dict["state"][index])
                where = _where(group, number, i)
                if group["algorithm"] == "adamw":
                    loading[param] = _adamw_state(saved, param, where)
                else:
                    loading[param] = self._taken(saved, param, group, where)
        if left:
            raise ValueError(
                f"the state has entries of no parameter of this optimizer: {min(left)}"
            )
        self._loading = loading
        return {**state_dict, "state": {}, "param_groups": made}

    def _taken(
        self, saved: dict[str, Any], param: Tensor, group: dict[str, Any], where: str
    ) -> dict[str, Any]:
        """A sign group's state from ``saved``."""
        momentum = foreign.take_momentum(saved, param.shape, where)
        made = {"exp_avg": _as_state(momentum, param, group, where)}
        made |= self._rest(saved, param, where)
        if saved:
            raise ValueError(f"the state of {where} has unknown entries: {', '.join(saved)}")
        return made

    def _rest(self, saved: dict[str, Any], param: Tensor, where: str) -> dict[str, Any]:
        """What a subclass keeps beside momentum, taken out of ``saved``."""
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._loading is not None:
            self.state.update(self._loading)
        self._caches = self._looked_up = None


def check_all(calls: list[partial[Any]], alone: bool = True) -> None:
    """Raise what any of these calls of the operation would, before anything is written. A single
    one sees to that itself, where it is ``alone``."""
    if len(calls) > 1 or not alone:
        for call in calls:
            call(check_only=True)


def run_all(calls: list[partial[Any]], adamw_calls: list[Callable[[], None]]) -> None:
    """Make the calls, of the operation and of AdamW, or raise before the first writes."""
    check_all(calls, alone=not adamw_calls)
    every: list[Callable[[], Any]] = [*adamw_calls, *calls]
    for call in every:
        call()


def _check_fit(param: Any, grad: Any, kept: dict[str, Any], where: str) -> None:
    """Raise ValueError unless the gradient and what is kept of a parameter are as it is."""
    for name, one in kept.items():
        if one.shape != param.shape:
            raise ValueError(
                f"{where} has shape {list(param.shape)} but its {name} {list(one.shape)}: it was "
                "resized after its first step; make the optimizer anew"
            )
        if one.device != param.device:
            raise ValueError(
                f"{where} is on {param.device} but its {name} on {one.device}: move the model "
                "before the first step, or load the optimizer's state again"
            )
    if grad is not None and grad.shape != param.shape:
        raise ValueError(
            f"{where} has shape {list(param.shape)} but its gradient {list(grad.shape)}"
        )
    if grad is not None and grad.device != param.device:
        raise ValueError(f"{where} is on {param.device} but its gradient on {grad.device}")
    held = {"": param, "the gradient of ": grad} | {f"the {k} of ": v for k, v in kept.items()}
    for name, one in held.items():
        if isinstance(one, Tensor) and _is_freed(local(one)):
            raise ValueError(f"the memory of {name}{where} has been freed")


def _is_freed(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or not tensor.numel() or tensor.device.type == "meta":
        return False
    return not tensor.untyped_storage().nbytes()


def _summed(entry: Entry, weight: float) -> Tensor:
    """The sum that was kept of an AdamW parameter's gradients, and weight times the new one."""
    kept: Tensor | None = entry.state.get("grad_sum")
    if entry.grad is None:
        assert kept is not None
        return kept
    share = _times(entry.grad, weight)
    return share if kept is None else kept + share


def _same(one: list[Any], other: list[Any]) -> bool:
    """Whether they hold the same objects."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _key(group: dict[str, Any], what: Any, device: torch.device) -> Key:
    rounds = group["stochastic_rounding"]
    seed = group["seed"] * 0x100000000 + group["steps"] if rounds else None
    return Key(what, device, group["maximize"], seed, group["lazy_momentum"], group["backend"])


def _where(group: dict[str, Any], number: int, i: int) -> str:
    names = group.get("param_names")
    return names[i] if names else f"parameter {i} of group {number}"


def _times(value: Any, factor: float) -> Any:
    return value if factor == 1 else value * factor


def _float_dtype(param: Tensor, group: dict[str, Any]) -> torch.dtype:
    """Of momentum that is not 8-bit: float64 parameters are computed in float64."""
    if param.dtype == torch.float64 and group["state_dtype"] == "float32":
        return torch.float64
    return getattr(torch, group["state_dtype"])


def _as_state(
    momentum: Tensor | EightBit, param: Tensor, group: dict[str, Any], where: str
) -> Tensor | EightBit:
    """A copy of a loaded momentum on the parameter's device, in the group's state_dtype."""
    if isinstance(momentum, Tensor):
        if not momentum.is_floating_point():
            raise ValueError(f"the momentum of {where} is {momentum.dtype}")
        if is_sharded(momentum) != is_sharded(param):
            raise ValueError(
                f"the momentum of {where} and the parameter are not both sharded: load it with "
                "torch.distributed.checkpoint's set_optimizer_state_dict"
            )
    if group["state_dtype"] == "8bit":
        if isinstance(momentum, EightBit):
            return EightBit(
                momentum.codes.to(param.device, copy=True),
                momentum.scales.to(param.device, copy=True),
            )
        return EightBit.from_float(momentum.to(param.device))
    values = momentum.to_float() if isinstance(momentum, EightBit) else momentum
    made = torch.empty_like(
        param, dtype=_float_dtype(param, group), memory_format=torch.preserve_format
    )
    return made.copy_(values).detach()


def _adamw_state(saved: dict[str, Any], param: Tensor, where: str) -> dict[str, Any]:
    kept = saved.pop("grad_sum", None)
    if set(saved) != set(adamw.STATE):
        raise ValueError(
            f"the state of {where} has {', '.join(map(str, saved))}; AdamW's has "
            f"{', '.join(adamw.STATE)}"
        )
    made = {"step": torch.as_tensor(saved["step"], dtype=torch.float32).clone()}
    if kept is not None:
        saved["grad_sum"] = kept
    for key in (*adamw.TENSORS, *(() if kept is None else ("grad_sum",))):
        if not isinstance(saved[key], Tensor):
            raise ValueError(f"{key} of {where} is a {type(saved[key]).__name__}, not a tensor")
        if saved[key].shape != param.shape:
            raise ValueError(
                f"{key} of {where} has shape {list(saved[key].shape)}, the parameter "
                f"{list(param.shape)}"
            )
        made[key] = saved[key].detach().to(param.device, param.dtype, copy=True)
    return made


def _agree_on_non_finite(batch: Batch) -> None:
    """Where one process's shard of a gradient is not finite, the others' count as such too."""
    by_mesh: dict[Any, list[int]] = {}
    for i, entry in enumerate(batch.entries):
        if is_sharded(entry.param) and entry.grad is not None:
            by_mesh.setdefault(mesh_of(entry.param), []).append(i)
    for mesh, indices in by_mesh.items():
        grads = [batch.grads[i] for i in indices]
        spread_non_finite(mesh, grads)
        for i, grad in zip(indices, grads, strict=True):
            batch.grads[i] = grad
