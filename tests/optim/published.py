"""The updates as published, a tensor at a time: what tests compare with."""

from __future__ import annotations

import torch


class Lion:
    """arXiv 2302.06675, algorithm 2, as google/automl and lion-pytorch compute it."""

    def __init__(self, params, lr, betas, weight_decay):
        self.params, self.lr, self.betas, self.decay = list(params), lr, betas, weight_decay
        self.m = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, grads):
        b1, b2 = self.betas
        for p, m, g in zip(self.params, self.m, grads, strict=True):
            p.mul_(1 - self.lr * self.decay)
            p.add_(torch.sign(b1 * m + (1 - b1) * g), alpha=-self.lr)
            m.mul_(b2).add_(g, alpha=1 - b2)


class Tiger:
    """bojone/tiger's rules: kinds, accumulation by β₁, NaN rule; floors of zero tensors."""

    def __init__(
        self, params, kinds, lr, beta, decay, k=1, schedule=None, shrink=0.99, floors=None
    ):
        self.params, self.kinds = list(params), list(kinds)
        self.lr, self.beta, self.decay, self.k, self.s = lr, beta, decay, k, shrink
        self.schedule = schedule or (lambda t: 1.0)
        self.floors = floors or [0.0] * len(self.params)
        self.m = [torch.zeros_like(p) for p in self.params]
        self.t = 0

    @torch.no_grad()
    def step(self, grads):
        alpha = self.lr * self.schedule(self.t)
        for i, (p, m, g) in enumerate(zip(self.params, self.m, grads, strict=True)):
            kind = self.kinds[i]
            if not torch.isfinite(g).all():
                c = 1.0 if kind == "gamma" else 0.0
                p.sub_(c).mul_(self.s).add_(c)
                continue
            first = self.beta if self.t % self.k == 0 else 1.0
            m.mul_(first).add_(g, alpha=(1 - self.beta) / self.k)
            if (self.t + 1) % self.k:
                continue
            if kind in ("gamma", "beta"):
                p.sub_(0.5 * alpha * torch.sign(m))
                continue
            if kind == "embedding":
                size = p.square().mean(-1, keepdim=True).sqrt()
            else:
                size = p.square().mean().sqrt()
            eta = alpha * size.clamp(min=self.floors[i])
            p.sub_(eta * (torch.sign(m) + self.decay * p))
        self.t += 1
