"""The masks: functions of a seed, with the right probability, and Philox as it is published."""

import pytest
import torch

from fastlora.ops import dropout


def test_philox_gives_the_published_stream(monkeypatch):
    """Random123's known answer for philox4x32-10, counter and key all ones (kat_vectors)."""
    monkeypatch.setattr(dropout, "PHILOX_ROUNDS", 10)
    ones = 0xFFFFFFFF
    c = [torch.tensor([ones]) for _ in range(4)]
    words = dropout.philox(*c, ones, ones)
    assert [int(w) for w in words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_masks_keep_with_the_given_probability(p):
    seed = torch.tensor(1234567890123456789)
    for keep in (
        dropout.philox_keep((600, 333), p, seed),
        dropout.stream_keep((600, 333), p, seed, torch.device("cpu")),
    ):
        deviation = (keep.double().mean() - (1 - p)).abs()
        assert deviation <= 4 * (p * (1 - p) / keep.numel()) ** 0.5 + 1e-5
        columns = keep.double().mean(0)  # no column is favoured
        assert (columns - (1 - p)).abs().max() <= 5 * (p * (1 - p) / 600) ** 0.5 + 1e-5


def test_masks_differ_by_seed_and_repeat_by_seed():
    a, b = torch.tensor(1), torch.tensor(2)
    for draw in (
        lambda s: dropout.philox_keep((40, 41), 0.5, s),
        lambda s: dropout.stream_keep((40, 41), 0.5, s, torch.device("cpu")),
    ):
        assert torch.equal(draw(a), draw(a))
        assert 0.4 < (draw(a) == draw(b)).double().mean() < 0.6


def test_a_philox_mask_does_not_depend_on_how_many_rows_follow():
    seed = torch.tensor(77)
    assert torch.equal(
        dropout.philox_keep((9, 21), 0.3, seed)[:4], dropout.philox_keep((4, 21), 0.3, seed)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 1e-5, 0.3, 0.999999])
def test_drop_applies_the_mask_exactly(dtype, p):
    seed, cpu = torch.tensor(5), torch.device("cpu")
    x = torch.randn(50, 31).to(dtype)
    dropped = dropout.drop(x, dropout.stream_noise((50, 31), seed, cpu), p)
    assert torch.equal(dropped, x * dropout.stream_keep((50, 31), p, seed, cpu))


def test_every_level_of_noise_falls_on_the_right_side():
    noise = torch.arange(-32768, 32768).to(torch.int16).view(256, 256)
    for p in (0.0, 0.1, 0.5, 1 - 2**-16):
        kept = dropout.drop(torch.ones(256, 256), noise, p)
        assert int(kept.sum()) == dropout.LEVELS - dropout.threshold(p)
        assert dropout.keep_scale(p) == dropout.LEVELS / int(kept.sum())


def test_the_seed_follows_torchs_generator():
    torch.manual_seed(3)
    first = dropout.draw_seed("cpu")
    assert first.dtype == torch.int64 and first.shape == ()
    assert dropout.draw_seed("cpu") != first
    torch.manual_seed(3)
    assert dropout.draw_seed("cpu") == first
