// Where b's rows lie in memory one after another ("straight"), several of them at once are multiplied
// onto sums of whole rows of out, which stay in a near cache; such sums are made of so many chunks of
// the depth, for threads to share, and added up at the end. Where b's columns do ("turned"), an
// element of out is a product of two vectors, and a few columns go with all rows at once.
#include "few_rows.hpp"

#include "packed.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

constexpr int FEW_ROWS = LANES == 16 ? 8 : 4;
constexpr int SUMS = LANES == 16 ? 24 : 12;  // in registers, some of which are left for operands
constexpr int TOGETHER = 8;                  // rows of b that are read at once
constexpr int BLOCK = 2048;                  // columns of out for a thread, if b is straight
constexpr int CHUNKS = 8;
constexpr int SHALLOW = 256;                 // a depth that is not cut into chunks
constexpr int SHARE = 64;                    // columns of out for a thread, at the end
constexpr int PIECE = 256 * LANES;           // of the depth, summed by itself: one long sum rounds more

constexpr int at_most(int value, int bound) { return value < bound ? value : bound; }

inline bool straight(const Term& term) { return term.b_column == 1; }

float total(Floats values) {
    Four parts[LANES / 4];
    std::memcpy(parts, &values, sizeof values);
    for (int i = 1; i < LANES / 4; ++i) parts[0] += parts[i];
    return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

template <int ROWS>
class FewRows {
public:
    explicit FewRows(const SumOfProducts& call)
        : call_(call), stride_(round_up(call.columns)), chunks_(chunks(call)),
          sums_(static_cast<std::int64_t>(chunks_) * ROWS * stride_) {}

    void run(int threads) const {
        const std::int64_t blocks = (call_.columns + BLOCK - 1) / BLOCK;
        parallel_each(blocks * chunks_, threads, [&](std::int64_t index) {
            add_straight(index / chunks_ * BLOCK, static_cast<int>(index % chunks_));
        });
        parallel_each((call_.columns + SHARE - 1) / SHARE, threads,
                      [&](std::int64_t index) { finish(index * SHARE); });
    }

private:
    // The same for every number of threads.
    static int chunks(const SumOfProducts& call) {
        std::int64_t depth = 0;
        for (int i = 0; i < call.count; ++i) {
            if (straight(call.terms[i])) depth += call.terms[i].depth;
        }
        return depth == 0 ? 0 : depth <= SHALLOW ? 1 : CHUNKS;
    }

    float* sum(int chunk, int row, std::int64_t column) const {
        return sums_ + (chunk * ROWS + row) * stride_ + column;
    }

    void add_straight(std::int64_t column, int chunk) const {
        const std::int64_t end = column + BLOCK < call_.columns ? column + BLOCK : call_.columns;
        for (int i = 0; i < ROWS; ++i) zero(sum(chunk, i, column), round_up(end - column));
        for (const Term *term = call_.terms, *last = term + call_.count; term < last; ++term) {
            if (!straight(*term)) continue;
            std::int64_t k = term->depth * chunk / chunks_;
            const std::int64_t stop = term->depth * (chunk + 1) / chunks_;
            for (; k + TOGETHER <= stop; k += TOGETHER) {
                add_rows<TOGETHER>(*term, k, column, end, chunk);
            }
            for (; k < stop; ++k) add_rows<1>(*term, k, column, end, chunk);
        }
    }

    // COUNT rows of b from row k on.
    template <int COUNT>
    void add_rows(const Term& term, std::int64_t k, std::int64_t column, std::int64_t end,
                  int chunk) const {
        constexpr int MOST = 4 * ROWS <= SUMS ? 4 : 2 * ROWS <= SUMS ? 2 : 1;
        float left[COUNT * ROWS];
        for (int j = 0; j < COUNT; ++j) {
            for (int i = 0; i < ROWS; ++i) {
                const float own = term.a[i * term.a_stride + k + j];
                left[j * ROWS + i] = term.scale ? own * term.scale[k + j] : own;
            }
        }
        const float* b = term.b + k * term.b_row;
        for (; column + MOST * LANES <= end; column += MOST * LANES) {
            add<COUNT, MOST>(left, b + column, term.b_row, sum(chunk, 0, column), LANES);
        }
        for (; column < end; column += LANES) {
            add<COUNT, 1>(left, b + column, term.b_row, sum(chunk, 0, column),
                          least(end - column, LANES));
        }
    }

    // to [ROWS, V vectors] += leftᵀ b of left [COUNT, ROWS]; of the last vector `some` are there.
    template <int COUNT, int V>
    void add(const float* left, const float* b, std::int64_t b_row, float* to, int some) const {
        Floats sums[ROWS][V];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[i][v] = load(to + i * stride_ + v * LANES);
        }
#pragma GCC unroll 8
        for (int j = 0; j < COUNT; ++j, b += b_row, left += ROWS) {
            Floats right[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                right[v] = some == LANES ? load(b + v * LANES) : load_some(b + v * LANES, some);
            }
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) sums[i][v] += left[i] * right[v];
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) store(to + i * stride_ + v * LANES, sums[i][v]);
        }
    }

    // The turned terms, the chunks' sums, g and the bias, of a share of the columns.
    void finish(std::int64_t column) const {
        constexpr int TURNED = at_most(SUMS / ROWS, TOGETHER);
        const std::int64_t end = column + SHARE < call_.columns ? column + SHARE : call_.columns;
        for (; column + TURNED <= end; column += TURNED) turned<TURNED>(column);
        for (; column < end; ++column) turned<1>(column);
    }

    template <int COUNT>
    void turned(std::int64_t column) const {
        Floats sums[ROWS][COUNT] = {};
        for (const Term *term = call_.terms, *last = term + call_.count; term < last; ++term) {
            if (straight(*term)) continue;
            for (std::int64_t from = 0; from < term->depth; from += PIECE) {
                add_piece<COUNT>(*term, column, from, least(term->depth - from, PIECE), sums);
            }
        }
        for (int i = 0; i < ROWS; ++i) {
            float* out = call_.out + i * call_.out_stride + column;
            for (int j = 0; j < COUNT; ++j) {
                float value = total(sums[i][j]);
                for (int chunk = 0; chunk < chunks_; ++chunk) value += *sum(chunk, i, column + j);
                if (call_.g) value *= call_.g[column + j];
                if (call_.bias) value += call_.bias[column + j];
                out[j] = value;
            }
        }
    }

    template <int COUNT>
    static void add_piece(const Term& term, std::int64_t column, std::int64_t from, int length,
                          Floats (&sums)[ROWS][COUNT]) {
        Floats own[ROWS][COUNT] = {};
        const int full = length - length % LANES;
        for (int k = 0; k < full; k += LANES) multiply<COUNT>(term, column, from + k, LANES, own);
        if (full < length) multiply<COUNT>(term, column, from + full, length - full, own);
        for (int i = 0; i < ROWS; ++i) {
            for (int j = 0; j < COUNT; ++j) sums[i][j] += own[i][j];
        }
    }

    // LANES elements of the depth, or `some`.
    template <int COUNT>
    static inline void multiply(const Term& term, std::int64_t column, std::int64_t k, int some,
                                Floats (&sums)[ROWS][COUNT]) {
        const auto from = [&](const float* at) { return some == LANES ? load(at) : load_some(at, some); };
        Floats left[ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            left[i] = from(term.a + i * term.a_stride + k);
            if (term.scale) left[i] *= from(term.scale + k);
        }
#pragma GCC unroll 8
        for (int j = 0; j < COUNT; ++j) {
            const Floats right = from(term.b + (column + j) * term.b_column + k);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) sums[i][j] += left[i] * right;
        }
    }

    const SumOfProducts& call_;
    const std::int64_t stride_;
    const int chunks_;
    const Buffer<float> sums_;  // [chunks, ROWS, stride]
};

template <int ROWS>
void run(const SumOfProducts& call, int threads) {
    if (call.rows == ROWS) {
        FewRows<ROWS>(call).run(threads);
    } else if constexpr (ROWS > 1) {
        run<ROWS - 1>(call, threads);
    }
}

}  // namespace

bool has_few_rows(const SumOfProducts& call) { return call.rows <= FEW_ROWS; }

void sum_of_few_rows(const SumOfProducts& call, int threads) { run<FEW_ROWS>(call, threads); }

}  // namespace fastlora::FASTLORA_ISA
