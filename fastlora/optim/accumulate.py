"""``accumulate_in_momentum``: gradients go into Tiger's momentum during backward, and are freed."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastlora.optim.sign_optimizer import _where
from fastlora.optim.tiger import Tiger


def accumulate_in_momentum(
    model: nn.Module, optimizer: Any, *, loss_is_divided: bool = False
) -> MomentumAccumulation:
    """From now on fold each gradient into the optimizer's momentum as soon as backward has it.

    The gradient is freed at once, so that none outlives its layer's backward. Call ``backward`` on
    each of ``grad_accum_steps`` micro-batches, then ``step`` once: the result is exactly Tiger with
    the mean of their gradients. ``step`` may come early (a last, short batch): what is missing
    counts as zero, as it does where a loss is divided by k. ``zero_grad`` has nothing to do (but
    for AdamW groups, whose gradients stay where they are until ``step``).

    A gradient with NaN or ±∞ leaves momentum as it is; the parameter shrinks at the step.

    Gradients are gone before anything that works on ``.grad`` sees them: clipping, GradScaler
    (fp16), DistributedDataParallel (refused). bfloat16 autocast, checkpointing and FSDP2 are fine.

    Args:
        model: what is trained; every trained parameter must be the optimizer's.
        optimizer: a ``Tiger``, or ``accelerate``'s wrapper of one.
        loss_is_divided: the losses are divided by the number of micro-steps already, as
            ``accelerate`` and the HF Trainer do: gradients are added up instead of averaged, any
            number of them.

    Raises TypeError for an optimizer that is no Tiger (Lion's update needs gradient and momentum
    apart); ValueError for DistributedDataParallel, a trained parameter the optimizer does not have,
    or lazy_momentum; RuntimeError if it is attached already. A ``backward`` beyond
    ``grad_accum_steps`` raises RuntimeError: the step was left out, or one backward brought a
    parameter's gradient in pieces (reentrant checkpoints over a shared weight).
    """
    return MomentumAccumulation(model, optimizer, loss_is_divided)


class MomentumAccumulation:
    """What ``accumulate_in_momentum`` returns; a context manager that detaches at its end."""

    def __init__(self, model: nn.Module, optimizer: Any, loss_is_divided: bool) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(optimizer, Tiger):
            raise TypeError(
                f"gradients can be folded into the momentum of Tiger, not of "
                f"{type(optimizer).__name__}, whose update needs gradient and momentum apart"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "DistributedDataParallel averages gradients after they would be folded and freed; "
                "use FSDP2 (fully_shard)"
            )
        if optimizer._accumulation is not None:
            raise RuntimeError("gradients are folded into this optimizer's momentum already")
        self._optimizer = optimizer
        self._loss_is_divided = loss_is_divided
        own = set()
        for group in optimizer.param_groups:
            if group["lazy_momentum"]:
                raise ValueError("lazy_momentum is not known until all micro-steps are")
            own.update(group["params"])
        for name, param in model.named_parameters():
            if param.requires_grad and param not in own:
                raise ValueError(f"{name} is trained, but not one of the optimizer's parameters")
        if optimizer._in_cycle():
            raise RuntimeError("a cycle of micro-steps has begun: attach after a step")
        self._handles: list[RemovableHandle] = []
        for number in range(len(optimizer.param_groups)):
            self.attach(number)
        optimizer._accumulation = self

    @property
    def limit(self) -> int | None:
        """How many gradients a parameter may have before a step; None: any number."""
        return (
            None if self._loss_is_divided else self._optimizer.param_groups[0]["grad_accum_steps"]
        )

    @property
    def weight(self) -> float:
        """What each gradient is multiplied by."""
        limit = self.limit
        return 1.0 if limit is None else 1.0 / limit

    def attach(self, number: int) -> None:
        """Begin with the parameters of the optimizer's group of this number."""
        group = self._optimizer.param_groups[number]
        if group["algorithm"] != "sign":
            return
        # a parameter's hooks live as long as it does: this, and with it the optimizer, need not
        fold = weakref.WeakMethod(self._fold)
        for i, param in enumerate(group["params"]):
            if param.requires_grad:
                hook = partial(_call, fold, number, i)
                self._handles.append(param.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Leave gradients alone again.

        Raises RuntimeError where gradients were folded since the last step (they cannot be taken
        out of the momentum again: call ``step`` first), and if it is detached already.
        """
        if self._optimizer._accumulation is not self:
            raise RuntimeError("it is detached already")
        if self._optimizer._in_cycle():
            raise RuntimeError("gradients were folded since the last step: call step first")
        self._leave()

    def fold_what_is_left(self) -> None:
        """Gradients that came without backward, as by hand."""
        for number, group in enumerate(self._optimizer.param_groups):
            for i, param in enumerate(group["params"] if group["algorithm"] == "sign" else ()):
                if param.grad is not None:
                    self._fold(number, i, param)

    def __enter__(self) -> MomentumAccumulation:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        if error is None:
            self.detach()
        elif self._optimizer._accumulation is self:
            self._leave()

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._optimizer._accumulation = None

    def _fold(self, number: int, i: int, param: Tensor) -> None:
        # the group of now, as loading a state makes other dictionaries
        group = self._optimizer.param_groups[number]
        where = _where(group, number, i)
        limit, state = self.limit, self._optimizer.state
        done = state[param].get("folded", 0) if param in state else 0
        if limit is not None and done >= limit:
            raise RuntimeError(
                f"a gradient of {where} arrived after {done} micro-steps without a step: call "
                f"optimizer.step() after every {limit} (grad_accum_steps), or set that anew"
            )
        self._optimizer._fold(param, group, where, self.weight)
        param.grad = None


def _call(fold: weakref.WeakMethod[Any], number: int, i: int, param: Tensor) -> None:
    alive = fold()
    if alive is not None:
        alive(number, i, param)
