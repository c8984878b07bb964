// Panels of TALL rows of a matrix, a panel's columns one after another, and their products with a
// block of vectors, an element's in all of them together. So both products, along the rows and
// across them, read memory in order, whatever the stride of the rows was. Included by kernel files only.
#pragma once

#if defined(__AVX512F__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC's own header, wrongly
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#include "isa.hpp"
#include "vector.hpp"

// Whether the compiler knows AVX-512's products of bfloat16, for a function that is compiled for them.
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 10)
#define FASTLORA_HAS_PAIRS 1
#else
#define FASTLORA_HAS_PAIRS 0
#endif

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int REGISTERS = LANES == 16 ? 24 : 12;  // of sums: some are left for the operands
constexpr int DEEP = 128;                         // columns of which a panel stays in L1

// The first `count` of LANES values, zeros behind them.
inline Floats load_some(const float* from, std::int64_t count) {
    Floats values = {};
    std::memcpy(&values, from, static_cast<std::size_t>(count) * sizeof(float));
    return values;
}

typedef float Four __attribute__((vector_size(16)));

// Of both one after the other, those elements.
template <int A, int B, int C, int D>
inline Four merge(Four one, Four other) {
#if defined(__clang__)
    return __builtin_shufflevector(one, other, A, B, C, D);
#else
    typedef std::int32_t Places __attribute__((vector_size(16)));
    return __builtin_shuffle(one, other, Places{A, B, C, D});
#endif
}

inline void transpose_one_by_one(const float* from, std::int64_t from_stride, std::int64_t rows,
                                 std::int64_t columns, float* to, std::int64_t to_stride) {
    for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t k = 0; k < columns; ++k) to[k * to_stride + i] = from[i * from_stride + k];
    }
}

// to [columns, to_stride] = fromᵀ of from [rows, from_stride].
inline void transpose(const float* from, std::int64_t from_stride, std::int64_t rows,
                      std::int64_t columns, float* to, std::int64_t to_stride) {
    std::int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        const float* row = from + i * from_stride;
        std::int64_t k = 0;
        for (; k + 4 <= columns; k += 4) {
            Four a, b, c, d;
            std::memcpy(&a, row + k, sizeof a);
            std::memcpy(&b, row + from_stride + k, sizeof b);
            std::memcpy(&c, row + 2 * from_stride + k, sizeof c);
            std::memcpy(&d, row + 3 * from_stride + k, sizeof d);
            const Four left = merge<0, 4, 1, 5>(a, b), more_left = merge<0, 4, 1, 5>(c, d);
            const Four right = merge<2, 6, 3, 7>(a, b), more_right = merge<2, 6, 3, 7>(c, d);
            const Four rows[4] = {
                merge<0, 1, 4, 5>(left, more_left), merge<2, 3, 6, 7>(left, more_left),
                merge<0, 1, 4, 5>(right, more_right), merge<2, 3, 6, 7>(right, more_right)};
            for (int lane = 0; lane < 4; ++lane) {
                std::memcpy(to + (k + lane) * to_stride + i, &rows[lane], sizeof rows[lane]);
            }
        }
        transpose_one_by_one(row + k, from_stride, 4, columns - k, to + k * to_stride + i, to_stride);
    }
    transpose_one_by_one(from + i * from_stride, from_stride, rows - i, columns, to + i, to_stride);
}

// to [columns, tall]: `rows` ≤ tall rows `stride` apart, zeros for those there are not.
inline void pack(const float* x, std::int64_t stride, int rows, std::int64_t columns, int tall,
                 float* to) {
    constexpr std::int64_t TILE = 16;  // columns that a line of memory holds
    for (std::int64_t from = 0; from < columns; from += TILE) {
        float* tile = to + from * tall;
        const std::int64_t some = least(columns - from, TILE);
        transpose(x + from, stride, rows, some, tile, tall);
        for (std::int64_t k = 0; rows < tall && k < some; ++k) {
            for (int i = rows; i < tall; ++i) tile[k * tall + i] = 0;
        }
    }
}

