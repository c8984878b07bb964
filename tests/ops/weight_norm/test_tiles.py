"""The tile choice: plain Python, so every card can be asked about without one."""

import pytest
import torch

from fastlora.ops.adapter_linear.tiles import INTERPRETER, arch_of
from fastlora.ops.weight_norm import tiles

ARCHS = [arch_of(c, sm) for c, sm in ((80, 108), (86, 84), (89, 128), (90, 132), (100, 148))]
ARCHS += [arch_of(120, 170), INTERPRETER]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: str(a.capability))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_choice_is_among_the_candidates_and_fits(arch, dtype):
    for kernel in tiles.KERNELS:
        for r in (1, 8, 16, 17, 64, 100, 384, 5000):
            for regular in (True, False):
                tile = tiles.choose(kernel, dtype, r, arch, regular)
                assert tile in tiles.candidates(kernel, dtype, arch)
                form = tiles.one_rank_tile(tile, r)
                assert tiles.shared_bytes(kernel, tile, dtype, arch, form) <= arch.shared_bytes


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: str(a.capability))
def test_splits_cover_the_sum_in_whole_steps(arch):
    for dtype in DTYPES:
        for r in (8, 128):
            tile = tiles.choose("rows", dtype, r, arch)
            for n in (1, 576, 4096, 150000):
                for k in (0, 1, 576, 4096, 150000):
                    splits, steps = tiles.splits(tile, n, k, arch)
                    assert splits >= 1 and (splits - 1) * steps * tile.BLOCK_K <= max(k, 1)
                    assert splits * steps * tile.BLOCK_K >= k
                    assert splits == 1 or steps >= 4


def test_large_weights_fill_the_card():
    for arch in ARCHS[:-1]:
        tile = tiles.choose("rows", torch.bfloat16, 16, arch)
        splits, _ = tiles.splits(tile, 4096, 4096, arch)
        assert splits * tiles.cdiv(4096, tile.BLOCK_N) >= 2 * arch.sm_count


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="rows, finish"):
        tiles.slots("gram", torch.float32, INTERPRETER)
