// A layer with its adapter, y = x Wᵀ + t Bᵀ + bias with t = factor · drop(x) Aᵀ, forwards and
// backwards, each in one call: of few rows, what stands between the products takes longer than they.
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace fastlora {

// Element (i, j) at i * row + j * column; one of them is 1.
struct Matrix {
    const float* values;
    std::int64_t row, column;
};

struct AdapterLinear {
    std::int64_t rows, in, out, r;
    const float* x;  // [rows, in], rows x_stride apart
    std::int64_t x_stride;
    Matrix w, a, b;  // W [out, in], A [r, in], B [out, r]; B's rows are contiguous where dx or da is wanted
    float factor;    // scaling over the share that dropout keeps
    std::uint64_t seed;
    std::uint32_t threshold;  // of dropout.hpp; 0: nothing is dropped
    int slice;                // as in sum_of_products.hpp
    std::int64_t small;       // multiply-adds of a product below which one thread makes it
};

struct AdapterLinearForward {
    const float* bias;  // [out] or null
    float* y;           // [rows, out], contiguous
    float* t;           // [rows, r], contiguous
};

// dx = dY W + keep ∘ (H A), dA = Hᵀ drop(x), dB = dYᵀ t with H = factor · dY B. What is null is not wanted,
// and of the operands only what these need is there.
struct AdapterLinearBackward {
    const float* dy;  // [rows, out], rows dy_stride apart
    std::int64_t dy_stride;
    const float* t;  // [rows, r], contiguous
    float* dx;       // [rows, in], contiguous
    float* da;       // [r, in], contiguous
    float* db;       // [out, r], contiguous
};

}  // namespace fastlora

FASTLORA_EACH_ISA(
    void adapter_linear_forward(const AdapterLinear& layer, const AdapterLinearForward& call,
                                int threads);
    void adapter_linear_backward(const AdapterLinear& layer, const AdapterLinearBackward& call,
                                 int threads);)
