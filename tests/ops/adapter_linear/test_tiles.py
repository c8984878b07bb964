"""The choice of tiles and algorithms, on architectures this machine need not have."""

from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlora.ops import tuned
from fastlora.ops.adapter_linear import tiles

DEVICE = "NVIDIA H200 (test)"

CAPABILITIES = (80, 86, 89, 90, 100, 120)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

architectures = st.one_of(
    st.just(tiles.INTERPRETER),
    st.builds(tiles.arch_of, st.sampled_from(CAPABILITIES), st.integers(1, 200)),
)
rows = st.one_of(st.sampled_from((1, 16, 17, 128, 8192)), st.integers(0, 1 << 22))
widths = st.one_of(st.sampled_from((1, 576, 4096, 14336, 128256)), st.integers(1, 1 << 17))
ranks = st.integers(1, 2048)


@given(
    kernel=st.sampled_from(tiles.KERNELS),
    dtype=st.sampled_from(DTYPES),
    M=rows,
    N=widths,
    K=widths,
    r=ranks,
    arch=architectures,
    regular=st.booleans(),
)
def test_only_candidates_are_chosen(kernel, dtype, M, N, K, r, arch, regular):
    tile = tiles.choose(kernel, dtype, M, N, K, r, arch, regular)
    assert tile in tiles.candidates(kernel, dtype, arch)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", tiles.KERNELS)
def test_every_candidate_fits_and_can_be_chosen(kernel, dtype, capability):
    arch = tiles.arch_of(capability, sm_count=100)
    assert arch.shared_bytes == LIMITS[capability] * 1024
    found = tiles.candidates(kernel, dtype, arch)
    for tile in found:
        assert tiles.shared_bytes(kernel, tile, dtype, arch) <= arch.shared_bytes, tile
        for side in (tile.BLOCK_M, tile.BLOCK_N, tile.BLOCK_K, tile.BLOCK_R):
            assert side & (side - 1) == 0, "Triton's blocks are powers of two"
            assert side == 0 or side >= (4 if kernel == "sum" else 16)
    chosen = {
        tiles.choose(kernel, dtype, M, N, 4096, r, arch, regular)
        for M in (1, 64, 512, 8192)
        for N in (256, 4096)
        for r in (8, 64, 300)
        for regular in (True, False)
    }
    assert chosen == set(found)


@given(dtype=st.sampled_from(DTYPES), M=st.integers(1, 1 << 20), arch=architectures)
def test_lengths_of_one_bucket_share_kernels(dtype, M, arch):
    longest = tiles.bucket(M)
    assert M <= longest < 2 * M
    for kernel in tiles.KERNELS:
        one, other = (tiles.choose(kernel, dtype, m, 4096, 4096, 16, arch) for m in (M, longest))
        assert one == other
    for part in tiles.PARTS:
        one, other = (tiles.algorithm(part, dtype, m, 4096, 4096, 16, arch) for m in (M, longest))
        assert one == other


@given(
    dtype=st.sampled_from(DTYPES), M=st.integers(1, 1 << 20), K=widths, r=ranks, arch=architectures
)
def test_splits_cover_the_reduction_once(dtype, M, K, r, arch):
    tile = tiles.choose("shrink", dtype, M, 0, K, r, arch)
    splits, steps = tiles.shrink_splits(tile, M, K, r, arch)
    width = steps * tile.BLOCK_K
    assert (splits - 1) * width < K <= splits * width
    assert width % 8 == 0
    programs = tiles.cdiv(M, tile.BLOCK_M) * tiles.cdiv(r, tile.BLOCK_R)
    assert splits == 1 or splits * programs <= arch.sm_count


@given(M=st.integers(1, 1 << 20), block=st.sampled_from((16, 32, 64)), count=st.integers(1, 5000))
def test_chunks_cover_the_rows_once(M, block, count):
    arch = tiles.arch_of(90, 132)
    chunks, per_chunk = tiles.row_chunks(block, M, count, arch)
    assert per_chunk % block == 0
    assert (chunks - 1) * per_chunk < M <= chunks * per_chunk
    assert chunks <= tiles.cdiv(2 * arch.sm_count, count)


