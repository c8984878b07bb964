"""The options of the adapters, under peft's names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from fastlora.nn.adapted import check_dropout, check_finite, check_rank, check_switch
from fastlora.nn.lora_linear import check_hyperparameters, check_variants

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What the configurations of all methods have: which modules they mean.

    Attributes:
        target_modules: "all-linear" (every ``nn.Linear`` but the output embedding), a list of
            module names (a whole path or its end), or a regular expression for whole paths.
        exclude_modules: a list or regular expression of modules to leave out.
    """

    peft_type: ClassVar[str]

    target_modules: str | list[str] = ALL_LINEAR
    exclude_modules: str | list[str] | None = None

    def __new__(cls, *args: Any, **options: Any) -> AdapterConfig:
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise TypeError(
                f"{cls.__name__} has no option {', '.join(unknown)}; it has {', '.join(known)}. "
                "For what only peft offers, build the model with peft and call fastlora.accelerate."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                value = sorted(value)
                object.__setattr__(self, name, value)
            _check_names(name, value)
        if not self.target_modules:
            raise ValueError("target_modules names no module")

    def patterns(self) -> dict[str, dict[str, Any]]:
        """Options that map expressions for modules to values; each must match an adapted one."""
        return {}


@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """One LoRA, rsLoRA, DoRA or LoRA-FA adapter over a model; fields as in ``peft.LoraConfig``.

    Attributes:
        r: rank, at least 1.
        lora_alpha: α; the scaling is α/r, or α/√r with ``use_rslora``.
        lora_dropout: probability in [0, 1) on the adapter's input while training.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        use_dora: weight-decomposed adaptation (arXiv 2402.09353).
        dora_simple: with DoRA, hold the norm constant in backward (its §4.3; peft always does).
            False lets the gradient flow through it. It is no part of a saved adapter.
        dora_keep_output: with DoRA, keep each linear's output for the gradient of its magnitudes.
            False computes it again in backward: less memory for one more base product; a list of
            module names (as ``target_modules``) does so for all others: with ["o_proj",
            "down_proj"] a llama computes q_proj and k_proj again. A gated pair (gate and up) and an
            attention's values are kept by the model anyway, and so here; but under dropout what is
            kept is an output of the dropped input, which the model does not keep. Not for
            embeddings and convolutions. It is no part of a saved adapter.
        use_lora_fa: freeze A (arXiv 2308.03303), so that no layer keeps its input for backward;
            no part of a saved adapter, which is plain LoRA.
        lora_bias: give lora_B a bias. Not with DoRA; embeddings have none.
        init_lora_weights: True starts A Kaiming-uniform and B at zero. "pissa" (arXiv 2404.02948)
            starts with the weight's r leading singular triples and takes them out of the base
            weight: B = U √(S/s), A = √(S/s) Vᵀ, W ← W − sBA. "pissa_niter_k" finds them by
            randomised iteration, of which 4 are plenty, many times faster. Linears only.
        rank_pattern, alpha_pattern: r and α for modules whose path ends in a match of the key.
        target_modules, exclude_modules: as in ``AdapterConfig``; beside linears a list or an
            expression may name ``nn.Embedding``, ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``.

    Raises TypeError for an option that does not exist here (what peft has beyond these is reached
    through peft itself and ``fastlora.accelerate``), ValueError for values out of range and for
    options that do not go together.
    """

    peft_type = "LORA"

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    dora_simple: bool = True
    dora_keep_output: bool | list[str] = True
    use_lora_fa: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hyperparameters(self.r, self.lora_alpha, self.lora_dropout)
        check_switch("use_rslora", self.use_rslora)
        check_variants(
            self.use_dora,
            self.dora_simple,
            self.use_lora_fa,
            self.lora_bias,
            isinstance(self.dora_keep_output, list) or self.dora_keep_output,
        )
        if isinstance(self.dora_keep_output, list):
            _check_names("dora_keep_output", self.dora_keep_output)
            check_variants(self.use_dora, True, False, False, dora_keep_output=False)
        if self.init_lora_weights is not True and not (
            isinstance(self.init_lora_weights, str) and _PISSA.fullmatch(self.init_lora_weights)
        ):
            raise ValueError(
                "init_lora_weights must be True, 'pissa' or 'pissa_niter_<iterations>', not "
                f"{self.init_lora_weights!r} (LoRA-GA is started by methods.lora_ga)"
            )
        for name, pattern in self.patterns().items():
            if not isinstance(pattern, dict):
                raise ValueError(f"{name} must map expressions to numbers")
            for key, value in pattern.items():
                _check_expression(name, key)
                if name == "rank_pattern":
                    check_rank("r", value)
                else:
                    check_finite("lora_alpha", value)

    def patterns(self) -> dict[str, dict[str, Any]]:
        return {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}

    @property
    def pissa(self) -> bool:
        """Whether the adapter starts as PiSSA."""
        return self.init_lora_weights is not True

    @property
    def pissa_niter(self) -> int | None:
        """The iterations of "pissa_niter_k"; None for a whole decomposition."""
        digits = str(self.init_lora_weights).rpartition("_")[2]
        return int(digits) if digits.isdigit() else None

    def rank_of(self, name: str) -> int:
        return _lookup(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        return _lookup(self.alpha_pattern, name, self.lora_alpha)


@dataclass(frozen=True)
class AdaLoRAConfig(AdapterConfig):
    """One AdaLoRA adapter (arXiv 2303.10512) over the linears of a model, as ``AdaLoraConfig``.

    Attributes:
        init_r: rank that every layer starts with.
        target_r: average rank that the allocation aims at.
        lora_alpha: α; the scaling is α / (init_r + 1e-5), and α ≤ 0 stands for init_r.
        lora_dropout: probability in [0, 1) on the adapter's input while training.
        total_step, tinit, tfinal, deltaT, beta1, beta2: of the allocation's schedule, in steps, and
            of its moving averages; the layers do not depend on them.
        orth_reg_weight: of the regulariser that keeps A and B orthogonal
            (``methods.adalora.orthogonal_regulariser``).
        rank_pattern: {"<module>.lora_E": init_r times True or False}: the triplets that are there.

    Raises TypeError and ValueError as ``LoRAConfig`` does.
    """

    peft_type = "ADALORA"

    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hyperparameters(self.init_r, self.lora_alpha, self.lora_dropout)
        check_rank("target_r", self.target_r)
        check_rank("deltaT", self.deltaT)
        for name in ("tinit", "tfinal"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, not {value!r}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check_finite(name, value)
            if not 0 < value < 1:
                raise ValueError(f"{name} must be between 0 and 1, not {value!r}")
        check_finite("orth_reg_weight", self.orth_reg_weight)
        if self.orth_reg_weight < 0:
            raise ValueError(f"orth_reg_weight must not be negative, not {self.orth_reg_weight!r}")
        if self.total_step is not None:
            check_rank("total_step", self.total_step)
            if self.tinit >= self.total_step - self.tfinal:
                raise ValueError("tinit and tfinal leave no step of total_step for the allocation")
        self._check_rank_pattern()

    def _check_rank_pattern(self) -> None:
        if self.rank_pattern is None:
            return
        if not isinstance(self.rank_pattern, dict):
            raise ValueError("rank_pattern must map '<module>.lora_E' to lists of True and False")
        for key, mask in self.rank_pattern.items():
            if not isinstance(key, str) or not key.endswith(_RANK_KEY):
                raise ValueError(f"rank_pattern: '{key}' does not end in {_RANK_KEY}")
            if not isinstance(mask, list) or not all(isinstance(kept, bool) for kept in mask):
                raise ValueError(f"rank_pattern: '{key}' must be a list of True and False")
            if len(mask) != self.init_r:
                raise ValueError(
                    f"rank_pattern: '{key}' has {len(mask)} entries, init_r is {self.init_r}"
                )

    def mask_of(self, name: str) -> list[bool] | None:
        return (self.rank_pattern or {}).get(f"{name}{_RANK_KEY}")

    def patterns(self) -> dict[str, dict[str, Any]]:
        masks = self.rank_pattern or {}
        return {"rank_pattern": {f"^{re.escape(k.removesuffix(_RANK_KEY))}": 0 for k in masks}}


@dataclass(frozen=True)
class VeRAConfig(AdapterConfig):
    """One VeRA adapter (arXiv 2310.11454) over the linears of a model, as ``peft.VeraConfig``.

    Attributes:
        r: rank, at least 1; larger than LoRA's, as only vectors are trained.
        projection_prng_key: seed of the frozen projections that all layers share.
        save_projection: write them into a saved adapter (and the state dict). False draws them
            anew from the key, for the same ``target_modules``, on loading.
        vera_dropout: probability in [0, 1) on the adapter's input while training.
        d_initial: what ``vera_lambda_d`` starts at.

    Raises TypeError and ValueError as ``LoRAConfig`` does.
    """

    peft_type = "VERA"

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank("r", self.r)
        key = self.projection_prng_key
        if not isinstance(key, int) or isinstance(key, bool) or not -(2**63) <= key < 2**64:
            raise ValueError(f"projection_prng_key must be a 64-bit whole number, not {key!r}")
        check_switch("save_projection", self.save_projection)
        check_dropout("vera_dropout", self.vera_dropout)
        check_finite("d_initial", self.d_initial)


CONFIGS: tuple[type[AdapterConfig], ...] = (LoRAConfig, AdaLoRAConfig, VeRAConfig)
_RANK_KEY = ".lora_E"
_PISSA = re.compile(r"pissa(_niter_[0-9]+)?")


def _lookup(pattern: dict[str, Any], name: str, default: Any) -> Any:
    for key, value in pattern.items():
        if pattern_matches(key, name):
            return value
    return default


def pattern_matches(key: str, name: str) -> bool:
    """Whether the expression ``key`` matches the path ``name`` or its end at a dot, as in peft."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def names_module(entries: list[str], name: str) -> bool:
    """Whether a list of module names means the one at this path, as in peft."""
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _check_names(option: str, value: Any) -> None:
    if value is None and option == "exclude_modules":
        return
    if isinstance(value, str):
        _check_expression(option, value)
    elif not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{option} must be a list of module names or one string, not {value!r}")


def _check_expression(option: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"{option}: '{expression}' is not a regular expression: {error}"
        ) from error
