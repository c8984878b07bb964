"""Lion (arXiv 2302.06675): the sign of a momentum, one state a parameter."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fastlora.ops.sign_momentum import sign_momentum
from fastlora.optim import checks
from fastlora.optim.sign_optimizer import Entry, Rate, SignOptimizer, run_all


class Lion(SignOptimizer):
    """θ ← θ − η(sign(β₁m + (1−β₁)g) + λθ), then m ← β₂m + (1−β₂)g, for the whole model in one call.

    The decay is decoupled, η times λ, as in the paper (``lion_pytorch``'s
    ``decoupled_weight_decay`` divides λ by the initial lr, which is another convention). Beside
    AdamW take an lr 3 to 10 times smaller and a weight_decay as much larger; for language models
    (0.95, 0.98) are the steadier betas. As in every sign update, rows of an embedding whose
    gradient is zero go on moving: see ``lazy_rows``, ``algorithm`` and the README.

    Args:
        params: as for torch.optim: tensors, (name, tensor) pairs or groups, real and floating,
            of mixed dtypes and devices; DTensors (FSDP2) too.
        lr: a number, or a tensor of one, which on a GPU is read there and never waited for.
        betas: (β₁, β₂), each in [0, 1).
        weight_decay: λ.
        maximize: ascend.
        capturable: keep lr in a tensor on the parameters' device, so that a captured step follows
            it. The first step must not be a captured one.
        differentiable: refused.
        state_dtype: of the momentum: torch.float32, torch.bfloat16 or "8bit" (blocks of 256 with a
            scale each, 1.016 bytes a number). float64 parameters have it in float64.
        stochastic_rounding: round bfloat16 parameters up or down by chance, right in expectation,
            so that steps below half of their spacing are not lost. From ``seed`` and the number of
            the step, so a resumed run draws the same.
        lazy_rows: move only the rows (last axis) whose gradient is not zero; momentum still decays
            on all. With ``lazy_momentum`` that stays too.
        algorithm: "sign", or for a group "adamw": torch's AdamW with ``adam_betas`` and
            ``adam_eps``, for embeddings beside Lion elsewhere.
        backend: of ``ops.sign_momentum``; None chooses.

    All but ``differentiable`` may be given per group. Gradients may be sparse (not with adamw).

    Raises ValueError for a negative or not finite lr, weight_decay or betas outside [0, 1);
    TypeError for complex or integer parameters; ``step`` raises ValueError for a parameter that was
    resized or moved after its first step. A step that raises has changed nothing.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
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
            "betas": betas,
            "weight_decay": weight_decay,
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

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        checks.pair("betas", group["betas"])

    def _rate(self, entry: Entry) -> Rate:
        return Rate(entry.group["lr"], entry.group["weight_decay"])

    def _step(self) -> None:
        if not self._step_ordinarily():
            self._step_any()

    def _step_ordinarily(self) -> bool:
        """One call over lists that are made in a few microseconds; False where that cannot be."""
        lists = self._ordinary("betas") if self.param_groups else None
        if lists is None:
            return False
        lr, weight_decay = [], []
        for group in self.param_groups:
            count = len(group["params"])
            lr += [group["lr"]] * count
            weight_decay += [group["weight_decay"]] * count
        first = self.param_groups[0]
        try:
            sign_momentum(
                lists.params,
                lists.grads,
                lists.momenta,
                lr=lr if len(self.param_groups) > 1 else first["lr"],
                betas=first["betas"],
                weight_decay=weight_decay if len(self.param_groups) > 1 else first["weight_decay"],
                maximize=first["maximize"],
                **lists.rounding,
                cache=self._cache("ordinary"),
                backend=first["backend"],
            )
        except (TypeError, ValueError):  # raised before anything was written
            return False  # sparse gradients, several devices; or what is wrong will be said
        return True

    def _step_any(self) -> None:
        batches = self._batches(self._entries(), lambda entry: tuple(entry.group["betas"]))
        calls = [
            partial(
                sign_momentum,
                batch.params,
                batch.grads,
                batch.momenta,
                lr=batch.lr,
                betas=batch.key.what,
                weight_decay=batch.weight_decay,
                maximize=batch.key.maximize,
                rows=batch.rows,
                mask_momentum_rows=batch.key.lazy_momentum,
                **batch.rounding(),
                cache=self._cache("any", batch.number),
                backend=batch.key.backend,
            )
            for batch in batches
        ]
        run_all(calls, self._adamw())
