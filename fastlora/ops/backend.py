"""Who can run a call: capabilities as data, reasons as sentences.

An operation lists its ``Backend`` entries in order of preference; ``select`` picks one from the
call's metadata alone. The choice is made by, in this order: the ``backend=`` argument, the
``use_backend`` context, the environment variable FASTLORA_BACKEND, and else automatically.
This is the only file of the package that reads the environment.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from fastlora.ops import library, tuned

NAMES = ("triton", "native", "onednn", "eager")
ENVIRONMENT_VARIABLE = "FASTLORA_BACKEND"
HALF = frozenset({torch.float16, torch.bfloat16})

_requested: ContextVar[str | None] = ContextVar("fastlora_backend", default=None)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run the call; the message lists every reason."""


class FallbackWarning(UserWarning):
    """A GPU call runs in plain PyTorch because its kernels cannot; said once per reason."""


class Situation(NamedTuple):
    """What a choice depends on. ``dtype`` is the compute dtype, after any autocast."""

    device: torch.device
    dtype: torch.dtype


Reason = Callable[[Situation], str | None]


@dataclass(frozen=True, eq=False)  # by identity: hashed on every call
class Backend:
    """One way to run an operation.

    ``module`` is imported when it is first chosen. ``refuses`` are hard limits: each returns a
    sentence where the call cannot run. ``leaves`` are reasons not to take it automatically.
    ``where`` says of which calls it is taken, if their sizes decide: the next one has the rest.
    """

    name: str
    module: str
    refuses: tuple[Reason, ...] = ()
    leaves: tuple[Reason, ...] = ()
    where: str = ""

    def cannot(self, at: Situation) -> list[str]:
        return [text for reason in self.refuses if (text := reason(at))]

    def rather_not(self, at: Situation) -> list[str]:
        return [text for reason in self.leaves if (text := reason(at))]


# --- reasons that several operations share -----------------------------------------------------


def only_devices(*types: str) -> Reason:
    def reason(at: Situation) -> str | None:
        if at.device.type in types:
            return None
        return f"it runs on {' or '.join(types)}, not on {at.device.type}"

    return reason


def only_dtypes(*dtypes: torch.dtype) -> Reason:
    def reason(at: Situation) -> str | None:
        if at.dtype in dtypes:
            return None
        return f"it computes in {', '.join(map(_short, dtypes))}, not in {_short(at.dtype)}"

    return reason


def needs_triton(at: Situation) -> str | None:
    """Triton on this device: compiled on CUDA (sm_80 and newer), interpreted on a CPU."""
    if not _installed("triton"):
        return "triton is not installed"
    if at.device.type == "cpu":
        if not triton_interprets():
            return "on CPU tensors Triton needs its interpreter (TRITON_INTERPRET=1)"
        if at.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 products wrongly"
        return None
    if triton_interprets():
        return "TRITON_INTERPRET is set, so kernels are not compiled for the GPU"
    if torch.version.hip is not None:
        return "its kernels are neither tuned nor tested on ROCm"
    major, minor = torch.cuda.get_device_capability(at.device)
    if major < 8:
        return f"it needs compute capability 8.0 or newer, this device has {major}.{minor}"
    return None


def interpreter_is_for_tests(at: Situation) -> str | None:
    return "the interpreter serves tests only" if at.device.type == "cpu" else None


def needs_native(at: Situation) -> str | None:
    return library.missing()


def needs_onednn(at: Situation) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch does not offer oneDNN's linear"
    return None


def mkl_is_as_fast(at: Situation) -> str | None:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "PyTorch's own products are well tuned on this processor"
    if cpu_vendor() == "GenuineIntel":
        return "MKL, which PyTorch uses for float32, is well tuned on Intel processors"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "without AVX-512, PyTorch's MKL is as fast as oneDNN (python -m bench.cpu_products)"
    return None


