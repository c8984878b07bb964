"""FSDP2: two processes train shards, and hold what one process has of the whole."""

from __future__ import annotations

import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastlora.optim import Lion, Tiger, accumulate_in_momentum, param_groups


def build():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3, bias=False)
    )
    with torch.no_grad():
        net[3].weight.zero_()  # as LoRA's B: it needs the floor
    return net


def ids(step):
    return torch.randint(0, 11, (4, 3), generator=torch.Generator().manual_seed(step))


def loss_of(net, step):
    return (net(ids(step)) - 1).square().mean()


OPTIMIZERS = {
    "lion": lambda net: Lion(net.parameters(), lr=1e-2, weight_decay=0.1),
    "tiger": lambda net: Tiger(param_groups(net), lr=1e-2),
    "lazy": lambda net: Tiger(
        param_groups(net, embedding={"lazy_rows": True}), lr=1e-2, grad_accum_steps=2
    ),
    "adamw": lambda net: Tiger(
        param_groups(net, embedding={"algorithm": "adamw"}), lr=1e-2, state_dtype="bfloat16"
    ),
    "folded": lambda net: Tiger(param_groups(net), lr=1e-2, grad_accum_steps=2, shrink_ratio=0.5),
}


def spoilt(net, name, step):
    """One element of one gradient is not finite, in the shard of the first process alone; where it
    is folded, the whole of a layer's."""
    if step == 4 and name in ("tiger", "lazy"):
        grad = net[1].weight.grad
        here = grad.to_local() if hasattr(grad, "to_local") else grad
        if not dist.is_initialized() or here is grad or dist.get_rank() == 0:
            here[0, 0] = math.nan


def train(net, name):
    optimizer = OPTIMIZERS[name](net)
    handle = accumulate_in_momentum(net, optimizer) if name == "folded" else None
    for step in range(8):
        hook = None
        if step == 4 and name == "folded":  # the first of a cycle: the rate is of what has shrunk
            hook = net[1].register_forward_hook(lambda layer, x, y: y * math.nan)
        loss_of(net, step).backward()
        if hook is not None:
            hook.remove()
        spoilt(net, name, step)
        if handle is None or step % 2:
            optimizer.step()
        optimizer.zero_grad()
    return optimizer


def work(rank, port, expected, tmp_path):
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for name, whole in expected.items():
            net = build()
            for layer in (net[1], net):
                fully_shard(layer, mesh=mesh)
            optimizer = train(net, name)
            found = {n: p.full_tensor().detach() for n, p in net.named_parameters()}
            for n, p in found.items():
                torch.testing.assert_close(p, whole[n], rtol=0, atol=1e-6, msg=f"{name} {n}")
            if name in ("lion", "tiger"):
                saved = get_optimizer_state_dict(net, optimizer)
                again = OPTIMIZERS[name](net)
                set_optimizer_state_dict(net, again, saved)
                for p in net.parameters():
                    one, other = optimizer.state[p]["exp_avg"], again.state[p]["exp_avg"]
                    assert torch.equal(one.to_local(), other.to_local())
                assert again.param_groups[0]["steps"] == 8
        net = fully_shard(build(), mesh=mesh)
        eight = Lion(net.parameters(), state_dtype="8bit")
        loss_of(net, 0).backward()
        with pytest.raises(ValueError, match="8-bit momentum of sharded"):
            eight.step()
        (tmp_path / f"done{rank}").touch()
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_as_one(tmp_path):
    expected = {}
    for name in OPTIMIZERS:
        net = build()
        train(net, name)
        expected[name] = {n: p.detach() for n, p in net.named_parameters()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, expected, tmp_path), nprocs=2)
    assert {f.name for f in tmp_path.iterdir()} == {"done0", "done1"}
