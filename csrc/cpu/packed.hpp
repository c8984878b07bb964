// A matrix in panels of a few rows, a panel's columns one after another, and its products with a
// block of vectors, an element's in all of them together. So both products, along the rows and across them, read
// memory in order, whatever the stride of the rows was. Included by kernel files only.
#pragma once

#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int REGISTERS = LANES == 16 ? 24 : 12;  // of sums: some are left for the operands
constexpr int TALL = 3 * LANES;                   // rows of a panel
constexpr int DEEP = 128;                         // columns of which a panel stays in L1

// to [columns, TALL]: `rows` ≤ TALL rows `stride` apart, zeros for those there are not.
inline void pack(const float* x, std::int64_t stride, int rows, std::int64_t columns, float* to) {
    typedef float Four __attribute__((vector_size(16)));
    constexpr std::int64_t TILE = 16;
    for (std::int64_t from = 0; from < columns; from += TILE) {
        const int some = least(columns - from, TILE);
        float* tile = to + from * TALL;
        for (int i = 0; i < TALL; i += 4) {
            const float* row = x + i * stride + from;
            int k = 0;
            for (; i + 4 <= rows && k + 4 <= some; k += 4) {
                Four a, b, c, d;
                std::memcpy(&a, row + k, sizeof a);
                std::memcpy(&b, row + stride + k, sizeof b);
                std::memcpy(&c, row + 2 * stride + k, sizeof c);
                std::memcpy(&d, row + 3 * stride + k, sizeof d);
                for (int lane = 0; lane < 4; ++lane) {
                    const Four turned{a[lane], b[lane], c[lane], d[lane]};
                    std::memcpy(tile + (k + lane) * TALL + i, &turned, sizeof turned);
                }
            }
            for (; k < some; ++k) {
                for (int j = 0; j < 4; ++j) {
                    tile[k * TALL + i + j] = i + j < rows ? row[j * stride + k] : 0;
                }
            }
        }
    }
}

// y [width, TALL] = (x v)ᵀ of a panel x [columns, TALL] and v [columns, width].
inline void along_packed(const float* x, std::int64_t columns, const float* v, int width,
                         float* y) {
    constexpr int SOME = REGISTERS / 3;
    for (std::int64_t from = 0; from < columns; from += DEEP) {
        const int length = least(columns - from, DEEP);
        for (int group = 0; group < width; group += SOME) {
            Floats acc[SOME][3] = {};
            const float* left = x + from * TALL;
            const float* right = v + from * width + group;
            for (int k = 0; k < length; ++k, left += TALL, right += width) {
                Floats own[3];
                for (int r = 0; r < 3; ++r) own[r] = load(left + r * LANES);
                for (int c = 0; c < SOME; ++c) {
                    for (int r = 0; r < 3; ++r) acc[c][r] += right[c] * own[r];
                }
            }
            for (int c = 0; c < SOME; ++c) {
                float* to = y + (group + c) * TALL;
                for (int r = 0; r < 3; ++r) {
                    store(to + r * LANES, from ? load(to + r * LANES) + acc[c][r] : acc[c][r]);
                }
            }
        }
    }
}

// z [COUNT, width] += xᵀ y in VECTORS vectors' columns of COUNT of x's; y [TALL, width].
template <class Vector, int COUNT, int VECTORS>
void packed_tile(const float* x, const float* y, int width, float* z, std::int64_t ahead) {
    constexpr int SIZE = sizeof(Vector) / sizeof(float);
    if (ahead) {
        for (int line = 0; line < COUNT * TALL; line += 16) {
            __builtin_prefetch(x + ahead + line, 0, 2);
        }
    }
    Vector acc[COUNT][VECTORS] = {};
    for (int i = 0; i < TALL; ++i, y += width) {
        Vector right[VECTORS];
        for (int v = 0; v < VECTORS; ++v) std::memcpy(&right[v], y + v * SIZE, sizeof(Vector));
        for (int k = 0; k < COUNT; ++k) {
            for (int v = 0; v < VECTORS; ++v) acc[k][v] += x[k * TALL + i] * right[v];
        }
    }
    for (int k = 0; k < COUNT; ++k) {
        for (int v = 0; v < VECTORS; ++v) {
            Vector old;
            std::memcpy(&old, z + k * width + v * SIZE, sizeof(Vector));
            old += acc[k][v];
            std::memcpy(z + k * width + v * SIZE, &old, sizeof(Vector));
        }
    }
}

template <class Vector, int COUNT>
void packed_tiles(const float* x, const float* y, int width, float* z, std::int64_t ahead) {
    constexpr int SIZE = sizeof(Vector) / sizeof(float);
    int c = 0;
    for (; c + 2 * SIZE <= width; c += 2 * SIZE) {
        packed_tile<Vector, COUNT, 2>(x, y + c, width, z + c, c ? 0 : ahead);
    }
    if (c < width) packed_tile<Vector, COUNT, 1>(x, y + c, width, z + c, c ? 0 : ahead);
}

template <class Vector>
void packed_all(const float* x, std::int64_t columns, const float* y, int width, float* z,
                std::int64_t ahead) {
    constexpr int SIZE = sizeof(Vector) / sizeof(float), MOST = REGISTERS / 2;
    std::int64_t k = 0;
    if (width == SIZE) {
        for (; k + 2 * MOST <= columns; k += 2 * MOST) {
            packed_tile<Vector, 2 * MOST, 1>(x + k * TALL, y, width, z + k * width, ahead);
        }
    }
    for (; k + MOST <= columns; k += MOST) {
        packed_tiles<Vector, MOST>(x + k * TALL, y, width, z + k * width, ahead);
    }
    for (; k < columns; ++k) {
        packed_tiles<Vector, 1>(x + k * TALL, y, width, z + k * width, ahead);
    }
}

// z [columns, width] += xᵀ y of a panel x [columns, TALL] and y [TALL, width], a multiple of 8. The
// panel `ahead` of it comes next and is asked for, unless that is 0.
inline void across_packed(const float* x, std::int64_t columns, const float* y, int width, float* z,
                          std::int64_t ahead) {
    typedef float Eight __attribute__((vector_size(32)));
    if (LANES == 16 && width % LANES != 0) {
        packed_all<Eight>(x, columns, y, width, z, ahead);
    } else {
        packed_all<Floats>(x, columns, y, width, z, ahead);
    }
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA
