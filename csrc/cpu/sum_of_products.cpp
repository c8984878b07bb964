// Out is cut into strips of columns, and a strip into tiles of rows; threads share the tiles, strip
// after strip. For each strip a slice of b is brought into the order it is read in, in panels of as
// many columns as a tile's registers hold; a panel stays in the inner cache while all tiles go along
// it, their sums in registers. From slice to slice the sums lie in out. A further product is nothing
// but further slices.
#include "sum_of_products.hpp"

#if defined(__AVX512F__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC's own header, wrongly
#endif
#include <immintrin.h>
#endif

#include "few_rows.hpp"
#include "packed.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

constexpr int ROWS = 6;
constexpr int VECTORS = LANES == 16 ? 4 : 2;  // ROWS x VECTORS sums fill the registers
constexpr int PANEL = VECTORS * LANES;
constexpr int STRIP = 64;                                // a few lines of memory
constexpr int DEPTH = 256;                               // of a slice, where the caller has no figure
constexpr int BLOCK = (LANES == 16 ? 8192 : 32) * ROWS;  // rows of a that a strip's panels share
constexpr int LINE = 16;                                 // floats that come from memory together
static_assert(STRIP % PANEL == 0, "a strip is whole panels");

// Some of a term's depth, for the strip from `column` on.
struct Slice {
    const Term* term;
    std::int64_t from;
    int length;
    std::int64_t column;
    int width;

    const float* b() const { return term->b + from * term->b_row + column * term->b_column; }
};

inline int most_depth(const SumOfProducts& call) {
    return call.slice > 0 ? (call.slice + LINE - 1) / LINE * LINE : DEPTH;
}

// What a tile does besides multiplying: out is new, or holds the slices before; g and bias come with
// the last.
struct Ends {
    bool first;
    const float* g;
    const float* bias;
};

// out [COUNT, V vectors] (+)= a [COUNT, length] b [length, PANEL].
template <int COUNT, int V>
inline void tile(const float* a, std::int64_t a_stride, int length, const float* b, float* out,
                 std::int64_t out_stride, const Ends& ends) {
    Floats sums[COUNT][V] = {};
    const float* row[COUNT];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) row[i] = a + i * a_stride;
#pragma GCC unroll 4
    for (int k = 0; k < length; ++k, b += PANEL) {
        Floats right[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) right[v] = load(b + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) {
            const float left = row[i][k];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[i][v] += left * right[v];
        }
    }
    // the sums of slices are added up, which rounds less than one long sum does
    if (!ends.first) {
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) {
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) sums[i][v] += load(out + i * out_stride + v * LANES);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
        if (ends.g) {
            const Floats g = load(ends.g + v * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < COUNT; ++i) sums[i][v] *= g;
        }
        if (ends.bias) {
            const Floats bias = load(ends.bias + v * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < COUNT; ++i) sums[i][v] += bias;
        }
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) store(out + i * out_stride + v * LANES, sums[i][v]);
    }
}

// Of `width` columns that do not fill V vectors: the sums go through a tile that has them all.
template <int COUNT, int V>
void edge(const float* a, std::int64_t a_stride, int length, const float* b, float* out,
          std::int64_t out_stride, const Ends& ends, int width) {
    float own[COUNT * V * LANES] = {};
    for (int i = 0; !ends.first && i < COUNT; ++i) {
        for (int j = 0; j < width; ++j) own[i * V * LANES + j] = out[i * out_stride + j];
    }
    tile<COUNT, V>(a, a_stride, length, b, own, V * LANES, ends);
    for (int i = 0; i < COUNT; ++i) {
        for (int j = 0; j < width; ++j) out[i * out_stride + j] = own[i * V * LANES + j];
    }
}

// For `rows` ≤ COUNT.
template <int COUNT, int V>
void rest(const float* a, std::int64_t a_stride, int length, const float* b, float* out,
          std::int64_t out_stride, const Ends& ends, int width, std::int64_t rows) {
    if (rows == COUNT) {
        if (width == V * LANES) {
            tile<COUNT, V>(a, a_stride, length, b, out, out_stride, ends);
        } else {
            edge<COUNT, V>(a, a_stride, length, b, out, out_stride, ends, width);
        }
    } else if constexpr (COUNT > 1) {
        rest<COUNT - 1, V>(a, a_stride, length, b, out, out_stride, ends, width, rows);
    }
}

#if defined(__AVX512F__)
// to [4, PANEL], a vector of each row, from four places in each of 16 rows: the rows i, 4 + i, 8 + i
// and 12 + i, from q[i].
inline void turn_four(const __m512* q, float* to) {
    const __m512 a = _mm512_unpacklo_ps(q[0], q[1]), b = _mm512_unpackhi_ps(q[0], q[1]);
    const __m512 c = _mm512_unpacklo_ps(q[2], q[3]), d = _mm512_unpackhi_ps(q[2], q[3]);
    _mm512_store_ps(to, _mm512_shuffle_ps(a, c, 0x44));
    _mm512_store_ps(to + PANEL, _mm512_shuffle_ps(a, c, 0xee));
    _mm512_store_ps(to + 2 * PANEL, _mm512_shuffle_ps(b, d, 0x44));
    _mm512_store_ps(to + 3 * PANEL, _mm512_shuffle_ps(b, d, 0xee));
}

