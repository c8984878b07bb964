"""LoRA-Pro's gradients against the least-squares problem that they solve, in float64."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

import fastlora
from fastlora import AdaLoRAConfig, LoRAConfig, VeRAConfig
from fastlora.adapters import layers
from fastlora.methods import LoRAPro

EXACT = {"atol": 1e-9, "rtol": 1e-9}


def make(dtype=torch.float64, zero_B=False, r=3, **options):
    """Two linears of one shape, one of another, and a convolution; scalings differ."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10),
        nn.Unflatten(1, (2, 5)), nn.Conv1d(2, 6, 3), nn.Flatten(),
    ).to(dtype)  # fmt: skip
    options = {"r": r, "lora_alpha": 5, "alpha_pattern": {"2": 2}} | options
    fastlora.inject(model, LoRAConfig(target_modules=["0", "2", "4", "6"], **options))
    if not zero_B:
        with torch.no_grad():
            for layer in layers(model):
                layer.lora_B.normal_()
    return model


def batch(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    return x.to(next(model.parameters()).dtype)


def backward(model, seed=1):
    model.zero_grad()
    model(batch(model, seed)).square().sum().backward()


def full_gradients(model, seed=1):
    """G [N, K] of every adapted weight, W + sBA trained as a whole."""
    dense = copy.deepcopy(model)
    fastlora.merge(dense)
    for layer in layers(dense):
        layer.weight.requires_grad_(True)
    backward(dense, seed)
    return [layer.weight.grad.flatten(1) for layer in layers(dense)]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model, lr=0.0):
    return torch.optim.SGD(trained(model), lr=lr)


def factors(layer):
    return layer.lora_A.detach().flatten(1), layer.lora_B.detach().flatten(1)


def gradients(layer):
    return layer.lora_A.grad.flatten(1).clone(), layer.lora_B.grad.flatten(1).clone()


def corrected(model, **options):
    """[(raw g_A, raw g_B, g_A, g_B)] of each layer, by the optimizer's hook."""
    method, optimizer = LoRAPro(**options), sgd(model)
    method.attach(model, optimizer)
    backward(model)
    raw = [gradients(layer) for layer in layers(model)]
    optimizer.step()
    method.detach()
    return [(*before, *gradients(layer)) for before, layer in zip(raw, layers(model), strict=True)]


def projections(A, B):
    P_A = A.T @ torch.linalg.inv(A @ A.T) @ A
    P_B = B @ torch.linalg.inv(B.T @ B) @ B.T
    return P_A, P_B


def equivalent(layer, g_A, g_B):
    A, B = factors(layer)
    return layer.scaling * (B @ g_A + g_B @ A)


@pytest.mark.parametrize("x", ["sylvester", "symmetric", "zero"])
def test_the_equivalent_gradient_is_the_projection_whatever_x(x):
    model = make()
    for layer, full, (_, _, g_A, g_B) in zip(
        layers(model), full_gradients(model), corrected(model, x=x, damping=0.0), strict=True
    ):
        P_A, P_B = projections(*factors(layer))
        identity = torch.eye(len(P_B), dtype=P_B.dtype)
        expected = P_B @ full + (identity - P_B) @ full @ P_A
        torch.testing.assert_close(equivalent(layer, g_A, g_B), expected, **EXACT)


@pytest.mark.parametrize("x", ["sylvester", "symmetric", "zero"])
def test_the_residual_is_the_optimum_of_least_squares(x):
    """The problem itself, solved over the entries of g_A and g_B without any formula."""
    model = make()
    for layer, full, (_, _, g_A, g_B) in zip(
        layers(model), full_gradients(model), corrected(model, x=x, damping=0.0), strict=True
    ):
        A, B = factors(layer)
        (r, K), N = A.shape, len(B)
        eye_K, eye_N = (torch.eye(n, dtype=A.dtype) for n in (K, N))
        # rows of vec(s (B g_A + g_B A)), columns of vec(g_A) and vec(g_B), both row by row
        system = layer.scaling * torch.cat(
            (torch.kron(B, eye_K), torch.kron(eye_N, A.T.contiguous())), 1
        )
        best = torch.linalg.lstsq(system, full.reshape(-1, 1), driver="gelsd").solution
        optimum = (system @ best - full.reshape(-1, 1)).norm()
        residual = (equivalent(layer, g_A, g_B) - full).norm()
        torch.testing.assert_close(residual, optimum, **EXACT)
        if r < min(K, N):
            assert optimum > 0.1  # so that there is something to minimise


def test_gradients_and_projection_have_one_inner_product():
    model = make()
    for layer, (a0, b0, g_A, g_B) in zip(layers(model), corrected(model, damping=0.0), strict=True):
        inner = (a0 * g_A).sum() + (b0 * g_B).sum()
        torch.testing.assert_close(inner, equivalent(layer, g_A, g_B).square().sum(), **EXACT)


def test_sylvesters_X_is_stationary():
    """No X brings g_A and g_B nearer to autograd's: the distance's gradient in X vanishes."""
    model = make()
    zero = corrected(make(), x="zero", damping=0.0)
    own = corrected(model, x="sylvester", damping=0.0)
    for layer, (a0, b0, a1, b1), (_, _, g_A, g_B) in zip(layers(model), zero, own, strict=True):
        A, B = factors(layer)
        X = (g_A - a1) @ torch.linalg.pinv(A)
        torch.testing.assert_close(a1 + X @ A, g_A, **EXACT)
        torch.testing.assert_close(b1 - B @ X, g_B, **EXACT)  # it is one and the same X
        right = torch.linalg.inv(B.T @ B) @ a0 @ A.T / layer.scaling**2
        torch.testing.assert_close(B.T @ B @ X + X @ A @ A.T, -right, **EXACT)

        def distance(X, a0=a0, b0=b0, a1=a1, b1=b1, A=A, B=B):
            return (a1 + X @ A - a0).square().sum() + (b1 - B @ X - b0).square().sum()

        slope = torch.autograd.functional.jacobian(distance, X)
        at_zero = torch.autograd.functional.jacobian(distance, torch.zeros_like(X))
        assert slope.norm() < 1e-9 * at_zero.norm()


def test_the_symmetric_x_shares_alike():
    """methods.md: g_A = s⁻² (BᵀB)⁻¹ g_A⁰ (I − ½ P_A), g_B = s⁻² (I − ½ P_B) g_B⁰ (AAᵀ)⁻¹."""
    model = make()
    own = corrected(model, x="symmetric", damping=0.0)
    for layer, (a0, b0, g_A, g_B) in zip(layers(model), own, strict=True):
        A, B = factors(layer)
        P_A, P_B = projections(A, B)
        half_A, half_B = torch.eye(len(P_A)) - P_A / 2, torch.eye(len(P_B)) - P_B / 2
        s = layer.scaling
        torch.testing.assert_close(g_A, torch.linalg.inv(B.T @ B) @ a0 @ half_A / s**2, **EXACT)
        torch.testing.assert_close(g_B, half_B @ b0 @ torch.linalg.inv(A @ A.T) / s**2, **EXACT)


def test_a_full_rank_adapter_follows_the_full_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 4)).double()
    fastlora.inject(model, LoRAConfig(r=4, lora_alpha=6))
    with torch.no_grad():
        layers(model)[0].lora_B.normal_()
    (full,) = full_gradients(model)
    ((_, _, g_A, g_B),) = corrected(model, damping=0.0)
    torch.testing.assert_close(equivalent(layers(model)[0], g_A, g_B), full, **EXACT)


def test_one_step_of_descent_loses_eta_times_the_projections_square():
    model = make()
    lr = 1e-7
    optimizer = sgd(model, lr)
    LoRAPro(damping=0.0).attach(model, optimizer)
    x = batch(model)
    backward(model)
    with torch.no_grad():
        before = model(x).square().sum()
    optimizer.step()
    square = sum(equivalent(layer, *gradients(layer)).square().sum() for layer in layers(model))
    with torch.no_grad():
        change = model(x).square().sum() - before
    torch.testing.assert_close(change, -lr * square, rtol=1e-3, atol=0.0)


# --- B = 0 and after ---------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("x", ["sylvester", "symmetric", "zero"])
def test_while_B_is_zero_the_step_is_Bs(x, damping):
    model = make(zero_B=True)
    full = full_gradients(model)
    for layer, G, (a0, b0, g_A, g_B) in zip(
        layers(model), full, corrected(model, x=x, damping=damping), strict=True
    ):
        A, _ = factors(layer)
        assert not a0.any() and not g_A.any()
        expected = b0 @ torch.linalg.inv(A @ A.T) / layer.scaling**2
        # the damping's share is δ λ_max / λ_min of AAᵀ
        eigen = torch.linalg.eigvalsh(A @ A.T)
        share = damping * float(eigen[-1] / eigen[0]) + 1e-9
        torch.testing.assert_close(g_B, expected, rtol=share, atol=share * float(g_B.abs().max()))
        if damping == 0.0:
            P_A = A.T @ torch.linalg.inv(A @ A.T) @ A
            torch.testing.assert_close(equivalent(layer, g_A, g_B), G @ P_A, **EXACT)


@pytest.mark.parametrize("x", ["sylvester", "zero"])
def test_the_damping_bounds_a_however_small_B_is(x):
    damping, norms = 1e-6, {}
    for size in (1e-1, 1e-3, 1e-4, 1e-6, 1e-9, 1e-12):
        model = make()
        with torch.no_grad():
            for layer in layers(model):
                layer.lora_B.mul_(size)
        full = full_gradients(model)
        own = corrected(model, x=x, damping=damping)
        for layer, G, (_, _, g_A, _) in zip(layers(model), full, own, strict=True):
            A, B = factors(layer)
            largest = max(torch.linalg.eigvalsh(A @ A.T)[-1], torch.linalg.eigvalsh(B.T @ B)[-1])
            bound = torch.linalg.norm(G) / (2 * layer.scaling * (damping * largest).sqrt())
            norm = torch.linalg.norm(g_A)
            assert norm <= bound * (1 + 1e-9)
            norms.setdefault(layer.name, []).append(float(norm))
    for series in norms.values():  # without it g_A would go on growing, by 1e8 from 1e-4 on
        assert series[-1] < 1e-2 * max(series)


def test_the_second_step_from_zero_is_finite_and_bounded_in_float32():
    model = make(torch.float32, zero_B=True)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3)
    LoRAPro().attach(model, optimizer)
    losses = []
    for _ in range(40):
        backward(model)
        with torch.no_grad():
            losses.append(float(model(batch(model)).square().sum()))
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in trained(model))
    assert all(after < before for before, after in itertools.pairwise(losses))


# --- how it is computed ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["efficient", "full"])
def test_a_stack_is_its_layers_one_by_one(mode):
    """Layers "0" and "2" have one shape, and different s."""
    together, apart = make(), make()
    optimizer = sgd(together, lr=1e-3)
    LoRAPro(mode).attach(together, optimizer)
    single = []
    for name, child in apart.named_children():
        if layers(nn.Sequential(child)):
            own = sgd(child, lr=1e-3)
            LoRAPro(mode).attach(nn.ModuleDict({name: child}), own)
            single.append(own)
    for step in range(3):
        for model in (together, apart):
            backward(model, step)
        optimizer.step()
        for own in single:
            own.step()
        for one, other in zip(layers(together), layers(apart), strict=True):
            for a, b in ((one.lora_A, other.lora_A), (one.lora_B, other.lora_B)):
                torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
                torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-9)


def test_float32_is_near_float64():
    exact, single = make(), make()
    single.float()
    pairs = zip(corrected(exact), corrected(single), strict=True)
    for (_, _, a, b), (_, _, a32, b32) in pairs:
        for wide, narrow in ((a, a32), (b, b32)):
            assert narrow.dtype == torch.float32
            # eps times the Gram matrices' condition, about 50 and squared by the two inverses
            assert (narrow - wide).norm() <= 1e-4 * wide.norm()


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_any_optimizer_goes_on_with_the_gradients(optimizer_class):
    """An ordinary optimizer, given by hand the closed form in its plainest words."""
    model, by_hand = make(), make()
    optimizer = optimizer_class(trained(model), lr=1e-2)
    LoRAPro(x="zero", damping=0.0).attach(model, optimizer)
    other = optimizer_class(trained(by_hand), lr=1e-2)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        backward(by_hand, step)
        for layer in layers(by_hand):
            (A, B), (a0, b0) = factors(layer), gradients(layer)
            _, P_B = projections(A, B)
            g_A = torch.linalg.inv(B.T @ B) @ a0 / layer.scaling**2
            g_B = (b0 - P_B @ b0) @ torch.linalg.inv(A @ A.T) / layer.scaling**2
            layer.lora_A.grad.copy_(g_A.view_as(layer.lora_A))
            layer.lora_B.grad.copy_(g_B.view_as(layer.lora_B))
        other.step()
    for mine, theirs in zip(trained(model), trained(by_hand), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=1e-8)


