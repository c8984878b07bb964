"""Remembers a layer's last norm, and ‖W‖², for as long as nothing they depend on has changed.

What PyTorch offers for noticing a change, a tensor's ``_version``, is not enough: torch's own fused
optimizers (``AdamW(fused=True)``), ``p.data.add_(…)``, bitsandbytes, FSDP's gathering and writes
through NumPy all change values without touching it. So values are compared where that is cheap,
and otherwise nothing is remembered that an optimizer could be changing. The README has the table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from fastlora.ops.library import core, missing

_PROBES = 64


class _Identity(NamedTuple):
    """Which memory a tensor is, in which form, after how many recorded writes.

    The weak reference keeps the storage's address from being given to another, not its memory.
    """

    storage: StorageWeakRef
    facts: tuple[Any, ...]

    def holds(self, tensor: Tensor) -> bool:
        return self.storage.cdata == _address(tensor) and self.facts == _facts(tensor)


class _Seen(NamedTuple):
    """A tensor as it was: its identity, or a copy of (some of) its values, or both."""

    identity: _Identity | None
    values: Tensor | None


class _Entry(NamedTuple):
    weight: _Seen
    weight_sq: Tensor | None
    lora_A: _Seen | None
    lora_B: _Seen | None
    scaling: float
    norm: Tensor
    norm_version: int
    stream: int


class Found(NamedTuple):
    """What ``find`` remembers; None for what it does not."""

    norm: Tensor | None  # n [N]
    weight_sq: Tensor | None  # ‖W_j‖² [N]
    weight: _Seen | None  # the weight, just seen to be as it was: for ``keep``


class WeightNormCache:
    """The last results of ``weight_norm`` for one layer; give each layer its own.

    Pass the layer's parameters themselves, not detached copies. On the CPU a remembered norm is
    returned only if lora_A and lora_B equal, value for value, the copies kept of them, and weight
    is the same unwritten memory with the same values at 64 places. On other devices, where a
    comparison would wait for the device, it is returned only for parameters that do not train
    (``requires_grad`` False) and have the same versions.

    ``trust_versions`` goes by ``_version`` alone, for any tensor on any device: faster, and right
    only if every optimizer and every other writer records its writes. ``AdamW(fused=True)`` and
    ``p.data.add_(…)`` do not.

    A copied or unpickled cache is empty.
    """

    def __init__(self, trust_versions: bool = False) -> None:
        self.trust_versions = trust_versions
        self._entry: _Entry | None = None  # replaced as a whole, so that threads never mix two
        self._native: tuple[StorageWeakRef, Any] | None = None  # likewise

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightNormCache, (self.trust_versions,)

    def clear(self) -> None:
        """Forgets everything; for writes that cannot be noticed (README)."""
        self._entry = self._native = None

    def memory(self, weight: Tensor, new: Callable[[], Any]) -> Any:
        """What ``new`` has made for this weight's storage, and a backend keeps its own results in
        instead of here; the storage's address is given to no other meanwhile."""
        storage = weight.untyped_storage()
        known = self._native
        if known is None or known[0].cdata != storage._cdata:
            self._native = known = StorageWeakRef(storage), new()
        return known[1]

    def find(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Found:
        """What is remembered for these tensors."""
        entry = self._entry
        if entry is None or not _ordinary(weight, lora_A, lora_B):
            return Found(None, None, None)
        if entry.stream != _stream(weight) or not self._unchanged(entry.weight, weight):
            return Found(None, None, None)
        if (
            entry.lora_A is not None
            and entry.lora_B is not None
            and entry.scaling == scaling
            and entry.norm._version == entry.norm_version
            and self._unchanged(entry.lora_A, lora_A)
            and self._unchanged(entry.lora_B, lora_B)
        ):
            return Found(entry.norm.detach(), entry.weight_sq, entry.weight)
        return Found(None, entry.weight_sq, entry.weight)

    def keep(
        self,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        norm: Tensor,
        weight_sq: Tensor | None,
        seen: _Seen | None = None,
    ) -> None:
        """Remembers results for these tensors, as far as their changes can be noticed. ``seen``:
        the weight, if ``find`` has just looked at it."""
        self._entry = None
        if not _ordinary(weight, lora_A, lora_B):
            return
        seen = seen or self._see(weight, whole=False)
        if seen is not None:
            self._entry = _Entry(
                seen,
                weight_sq,
                self._see(lora_A, whole=True),
                self._see(lora_B, whole=True),
                scaling,
                norm,
                norm._version,
                _stream(weight),
            )

    def _see(self, tensor: Tensor, whole: bool) -> _Seen | None:
        compares = tensor.is_cpu and not self.trust_versions
        frozen = isinstance(tensor, Parameter) and not tensor.requires_grad
        if whole and compares:
            return _Seen(None, tensor.detach().clone())
        if tensor.is_inference() or not (compares or frozen or self.trust_versions):
            return None
        identity = _Identity(StorageWeakRef(tensor.untyped_storage()), _facts(tensor))
        return _Seen(identity, _probe(tensor) if compares else None)

    def _unchanged(self, seen: _Seen, tensor: Tensor) -> bool:
        identity, values = seen
        if identity is None:
            assert values is not None
            return tensor.is_cpu and _equal(tensor.detach(), values)
        if tensor.is_inference() or not identity.holds(tensor):
            return False
        if values is not None:
            return _equal(_probe(tensor), values)
        return self.trust_versions or not tensor.requires_grad


def _ordinary(*tensors: Tensor) -> bool:
    """Whether these are plain tensors whose memory can be looked at now."""
    if any(type(t) not in (Tensor, Parameter) or t.is_meta for t in tensors):
        return False
    # a captured graph would replay a remembered norm whatever the adapters have become
    return not (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor._version,
        tensor.data_ptr(),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
    )


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _equal(now: Tensor, before: Tensor) -> bool:
    """Every value the same. Three times as fast as ``torch.equal``, or thirty."""
    if now.shape != before.shape or now.dtype != before.dtype:
        return False
    if now.numel() == 0:
        return True
    if missing() is None and now.is_contiguous() and before.is_contiguous():
        return core().same(now.data_ptr(), before.data_ptr(), now.nbytes)
    low, high = torch.aminmax(now - before)
    return low.item() == 0.0 and high.item() == 0.0


def _probe(weight: Tensor) -> Tensor:
    """Values of weight [N, K] at places spread over its rows and columns, [64]."""
    weight = weight.detach()
    if weight.numel() == 0:
        return weight.new_empty(0)
    n, k = weight.shape
    if weight.is_contiguous():
        return weight.view(-1).index_select(0, _flat_places(n, k))
    return weight[_places(n, k)]


@lru_cache(maxsize=64)
def _places(n: int, k: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        steps = torch.arange(_PROBES, device="cpu")
        # the golden ratio's multiples spread over the columns whatever K is
        return steps * n // _PROBES, (steps.double() * 0.6180339887498949 % 1.0 * k).long()


@lru_cache(maxsize=64)
def _flat_places(n: int, k: int) -> Tensor:
    rows, columns = _places(n, k)
    with torch.inference_mode(False):
        return rows * k + columns
