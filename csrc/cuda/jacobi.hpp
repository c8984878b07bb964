// The launchers of jacobi.cu. Pointers are to the device's memory, and nothing waits for it.
#pragma once

#include <cstddef>

#include "../jacobi_calls.hpp"

namespace fastlora::cuda {

// Bytes of the device's memory that a call needs beside its operands: none where a matrix fits into
// a multiprocessor's shared memory. `device` is the current one. Throws std::runtime_error.
std::size_t workspace(const SymmetricEigen& call);
std::size_t workspace(const Svd& call);

// Queues the call on a cudaStream_t. Throws std::runtime_error where it cannot be launched.
void symmetric_eigen(const SymmetricEigen& call, void* workspace, void* stream);
void svd(const Svd& call, void* workspace, void* stream);

}  // namespace fastlora::cuda