# --- mode "full" -------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_square_B_makes_full_mode_adamw_on_the_weight(weight_decay):
    """r = N and X = 0: g_B vanishes, BA moves as a whole weight does, decay included."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 4)).double()
    fastlora.inject(model, LoRAConfig(r=4, lora_alpha=6))
    (layer,) = layers(model)
    with torch.no_grad():
        layer.weight.zero_()  # so that W is sBA, all of which decays
        layer.lora_B.normal_()
    dense = copy.deepcopy(model)
    fastlora.merge(dense)
    weight = layers(dense)[0].weight.requires_grad_(True)
    whole = torch.optim.AdamW([weight], lr=1e-2, weight_decay=weight_decay)
    optimizer = sgd(model, lr=1e-2)
    LoRAPro("full", x="zero", damping=0.0, weight_decay=weight_decay).attach(model, optimizer)
    for step in range(5):
        backward(dense, step)
        whole.step()
        backward(model, step)
        before = layer.lora_B.detach().clone()
        factor = (1 - optimizer.param_groups[0]["lr"] * weight_decay) ** 0.5
        optimizer.step()
        torch.testing.assert_close(layer.lora_B.detach(), before * factor, **EXACT)
        A, B = factors(layer)
        torch.testing.assert_close(layer.scaling * B @ A, weight.detach(), **EXACT)
        for group in (*whole.param_groups, *optimizer.param_groups):
            group["lr"] *= 0.7  # a schedule


@pytest.mark.parametrize("x", ["sylvester", "zero"])
def test_full_mode_follows_adams_update_as_near_as_it_can(x):
    """Two steps by hand, from the equivalent gradients; the decay's order included."""
    model, by_hand = make(), make()
    lr, decay, (beta1, beta2), eps = 1e-3, 0.5, (0.9, 0.999), 1e-8
    optimizer = sgd(model, lr=lr)
    method = LoRAPro("full", x=x, damping=0.0, weight_decay=decay).attach(model, optimizer)
    moments = {}
    for step in range(1, 4):
        backward(model, step)
        optimizer.step()
        G = full_gradients(by_hand, step)
        for layer, full in zip(layers(by_hand), G, strict=True):
            A, B = factors(layer)
            P_A, P_B = projections(A, B)
            projected = P_B @ full + full @ P_A - P_B @ full @ P_A
            m, v = moments.get(layer.name, (torch.zeros_like(full), torch.zeros_like(full)))
            m = beta1 * m + (1 - beta1) * projected
            v = beta2 * v + (1 - beta2) * projected**2
            moments[layer.name] = m, v
            update = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)
            c = (1 - lr * decay) ** 0.5
            A, B, s = c * A, c * B, layer.scaling
            g_A = torch.linalg.inv(B.T @ B) @ (s * B.T @ update) / s**2
            g_B = (update - P_B @ update) @ A.T @ torch.linalg.inv(A @ A.T) / s
            if x == "sylvester":
                r = len(A)
                eye = torch.eye(r, dtype=A.dtype)
                system = torch.kron(B.T @ B, eye) + torch.kron(eye, A @ A.T)
                X = torch.linalg.solve(system, -(g_A @ A.T).reshape(-1)).view(r, r)
                g_A, g_B = g_A + X @ A, g_B - B @ X
            with torch.no_grad():
                layer.lora_A.copy_((A - lr * g_A).view_as(layer.lora_A))
                layer.lora_B.copy_((B - lr * g_B).view_as(layer.lora_B))
        for mine, hand in zip(layers(model), layers(by_hand), strict=True):
            # Adam divides elements near zero by themselves: 1e-16 grows in u, not beyond 1e-8
            torch.testing.assert_close(mine.lora_A, hand.lora_A, atol=1e-8, rtol=1e-8)
            torch.testing.assert_close(mine.lora_B, hand.lora_B, atol=1e-8, rtol=1e-8)
    kept = method.state_dict()["moments"]
    for layer in layers(model):
        N, K = layer.lora_B.shape[0], layer.lora_A[0].numel()
        assert kept[layer.name]["exp_avg"].shape == (N, K)


