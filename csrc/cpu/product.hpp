// Products with a narrow side, summed in float32 over a run and from there in what Sum is.
#pragma once

#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {
namespace {

// At a time: ROWS x 2 sums, or fewer rows and as many in all, so many that the latency of a
// multiplication is hidden and few enough for the registers.
constexpr int ROWS = LANES == 16 ? 8 : 6;
constexpr int LINE = 16;                   // floats that come from memory together

// A matrix of which vectors are loaded: rows `stride` apart, `width` of their elements used.
struct Right {
    const float* values;
    std::int64_t stride, width;  // width: a multiple of LANES
};

// sums += w a for COUNT rows w of `length` elements and VECTORS vectors of a's columns. Meanwhile
// what lies `ahead` of w is fetched: w is read in pieces too short for the processor to foresee.
template <int COUNT, int VECTORS, class Sum>
void multiply(const float* const* w, const Right& a, std::int64_t column, std::int64_t length,
              std::int64_t ahead, Sum* sums) {
    Floats acc[COUNT][VECTORS];
#pragma GCC unroll 8  // all of these loops, or the sums begin, or end, in memory
    for (int i = 0; i < COUNT; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) acc[i][v] = Floats{};
    }
    const float* row = a.values + column;
    for (std::int64_t line = 0; line < length; line += LINE) {
        for (int i = 0; i < COUNT; ++i) __builtin_prefetch(w[i] + line + ahead);
        const std::int64_t end = line + LINE < length ? line + LINE : length;
        for (std::int64_t j = line; j < end; ++j, row += a.stride) {
            Floats right[VECTORS];
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) right[v] = load(row + v * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < COUNT; ++i) {
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) acc[i][v] += w[i][j] * right[v];
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            add_to(sums + i * a.width + column + v * LANES, acc[i][v]);
        }
    }
}

template <int COUNT, int VECTORS, class Sum>
void multiply_columns(const float* const* w, const Right& a, std::int64_t column,
                      std::int64_t length, std::int64_t ahead, Sum* sums) {
    for (; column + VECTORS * LANES <= a.width; column += VECTORS * LANES) {
        multiply<COUNT, VECTORS>(w, a, column, length, ahead, sums);
    }
    if constexpr (VECTORS > 1) {
        multiply_columns<COUNT, VECTORS - 1>(w, a, column, length, ahead, sums);
    }
}

// sums [rows, a.width] += w [rows, length] a [length, a.width], for rows <= COUNT.
template <int COUNT, class Sum>
void multiply_rows(const float* w, std::int64_t stride, std::int64_t rows, const Right& a,
                   std::int64_t length, Sum* sums) {
    if (rows == COUNT) {
        const float* some[COUNT];
        for (int c = 0; c < COUNT; ++c) some[c] = w + c * stride;
        multiply_columns<COUNT, (3 * COUNT <= 2 * ROWS ? 3 : 2)>(some, a, 0, length, ROWS * stride,
                                                                 sums);
    } else if constexpr (COUNT > 1) {
        multiply_rows<COUNT - 1>(w, stride, rows, a, length, sums);
    }
}

// sums [rows, a.width] += w [rows, length] a [length, a.width].
template <class Sum>
void add_product(const float* w, std::int64_t stride, std::int64_t rows, const Right& a,
                 std::int64_t length, Sum* sums) {
    for (std::int64_t i = 0; i < rows; i += ROWS) {
        multiply_rows<ROWS>(w + i * stride, stride, rows - i < ROWS ? rows - i : ROWS, a, length,
                            sums + i * a.width);
    }
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA
