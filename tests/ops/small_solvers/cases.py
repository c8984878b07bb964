"""Stacks of matrices that a solver can stumble over."""

import torch

SIZES = (1, 2, 3, 16, 17, 64, 127, 128)
KINDS = (
    "random",
    "graded",
    "repeated",
    "zero",
    "identity",
    "deficient",
    "diagonal",
    "huge",
    "tiny",
    "one direction",
)


def limit(dtype, n):
    """What residual and orthogonality must stay below: LAPACK's own is about 11 units at n = 128;
    ours are at most about 14, and 24 for the orthogonality of U."""
    return torch.finfo(dtype).eps * (6.0 + 3.0 * n**0.5)


def orthogonal(n, batch, generator):
    return torch.linalg.qr(torch.randn(batch, n, n, generator=generator, dtype=torch.float64))[0]


def matrices(kind, n, batch=3, dtype=torch.float64, seed=0):
    """[batch, n, n], not symmetric."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind == "zero":
        a = torch.zeros(batch, n, n, dtype=torch.float64)
    elif kind == "identity":
        a = torch.eye(n, dtype=torch.float64).expand(batch, n, n).clone()
    elif kind == "diagonal":
        a = torch.diag_embed(draw(batch, n))
    elif kind == "graded":
        steps = torch.logspace(-12, 0, n, dtype=torch.float64)
        a = draw(batch, n, n) * steps
    elif kind == "repeated":
        values = torch.tensor([2.0, 2.0, -2.0, 0.5], dtype=torch.float64).repeat(n)[:n]
        left = orthogonal(n, batch, generator)
        a = (left * values) @ left.mT
    elif kind == "deficient":
        rank = max(n // 3, 1)
        a = draw(batch, n, rank) @ draw(batch, rank, n)
    elif kind == "one direction":
        a = torch.ones(batch, n, n, dtype=torch.float64)
    else:
        a = draw(batch, n, n) * {"random": 1.0, "huge": 1e30, "tiny": 1e-30}[kind]
    return a.to(dtype)


def symmetric(kind, n, batch=3, dtype=torch.float64, seed=0):
    """[batch, n, n]; the graded and the deficient ones are positive semidefinite."""
    a = matrices(kind, n, batch, torch.float64, seed)
    if kind in ("graded", "deficient"):
        a = a.mT @ a
    return (0.5 * (a + a.mT)).to(dtype)
