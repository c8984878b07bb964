"""Repeated singular values and what lies behind them: a block's copies, a shift's gap."""

import pytest
import torch

from fastlora.ops import library, svd_lowrank
from fastlora.ops.low_rank_svd import native, op
from tests.ops.low_rank_svd.cases import SPECTRA, matrix, residual, seeded

native_only = pytest.mark.skipif(library.missing() is not None, reason="no native core")


def equal(copies, top, bottom, n, spread=0.0, first=0):
    """``copies`` of 1, or within ``spread`` of it, behind ``first`` larger ones; then a tail."""

    def values(i):
        s = torch.linspace(top, bottom, n, dtype=i.dtype)
        s[:first] = torch.linspace(1.8, 1.1, first)
        s[first : first + copies] = 1 - spread * torch.linspace(0, 1, copies)
        return s

    return values


def excess(x, result, values, q):
    """How far above the optimum, relative to it."""
    best = values(torch.arange(min(x.shape), dtype=torch.float64)).sort().values[:-q].norm()
    return float(residual(x, result) / best - 1)


@native_only
@pytest.mark.parametrize(
    "n, q, values",
    [
        (400, 24, equal(24, 0.7, 0.42, 400)),
        (600, 24, equal(24, 0.7, 0.42, 600, spread=0.003)),
        (1000, 32, equal(32, 0.5, 0.3, 1000)),
        (1000, 32, equal(32, 0.7, 0.42, 1000, spread=0.01)),
        (500, 24, equal(24, 0.8, 0.48, 500, first=4)),
        (400, 32, equal(32, 0.5, 0.3, 400, spread=0.01)),  # the last one in the last block
    ],
)
def test_no_copy_is_missed_in_a_large_matrix(n, q, values):
    """The tail's energy, which grows with the matrix, hid what the check had found."""
    x = matrix(n, n, values)
    result = svd_lowrank(x, q, generator=seeded(), backend="native")
    assert (result.S > 0.8).sum() == q
    plain = [svd_lowrank(x, q, generator=seeded(seed), backend="eager") for seed in range(5)]
    assert excess(x, result, values, q) <= 1.3 * max(excess(x, p, values, q) for p in plain)


@native_only
@pytest.mark.parametrize("q", [8, 16, 20, 32])
@pytest.mark.parametrize("tail", ["flat", "linear", "falling"])
def test_near_values_are_found_or_given_up(tail, q):
    """Of as many copies as a block may miss, what is kept is no further off than others are."""
    drawn = torch.Generator().manual_seed(q)
    for spread in (0.0, 0.003, 0.03, 0.2):
        copies, first, top = (
            int(torch.randint(9, 73, (), generator=drawn)),
            (0, 0, 3, 8)[int(torch.randint(4, (), generator=drawn))],
            0.3 + 0.6 * float(torch.rand((), generator=drawn)),
        )

        def values(i, copies=copies, first=first, top=top, spread=spread):
            shape = {"flat": 0.5 + 0 * i, "linear": 1 - 0.4 * i / len(i)}
            shape["falling"] = (i - first - copies + 1).clamp_min(1) ** -0.5
            s = top * shape[tail]
            s[:first] = torch.linspace(1.8, 1.1, first)
            s[first : first + copies] = 1 - spread * torch.linspace(0, 1, copies)
            return s

        x = matrix(400, 460, values)
        others = [svd_lowrank(x, q, generator=seeded(seed), backend="eager") for seed in (0, 1)]
        for seed in (0, 1):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                u, s, v = torch.svd_lowrank(x, q=q, niter=4)
            others.append((u, s, v.mT))
        result = svd_lowrank(x, q, generator=seeded(), backend="native")
        worst = max(excess(x, each, values, q) for each in others)
        assert excess(x, result, values, q) <= worst + 1e-3, (copies, first, spread, top)


@native_only
def test_noise_is_not_given_up(monkeypatch):
    plain, found = native.forward, []
    monkeypatch.setattr(op.native, "forward", lambda *args: found.append(plain(*args)) or found[-1])
    monkeypatch.setattr(native, "_ALIKE", 1.0)  # all of it is checked
    svd_lowrank(torch.randn(4, 576, 800, generator=seeded(7)), 32, generator=seeded())
    assert found[0].found.all()


@pytest.mark.parametrize("q, oversample", [(1, 0), (8, 0), (8, 1), (8, 4), (16, 5)])
def test_a_gap_behind_few_columns(q, oversample):
    """A shift by half of λ_b, before a tail near zero, leaves 10^-3 above the optimum here."""
    values = equal(q + oversample, 0.1, 0.1, 200)
    x = matrix(200, 200, values, torch.float64)
    result = svd_lowrank(x, q, oversample=oversample, generator=seeded())
    assert excess(x, result, values, q) <= 1e-12


@pytest.mark.parametrize("q, copies", [(8, 16), (16, 32)])
def test_a_gap_right_behind_the_block(q, copies):
    values = equal(copies, 0.1, 0.1, 200)
    x = matrix(200, 200, values, torch.float64)
    assert excess(x, svd_lowrank(x, q, 4, generator=seeded()), values, q) <= 1e-7
    assert excess(x, svd_lowrank(x, q, 8, generator=seeded()), values, q) <= 1e-13


@pytest.mark.parametrize("spectrum", ["slow", "flat"])
def test_slow_spectra_keep_their_shift(spectrum):
    """Half as many iterations as torch's, and no more error: that is what the shift is for."""
    if spectrum == "flat":
        x = torch.randn(4, 300, 450, generator=seeded())
    else:
        x = torch.stack([matrix(300, 450, SPECTRA[spectrum], seed=seed) for seed in range(4)])
    ours = residual(x, svd_lowrank(x, 20, generator=seeded(1), backend="eager"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(x, q=20, niter=4)
    assert ours.mean() <= residual(x, (u, s, v.mT)).mean()


@pytest.mark.parametrize(
    "call, raised, sentence",
    [
        (dict(matrices=torch.full((6, 8), 3e38)), ValueError, "matrices is too large: its norm"),
        (dict(matrices=torch.ones(6, 8, device="meta")), ValueError, "matrices is on meta"),
        (dict(matrices=torch.ones(6, 8), generator=3), TypeError, "must be a torch.Generator"),
    ],
)
def test_what_has_no_result_is_refused_with_a_sentence(call, raised, sentence):
    with pytest.raises(raised, match=sentence):
        svd_lowrank(**call, q=2)


def test_a_matrix_that_overlaps_itself():
    """A Hankel matrix as a view: both strides are 1."""
    values = torch.randn(599, generator=torch.Generator().manual_seed(0))
    hankel = values.as_strided((300, 300), (1, 1))
    result = svd_lowrank(hankel, 4, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(hankel.double())[:4]
    torch.testing.assert_close(result.S.double(), exact, rtol=0.02, atol=0)
