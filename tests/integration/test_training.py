"""Whole trainings: peft, accelerated peft and injected layers walk the same path."""

import copy

import pytest
import torch

import fastlora
from fastlora.adapters import layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

OPTIONS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
STEPS = 8


def batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 96, (2, 17), generator=generator) for _ in range(STEPS)]


def contestants(tiny_llama, **changes):
    """(name, model) with equal bases and equal initial adapters."""
    base = tiny_llama(**changes)
    torch.manual_seed(11)
    plain = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**OPTIONS))
    accelerated = copy.deepcopy(plain)
    assert not fastlora.accelerate(accelerated).skipped
    injected = copy.deepcopy(base)
    fastlora.inject(injected, fastlora.LoRAConfig(**OPTIONS))
    with torch.no_grad():
        for mine, theirs in zip(layers(injected), layers(plain), strict=True):
            assert mine.name == theirs.name
            mine.lora_A.copy_(theirs.lora_A)
    return {"peft": plain, "accelerated": accelerated, "injected": injected}


def assert_same(losses):
    expected = torch.tensor(losses.pop("peft"))
    assert expected[-1] < expected[0]
    for name, values in losses.items():
        torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-4, atol=0, msg=name)


def loop(model, **forward):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for ids in batches() * 2:
        loss = model(input_ids=ids, labels=ids, **forward).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_plain_loop(tiny_llama):
    models = contestants(tiny_llama)
    assert_same({name: loop(model) for name, model in models.items()})
    for mine, theirs in zip(layers(models["injected"]), layers(models["peft"]), strict=True):
        torch.testing.assert_close(mine.lora_B, theirs.lora_B, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny_llama, reentrant):
    losses = {}
    for name, model in contestants(tiny_llama).items():
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        losses[name] = loop(model, use_cache=False)
    plain = loop(contestants(tiny_llama)["peft"])
    torch.testing.assert_close(torch.tensor(losses["peft"]), torch.tensor(plain))
    assert_same(losses)


def test_checkpointing_with_dropout_replays_the_masks(tiny_llama):
    """With and without checkpointing, the same seed gives the same losses."""
    runs = []
    for checkpointed in (False, True):
        model = tiny_llama()
        torch.manual_seed(11)
        fastlora.inject(model, fastlora.LoRAConfig(lora_dropout=0.2, **OPTIONS))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(12)
        runs.append(loop(model, use_cache=False))
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]))


def test_autocast(tiny_llama):
    """In bfloat16 ours strays no further from the float32 course than twice what peft does."""
    exact = torch.tensor(loop(contestants(tiny_llama)["peft"]))
    strays = {}
    for name, model in contestants(tiny_llama).items():
        with torch.autocast("cpu", torch.bfloat16):
            strays[name] = (torch.tensor(loop(model)) - exact).abs()
    assert 0 < strays["peft"].mean() < 0.05 * exact.mean()
    for stray in strays.values():
        assert stray[0] <= 2 * torch.finfo(torch.bfloat16).eps * exact[0]
        assert stray.mean() <= 2 * strays["peft"].mean()


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = torch.cat(batches())

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def test_the_hf_trainer(tiny_llama, tmp_path):
    losses = {}
    for name, model in contestants(tiny_llama).items():
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=2,
            max_steps=3 * STEPS,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=5,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows())
        trainer.train()
        losses[name] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert len(losses[name]) == 3 * STEPS
    assert_same(losses)


def test_generation_with_a_cache(tiny_llama):
    models = contestants(tiny_llama)
    torch.manual_seed(1)
    values = [torch.randn_like(layer.lora_B) * 0.1 for layer in layers(models["peft"])]
    written = []
    for model in models.values():
        with torch.no_grad():
            for layer, value in zip(layers(model), values, strict=True):
                layer.lora_B.copy_(value)
        model.eval()
        out = model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False)
        written.append(out.tolist())
    assert written[0] == written[1] == written[2] and len(written[0][0]) > 3
