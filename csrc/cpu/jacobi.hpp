// Symmetric eigenproblems and singular values of many small matrices.
#pragma once

#include <cstdint>

#include "../jacobi_calls.hpp"
#include "isa.hpp"

// `backwards` runs the items of every phase in the opposite order, which must not matter: on a GPU
// they run in any.
FASTLORA_EACH_ISA(
    // Each returns how many matrices are not solved.
    std::int64_t symmetric_eigen(const SymmetricEigen& call, bool backwards, int threads);
    std::int64_t svd(const Svd& call, bool backwards, int threads);)