// y [width, TALL] = (x v)ᵀ of a panel x [columns, TALL] and v [columns, width], TALL = VECTORS LANES.
template <int VECTORS>
void along_packed(const float* x, std::int64_t columns, const float* v, int width, float* y) {
    constexpr int TALL = VECTORS * LANES, SOME = REGISTERS / 3;
    for (std::int64_t from = 0; from < columns; from += DEEP) {
        const int length = least(columns - from, DEEP);
        for (int group = 0; group < width; group += SOME) {
            Floats acc[SOME][VECTORS] = {};
            const float* left = x + from * TALL;
            const float* right = v + from * width + group;
            for (int k = 0; k < length; ++k, left += TALL, right += width) {
                Floats own[VECTORS];
                for (int r = 0; r < VECTORS; ++r) own[r] = load(left + r * LANES);
#pragma GCC unroll 32  // both loops, or the sums go through memory
                for (int c = 0; c < SOME; ++c) {
#pragma GCC unroll 8
                    for (int r = 0; r < VECTORS; ++r) acc[c][r] += right[c] * own[r];
                }
            }
            for (int c = 0; c < SOME; ++c) {
                float* to = y + (group + c) * TALL;
                for (int r = 0; r < VECTORS; ++r) {
                    store(to + r * LANES, from ? load(to + r * LANES) + acc[c][r] : acc[c][r]);
                }
            }
        }
    }
}

// z is written, or added to.
enum class Into { fresh, sum };

// Panels [columns, TALL], each `distance` after the one before; what lies `ahead` of one is read soon
// and asked for, unless that is 0.
struct Panels {
    const float* values;
    std::int64_t distance;
    int count;
    std::int64_t ahead;

    // Asks for what is ahead of so many floats from `own` on.
    void fetch(const float* own, int floats) const {
        for (int line = 0; ahead && line < floats; line += 16) {
            __builtin_prefetch(own + ahead + line, 0, 2);
        }
    }
};

// A tile's sums go to z. Inlined always: they are registers.
template <Into INTO, class Vector, int COUNT, int VECTORS>
__attribute__((always_inline)) inline void put_tile(const Vector (&acc)[COUNT][VECTORS], int width,
                                                    float* z) {
#pragma GCC unroll 32
    for (int c = 0; c < COUNT; ++c) {
        for (int v = 0; v < VECTORS; ++v) {
            float* to = z + c * width + v * static_cast<int>(sizeof(Vector) / sizeof(float));
            Vector value = {};
            if constexpr (INTO == Into::sum) std::memcpy(&value, to, sizeof value);
            value += acc[c][v];
            std::memcpy(to, &value, sizeof value);
        }
    }
}

// z [COUNT, width] from Σ xᵀ y in VECTORS vectors' columns, of COUNT columns of every panel x.
template <int TALL, Into INTO, class Vector, int COUNT, int VECTORS>
void packed_tile(const Panels& x, const float* y, int width, float* z, bool first) {
    constexpr int SIZE = sizeof(Vector) / sizeof(float);
    Vector acc[COUNT][VECTORS] = {};
    const float* own = x.values;
    for (int panel = 0; panel < x.count; ++panel, own += x.distance) {
        if (first) x.fetch(own, COUNT * TALL);
        for (int i = 0; i < TALL; ++i, y += width) {
            Vector right[VECTORS];
            for (int v = 0; v < VECTORS; ++v) std::memcpy(&right[v], y + v * SIZE, sizeof(Vector));
#pragma GCC unroll 32
            for (int c = 0; c < COUNT; ++c) {
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) acc[c][v] += own[c * TALL + i] * right[v];
            }
        }
    }
    put_tile<INTO>(acc, width, z);
}

// The products in float32.
struct Exact {
    typedef float Operand;

    static const float* operand(const float* y, std::int64_t, int, float*) { return y; }

    template <int VECTORS>
    static void along(const float* x, std::int64_t columns, const float* v, int width, float* y) {
        along_packed<VECTORS>(x, columns, v, width, y);
    }

    template <int TALL, Into INTO, class Vector, int COUNT, int VECTORS>
    static void tile(const Panels& x, const float* y, int width, float* z, bool first) {
        packed_tile<TALL, INTO, Vector, COUNT, VECTORS>(x, y, width, z, first);
    }
};

