// out = g ∘ (out + keep ∘ (a b)) + bias with a narrow product a b: the adapter's way into a layer's
// output, and past a dropout's mask `keep` into its input's gradient.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace fastlora {

struct LowRankUpdate {
    float* out;  // [rows, columns], rows out_stride apart
    std::int64_t rows, columns, out_stride;
    const float* a;  // [rows, r], rows a_stride apart
    std::int64_t a_stride, r;
    const float* b;  // [r, columns]; element (i, j) at i * b_row + j * b_column
    std::int64_t b_row, b_column;
    const float* g;     // [columns] or null
    const float* bias;  // [columns] or null
    const std::uint16_t* bits;  // of the mask, as dropout.hpp has them; or null
};

}  // namespace fastlora

FASTLORA_EACH_ISA(void low_rank_update(const LowRankUpdate& call, int threads);)
