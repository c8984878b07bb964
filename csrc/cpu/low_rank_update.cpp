// Threads share the rows, or, where there are few, the columns. Each brings the columns of b that it
// needs into the order it reads them in, a panel at a time that stays in the second cache, and goes
// along its rows of out.
#include "low_rank_update.hpp"

#include "kept.hpp"
#include "packed.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

constexpr int ROWS = LANES == 16 ? 4 : 6;
constexpr int VECTORS = LANES == 16 ? 4 : 2;  // ROWS x VECTORS sums fill the registers
constexpr int STRIP = VECTORS * LANES;
constexpr int PANEL = 16384;    // elements of b
constexpr int MANY = 8 * ROWS;  // rows of a thread: as many as are worth a copy of b of its own

// COUNT rows from `row` on, of the STRIP columns from `column` on; b [r, STRIP].
template <int COUNT, bool MASKED>
void block(const LowRankUpdate& call, std::int64_t row, std::int64_t column, const float* b) {
    Floats sums[COUNT][VECTORS];
    float* out[COUNT];
    const float* a[COUNT];
    for (int i = 0; i < COUNT; ++i) {
        out[i] = call.out + (row + i) * call.out_stride + column;
        a[i] = call.a + (row + i) * call.a_stride;
        for (int v = 0; v < VECTORS; ++v) {
            sums[i][v] = MASKED ? Floats{} : load(out[i] + v * LANES);
        }
    }
    for (std::int64_t rank = 0; rank < call.r; ++rank) {
        Floats right[VECTORS];
        for (int v = 0; v < VECTORS; ++v) right[v] = load(b + rank * STRIP + v * LANES);
        for (int i = 0; i < COUNT; ++i) {
            for (int v = 0; v < VECTORS; ++v) sums[i][v] += a[i][rank] * right[v];
        }
    }
    for (int i = 0; MASKED && i < COUNT; ++i) {
        const std::uint16_t* bits = call.bits + (row + i) * words_of(call.columns);
        for (int v = 0; v < VECTORS; ++v) {
            sums[i][v] = load(out[i] + v * LANES) +
                         kept(sums[i][v], bits_at(bits, column + v * LANES));
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

// For as many rows as there are before `end`, at most COUNT.
template <int COUNT>
void rows(const LowRankUpdate& call, std::int64_t row, std::int64_t end, std::int64_t column,
          const float* b) {
    if (end - row >= COUNT) {
        if (call.bits) {
            block<COUNT, true>(call, row, column, b);
        } else {
            block<COUNT, false>(call, row, column, b);
        }
    } else if constexpr (COUNT > 1) {
        rows<COUNT - 1>(call, row, end, column, b);
    }
}

// Fewer columns than a strip has.
void rest(const LowRankUpdate& call, std::int64_t row, std::int64_t end, std::int64_t column,
          std::int64_t width, const float* b) {
    for (; row < end; ++row) {
        float* out = call.out + row * call.out_stride + column;
        const float* a = call.a + row * call.a_stride;
        for (std::int64_t j = 0; j < width; ++j) {
            float sum = 0;
            for (std::int64_t rank = 0; rank < call.r; ++rank) sum += a[rank] * b[rank * STRIP + j];
            if (call.bits) {
                const std::uint16_t* bits = call.bits + row * words_of(call.columns);
                if (!(bits_at(bits, column + j) & 1u)) sum = 0;
            }
            sum += out[j];
            if (call.g) sum *= call.g[column + j];
            out[j] = call.bias ? sum + call.bias[column + j] : sum;
        }
    }
}

// b's columns of a strip as [r, STRIP].
void fill(const LowRankUpdate& call, std::int64_t column, int width, float* b) {
    if (call.b_row == 1) {
        transpose(call.b + column * call.b_column, call.b_column, width, call.r, b, STRIP);
        return;
    }
    for (std::int64_t rank = 0; rank < call.r; ++rank) {
        const float* from = call.b + rank * call.b_row + column * call.b_column;
        for (int j = 0; j < width; ++j) b[rank * STRIP + j] = from[j * call.b_column];
    }
}

void part(const LowRankUpdate& call, std::int64_t top, std::int64_t bottom, std::int64_t first,
          std::int64_t last) {
    const std::int64_t size = call.r * STRIP;  // of b for a strip
    const std::int64_t strips = (last - first + STRIP - 1) / STRIP;
    const std::int64_t most = size > 0 && PANEL > size ? PANEL / size : 1;
    const std::int64_t panels = (strips + most - 1) / most;
    const std::int64_t panel = (strips + panels - 1) / panels * STRIP;  // none much narrower
    Buffer<float> b(panel * call.r);
    for (std::int64_t left = first; left < last; left += panel) {
        const std::int64_t width = least(last - left, panel);
        const std::int64_t full = width - width % STRIP;
        for (std::int64_t j = 0; j < width; j += STRIP) {
            fill(call, left + j, least(width - j, STRIP), b + j * call.r);
        }
        for (std::int64_t row = top; row < bottom; row += ROWS) {
            for (std::int64_t j = 0; j < full; j += STRIP) {
                rows<ROWS>(call, row, bottom, left + j, b + j * call.r);
            }
        }
        if (full < width) rest(call, top, bottom, left + full, width - full, b + full * call.r);
    }
}

}  // namespace

void low_rank_update(const LowRankUpdate& call, int threads) {
    if (call.rows <= 0 || call.columns <= 0) return;
    if (call.rows >= MANY * threads) {
        parallel_for(call.rows, ROWS, threads, [&](std::int64_t top, std::int64_t bottom) {
            part(call, top, bottom, 0, call.columns);
        });
    } else {
        parallel_for(call.columns, STRIP, threads, [&](std::int64_t first, std::int64_t last) {
            part(call, 0, call.rows, first, last);
        });
    }
}

}  // namespace fastlora::FASTLORA_ISA
