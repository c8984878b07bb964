"""Text into training and held-out batches of tokens."""

from __future__ import annotations

import importlib
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora.cli.errors import UserError

HELD_OUT_SHARE = 0.1
MOST_HELD_OUT_BATCHES = 8
_PARAGRAPH = re.compile(r"\n\s*\n")
_SHORTEST_COMPARED = 40


@dataclass(frozen=True)
class Corpus:
    """Documents, where they come from, and a prompt in their manner for a sample."""

    title: str
    documents: tuple[str, ...]
    prompt: str | None = None


@dataclass(frozen=True)
class Batches:
    """Token ids [batch, seq_len]: one a training step, and the held-out ones."""

    training: list[Tensor]
    held_out: list[Tensor]
    training_tokens: int


# --- reading -----------------------------------------------------------------------------------


def read(path: str | None) -> Corpus:
    """The documents of a text or jsonl file; by default Python's own language reference.

    Raises UserError for a file that is missing, not text, not jsonl, or empty.
    """
    if path is None:
        return _language_reference()
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"--data {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"--data {path} cannot be read: {error.strerror}") from None
    documents = _json_lines(path, text) if file.suffix == ".jsonl" else [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"--data {path} holds no text")
    return Corpus(file.name, tuple(documents))


def _language_reference() -> Corpus:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise UserError(
            "this Python comes without pydoc_data, the demo's default text; give one with --data"
        ) from None
    return Corpus(
        "Python's language reference (pydoc_data.topics)",
        tuple(topics[name] for name in sorted(topics)),
        prompt='The "with" statement is used to wrap the execution of a block',
    )


def _json_lines(path: str, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"--data {path}, line {number} is not JSON: {error.msg}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UserError(f"--data {path}, line {number} has no field 'text' holding a string")
        documents.append(record["text"])
    return documents


# --- splitting ---------------------------------------------------------------------------------


def split(documents: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(training, held-out): whole documents aside, about a tenth of the text.

    A paragraph that also stands in the held-out part is taken out of training, since reference
    texts quote one another. Too few documents to set one aside: the text's last tenth is held out.
    """
    budget = HELD_OUT_SHARE * sum(map(len, documents))
    order = list(range(len(documents)))
    random.Random(0).shuffle(order)
    chosen: set[int] = set()
    for index in order:
        if len(documents[index]) <= budget:
            chosen.add(index)
            budget -= len(documents[index])
    if not chosen:
        return _cut("\n\n".join(documents))
    held_out = [documents[index] for index in sorted(chosen)]
    known = {_normal(paragraph) for text in held_out for paragraph in _PARAGRAPH.split(text)}
    rest = (text for index, text in enumerate(documents) if index not in chosen)
    training = [_without(text, known) for text in rest]
    return [text for text in training if text.strip()], held_out


def _cut(text: str) -> tuple[list[str], list[str]]:
    at = int(len(text) * (1 - HELD_OUT_SHARE))
    for boundary in ("\n\n", "\n", " "):
        found = text.rfind(boundary, len(text) // 2, at)
        if found >= 0:
            at = found + len(boundary)
            break
    return [text[:at]], [text[at:]]


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _without(text: str, known: set[str]) -> str:
    kept = []
    for paragraph in _PARAGRAPH.split(text):
        normal = _normal(paragraph)
        if len(normal) < _SHORTEST_COMPARED or normal not in known:
            kept.append(paragraph)
    return "\n\n".join(kept)


# --- batching ----------------------------------------------------------------------------------


def batches(
    corpus: Corpus, tokenizer: Any, steps: int, batch: int, seq_len: int, seed: int
) -> Batches:
    """Packed blocks of ``seq_len`` tokens, shuffled by ``seed``; the text is repeated if it ends.

    Raises UserError where the text is too short for one training and one held-out batch.
    """
    training, held_out = split(corpus.documents)
    train_blocks = _blocks(tokenizer, training, seq_len)
    held_blocks = _blocks(tokenizer, held_out, seq_len)
    if len(train_blocks) < batch or len(held_blocks) < batch:
        raise UserError(
            f"{corpus.title} is too short: {batch} × {seq_len} tokens are needed for training and "
            f"as many held out, and it gives {len(train_blocks)} and {len(held_blocks)} sequences "
            f"of {seq_len}; a smaller --seq-len or --batch needs less"
        )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order += torch.randperm(len(train_blocks), generator=generator).tolist()
    count = min(len(held_blocks) // batch, MOST_HELD_OUT_BATCHES)
    spread = torch.linspace(0, len(held_blocks) - 1, count * batch).long()
    return Batches(
        [train_blocks[order[i * batch : (i + 1) * batch]] for i in range(steps)],
        list(held_blocks[spread].split(batch)),
        train_blocks.numel(),
    )


def _blocks(tokenizer: Any, texts: Iterable[str], seq_len: int) -> Tensor:
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
    count = len(ids) // seq_len
    return torch.tensor(ids[: count * seq_len], dtype=torch.long).view(count, seq_len)
