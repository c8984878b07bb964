// Products of a panel of rows with a few vectors: along the rows (x_i · v_c), and across them
// (z_c += Σ_i u_ic x_i). Rows of both lie along memory, vectors have zeros up to a multiple of LANES;
// so one layout serves both, and nothing is ever turned. Included by kernel files only.
#pragma once

#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int GROUP = 8;                     // vectors that are multiplied by at once
constexpr int PANEL = 24;                    // rows of a panel at most
constexpr int RUN = 512;                     // so long a piece of GROUP vectors stays in L1
constexpr int TILE_ROWS = 3;                 // along: sums of a tile fill the registers
constexpr int TILE_GROUP = LANES == 16 ? 8 : 4;
constexpr int TILE_VECTORS = LANES == 16 ? 2 : 3;  // across

// Rows `stride` apart.
struct Rows {
    const float* values;
    std::int64_t stride;
    const float* operator[](std::int64_t row) const { return values + row * stride; }
    Rows from(std::int64_t row, std::int64_t column = 0) const {
        return {values + row * stride + column, stride};
    }
};

// The first `count` of LANES values, zeros behind them.
inline Floats load_some(const float* from, std::int64_t count) {
    Floats values = {};
    std::memcpy(&values, from, static_cast<std::size_t>(count) * sizeof(float));
    return values;
}

// Keeps the compiler from loading it again for every use.
inline Floats in_register(Floats values) {
#if defined(__AVX512F__)
    asm("" : "+v"(values));
#endif
    return values;
}

// sums [ROWS][GROUP][LANES] (+)= lane by lane the products of ROWS rows and TILE_GROUP vectors.
template <int COUNT>
void along_tile(Rows x, Rows v, std::int64_t length, bool first, float* sums) {
    Floats acc[COUNT][TILE_GROUP];
    for (int i = 0; i < COUNT; ++i) {
        for (int c = 0; c < TILE_GROUP; ++c) {
            acc[i][c] = first ? Floats{} : load(sums + (i * GROUP + c) * LANES);
        }
    }
    const float* rows[COUNT];
    for (int i = 0; i < COUNT; ++i) rows[i] = x[i];
    const float* vectors[TILE_GROUP];
    for (int c = 0; c < TILE_GROUP; ++c) vectors[c] = v[c];
    std::int64_t k = 0;
    for (; k + LANES <= length; k += LANES) {
        Floats left[COUNT];
        for (int i = 0; i < COUNT; ++i) left[i] = load(rows[i] + k);
        for (int c = 0; c < TILE_GROUP; ++c) {
            const Floats right = in_register(load(vectors[c] + k));
            for (int i = 0; i < COUNT; ++i) acc[i][c] += left[i] * right;
        }
    }
    for (int i = 0; i < COUNT; ++i) {
        for (int c = 0; c < TILE_GROUP; ++c) store(sums + (i * GROUP + c) * LANES, acc[i][c]);
    }
}

// The same for the last `length` < LANES values of a row.
inline void along_rest(const float* x, Rows v, std::int64_t length, bool first, float* sums) {
    const Floats left = load_some(x, length);
    for (int c = 0; c < GROUP; ++c) {
        Floats own = left * load(v[c]);
        if (!first) own += load(sums + c * LANES);
        store(sums + c * LANES, own);
    }
}

typedef float Four __attribute__((vector_size(16)));

inline Four folded(const float* lanes) {
    Four total, part;
    std::memcpy(&total, lanes, sizeof total);
    for (int lane = 4; lane < LANES; lane += 4) {
        std::memcpy(&part, lanes + lane, sizeof part);
        total += part;
    }
    return total;
}

