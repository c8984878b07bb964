"""LoRA-GA's identities in float64, how gradients are gathered, peft's variant, refusals."""

import copy

import pytest
import torch
from torch import nn

import fastlora
from fastlora import AdaLoRAConfig, LoRAConfig
from fastlora.adapters import layers
from fastlora.methods import LoRAGAConfig, lora_ga

peft = pytest.importorskip("peft")
EXACT = {"atol": 1e-9, "rtol": 1e-9}
DETERMINISTIC = ["ArB2r", "A2rBr", "ArBr"]
DIRECTIONS = [*DETERMINISTIC, "random"]
NAMES = ["0", "2", "4"]


def plain(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20, bias=False)
    ).to(dtype)


def batches(count=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(40, 44, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(count)
    ]


def loss(model, batch):
    x, y = batch.split((24, 20), 1)
    return (model(x) - y).square().mean() * 10


def config(**options):
    return LoRAConfig(**({"r": 3, "lora_alpha": 5, "target_modules": NAMES} | options))


def gradients(model, data):
    """The mean gradient of every weight, all of them alive at once."""
    model = copy.deepcopy(model).requires_grad_(True)
    (sum(loss(model, batch) for batch in data) / len(data)).backward()
    return [m.weight.grad for m in model if isinstance(m, nn.Linear)]


def started(data=None, dtype=torch.float64, options=None, **own):
    model = plain(dtype)
    data = batches(dtype=dtype) if data is None else data
    lora_ga(model, config(**own), data, loss, options)
    return model


# --- identities --------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_factors_are_orthogonal_and_of_one_length(direction):
    model = started(options=LoRAGAConfig(direction=direction, stable_gamma=9))
    for layer in layers(model):
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        expected = torch.eye(3, dtype=A.dtype) * len(B) ** 0.5 / 9
        torch.testing.assert_close(A @ A.T, expected, **EXACT)
        torch.testing.assert_close(B.T @ B, expected, **EXACT)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_output_and_the_weight_stay(direction, options):
    model = started(options=LoRAGAConfig(direction=direction), **options)
    x = batches(1, seed=7)[0][:, :24]
    torch.testing.assert_close(model(x), plain()(x), atol=1e-12, rtol=1e-12)
    for layer, W in zip(layers(model), plain()[::2], strict=True):
        BA = layer.lora_B.detach() @ layer.lora_A.detach()
        assert BA.norm() > 0.01
        torch.testing.assert_close(
            layer.weight + layer.scaling * BA, W.weight.detach(), atol=1e-14, rtol=1e-14
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_vectors_are_those_of_the_mean_gradient(direction):
    data = batches()
    model = started(data, options=LoRAGAConfig(direction=direction, scale="unit"))
    for layer, G in zip(layers(model), gradients(plain(), data), strict=True):
        U, _, Vh = torch.linalg.svd(G)
        of_A = (layer.lora_A.detach() @ Vh[:6].T).abs()
        of_B = (U[:, :6].T @ layer.lora_B.detach()).abs()
        # each row of A is one of the right singular vectors, each column of B a left one
        near = {"atol": 1e-6, "rtol": 0.0}  # the iteration's, squared in what follows from it
        indices_A, indices_B = of_A.argmax(1), of_B.argmax(0)
        torch.testing.assert_close(of_A, nn.functional.one_hot(indices_A, 6).double(), **near)
        torch.testing.assert_close(of_B.T, nn.functional.one_hot(indices_B, 6).double(), **near)
        expected = {
            "ArB2r": ([0, 1, 2], [3, 4, 5]),
            "A2rBr": ([3, 4, 5], [0, 1, 2]),
            "ArBr": ([1, 3, 5], [0, 2, 4]),
        }.get(direction)
        if expected:
            assert (indices_A.tolist(), indices_B.tolist()) == expected
        else:
            assert sorted([*indices_A.tolist(), *indices_B.tolist()]) == list(range(6))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_first_step_goes_along_the_best_rank_2r_of_the_gradient(direction, rslora):
    """ΔW = −η (s²√N/γ) G_2r to first order, and the error is what G has beyond 2r."""
    data = batches()
    model = started(data, options=LoRAGAConfig(direction=direction), use_rslora=rslora)
    lr = 1e-6
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    before = [
        layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach() for layer in layers(model)
    ]
    (sum(loss(model, batch) for batch in data) / len(data)).backward()
    optimizer.step()
    for layer, old, G in zip(layers(model), before, gradients(plain(), data), strict=True):
        step = layer.scaling * layer.lora_B.detach() @ layer.lora_A.detach() - old
        zeta = -lr * layer.scaling**2 * len(G) ** 0.5 / 16
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        best = (U[:, :6] * S[:6]) @ Vh[:6]
        # what is left is of second order, lr times smaller than the step
        torch.testing.assert_close(step / zeta, best, atol=1e-5, rtol=1e-5)
        error = (step / zeta - G).square().sum()
        torch.testing.assert_close(error, S[6:].square().sum(), rtol=1e-5, atol=0.0)
        assert error > 1e-4 * S.square().sum()


@pytest.mark.parametrize("scale", ["unit", "gd", "weightS"])
def test_the_other_scales(scale):
    unit, other = (started(options=LoRAGAConfig(scale=name)) for name in ("unit", scale))
    for one, two, W in zip(layers(unit), layers(other), plain()[::2], strict=True):
        factor = {
            "unit": 1.0,
            "gd": 1 / one.scaling,
            "weightS": (torch.linalg.svdvals(W.weight)[:3] / one.scaling).sqrt().mean().item(),
        }[scale]
        # weights of a flat spectrum: svd_lowrank's values, r of them, are a little low
        near = {"rtol": 1e-9 if scale != "weightS" else 1e-3, "atol": 1e-12}
        torch.testing.assert_close(two.lora_A, one.lora_A * factor, **near)
        torch.testing.assert_close(two.lora_B, one.lora_B * factor, **near)


def test_random_follows_its_seed():
    def product(seed):
        options = LoRAGAConfig(direction="random", seed=seed)
        return [layer.lora_B @ layer.lora_A for layer in layers(started(options=options))]

    assert all(map(torch.equal, product(1), product(1)))
    assert not all(map(torch.allclose, product(1), product(2)))


def test_what_is_saved_gives_the_model_over_the_untouched_base(tmp_path):
    model = started(use_rslora=True, rank_pattern={"2": 4})
    with torch.no_grad():
        for layer in layers(model):
            layer.lora_A.add_(0.1)
    fastlora.save_adapter(model, tmp_path)
    x = batches(1)[0][:, :24]
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(x), model(x), atol=1e-12, rtol=1e-12)
    assert [layer.r for layer in layers(theirs)] == [6, 8, 6]
    assert not torch.allclose(model(x), plain()(x), atol=1e-2)


# --- gathering gradients -----------------------------------------------------------------------


def test_one_gradient_at_a_time_lives():
    model = plain()
    weights = [m.weight for m in model if isinstance(m, nn.Linear)]
    alive = []

    def look(_):
        alive.append([w.grad is not None for w in weights])

    for weight in weights:
        weight.register_post_accumulate_grad_hook(look)  # before ours, which drops it
    left = []

    def watched(model, batch):
        left.append([p.grad for p in model.parameters() if p.grad is not None])
        return loss(model, batch)

    lora_ga(model, config(), batches(4), watched)
    assert len(alive) == 12 and all(sum(each) == 1 for each in alive)
    assert left == [[]] * 4
    # the biases, which nothing is asked about, never get one
    assert all(p.grad is None for p in model.parameters())


def test_any_number_of_batches_and_a_generator_and_own_backward():
    data = batches(5)
    expected = started(data)

    def own(model, batch):
        loss(model, batch).backward()

    other = plain()
    lora_ga(other, config(), (batch for batch in data), own)
    joined = plain()
    lora_ga(joined, config(), [torch.cat(data)], loss)  # equal sizes: the mean is the same
    for model in (other, joined):
        for one, two in zip(layers(expected), layers(model), strict=True):
            torch.testing.assert_close(one.weight, two.weight, atol=1e-9, rtol=1e-9)
            product = one.lora_B @ one.lora_B.T
            torch.testing.assert_close(two.lora_B @ two.lora_B.T, product, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_with_and_without_checkpointing(tiny_llama, dtype):
    ids = torch.arange(48).view(2, 24) * 7 % 96
    found = []
    for reentrant in (None, False, True):
        model = tiny_llama(dtype=dtype).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        expected = tiny_llama(dtype=dtype)(input_ids=ids).logits

        def step(model, batch):
            return model(input_ids=batch, labels=batch, use_cache=False).loss

        report = lora_ga(model, LoRAConfig(r=4), [ids, ids.flip(1)], step)
        assert len(report.fused) == 14
        found.append([layer.weight.detach().clone() for layer in layers(model)])
        if dtype == torch.float32:
            torch.testing.assert_close(
                model.eval()(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4
            )
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def _rank(rank, file, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    data = batches(5)
    own = data[:2] if rank == 0 else data[2:]  # not even as many
    torch.manual_seed(rank)
    torch.save(started(own).state_dict(), f"{folder}/{rank}.pt")
    with pytest.raises(ValueError, match="the gradient of 0 has NaN"):  # on both ranks
        started([own[0] * (torch.nan if rank else 1)])
    with pytest.raises(ValueError, match="there is no batch"):
        started([])
    model = plain()
    lora_ga(model, config(), own if rank else [], loss)  # one of them has none
    torch.save(model.state_dict(), f"{folder}/some{rank}.pt")
    torch.distributed.destroy_process_group()


def test_the_mean_is_over_all_ranks(tmp_path):
    torch.multiprocessing.spawn(_rank, (tmp_path / "store", tmp_path), nprocs=2)
    for prefix, data in (("", batches(5)), ("some", batches(5)[2:])):
        expected = started(data).state_dict()
        one, two = (torch.load(tmp_path / f"{prefix}{rank}.pt") for rank in (0, 1))
        for key, value in expected.items():
            assert torch.equal(one[key], two[key])
            # of sums in another order; vectors may turn round
            assert_near = torch.testing.assert_close
            assert_near(one[key].abs(), value.abs(), atol=1e-8, rtol=1e-8)


# --- peft's variant ----------------------------------------------------------------------------


def steep():
    """Weights of a spectrum that peft's r columns find: weight_svd asks for its largest value."""
    model = plain()
    with torch.no_grad():
        for module in model[::2]:
            U, S, Vh = torch.linalg.svd(module.weight, full_matrices=False)
            module.weight.copy_(U * 0.5 ** torch.arange(len(S)) @ Vh)
    return model.float()


@pytest.mark.parametrize("scale", ["stable", "unit", "gd_scale", "weight_svd"])
@pytest.mark.parametrize("direction", DETERMINISTIC)
def test_the_variant_is_pefts(direction, scale):
    from peft.tuners.lora.loraga import preprocess_loraga

    data = batches(dtype=torch.float32)
    model, theirs = steep(), steep()
    options = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=NAMES, init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction=direction, scale=scale),
    )  # fmt: skip

    def train_step():
        for batch in data:
            loss(theirs, batch).backward()

    torch.manual_seed(0)
    preprocess_loraga(theirs, options, train_step)
    theirs = peft.get_peft_model(theirs, options)
    own = LoRAGAConfig(direction=direction, scale=scale, variant="peft")
    lora_ga(model, config(), data, loss, own)
    for mine, other in zip(layers(model), layers(theirs), strict=True):
        for a, b, size in (
            (mine.lora_A, other.lora_A, other.lora_A),
            (mine.lora_B.T, other.lora_B.T, other.lora_B),
        ):
            signs = torch.sign((a * b).sum(1, keepdim=True))
            # both iterations' last vectors, in float32
            assert (a * signs - b).abs().max() <= 2e-4 * size.abs().max()


# --- refusals ----------------------------------------------------------------------------------


def refused(match, model=None, data=None, step=loss, error=ValueError, **options):
    model = plain() if model is None else model
    grads = [p.grad for p in model.parameters()]
    before, trained = (
        copy.deepcopy(model.state_dict()),
        [p.requires_grad for p in model.parameters()],
    )
    with pytest.raises(error, match=match):
        lora_ga(model, config(**options), batches() if data is None else data, step)
    assert not layers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(
        one is two for one, two in zip(grads, (p.grad for p in model.parameters()), strict=True)
    )


def test_what_names_the_layer_before_a_weight_has_changed():
    class Aside(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    aside = Aside(*plain())
    refused(
        "no batch gave the weight of 2 a gradient",
        aside,
        step=lambda model, batch: model(batch[:, :24]).sum(),
    )
    refused(r"0 \[20, 24\] has 20 singular values, and LoRA-GA needs 2r = 22", r=11)
    refused("the gradient of 0 has NaN", data=[*batches(2), batches(1)[0] * torch.inf])
    refused("the gradient of 0 is zero", step=lambda model, batch: loss(model, batch) * 0)
    refused("0 has a scaling of 0", lora_alpha=0)
    refused("another start", init_lora_weights="pissa")
    refused("there is no batch", data=[])
    refused("does not depend on any weight", step=lambda model, batch: batch.sum())
    refused("from the step", step=_raising, error=RuntimeError)
    tied = plain()
    tied[4].weight = tied[2].weight
    refused("2 shares its weight with 4", tied)
    mixed = nn.Sequential(nn.Embedding(30, 24), plain())
    refused("0 is no linear", mixed, target_modules=["0", "1.0"])


def _raising(model, batch):
    loss(model, batch).backward()
    raise RuntimeError("from the step")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_too_few_directions_is_told_of(dtype, recwarn):
    started(dtype=dtype)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"those of 0, 2, 4 have a lower rank") as told:
        started([batches(1, dtype)[0][:5]], dtype)  # five rows of input, and 2r = 6
    assert len(told) == 1


def test_gradients_that_were_there_come_back():
    model = plain()
    loss(model, batches(1)[0]).backward()
    refused("is zero", model, step=lambda model, batch: loss(model, batch) * 0)


def test_an_interruption_while_the_weights_are_written(monkeypatch):
    from fastlora.adapters import starts

    calls, original = [], starts.Taken.residual

    def residual(self):
        calls.append(self.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(starts.Taken, "residual", residual)
    refused(None, plain(torch.bfloat16), batches(dtype=torch.bfloat16), error=KeyboardInterrupt)
    assert calls == NAMES


def test_options_and_configurations():
    for wrong in ({"direction": "BrA2r"}, {"scale": "gd_scale"}, {"variant": "ours"},
                  {"stable_gamma": 0}, {"stable_gamma": float("nan")},
                  {"variant": "peft", "scale": "gd"}):  # fmt: skip
        with pytest.raises(ValueError, match=next(reversed(wrong))):
            LoRAGAConfig(**wrong)
    with pytest.raises(TypeError, match="this is a AdaLoRAConfig"):
        lora_ga(plain(), AdaLoRAConfig(), batches(), loss)