def test_an_interrupted_run_goes_on_exactly():
    def steps(model, optimizer, numbers):
        for step in numbers:
            backward(model, step)
            optimizer.step()

    def start():
        model = make()
        optimizer = sgd(model, lr=1e-3)
        return model, optimizer, LoRAPro("full", weight_decay=0.1).attach(model, optimizer)

    whole, optimizer, _ = start()
    steps(whole, optimizer, range(6))
    first, optimizer, method = start()
    steps(first, optimizer, range(3))
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict(), method.state_dict()), file)
    file.seek(0)
    model_state, optimizer_state, method_state = torch.load(file)
    second, optimizer, method = start()
    second.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    method.load_state_dict(method_state)
    steps(second, optimizer, range(3, 6))
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


# --- attaching, and what it is not made for ----------------------------------------------------


def test_it_works_on_a_peft_model_and_lets_go():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 7)).double()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config).double()
    mine = copy.deepcopy(base)
    fastlora.inject(mine, LoRAConfig(r=3, lora_alpha=5))
    for layer, other in zip(layers(mine), layers(theirs), strict=True):
        with torch.no_grad():
            other.lora_B.normal_()
            layer.lora_A.copy_(other.lora_A)
            layer.lora_B.copy_(other.lora_B)
    for (*_, a, b), (*_, c, d) in zip(corrected(mine), corrected(theirs), strict=True):
        torch.testing.assert_close(a, c, **EXACT)
        torch.testing.assert_close(b, d, **EXACT)
    optimizer = sgd(theirs)
    method = LoRAPro().attach(theirs, optimizer)
    with pytest.raises(RuntimeError, match="attached already"):
        method.attach(theirs, optimizer)
    method.detach()
    backward(theirs)
    before = [gradients(layer) for layer in layers(theirs)]
    optimizer.step()
    for layer, pair in zip(layers(theirs), before, strict=True):
        assert all(map(torch.equal, gradients(layer), pair))
    with pytest.raises(RuntimeError, match="not attached"):
        method.detach()
    with pytest.raises(RuntimeError, match="attach it first"):
        method.load_state_dict({"mode": "efficient", "moments": {}})


def state_of(model):
    return [t.clone() for p in trained(model) for t in (p, p.grad) if t is not None]