#if FASTLORA_HAS_PAIRS
// The products of operands rounded to bfloat16, two at once, added up in float32: twice as many where
// the processor has the instruction. The caller makes sure that it does (``has_pairs``).
#define FASTLORA_PAIRS __attribute__((target("avx512bf16")))

struct Rounded {
    typedef std::uint32_t Operand;  // [rows / 2, width]: two rows' elements, the first the lower half

    static const std::uint32_t* operand(const float* y, std::int64_t rows, int width,
                                        std::uint32_t* space) {
        std::uint32_t* to = space;
        for (std::int64_t i = 0; i < rows; i += 2, y += 2 * width, to += width) {
            for (int c = 0; c < width; ++c) {
                to[c] = (nearest(y[c]) >> 16) | (nearest(y[width + c]) & 0xffff0000u);
            }
        }
        return space;
    }

    // As along_packed, columns even.
    template <int VECTORS>
    FASTLORA_PAIRS static void along(const float* x, std::int64_t columns, const std::uint32_t* v,
                                     int width, float* y) {
        constexpr int TALL = VECTORS * LANES, SOME = REGISTERS / 3;
        alignas(64) std::uint32_t pairs[DEEP / 2 * TALL];
        for (std::int64_t from = 0; from < columns; from += DEEP) {
            const int length = least(columns - from, DEEP) / 2;
            pair_columns<VECTORS>(x + from * TALL, length, pairs);
            for (int group = 0; group < width; group += SOME) {
                Floats acc[SOME][VECTORS] = {};
                const std::uint32_t* left = pairs;
                const std::uint32_t* right = v + from / 2 * width + group;
                for (int k = 0; k < length; ++k, left += TALL, right += width) {
                    Floats own[VECTORS];
                    for (int r = 0; r < VECTORS; ++r) {
                        std::memcpy(&own[r], left + r * LANES, sizeof own[r]);
                    }
#pragma GCC unroll 32
                    for (int c = 0; c < SOME; ++c) {
#pragma GCC unroll 8
                        for (int r = 0; r < VECTORS; ++r) {
                            acc[c][r] = add_pairs(acc[c][r], right[c], own[r]);
                        }
                    }
                }
                for (int c = 0; c < SOME; ++c) {
                    float* to = y + (group + c) * TALL;
                    for (int r = 0; r < VECTORS; ++r) {
                        store(to + r * LANES, from ? load(to + r * LANES) + acc[c][r] : acc[c][r]);
                    }
                }
            }
        }
    }

    template <int TALL, Into INTO, class Vector, int COUNT, int VECTORS>
    FASTLORA_PAIRS static void tile(const Panels& x, const std::uint32_t* y, int width, float* z,
                                    bool first) {
        constexpr int SIZE = sizeof(Vector) / sizeof(float), WORDS = COUNT * TALL / 2;
        static_assert(TALL % 32 == 0, "two registers of floats make one of pairs");
        alignas(64) std::uint32_t pairs[WORDS];
        Vector acc[COUNT][VECTORS] = {};
        const float* own = x.values;
        for (int panel = 0; panel < x.count; ++panel, own += x.distance) {
            if (first) x.fetch(own, COUNT * TALL);
            for (int word = 0; word < WORDS; word += 16) {
                const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(own + 2 * word + 16),
                                                          _mm512_loadu_ps(own + 2 * word));
                std::memcpy(pairs + word, &both, sizeof both);
            }
            for (int i = 0; i < TALL / 2; ++i, y += width) {
                Vector right[VECTORS];
                for (int v = 0; v < VECTORS; ++v) std::memcpy(&right[v], y + v * SIZE, sizeof(Vector));
#pragma GCC unroll 32
                for (int c = 0; c < COUNT; ++c) {
#pragma GCC unroll 8
                    for (int v = 0; v < VECTORS; ++v) {
                        acc[c][v] = add_pairs(acc[c][v], pairs[c * (TALL / 2) + i], right[v]);
                    }
                }
            }
        }
        put_tile<INTO>(acc, width, z);
    }