inline __m512 four_rows(const float* from, std::int64_t stride) {
    __m512 rows = _mm512_castps128_ps512(_mm_loadu_ps(from));
    rows = _mm512_insertf32x4(rows, _mm_loadu_ps(from + 4 * stride), 1);
    rows = _mm512_insertf32x4(rows, _mm_loadu_ps(from + 8 * stride), 2);
    return _mm512_insertf32x4(rows, _mm_loadu_ps(from + 12 * stride), 3);
}

// The first columns, fours of them, of 16 rows; returns how many. A line of memory is used up at
// once: rows a power of two apart push one another out of the cache.
inline int turn_sixteen(const float* from, std::int64_t stride, int length, float* to) {
    constexpr int FOURS = LINE / 4;
    int k = 0;
    for (; k + LINE <= length; k += LINE) {
        __m512 q[FOURS][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
            for (int f = 0; f < FOURS; ++f) q[f][i] = four_rows(from + i * stride + k + 4 * f, stride);
        }
#pragma GCC unroll 4
        for (int f = 0; f < FOURS; ++f) turn_four(q[f], to + (k + 4 * f) * PANEL);
    }
    for (; k + 4 <= length; k += 4) {
        __m512 q[4];
        for (int i = 0; i < 4; ++i) q[i] = four_rows(from + i * stride + k, stride);
        turn_four(q, to + k * PANEL);
    }
    return k;
}
#endif

// to [length, PANEL] = fromᵀ of `width` rows.
inline void turn(const float* from, std::int64_t stride, int width, int length, float* to) {
    int j = 0;
#if defined(__AVX512F__)
    for (; j + 16 <= width; j += 16) {
        const float* rows = from + j * stride;
        const int done = turn_sixteen(rows, stride, length, to + j);
        transpose_one_by_one(rows + done, stride, 16, length - done, to + done * PANEL + j, PANEL);
    }
#endif
    transpose(from + j * stride, stride, width - j, length, to + j, PANEL);
}

// b [panels, length, PANEL] of a slice, zeros in the lanes of the last vector beyond its width.
void fill(const Slice& slice, float* b) {
    const auto at_column = [&](float* row, int j) {
        return row + static_cast<std::int64_t>(j / PANEL) * slice.length * PANEL + j % PANEL;
    };
    const Term& term = *slice.term;
    const float* from = slice.b();
    const float* scale = term.scale ? term.scale + slice.from : nullptr;
    if (term.b_column == 1) {
        const int full = slice.width - slice.width % LANES;
        for (int k = 0; k < slice.length; ++k, from += term.b_row, b += PANEL) {
            const float factor = scale ? scale[k] : 1;
            for (int j = 0; j < full; j += LANES) store(at_column(b, j), factor * load(from + j));
            if (full < slice.width) {
                store(at_column(b, full), factor * load_some(from + full, slice.width - full));
            }
        }
        return;
    }
    for (int start = 0; start < slice.width; start += PANEL) {
        float* panel = at_column(b, start);
        const int width = least(slice.width - start, PANEL), full = width - width % LANES;
        for (int k = 0; full < width && k < slice.length; ++k) store(panel + k * PANEL + full, Floats{});
        turn(from + start * term.b_column, term.b_column, width, slice.length, panel);
        for (int k = 0; scale && k < slice.length; ++k, panel += PANEL) {
            for (int j = 0; j < width; j += LANES) store(panel + j, scale[k] * load(panel + j));
        }
    }
}

// The lines of memory that a slice of b lies in, fetched a few at a time while tiles go along the
// slice before: a model's weights are not in any cache. Rows of a and of out, which are, come by
// themselves: fetching them as well was slower.
class Lines {
public:
    Lines() = default;
    explicit Lines(const Slice& slice)
        : at_(slice.b()),
          stride_(slice.term->b_column == 1 ? slice.term->b_row : slice.term->b_column),
          in_row_(((slice.term->b_column == 1 ? slice.width : slice.length) + LINE - 1) / LINE),
          left_(in_row_ * (slice.term->b_column == 1 ? slice.length : slice.width)) {}

    int left() const { return left_; }

    void fetch(int count) {
        for (; count > 0 && left_ > 0; --count, --left_) {
            __builtin_prefetch(at_ + place_ * LINE, 0, 2);
            if (++place_ == in_row_) {
                place_ = 0;
                at_ += stride_;
            }
        }
    }

private:
    const float* at_ = nullptr;
    std::int64_t stride_ = 0;
    int in_row_ = 0, left_ = 0, place_ = 0;
};