@pytest.mark.parametrize(
    "capability, known",
    [(80, 80), (86, 86), (87, 86), (89, 89), (90, 90), (100, 100), (103, 100), (121, 120)],
)
def test_an_unknown_card_takes_the_nearest_lower_known_one(capability, known):
    arch = tiles.arch_of(capability, 50, "card")
    assert arch == tiles.Arch(known, 50, LIMITS[known] * 1024, "card")


def test_a_card_without_the_needed_tensor_cores_is_refused():
    with pytest.raises(ValueError, match=r"7\.5 is below 8\.0"):
        tiles.arch_of(75, 40)


def test_unknown_names_are_refused():
    arch = tiles.arch_of(90, 132)
    with pytest.raises(ValueError, match="unknown kernel 'expand'"):
        tiles.choose("expand", torch.float16, 1, 1, 1, 1, arch)
    with pytest.raises(ValueError, match="unknown kernel 'expand'"):
        tiles.shared_bytes("expand", tiles.Tile(), torch.float16, arch)
    with pytest.raises(ValueError, match="unknown part 'dw'"):
        tiles.algorithm("dw", torch.float16, 1, 1, 1, 1, arch)


@pytest.mark.parametrize(
    "capability, dtype, M, expected",
    [
        (80, torch.bfloat16, 8192, "fused"),
        (89, torch.float16, 8192, "fused"),
        (90, torch.bfloat16, 8192, "accumulate"),
        (90, torch.bfloat16, 16, "fused"),
        (100, torch.float16, 8192, "accumulate"),
        (120, torch.bfloat16, 8192, "fused"),
        (80, torch.float32, 8192, "accumulate"),
    ],
)
def test_the_prior(capability, dtype, M, expected):
    arch = tiles.arch_of(capability, 100)
    for part in tiles.PARTS:
        assert tiles.algorithm(part, dtype, M, 4096, 4096, 16, arch) == expected


# ----------------------------------------------------------------------------------------- tables


def entry(what="forward", take="fused", **sizes):
    own = {"M": 8192, "N": 4096, "K": 4096, "r": 16} | sizes
    return tuned.Entry("adapter_linear", what, "bfloat16", tuple(own.values()), take)


def measured(part="forward", M=8192, dtype=torch.bfloat16, device=DEVICE):
    return tiles.algorithm(part, dtype, M, 4096, 4096, 16, tiles.arch_of(90, 132, device))


def test_a_measured_algorithm_replaces_the_prior(tables):
    assert measured() == "accumulate"  # no table yet
    tables.write(DEVICE, entry())
    assert measured() == "fused"
    assert measured(M=5000) == "fused"  # the bucket of 8192
    assert measured(M=32768) == "accumulate"  # two steps away
    assert measured(part="dx") == "accumulate"
    assert measured(dtype=torch.float16) == "accumulate"
    assert measured(device="another card") == "accumulate"
    tables.write(DEVICE, entry(take="magic"))
    assert measured() == "accumulate"


def test_a_measured_tile_replaces_the_prior_if_it_is_still_a_candidate(tables):
    arch = tiles.arch_of(90, 132, DEVICE)
    candidates = tiles.candidates("main", torch.bfloat16, arch)

    def chosen(regular=True):
        return tiles.choose("main", torch.bfloat16, 8192, 4096, 4096, 16, arch, regular)

    prior, irregular = chosen(), chosen(regular=False)
    other = next(tile for tile in candidates if tile not in (prior, irregular))
    tables.write(DEVICE, entry("tile main", tuple(asdict(other).items())))
    assert chosen() == other
    assert chosen(regular=False) == irregular  # it was measured on regular operands
    gone = tuple((asdict(other) | {"BLOCK_M": 512}).items())
    tables.write(DEVICE, entry("tile main", gone))
    assert chosen() == prior
