"""The contestants, and the training that runs them side by side."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastlora
from fastlora.adapters import Report, layers, save_adapter
from fastlora.adapters.view import AdapterLayer
from fastlora.cli.demo import memory
from fastlora.cli.demo.methods import Recipe
from fastlora.cli.demo.model import share
from fastlora.cli.demo.optimizers import OPTIMIZERS
from fastlora.cli.errors import UserError
from fastlora.cli.pages import keep_freed_pages
from fastlora.nn import AdaptedLayer

FROZEN, PEFT, FASTLORA = "frozen", "peft", "fastlora"


@dataclass
class Contestant:
    """A model in training and what was measured on it.

    ``around`` makes the context its steps run in. ``beside`` is what its loss has beside the
    model's own. ``seconds`` are forward + backward of each step, the optimizer's part left out.
    """

    name: str
    model: Any
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    optimizer: torch.optim.Optimizer | None = None
    beside: Callable[[Any], Tensor] | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    saved_bytes: int = 0
    peak_bytes: int = 0
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None


def enter(
    base: Any, recipe: Recipe, seed: int, training: list[Tensor]
) -> tuple[dict[str, Contestant], Report]:
    """The three contestants over one set of base weights, with equal initial adapters; each over
    its own where the method's start changes them.

    Raises UserError where peft adapts layers of this model that fastlora does not.
    """
    torch.manual_seed(seed)
    own_start = recipe.method.own_start is not None
    rival = _with_peft(copy.deepcopy(base) if own_start else base, recipe)
    ours, report = _with_fastlora(copy.deepcopy(base) if own_start else base, recipe, training)
    theirs_by_name = {layer.name: layer for layer in layers(rival)}
    ours_by_name = {layer.name: layer for layer in layers(ours)}
    if missing := sorted(theirs_by_name.keys() ^ ours_by_name.keys()):
        raise UserError(
            "this model has linear layers that peft and fastlora do not both adapt, so the two "
            f"cannot be compared: {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}"
        )
    with torch.no_grad():
        for name, layer in ({} if own_start else ours_by_name).items():
            for part, tensor in layer.tensors.items():
                tensor.copy_(theirs_by_name[name].tensors[part])

    def chosen() -> contextlib.AbstractContextManager[None]:
        if recipe.backend is None:
            return contextlib.nullcontext()
        return fastlora.use_backend(recipe.backend)

    # a peft model adds what the method has beside the layers itself
    beside = recipe.method.beside if recipe.via == "inject" else None
    contestants = [
        Contestant(FROZEN, share(base)),
        Contestant(PEFT, rival, optimizer=_optimizer(rival, recipe, by_peft=True)),
        Contestant(FASTLORA, ours, chosen, _optimizer(ours, recipe), beside),
    ]
    for contestant in contestants:
        # the gradient of every layer's input is computed by all three, so the frozen model's step
        # is contained in the others'
        contestant.model.enable_input_require_grads()
        contestant.model.train()
    return {contestant.name: contestant for contestant in contestants}, report


def load(base: Any, folder: Path) -> Contestant:
    """A fresh model over the base weights, the adapter in ``folder`` put on it by peft."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return Contestant("loaded", peft.PeftModel.from_pretrained(share(base), str(folder)))


def same_adapter(one: Contestant, other: Contestant) -> bool:
    """Whether the second model carries just the adapters that are saved of the first, bit for
    bit."""
    first, second = ({layer.name: layer for layer in layers(c.model)} for c in (one, other))
    saved = {name: _saved(layer) for name, layer in first.items()}
    return first.keys() == second.keys() and all(
        saved[name].keys() == second[name].tensors.keys()
        and all(torch.equal(t, second[name].tensors[part]) for part, t in saved[name].items())
        # of no ranks there is no scaling
        and (second[name].r == 0 or math.isclose(layer.scaling, second[name].scaling, rel_tol=1e-6))
        for name, layer in first.items()
    )


def _saved(layer: AdapterLayer) -> dict[str, Tensor]:
    """What a file has of the layer: neither AdaLoRA's masked triplets nor what a start took out."""
    if isinstance(layer.module, AdaptedLayer):
        return dict(layer.module.saved())
    if layer.method != "ADALORA":
        return dict(layer.tensors)
    kept = layer.tensors["lora_E"].flatten() != 0
    return {
        part: tensor[:, kept] if part == "lora_B" else tensor[kept]
        for part, tensor in layer.tensors.items()
    }


def save(contestant: Contestant, recipe: Recipe, folder: Path) -> None:
    """Write the contestant's adapter in peft's format."""
    if recipe.via == "accelerate":
        contestant.model.save_pretrained(str(folder))
    else:
        save_adapter(contestant.model, folder)


def _with_peft(base: Any, recipe: Recipe) -> Any:
    import peft

    config = recipe.method.theirs(recipe)
    with warnings.catch_warnings():
        # peft asks transformers a question under its old name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return peft.get_peft_model(share(base), config)