class Strip {
public:
    // Of rows [top, bottom), and of the columns from `column` on.
    Strip(const SumOfProducts& call, std::int64_t column, std::int64_t top, std::int64_t bottom,
          float* b)
        : call_(call), column_(column), top_(top), bottom_(bottom), b_(b),
          width_(least(call.columns - column, STRIP)) {
        for (int j = 0; j < STRIP; ++j) {
            g_[j] = call.g && j < width_ ? call.g[column + j] : 0;
            bias_[j] = call.bias && j < width_ ? call.bias[column + j] : 0;
        }
    }

    void run() const {
        Slice slice = at(call_.terms, 0, column_);
        for (bool first = true, last = false; !last; first = false) {
            fill(slice, b_);
            const Slice next = after(slice);
            last = next.column != column_;
            const Ends ends{first, last && call_.g ? g_ : nullptr,
                            last && call_.bias ? bias_ : nullptr};
            Lines lines = next.width > 0 ? Lines(next) : Lines();
            const std::int64_t tiles = ((bottom_ - top_ + ROWS - 1) / ROWS) * ((width_ + PANEL - 1) / PANEL);
            const int share = static_cast<int>((lines.left() + tiles - 1) / tiles);
            for (std::int64_t row = top_; row < bottom_; row += BLOCK) {
                const std::int64_t end = row + BLOCK < bottom_ ? row + BLOCK : bottom_;
                for (int start = 0; start < width_; start += PANEL) {
                    along<VECTORS>(slice, start, row, end, lines, share, ends);
                }
            }
            slice = next;
        }
    }

private:
    // As long as a term's others are, up to whole lines.
    Slice at(const Term* term, std::int64_t from, std::int64_t column) const {
        const int most = most_depth(call_);
        const std::int64_t slices = term->depth > 0 ? (term->depth + most - 1) / most : 1;
        const std::int64_t lines = (term->depth + slices * LINE - 1) / (slices * LINE);
        return {term, from, least(term->depth - from, lines * LINE), column,
                least(call_.columns - column, STRIP)};
    }

    // The next slice, of the next strip's where there is none left.
    Slice after(const Slice& slice) const {
        const std::int64_t from = slice.from + slice.length;
        if (from < slice.term->depth) return at(slice.term, from, column_);
        if (slice.term + 1 < call_.terms + call_.count) return at(slice.term + 1, 0, column_);
        return at(call_.terms, 0, column_ + STRIP);
    }

    // All tiles along a panel, of the V vectors that hold its width; each fetches a share of lines.
    template <int V>
    void along(const Slice& slice, int start, std::int64_t row, std::int64_t end, Lines& lines,
               int share, const Ends& whole) const {
        const int width = least(width_ - start, PANEL);
        if constexpr (V > 1) {
            if (width <= (V - 1) * LANES) return along<V - 1>(slice, start, row, end, lines, share, whole);
        }
        const Term& term = *slice.term;
        const Ends ends{whole.first, whole.g ? whole.g + start : nullptr,
                        whole.bias ? whole.bias + start : nullptr};
        const float* a = term.a + row * term.a_stride + slice.from;
        const float* b = b_ + static_cast<std::int64_t>(start) * slice.length;
        float* out = call_.out + row * call_.out_stride + column_ + start;
        for (; width == V * LANES && row + ROWS <= end; row += ROWS) {
            lines.fetch(share);
            tile<ROWS, V>(a, term.a_stride, slice.length, b, out, call_.out_stride, ends);
            a += ROWS * term.a_stride;
            out += ROWS * call_.out_stride;
        }
        for (; row < end; row += ROWS) {
            lines.fetch(share);
            rest<ROWS, V>(a, term.a_stride, slice.length, b, out, call_.out_stride, ends, width,
                          least(end - row, ROWS));
            a += ROWS * term.a_stride;
            out += ROWS * call_.out_stride;
        }
    }

    const SumOfProducts& call_;
    const std::int64_t column_, top_, bottom_;
    float* const b_;  // a slice's panels
    const int width_;
    float g_[STRIP], bias_[STRIP];
};

}  // namespace

void sum_of_products(const SumOfProducts& call, int threads) {
    if (call.rows <= 0 || call.columns <= 0) return;
    if (has_few_rows(call)) return sum_of_few_rows(call, threads);
    const std::int64_t tiles = (call.rows + ROWS - 1) / ROWS;
    const std::int64_t strips = (call.columns + STRIP - 1) / STRIP;
    parallel_units(tiles * strips, tiles, threads, [&](std::int64_t first, std::int64_t last) {
        const Buffer<float> b(static_cast<std::int64_t>(most_depth(call)) * STRIP);
        while (first < last) {
            const std::int64_t strip = first / tiles, from = first % tiles;
            const std::int64_t to = least(from + last - first, tiles);
            const std::int64_t bottom = to * ROWS < call.rows ? to * ROWS : call.rows;
            Strip(call, strip * STRIP, from * ROWS, bottom, b + 0).run();
            first += to - from;
        }
    });
}

}  // namespace fastlora::FASTLORA_ISA