// out[i * out_stride + c] = x_i · v_c of `rows` ≤ PANEL rows and GROUP vectors.
inline void along(Rows x, std::int64_t rows, Rows v, std::int64_t length, float* out,
                  std::int64_t out_stride) {
    alignas(64) float sums[PANEL * GROUP * LANES];
    for (std::int64_t from = 0; from < length; from += RUN) {
        const std::int64_t some = least(length - from, RUN), whole = some / LANES * LANES;
        for (int c = 0; whole && c < GROUP; c += TILE_GROUP) {
            const Rows vectors = v.from(c, from);
            float* to = sums + c * LANES;
            std::int64_t i = 0;
            for (; i + TILE_ROWS <= rows; i += TILE_ROWS) {
                along_tile<TILE_ROWS>(x.from(i, from), vectors, whole, from == 0,
                                      to + i * GROUP * LANES);
            }
            for (; i < rows; ++i) {
                along_tile<1>(x.from(i, from), vectors, whole, from == 0, to + i * GROUP * LANES);
            }
        }
        for (std::int64_t i = 0; whole < some && i < rows; ++i) {
            along_rest(x[i] + from + whole, v.from(0, from + whole), some - whole,
                       from + whole == 0, sums + i * GROUP * LANES);
        }
    }
    for (std::int64_t i = 0; i < rows; ++i) {
        for (int c = 0; c < GROUP; c += 4) {
            const float* lanes = sums + (i * GROUP + c) * LANES;
            const Four p = folded(lanes), q = folded(lanes + LANES),
                       r = folded(lanes + 2 * LANES), s = folded(lanes + 3 * LANES);
            const Four total = (Four{p[0], q[0], r[0], s[0]} + Four{p[1], q[1], r[1], s[1]}) +
                               (Four{p[2], q[2], r[2], s[2]} + Four{p[3], q[3], r[3], s[3]});
            std::memcpy(out + i * out_stride + c, &total, sizeof total);
        }
    }
}

// z_c += Σ_i u_ic x_i in TILE_GROUP vectors' COUNT registers from `column` on.
template <int COUNT>
void across_tile(Rows x, std::int64_t rows, std::int64_t column, const float* u,
                 std::int64_t u_stride, float* z, std::int64_t z_stride) {
    Floats acc[TILE_GROUP][COUNT];
    for (int c = 0; c < TILE_GROUP; ++c) {
        for (int v = 0; v < COUNT; ++v) acc[c][v] = load(z + c * z_stride + column + v * LANES);
    }
    const float* row = x.values + column;
    for (std::int64_t i = 0; i < rows; ++i, row += x.stride, u += u_stride) {
        Floats own[COUNT];
        for (int v = 0; v < COUNT; ++v) own[v] = load(row + v * LANES);
        for (int c = 0; c < TILE_GROUP; ++c) {
            for (int v = 0; v < COUNT; ++v) acc[c][v] += u[c] * own[v];
        }
    }
    for (int c = 0; c < TILE_GROUP; ++c) {
        for (int v = 0; v < COUNT; ++v) store(z + c * z_stride + column + v * LANES, acc[c][v]);
    }
}

inline void across_rest(Rows x, std::int64_t rows, std::int64_t column, std::int64_t width,
                        const float* u, std::int64_t u_stride, float* z, std::int64_t z_stride) {
    Floats acc[TILE_GROUP];
    for (int c = 0; c < TILE_GROUP; ++c) acc[c] = load(z + c * z_stride + column);
    for (std::int64_t i = 0; i < rows; ++i) {
        const Floats own = load_some(x[i] + column, width);
        for (int c = 0; c < TILE_GROUP; ++c) acc[c] += u[i * u_stride + c] * own;
    }
    for (int c = 0; c < TILE_GROUP; ++c) store(z + c * z_stride + column, acc[c]);
}

// z_c += Σ_i u_ic x_i of any number of rows and GROUP vectors z.
inline void across(Rows x, std::int64_t rows, std::int64_t length, const float* u,
                   std::int64_t u_stride, float* z, std::int64_t z_stride) {
    for (int c = 0; c < GROUP; c += TILE_GROUP) {
        float* to = z + c * z_stride;
        std::int64_t k = 0;
        for (; k + TILE_VECTORS * LANES <= length; k += TILE_VECTORS * LANES) {
            across_tile<TILE_VECTORS>(x, rows, k, u + c, u_stride, to, z_stride);
        }
        for (; k + LANES <= length; k += LANES) {
            across_tile<1>(x, rows, k, u + c, u_stride, to, z_stride);
        }
        if (k < length) across_rest(x, rows, k, length - k, u + c, u_stride, to, z_stride);
    }
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA
