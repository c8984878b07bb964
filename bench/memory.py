"""What a training step of every method keeps and needs, ours beside peft's.

    python -m bench.memory [--models smollm2,llama3-8b] [--methods lora,dora,…] [--dropout 0]
                           [--blocks N] [--tokens N] [--json FILE]

"saved" is what is alive between forward and backward and was not before; "peak" the most that
forward and backward hold at one time beyond what was there before them (gradients included), both
from the profiler's record of allocations. "adds" is what is beyond the frozen model in which every
layer's input has a gradient. SmolLM2 is whole, in float32. Of Llama-3-8B it is one block with
random weights, in bfloat16, on few tokens: what a block keeps grows with tokens and blocks in
proportion ("a token": bytes saved beyond the frozen model, for each token and block), so that the
whole model need not be there. (On tensors without data, of the meta device, ours takes another way
than in training, and peft's does not run.)

With --json the figures are written after every method, beside those of other models that the file
has of the same conditions. Where a method cannot be measured, that is said and the rest goes on;
the exit status is then 1, as it is if ours keeps more than peft's.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import names
from bench.family import ALL
from fastlora.cli.demo import contest, data, memory, model
from fastlora.cli.demo.methods import Recipe
from fastlora.cli.facts import devices, versions

FORMAT = "fastlora.bench.memory/1"
# what differs from another only in how it starts or in what goes on around a step
SAME_AS_LORA = ("rslora", "pissa", "lora_ga")
_MIB = 1 << 20


@dataclass
class Subject:
    """A base model, a batch for it, and what its figures depend on."""

    title: str
    base: Any
    batch: Tensor


def smollm2(blocks: int | None, tokens: int | None) -> Subject:
    """The demo's model, 2 × 128 tokens."""
    source = model.find(None)
    tokenizer = model.load_tokenizer(source)
    batch = data.batches(data.read(None), tokenizer, 1, 2, tokens or 128, 0).training[0]
    base = model.load(source, torch.device("cpu"), torch.float32)
    if blocks is not None:
        base.model.layers = base.model.layers[:blocks]
    return Subject(f"{source.title}, float32, 2 x {batch.shape[1]} tokens", base, batch)


def llama3_8b(blocks: int | None, tokens: int | None) -> Subject:
    """A block of its shapes (meta-llama/Meta-Llama-3-8B's config.json), 1 × 256 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,  # the embedding and the head are not what is measured
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=blocks or 1,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        rope_theta=500000.0, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        base = LlamaForCausalLM(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    batch = torch.randint(0, config.vocab_size, (1, tokens or 256))
    many = f"{config.num_hidden_layers} block{'s' if config.num_hidden_layers > 1 else ''}"
    title = f"Llama-3-8B's shapes, {many}, bfloat16, 1 x {batch.shape[1]} tokens"
    return Subject(title, base, batch)


MODELS: dict[str, Callable[[int | None, int | None], Subject]] = {
    "smollm2": smollm2,
    "llama3-8b": llama3_8b,
}


def measure(subject: Subject, name: str, dropout: float) -> dict[str, dict[str, int]]:
    """{"frozen" | "peft" | "fastlora": {"saved": bytes, "peak": bytes}} of one method."""
    method = ALL[name]
    recipe = Recipe(method, method.rank, 32.0, dropout, method.lr, 1, "inject", None)
    entrants, _ = contest.enter(subject.base, recipe, 0, [subject.batch])
    contest.measure_memory(list(entrants.values()), subject.batch, subject.batch.device)
    return {
        side: {"saved": one.saved_bytes, "peak": one.peak_bytes} for side, one in entrants.items()
    }


def table(rows: dict[str, dict[str, dict[str, int]]], share: int) -> str:
    """A row a method, in MiB; what a token adds in bytes. share: tokens times blocks."""
    frozen = next(iter(rows.values()))[contest.FROZEN]
    lines = [
        f"frozen: {frozen['saved'] / _MIB:.0f} MiB saved, {frozen['peak'] / _MIB:.0f} peak",
        f"{'method':<17}{'peft saved':>11}{'adds':>8}{'a token':>9}{'ours saved':>12}{'adds':>8}"
        f"{'a token':>9}{'ratio':>7}{'peft peak':>11}{'ours peak':>11}{'ratio':>7}",
    ]
    for name, row in rows.items():
        theirs, ours = row[contest.PEFT], row[contest.FASTLORA]
        cells = ""
        for width, one in ((11, theirs), (12, ours)):
            adds = one["saved"] - frozen["saved"]
            cells += f"{one['saved'] / _MIB:>{width}.0f}{adds / _MIB:>8.0f}{adds / share:>9.0f}"
        lines.append(
            f"{name:<17}{cells}{ours['saved'] / theirs['saved']:>7.2f}"
            f"{theirs['peak'] / _MIB:>11.0f}{ours['peak'] / _MIB:>11.0f}"
            f"{ours['peak'] / theirs['peak']:>7.2f}"
        )
    return "\n".join(lines)


def kept(path: Path, conditions: dict[str, Any]) -> dict[str, Any]:
    """The models of an existing file, if it was written under the same conditions."""
    try:
        old = json.loads(path.read_text())
        same = old["format"] == FORMAT and old["conditions"] == conditions
        return dict(old["models"]) if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(
    path: Path, conditions: dict[str, Any], figures: dict[str, Any], problems: list[str]
) -> None:
    result = {
        "format": FORMAT,
        "conditions": conditions,
        "models": figures,
        "problems": problems,
    }
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    offered = [name for name in ALL if name not in SAME_AS_LORA]
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", default=",".join(offered))
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--blocks", type=int, help="the model's first so many blocks only")
    parser.add_argument("--tokens", type=int, help="so many a sequence")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_args(argv)
    try:
        models = names.several("model", args.models, MODELS)
        methods = names.several("method", args.methods, ALL)
    except names.UnknownName as error:
        parser.error(str(error))
    if args.blocks is not None and args.blocks < 1:
        parser.error("--blocks must be at least 1")
    if args.tokens is not None and args.tokens < 1:
        parser.error("--tokens must be at least 1")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")

    problems: list[str] = []
    figures: dict[str, Any] = {}
    conditions = {
        "dropout": args.dropout,
        "counted": memory.CPU_METHOD,
        "device": devices()[0]["name"],
        "versions": {name: own for name, own in versions().items() if own},
    }
    known = kept(Path(args.json), conditions) if args.json else {}
    for key in models:
        subject = MODELS[key](args.blocks, args.tokens)
        print(subject.title)
        rows: dict[str, dict[str, dict[str, int]]] = {}
        figures[key] = {"title": subject.title, "bytes": rows}
        for name in methods:
            print(f"\r{key}: {name:<20}", end="", file=sys.stderr, flush=True)
            try:
                rows[name] = measure(subject, name, args.dropout)
            except Exception as error:  # said, and the rest goes on
                text = " ".join(str(error).split())[:160]
                problems.append(f"{key}, {name}: not measured: {type(error).__name__}: {text}")
                continue
            ours, theirs = (rows[name][side]["saved"] for side in (contest.FASTLORA, contest.PEFT))
            if ours > theirs:
                problems.append(f"{key}, {name}: ours keeps {ours} bytes, peft's {theirs}")
            if args.json:  # after every method, for the next may take long
                write(Path(args.json), conditions, known | figures, problems)
        print(file=sys.stderr)
        if rows:
            blocks = len(subject.base.model.layers)
            print(table(rows, subject.batch.numel() * blocks))
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