private:
    typedef float Eight __attribute__((vector_size(32)));

    // pairs [length, TALL] of neighbours among x's columns [2 length, TALL].
    template <int VECTORS>
    FASTLORA_PAIRS static void pair_columns(const float* x, int length, std::uint32_t* pairs) {
        constexpr int TALL = VECTORS * LANES;
        std::uint16_t places[2 * LANES];
        for (int i = 0; i < LANES; ++i) {
            places[2 * i] = static_cast<std::uint16_t>(i);
            places[2 * i + 1] = static_cast<std::uint16_t>(LANES + i);
        }
        const __m512i order = _mm512_loadu_si512(places);
        for (int k = 0; k < length; ++k, x += 2 * TALL, pairs += TALL) {
            for (int r = 0; r < VECTORS; ++r) {
                const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + TALL + r * LANES),
                                                          _mm512_loadu_ps(x + r * LANES));
                _mm512_storeu_si512(pairs + r * LANES,
                                    _mm512_permutexvar_epi16(order, (__m512i)both));
            }
        }
    }

    // Of a float's bits, the upper half is the nearest bfloat16, ties to even.
    static std::uint32_t nearest(float value) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        return bits + 0x7fffu + ((bits >> 16) & 1u);
    }

    FASTLORA_PAIRS static Floats add_pairs(Floats sum, std::uint32_t x, Floats y) {
        const __m512i every = _mm512_set1_epi32(static_cast<int>(x));
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)every, (__m512bh)y);
    }

    FASTLORA_PAIRS static Eight add_pairs(Eight sum, std::uint32_t x, Eight y) {
        const __m256i every = _mm256_set1_epi32(static_cast<int>(x));
        return (Eight)_mm256_dpbf16_ps((__m256)sum, (__m256bh)every, (__m256bh)y);
    }
};

inline bool has_pairs() { return has_bfloat16(); }
#else
typedef Exact Rounded;

inline bool has_pairs() { return false; }
#endif

template <int TALL, Into INTO, class Vector, int COUNT, class Products>
void packed_tiles(const Panels& x, const typename Products::Operand* y, int width, float* z) {
    constexpr int SIZE = sizeof(Vector) / sizeof(float);
    int c = 0;
    for (; c + 2 * SIZE <= width; c += 2 * SIZE) {
        Products::template tile<TALL, INTO, Vector, COUNT, 2>(x, y + c, width, z + c, c == 0);
    }
    if (c < width) {
        Products::template tile<TALL, INTO, Vector, COUNT, 1>(x, y + c, width, z + c, c == 0);
    }
}

template <int TALL, Into INTO, class Vector, class Products>
void packed_all(Panels x, std::int64_t columns, const typename Products::Operand* y, int width,
                float* z) {
    constexpr int SIZE = sizeof(Vector) / sizeof(float), MOST = REGISTERS / 2;
    std::int64_t k = 0;
    const auto past = [&](int count) {
        k += count;
        x.values += count * TALL;
        z += count * width;
    };
    if (width == SIZE) {
        for (; k + 2 * MOST <= columns; past(2 * MOST)) {
            Products::template tile<TALL, INTO, Vector, 2 * MOST, 1>(x, y, width, z, true);
        }
    }
    for (; k + MOST <= columns; past(MOST)) {
        packed_tiles<TALL, INTO, Vector, MOST, Products>(x, y, width, z);
    }
    for (; k < columns; past(1)) packed_tiles<TALL, INTO, Vector, 1, Products>(x, y, width, z);
}

// z [columns, width] from Σ xᵀ y of panels x [columns, TALL] and y [count · TALL, width] as Products
// takes it (its ``operand``), width a multiple of 8.
template <int TALL, Into INTO, class Products = Exact>
void across_packed(const Panels& x, std::int64_t columns, const typename Products::Operand* y,
                   int width, float* z) {
    typedef float Eight __attribute__((vector_size(32)));
    if (LANES == 16 && width % LANES != 0) {
        packed_all<TALL, INTO, Eight, Products>(x, columns, y, width, z);
    } else {
        packed_all<TALL, INTO, Floats, Products>(x, columns, y, width, z);
    }
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA
