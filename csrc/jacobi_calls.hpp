// What is asked of Jacobi's solvers, on the CPU and on CUDA (fastlora/ops/small_solvers/README.md).
#pragma once

#include <cstdint>

namespace fastlora {

constexpr int LARGEST = 128;  // rows and columns that a matrix may have

enum class Outcome : std::uint8_t { solved = 0, not_finite = 1, not_converged = 2 };

// Of `count` matrices, contiguous and row after row: all double where `wide`, else all float. What
// is written for a matrix whose outcome is not `solved` means nothing.
struct SymmetricEigen {
    const void* a;  // [count, n, n], of which the lower triangles are read
    bool wide;
    std::int64_t count;
    int n, sweeps;
    void* w;  // [count, n], ascending
    void* v;  // [count, n, n], eigenvectors in columns
    Outcome* outcomes;  // [count]
};

struct Svd {
    const void* a;  // [count, m, n], m >= n
    bool wide;
    std::int64_t count;
    int m, n, sweeps;
    void* u;   // [count, m, n]
    void* s;   // [count, n], descending
    void* vh;  // [count, n, n]
    Outcome* outcomes;  // [count]
};

}  // namespace fastlora
