// ‖W_j + s (BA)_j‖ for every row j, BA never formed (fastlora/ops/weight_norm/README.md).
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace fastlora {

struct RowNorm {
    const float* weight;  // [n, k]; element (i, j) at i * row + j * column, one of which is 1
    std::int64_t row, column;
    std::int64_t n, k, r;
    const float* lora_A;  // [r, k], rows a_stride apart
    std::int64_t a_stride;
    const float* lora_B;  // [n, r], rows b_stride apart
    std::int64_t b_stride;
    double scaling;
    double cancellation, floor;  // as in contract.py
    const double* known_sq;      // ‖W_j‖² [n], or null
    double* weight_sq;           // [n], written where known_sq is null
    float* norm;                 // [n]
    std::uint8_t* lost;          // [n]: 1 for a row that is to be computed another way
};

}  // namespace fastlora

// Returns how many rows are lost.
FASTLORA_EACH_ISA(std::int64_t row_norm(const RowNorm& call, int threads);)
