// The leading singular triples of many matrices by block Lanczos (fastlora/ops/low_rank_svd/README.md).
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace fastlora {

enum class Found : std::uint8_t { triples, nothing, extremes };

struct BlockLanczos {
    const float* const* x;  // `count` matrices [rows, columns], rows `stride` apart
    std::int64_t count, stride, rows, columns;
    std::int64_t width, blocks;  // of so many vectors: 8, 16, 24 or 32
    // At random, [2 width, ..] with rows `start_stride` apart: the space begins with XᵀX of the first
    // `width` rows, [.., columns], or where `left` with Xᵀ of them, [.., rows]; the others,
    // [.., columns], are of what is to check it
    const float* start;
    std::int64_t start_stride;
    bool left;
    std::int64_t q;
    double low, high;  // norms between which it computes
    double alike;      // neighbours that differ by less than this share are checked
    double growth;     // by what share the check may raise a value
    double least;      // s_q as a share of s_1 that is resolved
    // XᵀY, which only leads to the next block, is multiplied in bfloat16 where the processor can, unless
    // this is 1. What has s_q below this share, or has converged, is done again without
    double rounded_least;
    float* u;          // [count, rows, q]
    double* s;         // [count, q]
    float* vh;         // [count, q, columns]
    double* squares;   // [count]: ‖X‖²
    double* checked;   // [count]: the largest growth in the check, -1 where there was none
    Found* found;      // [count]: nothing where another way must be taken, extremes where the norm
                       // is out of range or not a number
};

}  // namespace fastlora

FASTLORA_EACH_ISA(void block_lanczos(const BlockLanczos& call, int threads);)
