"""Lion and Tiger in the HF Trainer, by name and as ``optimizers=``."""

from __future__ import annotations

import pytest
import torch

import fastlora
from fastlora.optim import Lion, Tiger, accumulate_in_momentum, param_groups

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastlora.integrations.transformers import trainer_optimizer  # noqa: E402


def arguments(folder, **more):
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=6, learning_rate=1e-2,
        weight_decay=0.1, report_to=[], save_strategy="no", use_cpu=True, max_grad_norm=0.0,
        lr_scheduler_type="linear", seed=3, disable_tqdm=True, logging_steps=1, **more,
    )  # fmt: skip


def data():
    ids = torch.randint(0, 96, (32, 10), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def net(tiny_llama):
    model = tiny_llama()
    torch.manual_seed(1)
    fastlora.inject(model, fastlora.LoRAConfig(r=4))
    return model


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["lion", "tiger"])
def test_by_name_it_is_as_made_by_hand(name, tiny_llama, tmp_path):
    args = arguments(tmp_path)
    named = transformers.Trainer(
        net(tiny_llama), args, train_dataset=data(),
        optimizer_cls_and_kwargs=trainer_optimizer(name, args, state_dtype="bfloat16"),
    )  # fmt: skip
    found = losses(named)
    inner = getattr(named.optimizer, "optimizer", named.optimizer)
    assert type(inner) is {"lion": Lion, "tiger": Tiger}[name]
    assert inner.param_groups[0]["kind"] == "other" and inner.param_groups[0]["steps"] == 6
    assert inner.param_groups[0]["lr"] == 0.0  # the Trainer's schedule has ended

    model = net(tiny_llama)
    own = type(inner)(param_groups(model), lr=1e-2, weight_decay=0.1, state_dtype="bfloat16")
    schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 1 - step / 6)
    by_hand = transformers.Trainer(model, args, train_dataset=data(), optimizers=(own, schedule))
    assert losses(by_hand) == found
    start = dict(net(tiny_llama).named_parameters())
    for name, param in model.named_parameters():
        assert torch.equal(param, start[name]) != param.requires_grad


def test_gradients_folded_into_momentum_under_the_trainer(tiny_llama, tmp_path):
    """It divides the losses itself, and sees no gradient."""
    seen = []
    for fold in (False, True):
        model = net(tiny_llama)
        args = arguments(tmp_path, gradient_accumulation_steps=2)
        optimizer = Tiger(param_groups(model), lr=1e-2)
        if fold:
            accumulate_in_momentum(model, optimizer, loss_is_divided=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainer = transformers.Trainer(
            model, args, train_dataset=data(), optimizers=(optimizer, schedule)
        )
        seen.append(losses(trainer))
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="no optimizer 'lyon'; there are lion, tiger"):
        trainer_optimizer("lyon")
    with pytest.raises(TypeError, match="momentum"):
        trainer_optimizer("lion", momentum=0.9)
    with pytest.raises(ValueError, match="lr must be"):
        trainer_optimizer("tiger", lr=-1.0)
