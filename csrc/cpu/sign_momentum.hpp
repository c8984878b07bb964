// Lion's and Tiger's update of many tensors in one call (fastlora/ops/sign_momentum/README.md).
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace fastlora {

enum class Stored : std::uint8_t { f32, bf16, f16, q8 };  // q8: int8 codes with scales

constexpr std::int64_t Q8_BLOCK = 256;  // elements that share a scale

// One entry of the list; all contiguous. What the call does not use is null.
struct Entry {
    char* param;
    const char* grad;
    char* momentum;
    float* scales;  // of q8
    std::int64_t count, row;  // elements, and those of the last axis
    Stored param_type, grad_type, momentum_type;
};

// Elements first..last of an entry: what a thread takes at once. They begin with a block of q8, and,
// where rows matter, with a row.
struct Chunk {
    std::int64_t entry, first, last;
};

enum class Relative : std::uint8_t { no, tensor, rows };

struct SignMomentum {
    const Entry* entries;
    std::int64_t count;
    const Chunk* chunks;  // in the order of entries
    std::int64_t chunk_count;
    float a, b, c, d;
    // one a tensor, or of all where `many` is false
    const double *lr, *decay, *floor;
    bool many;
    const Relative* relative;         // [count] or null
    const std::uint8_t* const* rows;  // [count] of null or which rows move, or null
    bool mask_momentum;               // rows that do not move keep their momentum too
    bool shrinks;
    float shrink;
    const float* centers;       // [count], where it shrinks
    const std::uint8_t* skip;   // [count] or null: parameters that stay
    std::uint8_t* lost;         // [count], written where it shrinks: a gradient that is not finite
    bool moves;                 // parameters are updated, and not only shrunk
    const std::uint32_t* keys;  // [count, 2], of stochastic rounding, or null
};

}  // namespace fastlora

FASTLORA_EACH_ISA(void sign_momentum(const SignMomentum& call, int threads);)
