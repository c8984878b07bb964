"""What the operation and its backends agree on, and which backends there are."""

from __future__ import annotations

import torch

from fastlora.ops import backend

# No norm returned is smaller, so that a magnitude divided by it stays finite: a zero row gives it.
FLOOR = 1e-12

# A row whose n² is below this fraction of ‖W_j‖² + s² Σ_r B_jr² ‖A_r‖² has lost digits to
# cancellation: it is computed anew, element by element in float64 (README, "Cancellation").
CANCELLATION = 1 / 16

# Each module has ``forward`` and ``backward`` with the signatures of eager.py; native.py, which
# sees by itself what has changed since a layer's last call, ``remembered`` besides.
BACKENDS = backend.usual("fastlora.ops.weight_norm", onednn_dtypes=backend.FLOATS)


def result_dtype(weight: torch.dtype) -> torch.dtype:
    """What norms are computed and returned in: float64 for float64, float32 for all others."""
    return torch.float64 if weight == torch.float64 else torch.float32
