// Threads share columns: each brings the columns of b that it needs into the order it reads them in.
#include "low_rank_update.hpp"

#include "parallel.hpp"
#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

constexpr int ROWS = 4;
constexpr int VECTORS = LANES == 16 ? 4 : 2;  // ROWS x VECTORS sums fill the registers
constexpr int STRIP = VECTORS * LANES;
constexpr int AHEAD = 2 * ROWS;  // rows: pieces of a strip's width are too short to be foreseen

// COUNT rows from `row` on, of the STRIP columns from `column` on; b [r, STRIP].
template <int COUNT>
void block(const LowRankUpdate& call, std::int64_t row, std::int64_t column, const float* b) {
    Floats sums[COUNT][VECTORS];
    float* out[COUNT];
    const float* a[COUNT];
    for (int i = 0; i < COUNT; ++i) {
        out[i] = call.out + (row + i) * call.out_stride + column;
        a[i] = call.a + (row + i) * call.a_stride;
        for (int v = 0; v < VECTORS; ++v) {
            sums[i][v] = load(out[i] + v * LANES);
            __builtin_prefetch(out[i] + AHEAD * call.out_stride + v * LANES, 1);
        }
    }
    for (std::int64_t rank = 0; rank < call.r; ++rank) {
        Floats right[VECTORS];
        for (int v = 0; v < VECTORS; ++v) right[v] = load(b + rank * STRIP + v * LANES);
        for (int i = 0; i < COUNT; ++i) {
            for (int v = 0; v < VECTORS; ++v) sums[i][v] += a[i][rank] * right[v];
        }
    }
    for (int v = 0; v < VECTORS; ++v) {
        if (call.g) {
            const Floats g = load(call.g + column + v * LANES);
            for (int i = 0; i < COUNT; ++i) sums[i][v] *= g;
        }
        if (call.bias) {
            const Floats bias = load(call.bias + column + v * LANES);
            for (int i = 0; i < COUNT; ++i) sums[i][v] += bias;
        }
        for (int i = 0; i < COUNT; ++i) store(out[i] + v * LANES, sums[i][v]);
    }
}

void strip(const LowRankUpdate& call, std::int64_t column, const float* b) {
    std::int64_t row = 0;
    for (; row + ROWS <= call.rows; row += ROWS) block<ROWS>(call, row, column, b);
    for (; row < call.rows; ++row) block<1>(call, row, column, b);
}

// Fewer columns than a strip has.
void rest(const LowRankUpdate& call, std::int64_t column, std::int64_t width, const float* b) {
    for (std::int64_t row = 0; row < call.rows; ++row) {
        float* out = call.out + row * call.out_stride + column;
        const float* a = call.a + row * call.a_stride;
        for (std::int64_t j = 0; j < width; ++j) {
            float sum = out[j];
            for (std::int64_t rank = 0; rank < call.r; ++rank) sum += a[rank] * b[rank * STRIP + j];
            if (call.g) sum *= call.g[column + j];
            out[j] = call.bias ? sum + call.bias[column + j] : sum;
        }
    }
}

}  // namespace

void low_rank_update(const LowRankUpdate& call, int threads) {
    parallel_for(call.columns, STRIP, threads, [&](std::int64_t first, std::int64_t last) {
        Buffer<float> b(call.r * STRIP);
        for (std::int64_t column = first; column < last; column += STRIP) {
            const std::int64_t width = last - column < STRIP ? last - column : STRIP;
            for (std::int64_t rank = 0; rank < call.r; ++rank) {
                const float* from = call.b + rank * call.b_row + column * call.b_column;
                for (std::int64_t j = 0; j < width; ++j) {
                    b[rank * STRIP + j] = from[j * call.b_column];
                }
            }
            if (width == STRIP) {
                strip(call, column, b + 0);
            } else {
                rest(call, column, width, b + 0);
            }
        }
    });
}

}  // namespace fastlora::FASTLORA_ISA
