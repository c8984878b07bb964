// out = x where a mask drawn from a seed keeps it, and 0 elsewhere (philox_keep of fastlora/ops/dropout.py).
#pragma once

#include <cstdint>

#include "isa.hpp"

namespace fastlora {

struct Dropout {
    const float* x;  // [rows, columns], rows x_stride apart; null where bits alone are wanted
    std::int64_t rows, columns, x_stride;
    float* out;  // [rows, columns], rows out_stride apart; may be x
    std::int64_t out_stride;
    std::uint64_t seed;
    std::uint32_t threshold;  // of the 65536 levels of a draw, those that drop
    std::uint16_t* bits;      // [rows, columns / 16 rounded up]: a bit of the mask an element
    bool drawn;               // bits are there, and read; else they are drawn and written
};

}  // namespace fastlora

FASTLORA_EACH_ISA(void dropout(const Dropout& call, int threads);)
