"""Tiger (kexue 9512, bojone/tiger): the sign of one momentum, rates relative to tensors' sizes."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlora.ops.sign_momentum import apply_momentum, fold_gradients, sign_momentum
from fastlora.optim import checks, schedules
from fastlora.optim.kinds import KINDS, by_shape
from fastlora.optim.sharded import is_sharded, is_zero, local, mesh_of, spread_non_finite
from fastlora.optim.sign_optimizer import (
    Batch,
    Entry,
    Rate,
    SignOptimizer,
    _summed,
    _times,
    check_all,
    run_all,
)

if TYPE_CHECKING:
    from fastlora.optim.accumulate import MomentumAccumulation


class Tiger(SignOptimizer):
    """m ← βm + (1−β)g, then θ ← θ − η(sign(m) + λθ), with η = α_t times each tensor's size.

    α_t is ``lr`` times ``lr_schedule``'s factor. By kind (``param_groups`` finds them):

    ===========  ==========================================  ======
    kind         η                                           λ
    ===========  ==========================================  ======
    gamma, beta  α_t / 2                                     0
    embedding    α_t · RMS of each row                       given
    other        α_t · max(RMS of the tensor, its floor)     given
    ===========  ==========================================  ======

    The RMS is of θ before the update. A tensor that is zero at its first step, as LoRA's B and
    AdaLoRA's E are, would have rate 0 and never move: its floor is 1/√(numbers per row), the RMS of
    a matrix initialised for as many inputs (Su names 1/√d as what may stand for the RMS), and for
    an embedding its rows' too. Every other tensor has floor 0, which is Tiger as published. VeRA's
    vectors are "beta" and move without it. The README has the reasoning.

    Args:
        params: as for ``Lion``, best from ``param_groups(model)``. Parameters without a kind get
            "beta" below two axes, else "other".
        lr: α, relative: 1e-3 to 2e-3.
        beta: β, 0.965 for language, 0.945 for images.
        weight_decay: λ; for gamma and beta only where their own group gives one.
        grad_accum_steps: k; ``step`` is then called after every backward and moves parameters at
            every k-th, with the mean of the k gradients: each goes into the momentum at once (β or
            1 times m, plus (1−β)/k times g), so none has to be kept. The same for all groups.
        lr_schedule: {step: factor}, steps being calls of ``step`` counted from 0 (micro-steps if
            k > 1); linear in between, constant after the last, from 0 at step 0 unless that is
            given.
        shrink_ratio: s. A tensor whose gradient holds NaN or ±∞ keeps its momentum, and instead of
            an update θ ← (θ − c)·s + c, c being 1 for gamma and 0 otherwise; at once, not only at
            every k-th. None: what is not finite goes into momentum, as with torch.optim.
        relative_lr: False takes η = α_t and λ for every tensor, whatever its kind: Lion with
            β₁ = β₂ = β.
        floor: in place of the rule above, for all tensors of the group.
        kind: "gamma", "beta", "embedding" or "other".
        Everything else is as in ``Lion``. AdamW groups have ``lr`` times the schedule's factor, and
            with k > 1 keep the sum of their gradients, as AdamW has no way without.

    ``accumulate_in_momentum`` folds gradients during backward. Raises as ``Lion`` does.
    """

    # not saved: what a pickled optimizer loses has to be attached again
    _accumulation: MomentumAccumulation | None = None
    _at = 0  # the micro-step that lr_schedule is read at
    _rates: tuple[Any, dict[int, tuple[Any, list[list[Any]]]]] = (None, {})  # of ``_group_rates``
    _open = False  # whether a cycle of micro-steps may have begun that no step has closed

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        beta: float = 0.965,
        weight_decay: float = 0.01,
        *,
        grad_accum_steps: int = 1,
        lr_schedule: Mapping[int, float] | None = None,
        shrink_ratio: float | None = 0.99,
        relative_lr: bool = True,
        floor: float | None = None,
        kind: str | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        state_dtype: torch.dtype | str = torch.float32,
        stochastic_rounding: bool = False,
        seed: int = 0,
        lazy_rows: bool = False,
        lazy_momentum: bool = False,
        algorithm: str = "sign",
        adam_betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        backend: str | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "weight_decay": weight_decay,
            "grad_accum_steps": grad_accum_steps,
            "lr_schedule": None if lr_schedule is None else dict(lr_schedule),
            "shrink_ratio": shrink_ratio,
            "relative_lr": relative_lr,
            "floor": floor,
            "kind": kind,
            "maximize": maximize,
            "capturable": capturable,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            "lazy_rows": lazy_rows,
            "lazy_momentum": lazy_momentum,
            "algorithm": algorithm,
            "adam_betas": adam_betas,
            "adam_eps": adam_eps,
            "backend": backend,
        }
        super().__init__(params, defaults, differentiable)

    # --- groups --------------------------------------------------------------------------------

    def _complete(self, group: dict[str, Any]) -> None:
        super()._complete(group)
        if group.get("kind", self.defaults["kind"]) in ("gamma", "beta"):
            relative = group.get("relative_lr", self.defaults["relative_lr"])
            if relative and group.get("algorithm", self.defaults["algorithm"]) == "sign":
                group.setdefault("weight_decay", 0.0)

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._accumulation is not None:
            self._accumulation.attach(len(self.param_groups) - 1)

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        super()._check_groups(groups)
        if any(group["grad_accum_steps"] != groups[0]["grad_accum_steps"] for group in groups):
            raise ValueError("grad_accum_steps must be the same for all groups")

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        checks.fraction("beta", group["beta"])
        k = group["grad_accum_steps"]
        checks.whole("grad_accum_steps", k, 1)
        if group["lr_schedule"] is not None:
            schedules.check_schedule(group["lr_schedule"])
        ratio = group["shrink_ratio"]
        if ratio is not None and not 0 <= ratio <= 1:
            raise ValueError(f"shrink_ratio must be in [0, 1] or None, not {ratio}")
        if group["floor"] is not None:
            checks.number("floor", group["floor"])
        if group["kind"] is not None:
            checks.one_of("kind", group["kind"], KINDS)
        if group["lazy_momentum"] and (k > 1 or self._accumulation is not None):
            raise ValueError(
                "momentum decays at the first of grad_accum_steps, when it is not known which rows "
                "the others will touch: lazy_momentum needs grad_accum_steps=1, and no "
                "accumulate_in_momentum"
            )
        if group["capturable"] and (k > 1 or group["lr_schedule"] is not None):
            raise ValueError(
                "a captured step cannot count: capturable goes with neither grad_accum_steps nor "
                "lr_schedule"
            )

    # --- rates ---------------------------------------------------------------------------------

    def _begin(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        super()._begin(param, group, state)
        state["zero"] = param.dim() >= 2 and is_zero(param)

    def _rate(self, entry: Entry, lr: Any = None) -> Rate:
        group, param = entry.group, entry.param
        if lr is None:
            lr = _times(group["lr"], self._factor(group))
        kind = group["kind"] or by_shape(param)
        center = 1.0 if kind == "gamma" else 0.0
        if not group["relative_lr"]:
            return Rate(lr, group["weight_decay"], center=center)
        if kind in ("gamma", "beta"):
            decay = 0.0 if group["kind"] is None else group["weight_decay"]
            return Rate(lr * 0.5, decay, center=center)
        floor = group["floor"]
        if floor is None:
            zero = entry.state["zero"] and param.numel()
            floor = (param.shape[0] / param.numel()) ** 0.5 if zero else 0.0
        relative = "rows" if kind == "embedding" else "tensor"
        return Rate(lr, group["weight_decay"], relative, floor)

    def _factor(self, group: dict[str, Any]) -> float:
        schedule = group["lr_schedule"]
        return 1.0 if schedule is None else schedules.piecewise_linear(self._at, schedule)

    # --- one step ------------------------------------------------------------------------------

    def _step(self) -> None:
        group = self.param_groups[0]
        k, self._at = group["grad_accum_steps"], group["steps"]
        if self._accumulation is not None:
            self._step_folded(self._accumulation)
        elif (self._at + 1) % k:
            self._micro_step(k)
        elif k > 1 or self._open or not self._step_ordinarily():
            self._update(self._entries(_is_folded), k)

    def _step_ordinarily(self) -> bool:
        """One call over lists that are made in a few microseconds; False where that cannot be."""
        lists = self._ordinary("beta", "shrink_ratio")
        if lists is None:
            return False
        lr: list[Any] = []
        rates = [[], [], [], []]  # type: list[list[Any]]  # decays, relative, floors, centers
        for number, group in enumerate(self.param_groups):
            alpha = _times(group["lr"], self._factor(group))
            half = alpha * 0.5
            halves, *more = self._group_rates(number, group)
            lr += [half if halved else alpha for halved in halves]
            for own, one in zip(rates, more, strict=True):
                own += one
        first = self.param_groups[0]
        beta, ratio = first["beta"], first["shrink_ratio"]
        decays, relative, floors, centers = rates
        try:
            sign_momentum(
                lists.params,
                lists.grads,
                lists.momenta,
                lr=lr,
                betas=(beta, beta),
                weight_decay=decays,
                relative=relative,
                floor=floors,
                maximize=first["maximize"],
                shrink=None if ratio is None else (ratio, centers),
                **lists.rounding,
                cache=self._cache("ordinary"),
                backend=first["backend"],
            )
        except (TypeError, ValueError):  # raised before anything was written
            return False  # sparse gradients, several devices; or what is wrong will be said
        return True

    def _group_rates(self, number: int, group: dict[str, Any]) -> list[list[Any]]:
        """Of each parameter: whether lr is halved, decay, what lr is relative to, floor, center."""
        params = group["params"]
        options = [group[key] for key in ("kind", "relative_lr", "floor", "weight_decay")]
        options.append(len(params))
        if self._rates[0] is not self._looked_up:  # other parameters or states
            self._rates = self._looked_up, {}
        kept = self._rates[1].get(number)
        if kept is None or kept[0] != options:
            made = [self._rate(Entry(p, None, group, self.state[p], ""), 1.0) for p in params]
            columns = [
                [rate.lr == 0.5 for rate in made],
                [rate.weight_decay for rate in made],
                [rate.relative for rate in made],
                [rate.floor for rate in made],
                [rate.center for rate in made],
            ]
            kept = self._rates[1][number] = (options, columns)
        return kept[1]

    def _update(self, entries: list[Entry], k: int = 1) -> None:
        """Take in 1/k of each gradient and move parameters, in one pass."""
        for entry in entries:
            seen = entry.state.get("rows")
            if entry.group["lazy_rows"] and seen is not None:
                entry.moved_rows = seen if entry.moved_rows is None else seen | entry.moved_rows
        batches = self._batches(entries, lambda entry: _what(entry, k), shrinks=True)
        calls: list[partial[Any]] = []
        for batch in batches:
            kind, decay, share, ratio = batch.key.what
            if kind == "apply":
                calls.append(self._apply_call(batch))
                continue
            calls.append(
                partial(
                    sign_momentum,
                    batch.params,
                    batch.grads,
                    batch.momenta,
                    coefficients=(decay, share, decay, share),
                    maximize=batch.key.maximize,
                    mask_momentum_rows=batch.key.lazy_momentum,
                    shrink=None if ratio is None else (ratio, batch.centers),
                    **_move(batch),
                    cache=self._cache("update", batch.number),
                )
            )
        run_all(calls, self._adamw(1 / k))
        self._close(entries)

    def _apply_call(self, batch: Batch) -> partial[None]:
        return partial(
            apply_momentum,
            batch.params,
            batch.momenta,
            **_move(batch),
            cache=self._cache("apply", batch.number),
        )

    def _micro_step(self, k: int) -> None:
        """Take in 1/k of each gradient; parameters stay, but for those that shrink."""
        batches = self._batches(self._entries(), lambda entry: _what(entry, k), shrinks=True)
        calls: list[partial[Any]] = []
        for batch in batches:
            _, decay, share, ratio = batch.key.what
            shrinking = {} if ratio is None else {
                "params": batch.params, "shrink": (ratio, batch.centers), **batch.rounding(),
                "rows": batch.rows, "mask_momentum_rows": False,
            }  # fmt: skip
            calls.append(
                partial(
                    fold_gradients,
                    batch.momenta,
                    batch.grads,
                    decay=decay,
                    weight=share,
                    maximize=batch.key.maximize,
                    **shrinking,
                    cache=self._cache("fold", batch.number),
                    backend=batch.key.backend,
                )
            )
        sums = [
            (entry.state, _summed(entry, 1 / k))
            for number in range(len(self.param_groups))
            for entry in self._adamw_entries(number)
        ]
        check_all(calls)
        self._open = True
        for call, batch in zip(calls, batches, strict=True):
            call()
            for entry in batch.entries:
                _count(entry.state, entry.moved_rows)
        for state, total in sums:
            state["grad_sum"] = total

    def _close(self, entries: list[Entry]) -> None:
        """A cycle of micro-steps is over."""
        self._open = False
        for entry in entries:
            for key in ("folded", "rows", "lost"):
                entry.state.pop(key, None)
        for group in self.param_groups:
            for param in group["params"] if group["algorithm"] == "adamw" else ():
                if param in self.state:
                    self.state[param].pop("grad_sum", None)

    # --- gradients folded during backward ------------------------------------------------------

    @torch.no_grad()
    def _fold(self, param: Tensor, group: dict[str, Any], where: str, weight: float) -> None:
        """Take weight times the parameter's gradient into its momentum.

        The parameter stays as it is, as backward may still need it; whether it is to shrink is
        noted.
        """
        entry = self._entry(param, param.grad, group, where)
        grad = entry.grad
        assert grad is not None
        beta = group["beta"]
        noting: dict[str, Any] = {}
        self._open = True
        if group["shrink_ratio"] is not None:
            if is_sharded(param):
                grads = [grad]
                spread_non_finite(mesh_of(param), grads)
                grad = grads[0]
            # in the parameter's place the gradient itself, which is given up after this: so it must
            # not be an expanded or negated view
            grad = grad.resolve_neg().contiguous()
            noting = {"params": [grad], "shrink": (1.0, 0.0)}
        lost = fold_gradients(
            [local(entry.state["exp_avg"])],
            [grad],
            decay=1.0 if entry.state.get("folded") else beta,
            weight=(1 - beta) * weight,
            maximize=group["maximize"],
            **noting,
            backend=group["backend"],
        )
        if lost is not None:
            before = entry.state.get("lost")
            flag = lost.to(torch.int32)
            count = flag if before is None else before[:1] + flag
            entry.state["lost"] = torch.cat([count, flag])
        _count(entry.state, entry.moved_rows)

    def _step_folded(self, accumulation: MomentumAccumulation) -> None:
        accumulation.fold_what_is_left()
        entries = self._entries(_is_folded)
        taken = max((entry.state["folded"] for entry in entries), default=1)
        self._at += taken - 1
        for entry in entries:
            entry.moved_rows = entry.state.get("rows")
        batches = self._batches(entries, lambda entry: ("apply", *_shrinking(entry)))
        calls = [self._apply_call(batch) for batch in batches]
        adamw_calls = self._adamw(accumulation.weight)
        check_all(calls, alone=False)
        for adamw_call in adamw_calls:
            adamw_call()
        for call, batch in zip(calls, batches, strict=True):
            _, ratio, (times, last) = batch.key.what
            if times:
                self._shrink(batch, ratio**times)
            if not last:
                call()
        self._close(entries)
        for group in self.param_groups:
            group["steps"] += taken - 1

    def _shrink(self, batch: Batch, ratio: float) -> None:
        """Shrink the parameters whose gradients were lost. Their rates are of the new size."""
        for i, (param, center, mask) in enumerate(
            zip(batch.params, batch.centers, batch.rows, strict=True)
        ):
            wide = param.to(torch.promote_types(param.dtype, torch.float32))
            new = (wide - center) * ratio + center
            if mask is not None:
                new = torch.where(mask.view(param.shape[:-1]).unsqueeze(-1), new, wide)
            param.copy_(new)
            batch.lr[i] = self._rate_here(batch.entries[i]).lr

    # --- loading -------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open = self._in_cycle()

    def _in_cycle(self) -> bool:
        """Whether a cycle of micro-steps has begun, as its states have it."""
        return any(_is_folded(state) or "grad_sum" in state for state in self.state.values())

    def _rest(self, saved: dict[str, Any], param: Tensor, where: str) -> dict[str, Any]:
        zero = saved.pop("zero", None)
        made: dict[str, Any] = {
            "zero": param.dim() >= 2 and is_zero(param) if zero is None else bool(zero)
        }
        folded = saved.pop("folded", None)
        if folded is not None:
            if not isinstance(folded, numbers.Integral) or folded < 0:
                raise ValueError(f"the folded gradients of {where} are counted as {folded!r}")
            made["folded"] = int(folded)
        lost = saved.pop("lost", None)
        if lost is not None:
            if not isinstance(lost, Tensor) or lost.shape != (2,):
                raise ValueError(f"lost of {where} must be a tensor of two numbers, not {lost!r}")
            made["lost"] = lost.to(param.device, copy=True)
        mask = saved.pop("rows", None)
        if mask is not None:
            lead = local(param).shape[:-1].numel()
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (lead,):
                raise ValueError(f"rows of {where} must be a bool tensor [{lead}], not {mask!r}")
            made["rows"] = mask.to(param.device, copy=True)
        return made


def _is_folded(state: dict[str, Any]) -> bool:
    return bool(state.get("folded"))


def _what(entry: Entry, k: int) -> tuple[str, float, float, float | None]:
    """(what to do, m's factor, g's factor, the ratio of shrinking)."""
    group = entry.group
    beta = group["beta"]
    if entry.grad is None:
        return "apply", 1.0, 0.0, None
    decay = 1.0 if entry.state.get("folded") else beta
    return "update", decay, (1 - beta) / k, group["shrink_ratio"]


def _shrinking(entry: Entry) -> tuple[float, tuple[int, int]]:
    """(ratio, (how many of the gradients were not finite, whether the last was))."""
    ratio, lost = entry.group["shrink_ratio"], entry.state.get("lost")
    return 1.0 if ratio is None else ratio, (0, 0) if lost is None else tuple(lost.tolist())


def _move(batch: Batch) -> dict[str, Any]:
    """How parameters move, as the operation's arguments."""
    return {
        "lr": batch.lr,
        "weight_decay": batch.weight_decay,
        "relative": batch.relative,
        "floor": batch.floor,
        "rows": batch.rows,
        **batch.rounding(),
        "backend": batch.key.backend,
    }


def _count(state: dict[str, Any], moved_rows: Tensor | None) -> None:
    """A gradient was folded in."""
    state["folded"] = state.get("folded", 0) + 1
    if moved_rows is not None:
        state["rows"] = state["rows"] | moved_rows if "rows" in state else moved_rows
