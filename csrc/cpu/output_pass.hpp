// Backward's one pass over dY [rows, columns] of y = g ∘ (x Wᵀ + t Cᵀ) + bias: all that is read off
// dY beside the large products (fastlora/ops/adapter_linear/README.md). Whatever is null is neither
// given nor wanted.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace fastlora {

struct OutputPass {
    const float* dy;  // rows dy_stride apart
    std::int64_t rows, columns, dy_stride;
    const float* g;  // [columns]
    float* scaled;   // dY ∘ g, contiguous; h and dc do without

    const float* read;  // y or z, rows read_stride apart: dg is wanted
    std::int64_t read_stride;
    const float* bias;           // [columns]; with y only
    double least, most, hidden;  // the bounds of contract.py's `legible`
    float* dg;                   // [columns]
    std::uint8_t* unread;        // [columns]: 1 where y does not show dg; null says that z is read

    std::int64_t r;
    const float* c;  // [columns, r], rows c_stride apart
    std::int64_t c_stride;
    double factor;
    float* h;        // factor · (dY ∘ g) C [rows, r], contiguous
    const float* t;  // [rows, r], rows t_stride apart
    std::int64_t t_stride;
    float* dc;  // (dY ∘ g)ᵀ t [columns, r], contiguous
};

}  // namespace fastlora

// Returns how many columns are unread.
FASTLORA_EACH_ISA(std::int64_t output_pass(const OutputPass& call, int threads);)