def _with_fastlora(base: Any, recipe: Recipe, training: list[Tensor]) -> tuple[Any, Report]:
    if recipe.via == "accelerate":
        model = _with_peft(base, recipe)
        report = fastlora.accelerate(model)
        if not report.fused:
            reason = report.skipped[0].detail if report.skipped else "it has no LoRA layers"
            raise UserError(f"no layer of the peft model can be accelerated: {reason}")
        return model, report
    model = share(base)
    return model, recipe.method.put_in(model, recipe.method.ours(recipe), training)


def _optimizer(model: Any, recipe: Recipe, by_peft: bool = False) -> torch.optim.Optimizer:
    chosen = OPTIMIZERS[recipe.optimizer]
    optimizer = (chosen.theirs if by_peft else chosen.ours)(model, recipe.lr)
    attach = recipe.method.around_steps
    if by_peft:
        attach = recipe.method.around_peft_steps or attach
    if attach is not None:
        attach(model, optimizer)
    return optimizer


# --- running -----------------------------------------------------------------------------------


def train(contestants: list[Contestant], batches: list[Tensor], device: torch.device) -> None:
    """Train all on the same batches, step by step in turn, each turn in another order, so that none
    always finds the memory as one other leaves it."""
    from tqdm import tqdm

    keep_freed_pages()

    seldom = 0.5 if sys.stderr.isatty() else 15.0
    progress = tqdm(batches, desc="training", unit="step", ncols=88, mininterval=seldom)
    with _no_collection():
        for step, batch in enumerate(progress):
            order = list(contestants)
            random.Random(step).shuffle(order)
            for contestant in order:
                _step(contestant, batch, device)
            shown = {c.name: f"{c.losses[-1]:.3f}" for c in contestants if c.optimizer}
            progress.set_postfix(shown, refresh=False)


def divergence(contestant: Contestant) -> str | None:
    """A sentence where training lost its footing; call it after the evaluation."""
    for step, loss in enumerate(contestant.losses, start=1):
        if not math.isfinite(loss):
            return f"{contestant.name}'s loss is not finite at step {step}"
    if contestant.eval_loss_after is not None and not math.isfinite(contestant.eval_loss_after):
        return f"{contestant.name}'s held-out loss is not finite after training"
    return None


def backward(contestant: Contestant, batch: Tensor) -> Tensor:
    """The loss of one batch, its gradients left in the parameters."""
    with contestant.around():
        loss = _loss(contestant, batch)
        loss.backward()
    return loss


def measure_memory(contestants: list[Contestant], batch: Tensor, device: torch.device) -> None:
    """Fill in saved and peak bytes from one extra forward, and one extra step, of each."""
    for contestant in contestants:
        _measure_memory(contestant, batch, device)


@torch.no_grad()
def evaluate(contestant: Contestant, batches: list[Tensor]) -> float:
    """The mean loss a token over ``batches``, without what a method adds to it."""
    losses = []
    for batch in batches:
        predicted = logits(contestant, batch)[:, :-1]
        loss = torch.nn.functional.cross_entropy(predicted.flatten(0, 1), batch[:, 1:].flatten())
        losses.append(float(loss))
    return sum(losses) / len(losses)


@torch.no_grad()
def logits(contestant: Contestant, batch: Tensor) -> Tensor:
    """[batch, seq_len, vocabulary] in float32 or wider, in evaluation mode."""
    with _evaluating(contestant):
        return contestant.model(input_ids=batch, use_cache=False).logits.float()


@torch.no_grad()
def sample(contestant: Contestant, tokenizer: Any, prompt: str, tokens: int) -> str:
    """What the model writes after ``prompt``, greedily."""
    device = next(contestant.model.parameters()).device
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(device)
    with _evaluating(contestant):
        ids = contestant.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _measure_memory(contestant: Contestant, batch: Tensor, device: torch.device) -> None:
    def forward() -> Tensor:
        return _loss(contestant, batch)

    gc.collect()
    with contestant.around():
        contestant.saved_bytes = memory.saved_bytes(forward, device)
        contestant.peak_bytes = memory.peak_bytes(lambda: forward().backward(), device)
    contestant.model.zero_grad(set_to_none=True)


def _step(contestant: Contestant, batch: Tensor, device: torch.device) -> None:
    contestant.model.zero_grad(set_to_none=True)
    with contestant.around():
        _wait(device)
        started = time.perf_counter()
        loss = _loss(contestant, batch)
        loss.backward()
        _wait(device)
        contestant.seconds.append(time.perf_counter() - started)
    contestant.losses.append(float(loss.detach()))
    if contestant.optimizer is not None:
        contestant.optimizer.step()


def _loss(contestant: Contestant, batch: Tensor) -> Tensor:
    loss = contestant.model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss if contestant.beside is None else loss + contestant.beside(contestant.model)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _evaluating(contestant: Contestant) -> Iterator[None]:
    contestant.model.eval()
    try:
        with contestant.around():
            yield
    finally:
        contestant.model.train()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out of timed steps."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
