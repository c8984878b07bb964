"""What the operation and its backends agree on, and which backends there are."""

from __future__ import annotations

import torch

from fastlora.ops import backend

_HERE = "fastlora.ops.weight_norm"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# No norm returned is smaller, so that a magnitude divided by it stays finite: a zero row gives it.
FLOOR = 1e-12

# A row whose n² is below this fraction of ‖W_j‖² + s² Σ_r B_jr² ‖A_r‖² has lost digits to
# cancellation: it is computed anew, element by element in float64 (README, "Cancellation").
CANCELLATION = 1 / 16

# Each module has ``forward`` and ``backward`` with the signatures of eager.py.
BACKENDS = (
    backend.Backend(
        "triton",
        f"{_HERE}.triton",
        refuses=(
            backend.only_devices("cuda", "cpu"),
            backend.only_dtypes(*_FLOATS),
            backend.needs_triton,
        ),
        leaves=(backend.interpreter_is_for_tests,),
    ),
    backend.Backend(
        "onednn",
        f"{_HERE}.onednn",
        refuses=(
            backend.only_devices("cpu"),
            backend.only_dtypes(*_FLOATS),
            backend.needs_onednn,
        ),
        leaves=(backend.mkl_is_as_fast,),
    ),
    backend.Backend(
        "eager", f"{_HERE}.eager", refuses=(backend.only_dtypes(*_FLOATS, torch.float64),)
    ),
)


def result_dtype(weight: torch.dtype) -> torch.dtype:
    """What norms are computed and returned in: float64 for float64, float32 for all others."""
    return torch.float64 if weight == torch.float64 else torch.float32