def multiplies_with_onednn() -> bool:
    """Whether float32 products on the CPU are better left to oneDNN than to what PyTorch takes."""
    at = Situation(torch.device("cpu"), torch.float32)
    return needs_onednn(at) is None and mkl_is_as_fast(at) is None


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def usual(
    folder: str, onednn_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> tuple[Backend, ...]:
    """An operation's four ways, modules of its ``folder``, in order of preference."""
    return (
        Backend(
            "triton",
            f"{folder}.triton",
            refuses=(only_devices("cuda", "cpu"), only_dtypes(*FLOATS), needs_triton),
            leaves=(interpreter_is_for_tests,),
        ),
        Backend(
            "native",
            f"{folder}.native",
            refuses=(only_devices("cpu"), only_dtypes(torch.float32), needs_native),
        ),
        Backend(
            "onednn",
            f"{folder}.onednn",
            refuses=(only_devices("cpu"), only_dtypes(*onednn_dtypes), needs_onednn),
            leaves=(mkl_is_as_fast,),
        ),
        Backend("eager", f"{folder}.eager", refuses=(only_dtypes(*FLOATS, torch.float64),)),
    )


# --- choosing ----------------------------------------------------------------------------------


def select(
    op: str,
    backends: tuple[Backend, ...],
    device: torch.device,
    dtype: torch.dtype,
    requested: str | None = None,
) -> ModuleType:
    """The module that runs ``op``: a pure function of metadata and of what was asked for.

    Raises BackendError where the backend asked for by name cannot run, ValueError for a name that
    does not exist.
    """
    return _module(choose(op, backends, device, dtype, requested).module)


def choose(
    op: str,
    backends: tuple[Backend, ...],
    device: torch.device,
    dtype: torch.dtype,
    requested: str | None = None,
) -> Backend:
    """The entry that ``select`` takes; nothing is imported."""
    return _choose(op, backends, Situation(device, dtype), *_asked_for(requested))


def _asked_for(argument: str | None = None) -> tuple[str | None, str]:
    """The backend that was asked for by name, if any, and what asked for it."""
    if argument:
        return argument, "backend="
    if name := _requested.get():
        return name, "use_backend"
    return os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE


@functools.cache
def _choose(
    op: str, backends: tuple[Backend, ...], at: Situation, name: str | None, source: str
) -> Backend:
    if name is not None:
        check_name(name, source)
        for backend in backends:
            if backend.name == name:
                if reasons := backend.cannot(at):
                    raise BackendError(
                        f"{op} cannot run on backend '{name}' (asked for by {source}) for "
                        f"{_short(at.dtype)} on {at.device}: {'; '.join(reasons)}."
                    )
                return backend
        offered = ", ".join(backend.name for backend in backends)
        raise BackendError(
            f"{op} has no backend '{name}' (asked for by {source}); it offers {offered}."
        )
    if measured := _measured(op, backends, at):
        return measured
    for backend in backends:
        if not backend.cannot(at) and not backend.rather_not(at):
            _say_fallback(op, backends, backend, at)
            return backend
    refusals = "; ".join(
        f"{b.name}: {', '.join(b.cannot(at) or b.rather_not(at))}" for b in backends
    )
    raise BackendError(f"{op} has no backend for {_short(at.dtype)} on {at.device}: {refusals}.")


def _measured(op: str, backends: tuple[Backend, ...], at: Situation) -> Backend | None:
    """The one that was the fastest on this device, if a table says so and it can run."""
    take = tuned.choice(device_name(at.device), op, "backend", _short(at.dtype))
    for backend in backends:
        if backend.name == take and not backend.cannot(at):
            return backend
    return None


def _say_fallback(op: str, backends: tuple[Backend, ...], taken: Backend, at: Situation) -> None:
    """On a GPU, plain PyTorch is not what the user came for: name the reason, once."""
    if at.device.type == "cpu":
        return
    passed = backends[: backends.index(taken)]
    reasons = [
        f"{b.name}: {text}"
        for b in passed
        if not any(text.startswith("it runs on") for text in b.cannot(at))
        for text in b.cannot(at) + b.rather_not(at)
    ]
    if reasons:
        warnings.warn(
            f"{op} runs as '{taken.name}' for {_short(at.dtype)} on {at.device} "
            f"({'; '.join(reasons)}).",
            FallbackWarning,
            stacklevel=7,
        )


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation called inside on the named backend (one of ``NAMES``).

    It holds for the calls of this thread. Autograd recomputes checkpoints in threads of its own on
    a GPU: around checkpointed steps with dropout set FASTLORA_BACKEND, which holds everywhere.

    Raises ValueError for an unknown name; an operation that cannot run there raises BackendError.
    """
    token = _requested.set(check_name(name))
    try:
        yield
    finally:
        _requested.reset(token)


def check_name(name: str, source: str = "use_backend") -> str:
    if name not in NAMES:
        raise ValueError(
            f"unknown backend '{name}' (asked for by {source}); the backends are "
            f"{', '.join(NAMES)}, and none named leaves the choice automatic"
        )
    return name


def table(
    op: str, backends: tuple[Backend, ...], at: Situation, only_by_argument: bool = False
) -> list[tuple[str, bool, str]]:
    """Rows (backend, would be taken now, sentence), in order of preference. ``only_by_argument``:
    neither ``use_backend`` nor the environment chooses for this operation."""
    name, source = (None, "") if only_by_argument else _asked_for()
    if name is not None:
        check_name(name, source)
    rows: list[tuple[str, bool, str]] = []
    taken, rest = False, False
    measured = None if name is not None or only_by_argument else _measured(op, backends, at)
    for backend in backends:
        if backend.name == name and not backend.cannot(at):
            rows.append((name, True, f"can run, and is taken: asked for by {source}"))
            continue
        if name is not None:
            reasons = backend.cannot(at)
            wanted = f", though {source} asks for it" if backend.name == name else ""
            text = "cannot: " + "; ".join(reasons) if reasons else "can run"
            rows.append((backend.name, False, text + wanted))
            continue
        if reasons := backend.cannot(at):
            rows.append((backend.name, False, "cannot: " + "; ".join(reasons)))
        elif measured is not None:
            sentence = "can run"
            if backend is measured:
                sentence += ", and is taken: measured to be the fastest on this device"
            rows.append((backend.name, backend is measured, sentence))
        elif reasons := backend.rather_not(at):
            rows.append((backend.name, False, "on request only: " + "; ".join(reasons)))
        elif rest:
            rows.append((backend.name, False, "can run, and has the rest"))
            rest = False
        else:
            where = f" {backend.where}" if backend.where else ""
            sentence = "can run" if taken else f"can run, and is taken{where}"
            rows.append((backend.name, not taken, sentence))
            taken, rest = True, bool(where) and not taken
    return rows


# --- facts about this process ------------------------------------------------------------------


@functools.cache
def cpu_facts() -> dict[str, str]:
    """What Linux tells of the first processor, by its names; nothing elsewhere."""
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, colon, value = line.partition(":")
                if not line.strip():
                    break  # the other processors are the same
                if colon:
                    facts[key.strip()] = value.strip()
    except OSError:
        pass
    return facts


def cpu_vendor() -> str:
    """'GenuineIntel', 'AuthenticAMD', … as the processor names itself, or '' where unknown."""
    if vendor := cpu_facts().get("vendor_id"):
        return vendor
    identifier = platform.processor()  # on Windows: "... GenuineIntel"
    return identifier.rsplit(" ", 1)[-1] if identifier else ""


@functools.cache
def device_name(device: torch.device) -> str:
    """The name by which measurements on a device are found: a GPU's own; a processor's, with what
    tells its generation where the name does not."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    facts = cpu_facts()
    name = facts.get("model name") or platform.processor() or platform.machine()
    told = [key for key in ("cpu family", "model") if key in facts]
    generation = ", ".join(f"{key.removeprefix('cpu ')} {facts[key]}" for key in told)
    return f"{name} ({generation})" if generation else name


def triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


_module = functools.cache(importlib.import_module)


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
