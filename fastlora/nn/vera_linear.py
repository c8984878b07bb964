"""VeRA's linear layer, and the random projections that all such layers of a model share."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.nn.adapted import adapter_dtype_over, check_dropout, check_finite, check_rank
from fastlora.nn.adapted_linear import AdaptedLinear, parameters_of
from fastlora.ops.adapter_group import Member
from fastlora.ops.adapter_linear.entry import is_transformed


class Copies:
    """The first columns of A and rows of B of the model's projections, made once for all layers.

    Layers of one width get the very same A, contiguous, as products take a narrow slice of wide
    rows badly; B's are views of one matrix. What has changed is made anew. Itself copied, it is
    empty.
    """

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Any, Any, Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Copies, ()

    def columns(
        self, adapter: str, A: Tensor, k: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        if A.shape[1] == k and A.dtype == dtype and A.device == device:
            return A
        return self._of(
            ("A", adapter, k, dtype, device),
            A,
            lambda A: A[:, :k].to(device, dtype).contiguous(),
        )

    def rows(
        self, adapter: str, B: Tensor, n: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        if B.dtype != dtype or B.device != device:
            B = self._of(("B", adapter, dtype, device), B, lambda B: B.to(device, dtype))
        if B.shape[0] == n:
            return B
        return self._of(("B", adapter, n, dtype, device), B, lambda B: B[:n])

    def _of(self, key: Any, source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        state = source.data_ptr(), None if source.is_inference() else source._version
        made = self._made.get(key)
        if made is None or made[0]() is not source or made[1] != state:
            # they serve a later call that trains, so no inference tensors are made
            with torch.inference_mode(False), torch.no_grad():
                made = weakref.ref(source), state, make(source.detach())
            self._made[key] = made
        return made[2]


class VeRAProjection(nn.Module):
    """The frozen ``vera_A`` [r, K] and ``vera_B`` [N, r] of a model; a layer takes A[:, :k], B[:n].

    Kaiming-uniform with gain √2 in float32, A drawn before B from one CPU generator that
    ``projection_prng_key`` seeds, as in peft: equal keys and sizes give equal matrices there.
    ``persistent``: they belong to the state dict (False: they are drawn anew from the key).
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(
        self,
        r: int,
        in_features: int,
        out_features: int,
        projection_prng_key: int = 0,
        persistent: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        check_rank("r", r)
        self.r = r
        self.projection_prng_key = projection_prng_key
        self._copies = Copies()
        generator = torch.Generator("cpu").manual_seed(projection_prng_key)
        for name, shape in (("vera_A", (r, in_features)), ("vera_B", (out_features, r))):
            bound = math.sqrt(6 / shape[1])
            drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
            drawn.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn.to(device), persistent)

    def sliced(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """(A [r, in_features], B [out_features, r]) for a layer; see ``Copies``."""
        A, B = self.vera_A, self.vera_B
        if torch.compiler.is_compiling() or is_transformed(A):
            return A[:, :in_features].to(device, dtype), B[:out_features].to(device, dtype)
        return (
            self._copies.columns("", A, in_features, dtype, device),
            self._copies.rows("", B, out_features, dtype, device),
        )


class VeRALinear(AdaptedLinear):
    """y = x Wᵀ + bias + b ∘ (((drop(x) Aᵀ) ∘ d) Bᵀ)   (arXiv 2310.11454, eq. 2).

    ``vera_lambda_d`` [r] starts at ``d_initial`` and ``vera_lambda_b`` [N] at zero; these two are
    trained. A and B are slices of the model's one ``VeRAProjection``, which only the layer that was
    given it with ``owns_projection`` holds as a submodule, so that it moves, and is saved, once.
    Make one with ``from_linear``.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        projection: VeRAProjection,
        vera_dropout: float = 0.0,
        d_initial: float = 0.1,
        adapter_dtype: torch.dtype | None = None,
        owns_projection: bool = True,
    ) -> None:
        check_dropout("vera_dropout", vera_dropout)
        check_finite("d_initial", d_initial)
        super().__init__(weight, bias)
        n, k = projection.vera_B.shape[0], projection.vera_A.shape[1]
        if k < self.in_features or n < self.out_features:
            raise ValueError(
                f"the projections serve layers of up to {k} → {n} features, this one has "
                f"{self.in_features} → {self.out_features}"
            )
        self.r = projection.r
        self.vera_dropout = vera_dropout
        self.d_initial = d_initial
        self._projection = (projection,)  # in a tuple: no submodule of this layer
        if owns_projection:
            self.vera_projection = projection
        dtype, device = adapter_dtype_over(weight.dtype, adapter_dtype), weight.device
        self.vera_lambda_d = nn.Parameter(torch.empty(self.r, dtype=dtype, device=device))
        self.vera_lambda_b = nn.Parameter(torch.empty(len(weight), dtype=dtype, device=device))
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        projection: VeRAProjection | None = None,
        r: int = 256,
        vera_dropout: float = 0.0,
        d_initial: float = 0.1,
        adapter_dtype: torch.dtype | None = None,
        owns_projection: bool = True,
    ) -> VeRALinear:
        """An adapted layer around ``linear``'s own weight and bias (shared, and frozen by this).

        ``projection``: shared with other layers; None draws one of rank ``r`` for this layer
        alone. Raises as ``LoRALinear.from_linear`` does, and ValueError for a projection that is
        too small.
        """
        weight, bias = parameters_of(linear)
        if projection is None:
            n, k = weight.shape
            projection = VeRAProjection(r, k, n, device=weight.device)
        layer = cls(
            weight, bias, projection, vera_dropout, d_initial, adapter_dtype, owns_projection
        )
        return layer.train(linear.training)

    @property
    def projection(self) -> VeRAProjection:
        return self._projection[0]

    def reset_parameters(self) -> None:
        """Set d to ``d_initial`` and b to zero; base and projections stay."""
        nn.init.constant_(self.vera_lambda_d, self.d_initial)
        nn.init.zeros_(self.vera_lambda_b)

    def slices(self) -> tuple[Tensor, Tensor]:
        """This layer's A [r, K] and B [N, r], in the dtype that is computed in: its weight's, or
        autocast's."""
        dtype, device = self.weight.dtype, self.weight.device
        if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return self.projection.sliced(self.in_features, self.out_features, dtype, device)

    def operands(self, dropout: bool) -> Member:
        A, B = self.slices()
        return Member(
            self.weight,
            A,
            B,
            1.0,
            self.bias,
            self.vera_dropout if dropout else 0.0,
            mid_scale=self.vera_lambda_d,
            adapter_scale=self.vera_lambda_b,
        )

    def tensors(self) -> dict[str, nn.Parameter]:
        return {"vera_lambda_d": self.vera_lambda_d, "vera_lambda_b": self.vera_lambda_b}

    def summary(self) -> str:
        return f"VeRA, r={self.r}"

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {
            "r": self.r,
            "vera_dropout": self.vera_dropout,
        }
