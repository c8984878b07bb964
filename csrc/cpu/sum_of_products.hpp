// out = g ∘ (Σ a diag(scale) b) + bias over a list of products: a layer's large product and its
// adapter's narrow one, or those of several layers, without a pass over out for each.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace fastlora {

struct Term {
    const float* a;  // [rows, depth], rows a_stride apart
    std::int64_t a_stride, depth;
    const float* b;  // [depth, columns]; element (i, j) at i * b_row + j * b_column, one of them 1
    std::int64_t b_row, b_column;
    const float* scale;  // [depth] or null
};

struct SumOfProducts {
    float* out;  // [rows, columns], rows out_stride apart: written, not read
    std::int64_t rows, columns, out_stride;
    const Term* terms;
    int count;          // of terms, at least 1
    const float* g;     // [columns] or null
    const float* bias;  // [columns] or null
    int slice;          // of a term's depth, how much is multiplied at once, at most; 0: as by default
};

}  // namespace fastlora

// The same to the bit for every number of threads.
FASTLORA_EACH_ISA(void sum_of_products(const SumOfProducts& call, int threads);)
