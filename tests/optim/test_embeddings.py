"""What sign updates do to rows without a gradient (kexue 9736), and each remedy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastlora.nn import TiedHead
from fastlora.optim import Lion, Tiger, accumulate_in_momentum, param_groups

V, D = 12, 4
SEEN = [1, 3, 4]


def embedding(sparse=False, seed=0):
    torch.manual_seed(seed)
    return nn.Embedding(V, D, sparse=sparse)


def train(net, optimizer, steps, ids=SEEN, seed=1):
    torch.manual_seed(seed)
    for _ in range(steps):
        target = torch.randn(len(ids), D)
        (net(torch.tensor(ids)) * target).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


MAKERS = {
    "lion": lambda params, **o: Lion(params, lr=1e-2, weight_decay=0.1, **o),
    "tiger": lambda params, **o: Tiger(
        [{"params": params, "kind": "embedding"}], lr=1e-2, weight_decay=0.1, **o
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_without_a_remedy_rare_rows_drift_to_their_sign_over_the_decay(make):
    """A row seen once keeps the sign of its momentum: ∓1/λ is where it stops."""
    net = embedding()
    optimizer = make(net.parameters())
    (net(torch.tensor([5])).sum() - net(torch.tensor([7])).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    middle = None
    for step in range(9000):
        net.weight.grad = torch.zeros_like(net.weight)
        optimizer.state[net.weight]["exp_avg"].mul_(1.02)  # or float32 runs out of numbers at last
        optimizer.step()
        if step == 500:
            middle = net.weight.detach().clone()
    torch.testing.assert_close(net.weight[5].data, torch.full((D,), -10.0), rtol=1e-2, atol=0)
    torch.testing.assert_close(net.weight[7].data, torch.full((D,), 10.0), rtol=1e-2, atol=0)
    assert (net.weight[5].detach() < middle[5]).all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
def test_lazy_rows_leave_others_bytes_alone(make, sparse, momentum):
    net, plain = embedding(sparse), embedding()
    before = net.weight.detach().clone()
    lazy = make(net.parameters(), lazy_rows=True, lazy_momentum=momentum)
    train(net, lazy, 3, ids=[1, 3, 4, 8])
    kept, m_kept = net.weight[8].detach().clone(), lazy.state[net.weight]["exp_avg"][8].clone()
    train(net, lazy, 20)
    others = [i for i in range(V) if i not in (*SEEN, 8)]
    assert torch.equal(net.weight[others], before[others])
    assert torch.equal(net.weight[8], kept) and not torch.equal(kept, before[8])
    m = lazy.state[net.weight]["exp_avg"]
    assert torch.equal(m[8], m_kept) == momentum
    # what moves, moves as it would without
    usual = make(plain.parameters())
    train(plain, usual, 3, ids=[1, 3, 4, 8])
    train(plain, usual, 20)
    assert torch.equal(net.weight[SEEN], plain.weight[SEEN])
    assert not torch.equal(plain.weight[8], kept)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_dense_gradients_are_the_plain_optimizers(make):
    net, plain = embedding(), embedding()
    everything = list(range(V))
    train(net, make(net.parameters(), lazy_rows=True), 10, everything)
    train(plain, make(plain.parameters()), 10, everything)
    assert torch.equal(net.weight, plain.weight)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("coalesced", [False, True])
def test_sparse_gradients_are_their_dense_ones(make, coalesced):
    net, plain = embedding(), embedding()
    optimizers = make(net.parameters()), make(plain.parameters())
    for step in range(5):
        torch.manual_seed(step)
        indices, values = torch.tensor([[2, 9, 2]]), torch.randn(3, D)
        grad = torch.sparse_coo_tensor(indices, values, (V, D))
        net.weight.grad = grad.coalesce() if coalesced else grad
        plain.weight.grad = grad.to_dense()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(net.weight, plain.weight)


@pytest.mark.parametrize("sparse", [False, True])
def test_over_micro_steps_the_union_of_rows_moves(sparse):
    net = embedding(sparse)
    before = net.weight.detach().clone()
    optimizer = Tiger(
        [{"params": net.parameters(), "kind": "embedding", "lazy_rows": True}], grad_accum_steps=3
    )
    for ids in ([1], [4, 6], [1, 2]):
        train(net, optimizer, 1, ids)
    moved = (net.weight != before).any(1).nonzero().flatten().tolist()
    assert moved == [1, 2, 4, 6]
    for ids in ([0], [0], [0]):
        train(net, optimizer, 1, ids)
    moved = (net.weight != before).any(1).nonzero().flatten().tolist()
    assert moved == [0, 1, 2, 4, 6]


@pytest.mark.parametrize("cls", [Lion, Tiger])
def test_adamw_for_the_embedding_beside_signs_elsewhere(cls):
    """The AdamW part is torch's AdamW to the bit, state and resuming included."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D))

    both, apart = build(), build()
    options = {"algorithm": "adamw", "lr": 1e-2, "weight_decay": 0.1, "adam_betas": (0.8, 0.95)}
    optimizer = cls(param_groups(both, embedding=options), lr=1e-3)
    signs = cls(param_groups(apart[1]), lr=1e-3)
    adam = torch.optim.AdamW(apart[0].parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95))
    for step in range(8):
        if step == 4:
            saved, optimizer = optimizer.state_dict(), cls(param_groups(both, embedding=options))
            optimizer.load_state_dict(saved)
        torch.manual_seed(step)
        target = torch.randn(3, D)
        for net, each in ((both, [optimizer]), (apart, [signs, adam])):
            (net(torch.tensor(SEEN)) * target).sum().backward()
            for one in each:
                one.step()
                one.zero_grad()
    assert all(
        torch.equal(p, q) for p, q in zip(both.parameters(), apart.parameters(), strict=True)
    )
    # a row without gradients stays but for its decay
    assert torch.allclose(both[0].weight[0], 0.999**8 * build()[0].weight[0])


@pytest.mark.parametrize("how", ["one", "micro", "folded"])
def test_rows_without_a_gradient_do_not_shrink(how):
    """With lazy_rows a gradient that is not finite shrinks the rows it touches alone."""
    net = embedding()
    before = net.weight.detach().clone()
    optimizer = Tiger(
        [{"params": net.parameters(), "kind": "embedding", "lazy_rows": True}],
        grad_accum_steps=1 if how == "one" else 2, weight_decay=0.0, lr=0.0, shrink_ratio=0.5,
    )  # fmt: skip
    if how == "folded":
        accumulate_in_momentum(net, optimizer)
    (net(torch.tensor([2])).sum() * float("nan")).backward()
    optimizer.step()
    expected = before.clone()
    expected[2] *= 0.5
    assert torch.equal(net.weight.data, expected)


def test_a_tied_head_keeps_every_row_in_motion():
    """All rows get a gradient at every step, so none is carried off."""
    torch.manual_seed(0)
    net = embedding()
    head = TiedHead(net)
    optimizer = Lion(net.parameters(), lr=1e-2, weight_decay=0.1)
    ids = torch.tensor(SEEN)
    for _ in range(600):
        nn.functional.cross_entropy(head(net(ids)), ids.roll(1)).backward()
        assert (net.weight.grad != 0).any(1).all()
        optimizer.step()
        optimizer.zero_grad()
    assert net.weight.abs().max() < 6  # without it: towards 10