@pytest.mark.parametrize("mode", ["efficient", "full"])
@pytest.mark.parametrize("where", ["value", "gradient", "one missing", "closure"])
def test_a_step_that_cannot_be_made_changes_nothing(mode, where):
    model = make()
    optimizer = sgd(model, lr=0.1)
    method = LoRAPro(mode).attach(model, optimizer)
    backward(model)
    optimizer.step()
    backward(model)
    last = layers(model)[-1]
    words = f"of {last.name} .*not finite"
    if where == "value":
        last.lora_A.data.view(-1)[0] = float("nan")
    elif where == "gradient":
        last.lora_B.grad.view(-1)[0] = float("inf")
    elif where == "one missing":
        last.lora_A.grad, words = None, "only one has a gradient"
    else:
        words = "closure"
    before = state_of(model), copy.deepcopy(method.state_dict())
    with pytest.raises(RuntimeError, match=words):
        optimizer.step(*([lambda: None] if where == "closure" else []))
    torch.testing.assert_close(state_of(model), before[0], atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(method.state_dict()["moments"], before[1]["moments"], atol=0, rtol=0)


def test_a_layer_without_gradient_is_passed_over():
    model = make()
    optimizer = sgd(model, lr=0.1)
    method = LoRAPro("full").attach(model, optimizer)
    backward(model)
    first = layers(model)[0]
    first.lora_A.grad = first.lora_B.grad = None
    before = first.lora_A.clone(), first.lora_B.clone()
    optimizer.step()
    assert torch.equal(first.lora_A, before[0]) and torch.equal(first.lora_B, before[1])
    assert method.state_dict()["moments"].keys() == {layer.name for layer in layers(model)[1:]}


@pytest.mark.parametrize(
    "config, words",
    [
        (LoRAConfig(r=2, use_dora=True), "it computes DoRA"),
        (LoRAConfig(r=2, use_lora_fa=True), "only one of A and B"),
        (AdaLoRAConfig(init_r=2), "an adapter of ADALORA"),
        (VeRAConfig(r=2), "an adapter of VERA"),
    ],
)
def test_what_it_is_not_made_for(config, words):
    model = nn.Sequential(nn.Linear(4, 4))
    fastlora.inject(model, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=words):
        LoRAPro().attach(model, optimizer)
    with pytest.raises(ValueError, match="no LoRA layers"):
        LoRAPro().attach(nn.Linear(2, 2), optimizer)


@pytest.mark.parametrize(
    "layer, words",
    [(nn.Embedding(4, 4), "an embedding"), (nn.Conv2d(4, 4, 1, groups=2), "grouped convolution")],
)
def test_layers_it_is_not_made_for(layer, words):
    model = nn.Sequential(layer)
    fastlora.inject(model, LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=words):
        LoRAPro().attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_two_active_adapters_on_a_layer_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="two adapters are active"):
        LoRAPro().attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    "mode, optimizer, words",
    [
        ("full", lambda p: torch.optim.AdamW(p, lr=0.1), "by a torch.optim.SGD, not by AdamW"),
        ("full", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "no momentum"),
        ("full", lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), "no momentum"),
        ("full", lambda p: torch.optim.SGD(p, lr=5.0), "must stay below 1"),
        ("efficient", lambda p: torch.optim.SGD(p[:-1], lr=0.1), "not the optimizer's"),
        (
            "full",
            lambda p: torch.optim.SGD([{"params": p[:1], "lr": 0.2}, {"params": p[1:]}], lr=0.1),
            "must have one lr",
        ),
    ],
)
def test_optimizers_it_is_not_made_for(mode, optimizer, words):
    model = make()
    decay = {"weight_decay": 0.5} if mode == "full" else {}
    with pytest.raises(ValueError, match=words):
        LoRAPro(mode, **decay).attach(model, optimizer(trained(model)))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"mode": "fast"}, "mode must be"),
        ({"x": "any"}, "x must be one of"),
        ({"damping": -1e-6}, "damping"),
        ({"mode": "full", "betas": (0.9, 1.0)}, "betas"),
        ({"mode": "full", "eps": 0.0}, "eps"),
        ({"mode": "full", "weight_decay": -1.0}, "weight_decay"),
        ({"weight_decay": 0.1}, "is mode 'full's"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        LoRAPro(**options)


def test_a_state_that_does_not_fit_changes_nothing():
    model = make()
    optimizer = sgd(model)
    method = LoRAPro("full").attach(model, optimizer)
    backward(model)
    optimizer.step()
    before = copy.deepcopy(method.state_dict())
    for spoil, words in (
        (lambda state: state.update(mode="efficient"), "of mode 'efficient'"),
        (lambda state: state["moments"].update(x=state["moments"]["0"]), "no layer here"),
        (
            lambda state: state["moments"]["6"].update(exp_avg=torch.zeros(2, 2)),
            r"of 6 has shape \[2, 2\]",
        ),
        (lambda state: state.pop("moments"), "the state has no moments"),
        (lambda state: state["moments"]["6"].pop("step"), "what the state has of 6 has no step"),
    ):
        state = copy.deepcopy(before)
        state["moments"]["0"]["exp_avg"].fill_(7.0)
        spoil(state)
        with pytest.raises(ValueError, match=words):
            method.load_state_dict(state)
        after = method.state_dict()["moments"]
        torch.testing.assert_close(after, before["moments"], atol=0, rtol=0)
