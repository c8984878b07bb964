// A dropout mask in bits: sixteen neighbouring elements of a row in a word, the first in its lowest.
// Included by kernel files only.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int WORD = 16;  // elements

inline std::int64_t words_of(std::int64_t columns) { return (columns + WORD - 1) / WORD; }

// The bits of the LANES elements from `column` of a row on, a multiple of LANES.
inline unsigned bits_at(const std::uint16_t* row, std::int64_t column) {
    return static_cast<unsigned>(row[column / WORD]) >> (column % WORD);
}

// Of the lowest LANES bits: the value where there is one, else 0.
inline Floats kept(Floats values, unsigned bits) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_maskz_mov_ps(
        static_cast<__mmask16>(bits), reinterpret_cast<__m512>(values)));
#else
    typedef std::uint32_t Words __attribute__((vector_size(4 * LANES)));
    Words own;
    for (int lane = 0; lane < LANES; ++lane) own[lane] = 1u << lane;
    const Words there = reinterpret_cast<Words>((own & bits) != 0);
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(values) & there);
#endif
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA
