"""A linear layer with a LoRA, DoRA or LoRA-FA adapter, as a drop-in for ``nn.Linear``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.nn import start as starts
from fastlora.nn.adapted import (
    adapter_dtype_over,
    check_dropout,
    check_finite,
    check_rank,
    check_switch,
)
from fastlora.nn.adapted_linear import AdaptedLinear, parameters_of
from fastlora.nn.dora import Magnitude
from fastlora.nn.start import Start
from fastlora.ops.adapter_group import Member


class LoRALinear(AdaptedLinear):
    """y = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ, with W and bias frozen and A, B trained.

    Parameters carry the names they have in peft's files: ``weight`` [N, K] and ``bias`` [N] stay
    where ``nn.Linear`` has them, ``lora_A.weight`` is [r, K] and ``lora_B.weight`` is [N, r].
    A starts Kaiming-uniform(√5) and B at zero, so that the output starts as the base's
    (arXiv 2106.09685, §4.1; initialisation as in the authors' code). s = α/r, or α/√r with
    ``use_rslora`` (arXiv 2312.03732). Make one with ``from_linear``. The forward reads the
    weights of ``lora_A`` and ``lora_B`` and does not call them: hooks on those two do not run.

    With ``use_dora`` (arXiv 2402.09353) y = g ∘ (x Wᵀ + s · …) + bias, where g = m / ‖W + s·BA‖ and
    ``lora_magnitude_vector.weight`` m [N] starts as that norm; a row of zeros stays one.
    Dropout then reaches the part of the base that g adds, too, as in peft. ``dora_simple`` False
    lets the gradient of A and B flow through the norm, and ``dora_keep_output`` False keeps no
    output for m's gradient, which backward computes again. With
    ``use_lora_fa`` (2308.03303) A is frozen, and no input is kept for backward. ``lora_bias`` gives
    B a bias [N], added times s.

    ``start``: what PiSSA or LoRA-GA took out of the weight at the beginning (None otherwise). It is
    no buffer and stays on the CPU, and is in the layer's state dict.
    """

    start: Start | None = None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        *,
        use_dora: bool = False,
        dora_simple: bool = True,
        use_lora_fa: bool = False,
        lora_bias: bool = False,
        dora_keep_output: bool = True,
        init_lora_weights: bool = True,
    ) -> None:
        check_hyperparameters(r, lora_alpha, lora_dropout)
        check_variants(use_dora, dora_simple, use_lora_fa, lora_bias, dora_keep_output)
        super().__init__(weight, bias)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.use_lora_fa = use_lora_fa
        self.keep_output = dora_keep_output
        dtype = adapter_dtype_over(weight.dtype, adapter_dtype)
        where: dict[str, Any] = {"device": weight.device, "dtype": dtype}
        self.lora_A = undrawn(self.in_features, r, False, where)
        self.lora_B = undrawn(r, self.out_features, lora_bias, where)
        self.lora_A.weight.requires_grad_(not use_lora_fa)
        self.lora_magnitude_vector: Magnitude | None = None
        if init_lora_weights:
            self.reset_parameters()
        elif lora_bias:
            nn.init.zeros_(self.lora_B.bias)
        if use_dora:
            wide = torch.promote_types(weight.dtype, torch.float32)
            norm = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=wide)
            self.lora_magnitude_vector = Magnitude(norm, dtype, dora_simple)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        **variants: bool,
    ) -> LoRALinear:
        """An adapted layer around ``linear``'s own weight and bias (shared, and frozen by this).

        ``adapter_dtype`` is the base's dtype, or float32 over a half-precision base (as in peft).
        ``variants``: use_dora, dora_simple, use_lora_fa, lora_bias, dora_keep_output; and
        init_lora_weights, False for a caller who writes A and B, which hold anything until then.

        Raises TypeError for anything but an exact ``nn.Linear`` with floating weights (a subclass
        may compute something else) and for an ``adapter_dtype`` that does not go with the base's;
        ValueError for a linear with hooks or a forward of its own (they would be lost), r < 1,
        dropout outside [0, 1), an α that is not finite, or variants that do not go together.
        """
        weight, bias = parameters_of(linear)
        layer = cls(
            weight, bias, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, **variants
        )
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Draw A anew and set B (and its bias) to zero; the base stays, and so do magnitudes."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if self.lora_B.bias is not None:
            nn.init.zeros_(self.lora_B.bias)

    def operands(self, dropout: bool) -> Member:
        # asked for at every call, and a Module's way to each of its parts takes a microsecond
        weight, scaling, lora_B = self.weight, self.scaling, self.lora_B
        A, B, own_bias = self.lora_A.weight, lora_B.weight, lora_B.bias
        magnitude = self.lora_magnitude_vector
        bias: Tensor | None = self.bias
        p = self.lora_dropout if dropout else 0.0
        if magnitude is not None:
            g = magnitude.scale(weight, A, B, scaling)
            return Member(
                weight, A, B, scaling, bias, p, g, drop_base=p > 0, keep_output=self.keep_output
            )
        if own_bias is not None:
            bias = bias_with(bias, own_bias, scaling, weight.dtype)
        return Member(weight, A, B, scaling, bias, p)

    def tensors(self) -> dict[str, nn.Parameter]:
        found = {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}
        if self.lora_B.bias is not None:
            found["lora_B.bias"] = self.lora_B.bias
        if self.lora_magnitude_vector is not None:
            found["lora_magnitude_vector"] = self.lora_magnitude_vector.weight
        return found

    def saved(self) -> dict[str, Tensor]:
        """``tensors``, or what they are to the weight before a ``start`` was taken out of it: with
        A' = [A; A₀] and B' = [B, −B₀] W₀ + s·B'A' is this layer's weight."""
        found: dict[str, Tensor] = dict(self.tensors())
        if self.start is not None:
            A, B = self.lora_A.weight.detach(), self.lora_B.weight.detach()
            A_0, B_0 = self.start.on(A.device, A.dtype)
            found["lora_A.weight"] = torch.cat((A, A_0))
            found["lora_B.weight"] = torch.cat((B, -B_0), 1)
        return found

    def saved_rank(self) -> int:
        """The rank of ``saved``."""
        return self.r + (0 if self.start is None else self.start.r)

    def original_forward(self, x: Tensor) -> Tensor:
        y = self.base_forward(x)
        if self.start is None:
            return y
        A_0, B_0 = self.start.on(x.device, self.lora_A.weight.dtype)
        return (y + (x.to(A_0.dtype) @ A_0.t() * self.scaling) @ B_0.t()).to(y.dtype)

    @torch.no_grad()
    def put_back(self) -> None:
        if self.start is None:
            return
        if self.merged:
            raise RuntimeError("the adapter is merged; unmerge it first")
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        A_0, B_0 = self.start.on(self.weight.device, wide)
        self.weight.copy_(torch.addmm(self.weight.to(wide), B_0, A_0, alpha=self.scaling))
        self.start = None

    def summary(self) -> str:
        return lora_summary(self)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        starts.write(self.start, destination, prefix)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        shape = (self.out_features, self.in_features)
        self.start = starts.read(
            self.start, shape, state_dict, prefix, missing_keys, unexpected_keys, error_msgs
        )

    def cannot_merge(self) -> str | None:
        if self.lora_B.bias is not None and self.bias is None:
            return "it has a bias of its own (lora_bias), and the base has none to take it"
        return None

    def _merged_bias(self) -> Tensor | None:
        return None if self.lora_B.bias is None else self.operands(dropout=False).bias

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | lora_facts(self)


def bias_with(bias: Tensor | None, lora_bias: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """bias + s · lora_bias [N], rounded once to ``dtype``; bias may be None."""
    own = lora_bias * scaling
    return (own if bias is None else bias + own).to(dtype)


def lora_facts(layer: Any) -> dict[str, Any]:
    """What a printed layer tells of its LoRA options."""
    facts = {
        name: getattr(layer, name) for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")
    }
    if getattr(layer, "use_lora_fa", False):
        facts["use_lora_fa"] = True
    return facts


def lora_summary(layer: Any) -> str:
    """What a report says of a LoRA adapter."""
    said = [f"r={layer.r}", f"scaling={layer.scaling:g}"]
    if layer.lora_magnitude_vector is not None:
        said.insert(0, "DoRA")
    if getattr(layer, "use_lora_fa", False):
        said.insert(0, "A frozen")
    return ", ".join(said)


def undrawn(in_features: int, out_features: int, bias: bool, where: dict[str, Any]) -> Any:
    """An ``nn.Linear`` whose parameters are yet to be written, as by ``nn.utils.skip_init``, which
    takes half a millisecond to draw on the meta device. ``where``: device and dtype."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = in_features, out_features
    linear.weight = nn.Parameter(torch.empty(out_features, in_features, **where))
    own = nn.Parameter(torch.empty(out_features, **where)) if bias else None
    linear.register_parameter("bias", own)
    return linear


def check_hyperparameters(r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Raise ValueError unless r ≥ 1, α is finite and dropout is in [0, 1)."""
    check_rank("r", r)
    check_finite("lora_alpha", lora_alpha)
    check_dropout("lora_dropout", lora_dropout)


def check_variants(
    use_dora: bool,
    dora_simple: bool,
    use_lora_fa: bool,
    lora_bias: bool,
    dora_keep_output: bool = True,
) -> None:
    """Raise ValueError for variants of LoRA that do not go together."""
    for name, value in locals().copy().items():
        check_switch(name, value)
    if lora_bias and use_dora:
        raise ValueError("lora_bias does not go with use_dora: peft has no such adapter")
    if not dora_simple and not use_dora:
        raise ValueError("dora_simple=False says how DoRA's norm is differentiated; set use_dora")
    if not dora_keep_output and not use_dora:
        raise ValueError("dora_keep_output=False says what DoRA keeps for backward; set use_dora")
