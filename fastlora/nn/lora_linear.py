"""A linear layer with a LoRA adapter, as a drop-in for ``torch.nn.Linear``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastlora.nn.plain import added_behaviour
from fastlora.ops.adapter_linear import adapter_linear
from fastlora.ops.backend import HALF

FLOATS = (torch.float32, torch.float64, *HALF)


class LoRALinear(nn.Module):
    """y = x Wᵀ + bias + s · drop(x) Aᵀ Bᵀ, with W and bias frozen and A, B trained.

    Parameters carry the names they have in peft's files: ``weight`` [N, K] and ``bias`` [N] stay
    where ``nn.Linear`` has them, ``lora_A.weight`` is [r, K] and ``lora_B.weight`` is [N, r].
    A starts Kaiming-uniform(√5) and B at zero, so that the output starts as the base's
    (arXiv 2106.09685, §4.1; initialisation as in the authors' code). s = α/r, or α/√r with
    ``use_rslora`` (arXiv 2312.03732). Make one with ``from_linear``. The forward reads the
    weights of ``lora_A`` and ``lora_B`` and does not call them: hooks on those two do not run.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_hyperparameters(r, lora_alpha, lora_dropout)
        self.out_features, self.in_features = weight.shape
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.use_rslora = use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.merged = False
        self.enabled = True
        weight.requires_grad_(False)
        self.register_parameter("weight", weight)
        if bias is not None:
            bias.requires_grad_(False)
        self.register_parameter("bias", bias)
        if adapter_dtype is None:
            adapter_dtype = torch.float32 if weight.dtype in HALF else weight.dtype
        allowed = {weight.dtype, torch.float32} if weight.dtype in HALF else {weight.dtype}
        if adapter_dtype not in allowed:
            raise TypeError(
                f"adapter_dtype {adapter_dtype} does not go with a base of {weight.dtype}: it is "
                "the base's, or float32 over a half-precision base"
            )
        where = {"device": weight.device, "dtype": adapter_dtype}
        self.lora_A = nn.utils.skip_init(nn.Linear, self.in_features, r, bias=False, **where)
        self.lora_B = nn.utils.skip_init(nn.Linear, r, self.out_features, bias=False, **where)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """An adapted layer around ``linear``'s own weight and bias (shared, and frozen by this).

        ``adapter_dtype`` is the base's dtype, or float32 over a half-precision base (as in peft).

        Raises TypeError for anything but an exact ``nn.Linear`` with floating weights (a subclass
        may compute something else) and for an ``adapter_dtype`` that does not go with the base's;
        ValueError for a linear with hooks or a forward of its own (they would be lost), r < 1,
        dropout outside [0, 1) or an α that is not finite.
        """
        if reason := cannot_adapt(linear):
            raise (ValueError if type(linear) is nn.Linear else TypeError)(
                f"from_linear cannot take this layer: {reason}"
            )
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        assert weight is not None  # cannot_adapt has seen it
        layer = cls(weight, bias, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Draw A anew and set B to zero; the base stays."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.enabled:
            return nn.functional.linear(x, self.weight, self.bias)
        return adapter_linear(
            x,
            self.weight,
            self.lora_A.weight,
            self.lora_B.weight,
            self.scaling,
            self.bias,
            self.lora_dropout if self.training else 0.0,
        )

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """s · B A [N, K], computed in float32 (float64 for a float64 base), in the base's dtype."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        delta = self.lora_B.weight.to(wide) @ self.lora_A.weight.to(wide)
        return delta.mul_(self.scaling).to(self.weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Add s · B A to the base weight in place; the forward is then one plain linear.

        A state dict taken while merged holds the merged weight beside A and B.

        Raises RuntimeError if it is merged already, ValueError if the result would not be finite;
        the weight is unchanged then.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged already")
        merged = self.weight + self.delta_weight()
        if not torch.isfinite(merged).all():
            raise ValueError("merging would put non-finite values into the base weight")
        self.weight.copy_(merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract s · B A again. The weight returns to within a rounding of what it was.

        Raises RuntimeError if it is not merged.
        """
        if not self.merged:
            raise RuntimeError("the adapter is not merged")
        self.weight.sub_(self.delta_weight())
        self.merged = False

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, lora_alpha={self.lora_alpha}, "
            f"lora_dropout={self.lora_dropout}, use_rslora={self.use_rslora}"
        )


def cannot_adapt(linear: nn.Module) -> str | None:
    """Why a ``LoRALinear`` cannot stand in for this module, as a sentence; None if it can."""
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, not a torch.nn.Linear"
    weight = linear._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter:
        return f"its weight is a {type(linear.weight).__name__}, not a plain parameter"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}, not float32, float64, bfloat16 or float16"
    return added_behaviour(linear)


def check_hyperparameters(r: int, lora_alpha: float, lora_dropout: float) -> None:
    """Raise ValueError unless r ≥ 1, α is finite and dropout is in [0, 1)."""
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r must be a whole number of at least 1, not {r!r}")
    if not isinstance(lora_alpha, (int, float)) or not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be a finite number, not {lora_alpha!r}")
    if not isinstance(lora_dropout, (int, float)) or not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), not {lora_dropout!r}")
