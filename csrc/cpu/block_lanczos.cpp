// A matrix a thread, from a copy in panels. Panels are read once for both products, Y = X V and XᵀY,
// while they are in the cache. The basis lies in panels of its own, a vector a row of them, and a
// block that is being worked at with an element of all its vectors together: so the same two products
// serve throughout.
#include "block_lanczos.hpp"

#include <cmath>

#include "dense.hpp"
#include "packed.hpp"
#include "parallel.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

constexpr int PASSES = 4;             // of an orthonormalisation at most
constexpr double SOUND = 0.03;        // pivots below this share of the whole: once more
constexpr double SHIFT = 1e-6;        // of the mean square, where pivots vanish
constexpr double ORTHONORMAL = 2e-6;  // what the results' Gram matrices may be off untouched
constexpr double REPAIRED = 0.05;     // and up to where one Cholesky pass repairs them
constexpr int CHECKING = 2;           // blocks of the check
constexpr int START = -1;             // in place of a block's number: what the first is made from
constexpr double LATE = 0.5;          // of a checked vector that may lie in the last block
constexpr double SETTLED = 0.03;      // and of any, where all have converged
constexpr int GROUP = 8;              // what widths are a multiple of
constexpr int VECTORS = LANES == 16 ? 2 : 3;
constexpr int TALL = VECTORS * LANES;  // rows of a panel of X
constexpr int PAIR = 2;  // panels that are multiplied at once: XᵀY is read and written half as often
constexpr int BASIS = 16;             // vectors of a panel of the basis: few, since the last has gaps
constexpr int RUN = 512;              // squares that are summed in float32
constexpr int GRAM_ROWS = 64;
constexpr int WIDEST = 32;            // vectors of a block
constexpr std::int64_t CHUNK = 256;   // rows at least whose share of XᵀY is summed by itself
constexpr std::int64_t CHUNKS = 8;    // at most
constexpr std::int64_t ROOM = std::int64_t{1} << 28;  // floats of the copies there are at once

// Rows `stride` apart.
struct Rows {
    const float* values;
    std::int64_t stride;
    const float* operator[](std::int64_t row) const { return values + row * stride; }
};

inline std::int64_t up_to(std::int64_t count, std::int64_t multiple) {
    return (count + multiple - 1) / multiple * multiple;
}

double square_sum(const float* values, std::int64_t length) {
    double total = 0;
    for (std::int64_t from = 0; from < length; from += RUN) {
        const std::int64_t some = least(length - from, RUN);
        Floats run = {};
        std::int64_t j = 0;
        for (; j + LANES <= some; j += LANES) run += load(values + from + j) * load(values + from + j);
        if (j < some) {
            const Floats rest = load_some(values + from + j, some - j);
            run += rest * rest;
        }
        total += sum(widen(run));
    }
    return total;
}

// g [n, n] = xᵀx of rows x [count, n], in float64, by rows `width` apart; its first `known` rows and
// columns, a multiple of GROUP, are there already. `space`: [width, GRAM_ROWS], in which GROUP columns
// of x lie together.
void gram_of_columns(Rows x, std::int64_t count, int known, int n, std::int64_t width, double* g,
                     double* space) {
    constexpr int TILE = LANES == 16 ? 8 : 4, PARTS = GROUP / WIDE;
    typedef float Some __attribute__((vector_size(4 * WIDE)));
    const auto from = [&](int i) { return i < known ? known : i / GROUP * GROUP; };
    for (int i = 0; i < up_to(n, TILE); ++i) {
        for (std::int64_t j = from(i); j < width; ++j) g[i * width + j] = 0;
    }
    for (std::int64_t first = 0; first < count; first += GRAM_ROWS) {
        const int some = least(count - first, GRAM_ROWS);
        for (int j = 0; j < n; j += GROUP) {
            double* to = space + j * GRAM_ROWS;
            const int columns = least(n - j, GROUP);
            for (int i = 0; i < some; ++i, to += GROUP) {
                const float* row = x[first + i] + j;
                alignas(64) float padded[GROUP] = {};
                if (columns < GROUP) {
                    std::memcpy(padded, row, static_cast<std::size_t>(columns) * sizeof(float));
                    row = padded;
                }
                for (int v = 0; v < GROUP; v += WIDE) {
                    Some own;
                    std::memcpy(&own, row + v, sizeof own);
                    put(to + v, __builtin_convertvector(own, Wide));
                }
            }
        }
        for (int i = 0; i < n; i += TILE) {
            for (std::int64_t j = from(i); j < n; j += GROUP) {
                Wide acc[TILE][PARTS];
                for (int t = 0; t < TILE; ++t) {
                    for (int v = 0; v < PARTS; ++v) {
                        acc[t][v] = wide(g + (i + t) * width + j + v * WIDE);
                    }
                }
                const double* left = space + i / GROUP * GROUP * GRAM_ROWS + i % GROUP;
                const double* right = space + j * GRAM_ROWS;
                for (int row = 0; row < some; ++row, left += GROUP, right += GROUP) {
                    Wide own[PARTS];
                    for (int v = 0; v < PARTS; ++v) own[v] = wide(right + v * WIDE);
                    for (int t = 0; t < TILE; ++t) {
                        for (int v = 0; v < PARTS; ++v) acc[t][v] += left[t] * own[v];
                    }
                }
                for (int t = 0; t < TILE; ++t) {
                    for (int v = 0; v < PARTS; ++v) {
                        put(g + (i + t) * width + j + v * WIDE, acc[t][v]);
                    }
                }
            }
        }
    }
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < i; ++j) g[i * width + j] = g[j * width + i];
        for (std::int64_t j = n; j < width; ++j) g[i * width + j] = 0;
    }
}

// Rows of `width` elements from old ones, to = old Tᵀ, T lower triangular by rows `stride` apart; in
// place too.
void multiply_rows(const float* old, float* to, int width, std::int64_t rows, const double* t,
                   std::int64_t stride) {
    typedef float Eight __attribute__((vector_size(32)));
    Buffer<float> turned(width * width);
    for (int i = 0; i < width; ++i) {
        for (int j = 0; j < width; ++j) turned[j * width + i] = j > i ? 0 : t[i * stride + j];
    }
    Buffer<float> row(width);
    for (std::int64_t k = 0; k < rows; ++k, old += width, to += width) {
        std::memcpy(row + 0, old, width * sizeof(float));
        int i = 0;
        for (; i + GROUP <= width; i += GROUP) {
            Eight value = {}, factor;
            for (int j = 0; j < i + GROUP; ++j) {
                std::memcpy(&factor, turned + j * width + i, sizeof factor);
                value += row[j] * factor;
            }
            std::memcpy(to + i, &value, sizeof value);
        }
        for (; i < width; ++i) {
            to[i] = 0;
            for (int j = 0; j <= i; ++j) to[i] += row[j] * turned[j * width + i];
        }
    }
}

class Space {
public:
    // `threads` share every product.
    Space(const BlockLanczos& call, int threads)
        : call_(call),
          threads_(threads),
          block_(static_cast<int>(call.width)),
          most_(static_cast<int>(call.blocks + CHECKING) * block_),
          width_(round_up(most_)),
          wide_(static_cast<int>(up_to(call.q, GROUP))),
          size_(call.columns * block_),
          panels_((call.rows + TALL - 1) / TALL),
          basis_panels_((most_ + BASIS - 1) / BASIS),
          basis_(basis_panels_ * call.columns * BASIS),
          image_(call.rows * width_),
          image_panels_(panels_ * most_ * TALL),
          packed_(panels_ * call.columns * TALL),
          chunk_((panels_ + chunks(call.rows) - 1) / chunks(call.rows)),
          chunks_((panels_ + chunk_ - 1) / chunk_),
          blocks_(2 * size_),
          pairs_(size_),
          sums_((threads > 1 ? chunks_ : 1) * size_),
          squares_of_(panels_),
          taken_(basis_panels_ * BASIS * block_),
          gram_(up_to(most_, GROUP) * width_),
          gram_block_(WIDEST * width_),
          work_(most_ * width_),
          vectors_(most_ * wide_),
          values_(width_),
          rows_(GRAM_ROWS * width_),
          weights_(basis_panels_ * BASIS * wide_),
          right_(call.columns * wide_),
          before_(call.q),
          order_(most_),
          now_(blocks_ + 0),
          next_(blocks_ + size_) {}

    void run(std::int64_t index) {
        x_ = {call_.x[index], call_.stride};
        rounds_ = call_.rounded_least < 1 && has_pairs();
        coarse_ = false;
        call_.found[index] = decompose(index);
        if (!coarse_) return;
        rounds_ = false;
        call_.found[index] = decompose(index);
    }

private:
    Found decompose(std::int64_t index) {
        call_.checked[index] = -1;
        if (!read(index)) return Found::extremes;
        for (int block = 0; block < call_.blocks; ++block) {
            if (!extend(block)) return Found::nothing;
            multiply(block, block + 1 < call_.blocks);
        }
        if (!ritz(static_cast<int>(call_.blocks), 0, false)) return Found::nothing;
        if (alike() && !check(index)) return Found::nothing;
        return triples(index) ? Found::triples : Found::nothing;
    }

    static std::int64_t chunks(std::int64_t rows) {
        const std::int64_t count = rows / CHUNK;
        return count < 1 ? 1 : count < CHUNKS ? count : CHUNKS;
    }

    // Calls body(chunk, its first panel, the one after its last) for every chunk of X's panels, whoever
    // of the threads takes it.
    template <class Body>
    void each_chunk(const Body& body) const {
        parallel_for(chunks_, 1, threads_, [&](std::int64_t from, std::int64_t to) {
            for (std::int64_t chunk = from; chunk < to; ++chunk) {
                body(chunk, chunk * chunk_, least(panels_, (chunk + 1) * chunk_));
            }
        });
    }

    int rows_of(std::int64_t panel) const { return least(call_.rows - panel * TALL, TALL); }

    // The copy of X in panels, what the first block is made from while a panel is in the cache, and
    // ‖X‖²; whether that is in range.
    bool read(std::int64_t index) {
        std::memset(basis_ + 0, 0, basis_panels_ * call_.columns * BASIS * sizeof(float));
        if (!call_.left) {
            transpose(call_.start, call_.start_stride, block_, call_.columns, now_, block_);
            if (rounds_start()) Rounded::operand(now_, call_.columns, block_, pairs_ + 0);
        }
        multiply(START, true);
        double squares = 0;
        for (std::int64_t panel = 0; panel < panels_; ++panel) squares += squares_of_[panel];
        call_.squares[index] = squares;
        std::frexp(squares, &exponent_);
        const double norm = std::sqrt(squares);
        return norm > call_.low && norm < call_.high;
    }

    void read(std::int64_t panel) const {
        squares_of_[panel] = 0;
        for (int i = 0; i < rows_of(panel); ++i) {
            squares_of_[panel] += square_sum(x_[panel * TALL + i], call_.columns);
        }
        pack(x_[panel * TALL], x_.stride, rows_of(panel), call_.columns, TALL,
             packed_ + panel * call_.columns * TALL);
    }

    // Y of the block in now_, and XᵀY in next_ where `back`. Chunks of rows, however many threads share
    // them, are added up in one order.
    void multiply(int number, bool back) {
        each_chunk([&](std::int64_t chunk, std::int64_t panel, std::int64_t end) {
            // one thread takes the chunks in order
            const bool alone = threads_ == 1;
            float* sums = chunk == 0 ? next_ : sums_ + (alone ? 0 : chunk * size_);
            multiply(number, panel, end, back ? sums : nullptr);
            if (back && alone && chunk != 0) gather(sums);
        });
        for (std::int64_t chunk = 1; back && threads_ > 1 && chunk < chunks_; ++chunk) {
            gather(sums_ + chunk * size_);
        }
    }

    void gather(const float* part) const {
        for (std::int64_t i = 0; i < size_; ++i) next_[i] += part[i];
    }

    void multiply(int number, std::int64_t panel, std::int64_t end, float* sums) const {
        alignas(64) float turned[PAIR * TALL * WIDEST];
        const std::int64_t panel_size = call_.columns * TALL;
        for (bool fresh = true; panel < end; fresh = false) {
            const int some = least(end - panel, PAIR);
            const float* x = packed_ + panel * panel_size;
            for (int one = 0; one < some; ++one, ++panel) {
                float* rows = turned + one * TALL * block_;
                if (number == START) {
                    read(panel);
                    start(panel, rows);
                    continue;
                }
                float* y = image_panels_ + (panel * most_ + number * block_) * TALL;
                along_packed<VECTORS>(x + one * panel_size, call_.columns, now_, block_, y);
                transpose(y, TALL, block_, TALL, rows, block_);
                for (int i = 0; i < rows_of(panel); ++i) {
                    std::memcpy(image_ + (panel * TALL + i) * width_ + number * block_,
                                rows + i * block_, block_ * sizeof(float));
                }
            }
            if (!sums) continue;
            const Panels both{x, panel_size, some, panel + PAIR <= panels_ ? some * panel_size : 0};
            if (rounds_) {
                back<Rounded>(both, turned, fresh, sums);
            } else {
                back<Exact>(both, turned, fresh, sums);
            }
        }
    }

    // Its products along rows take columns by pairs.
    bool rounds_start() const { return rounds_ && call_.columns % 2 == 0; }

    // The panel's rows [TALL, block_] of what Xᵀ is multiplied with for the first block.
    void start(std::int64_t panel, float* rows) const {
        alignas(64) float y[TALL * WIDEST] = {};
        if (call_.left) {
            const float* from = call_.start + panel * TALL;
            for (int c = 0; c < block_; ++c, from += call_.start_stride) {
                std::memcpy(y + c * TALL, from, rows_of(panel) * sizeof(float));
            }
        } else {
            const float* x = packed_ + panel * call_.columns * TALL;
            if (rounds_start()) {
                Rounded::along<VECTORS>(x, call_.columns, pairs_ + 0, block_, y);
            } else {
                along_packed<VECTORS>(x, call_.columns, now_, block_, y);
            }
        }
        transpose(y, TALL, block_, TALL, rows, block_);
    }

    template <class Products>
    void back(const Panels& x, const float* y, bool fresh, float* sums) const {
        alignas(64) typename Products::Operand space[PAIR * TALL * WIDEST];
        const auto* own = Products::operand(y, x.count * TALL, block_, space);
        if (fresh) {
            across_packed<TALL, Into::fresh, Products>(x, call_.columns, own, block_, sums);
        } else {
            across_packed<TALL, Into::sum, Products>(x, call_.columns, own, block_, sums);
        }
    }

    // Block `number` from XᵀY of the one before it, the first from the start's.
    bool extend(int number) {
        const float scale = static_cast<float>(std::ldexp(1.0, -exponent_));
        for (std::int64_t i = 0; i < size_; ++i) next_[i] *= scale;
        return orthonormalise(number);
    }

    // Block `number` from next_, into now_ and the basis.
    bool orthonormalise(int number) {
        const int before = number * block_;
        for (int pass = 0; pass < PASSES; ++pass) {
            // All but rounding lies in the last two blocks. It goes first: taken out together with
            // the rest, it would carry over what the basis lacks in orthogonality, growing by steps.
            if (pass == 0 && before) project(number > 2 ? before - 2 * block_ : 0, before);
            const double out = before ? project(0, before) : 0;
            double factor[WIDEST * WIDEST] = {};
            gram_of_columns({next_, block_}, call_.columns, 0, block_, width_, gram_block_ + 0,
                            rows_ + 0);
            double trace = 0;
            for (int c = 0; c < block_; ++c) trace += gram_block_[c * width_ + c];
            const double mean = trace / block_;
            if (!(mean > 1e-60 && mean < 1e60)) return false;
            const auto take = [&](double shift) {
                for (int c = 0; c < block_; ++c) {
                    for (int d = 0; d < block_; ++d) {
                        factor[c * block_ + d] = gram_block_[c * width_ + d] + (c == d ? shift : 0);
                    }
                }
            };
            take(0);
            bool sound = cholesky(factor, block_, block_, 100 * SHIFT * mean);
            if (!sound) {
                take(SHIFT * trace);
                if (!cholesky(factor, block_, block_, 0)) return false;
            } else {
                double smallest = factor[0];
                for (int c = 1; c < block_; ++c) {
                    const double pivot = factor[c * block_ + c];
                    if (pivot < smallest) smallest = pivot;
                }
                sound = smallest > SOUND * std::sqrt(mean + out / block_);
            }
            invert_lower(factor, block_, block_);
            multiply_rows(next_, now_, block_, call_.columns, factor, block_);
            if (sound) {
                keep(number);
                return true;
            }
            float* const other = now_;
            now_ = next_;
            next_ = other;
        }
        return false;
    }

    // now_ becomes vectors of the basis.
    void keep(int number) const {
        for (int group = 0; group < block_; group += GROUP) {
            float* to = basis_panel((number * block_ + group) / BASIS);
            to += (number * block_ + group) % BASIS;
            const float* from = now_ + group;
            for (std::int64_t k = 0; k < call_.columns; ++k, to += BASIS, from += block_) {
                std::memcpy(to, from, GROUP * sizeof(float));
            }
        }
    }

    float* basis_panel(std::int64_t panel) const { return basis_ + panel * call_.columns * BASIS; }

    // Takes out of next_ what lies in vectors first … last - 1; the squares of that.
    double project(int first, int last) {
        const int begin = first / BASIS, end = (last + BASIS - 1) / BASIS;
        double out = 0;
        for (int panel = begin; panel < end; ++panel) {
            alignas(64) float y[WIDEST * BASIS];
            along_packed<BASIS / LANES>(basis_panel(panel), call_.columns, next_, block_, y);
            for (int i = 0; i < BASIS; ++i) {
                const int vector = panel * BASIS + i;
                const bool meant = vector >= first && vector < last;
                float* to = taken_ + ((panel - begin) * BASIS + i) * block_;
                for (int c = 0; c < block_; ++c) {
                    to[c] = meant ? -y[c * BASIS + i] : 0;
                    out += static_cast<double>(to[c]) * to[c];
                }
            }
        }
        across_packed<BASIS, Into::sum>(basis_panels(begin, end), call_.columns, taken_ + 0, block_,
                                        next_);
        return out;
    }

    Panels basis_panels(int begin, int end) const {
        return {basis_panel(begin), call_.columns * BASIS, end - begin, 0};
    }

    // Ritz values of the first blocks, of which `known` had theirs, and their order; unless the
    // values are alike and to be checked, the vectors too.
    bool ritz(int blocks, int known, bool checked) {
        count_ = blocks * block_;
        gram_of_columns({image_ + 0, width_}, call_.rows, known * block_, count_, width_,
                        gram_ + 0, rows_ + 0);
        std::memcpy(work_ + 0, gram_ + 0, count_ * width_ * sizeof(double));
        Symmetric solver(count_, width_, work_ + 0, values_ + 0);
        if (!solver.values()) return false;
        for (int i = 0; i < count_; ++i) {
            int at = i;
            for (; at > 0 && values_[order_[at - 1]] < values_[i]; --at) order_[at] = order_[at - 1];
            order_[at] = i;
        }
        if (!(values_[order_[0]] < HUGE_VAL)) return false;
        if (!checked && alike()) return true;
        solver.vectors(order_ + 0, static_cast<int>(call_.q), wide_, vectors_ + 0);
        return true;
    }

    double value(std::int64_t place) const {
        const double square = values_[order_[place]];
        return square > 0 ? std::sqrt(square) : 0;
    }

    // Whether so many neighbours lie so near that there may be more of them than a block can find.
    bool alike() const {
        for (std::int64_t i = 0; i + block_ <= call_.q + block_ / 2 && i + block_ <= count_; ++i) {
            if (value(i) - value(i + block_ - 1) < call_.alike * value(i)) return true;
        }
        return false;
    }

    // Whether two blocks from a fresh start leave all values about where they are, and no vector had
    // only just turned up, in the last block: it is far from converged.
    bool check(std::int64_t index) {
        const int blocks = static_cast<int>(call_.blocks);
        for (std::int64_t i = 0; i < call_.q; ++i) before_[i] = value(i);
        transpose(call_.start + block_ * call_.start_stride, call_.start_stride, block_,
                  call_.columns, next_, block_);
        if (!orthonormalise(blocks)) return false;
        multiply(blocks, true);
        if (!extend(blocks + 1)) return false;
        multiply(blocks + 1, false);
        if (!ritz(blocks + CHECKING, blocks, true)) return false;
        // The energy that is left would be no measure: it grows with the matrix, and hides copies.
        double most = 0;
        for (std::int64_t i = 0; i < call_.q; ++i) {
            const double growth = value(i) - before_[i];
            if (growth > most * before_[i]) most = growth / before_[i];
        }
        call_.checked[index] = most;
        return most <= call_.growth && !(most_late() > LATE);
    }

    // The largest share of a wanted vector that lies in the last of the space's own blocks, without
    // those of the check.
    double most_late() const {
        const int end = static_cast<int>(call_.blocks) * block_;
        double most = 0;
        for (std::int64_t i = 0; i < call_.q; ++i) {
            double share = 0;
            for (int j = end - block_; j < end; ++j) {
                share += vectors_[j * wide_ + i] * vectors_[j * wide_ + i];
            }
            if (share > most) most = share;
        }
        return most;
    }

    bool triples(std::int64_t index) {
        const std::int64_t q = call_.q;
        if (!(value(q - 1) > call_.least * value(0))) return false;
        coarse_ = rounds_ && !(value(q - 1) > call_.rounded_least * value(0) && most_late() > SETTLED);
        if (coarse_) return false;
        double* s = call_.s + index * q;
        for (std::int64_t i = 0; i < q; ++i) s[i] = value(i);
        std::memset(weights_ + 0, 0, basis_panels_ * BASIS * wide_ * sizeof(float));
        for (std::int64_t i = 0; i < count_ * wide_; ++i) {
            weights_[i] = static_cast<float>(vectors_[i]);
        }
        right();
        if (!orthonormal(right_ + 0, call_.columns, wide_)) return false;
        transpose(right_ + 0, wide_, call_.columns, q, call_.vh + index * q * call_.columns,
                  call_.columns);
        float* u = call_.u + index * call_.rows * q;
        left(u);
        return orthonormal(u, call_.rows, static_cast<int>(q));
    }

    // V = Q Z [columns, wide].
    void right() const {
        across_packed<BASIS, Into::fresh>(basis_panels(0, (count_ + BASIS - 1) / BASIS),
                                          call_.columns, weights_ + 0, wide_, right_ + 0);
    }

    // U = Y Z / s [rows, q].
    void left(float* u) const {
        for (std::int64_t i = 0; i < call_.q; ++i) {
            const double inverse = 1 / value(i);
            for (int j = 0; j < count_; ++j) {
                weights_[j * wide_ + i] = static_cast<float>(vectors_[j * wide_ + i] * inverse);
            }
        }
        Buffer<float> some(wide_ * TALL);
        for (std::int64_t panel = 0; panel < panels_; ++panel) {
            along_packed<VECTORS>(image_panels_ + panel * most_ * TALL, count_, weights_ + 0, wide_,
                                  some + 0);
            transpose(some + 0, TALL, call_.q, rows_of(panel), u + panel * TALL * call_.q, call_.q);
        }
    }

    // Whether vectors, the first q columns of x [rows, width], are orthonormal, if need be after one
    // Cholesky pass.
    bool orthonormal(float* x, std::int64_t rows, int width) const {
        const int q = static_cast<int>(call_.q);
        gram_of_columns({x, width}, rows, 0, q, width_, gram_ + 0, rows_ + 0);
        const double off = off_identity();
        if (off <= ORTHONORMAL) return true;
        if (!(off <= REPAIRED) || !cholesky(gram_ + 0, q, width_, 0)) return false;
        invert_lower(gram_ + 0, q, width_);
        for (int i = q; i < width; ++i) {
            for (int j = 0; j < width; ++j) gram_[i * width_ + j] = 0;
        }
        multiply_rows(x, x, width, rows, gram_ + 0, width_);
        return true;
    }

    // The largest element of gram_ - I in its q rows and columns.
    double off_identity() const {
        double most = 0;
        for (std::int64_t i = 0; i < call_.q; ++i) {
            for (std::int64_t j = 0; j < call_.q; ++j) {
                const double off = std::fabs(gram_[i * width_ + j] - (i == j));
                if (!(off <= most)) most = off;
            }
        }
        return most;
    }

    const BlockLanczos& call_;
    const int threads_, block_, most_;
    const std::int64_t width_;
    const int wide_;
    const std::int64_t size_;  // of a block
    const std::int64_t panels_, basis_panels_;
    const Buffer<float> basis_;         // Q in panels
    const Buffer<float> image_;         // X Q [rows, width_]
    const Buffer<float> image_panels_;  // the same in panels as X's
    const Buffer<float> packed_;        // X in panels
    const std::int64_t chunk_, chunks_;  // panels of one, and how many
    const Buffer<float> blocks_;         // now_ and next_
    const Buffer<Rounded::Operand> pairs_;  // of the start's vectors
    const Buffer<float> sums_;           // XᵀY of a chunk, of every chunk where threads share them
    const Buffer<double> squares_of_;   // of panels
    const Buffer<float> taken_;
    const Buffer<double> gram_, gram_block_, work_, vectors_, values_, rows_;
    const Buffer<float> weights_, right_;
    const Buffer<double> before_;  // the values that are checked
    const Buffer<int> order_;
    float *now_, *next_;  // a block, and what the one after it is made from: [columns, block_]
    Rows x_{};
    int exponent_ = 0, count_ = 0;
    bool rounds_ = false;  // XᵀY and the start's X V are multiplied in bfloat16
    bool coarse_ = false;  // and that is coarser than what else is left to do
};

}  // namespace

// A matrix a thread, as many at once as there is room for; threads share the products of those that
// are left over.
void block_lanczos(const BlockLanczos& call, int threads) {
    const std::int64_t room = ROOM / (call.rows * call.columns);
    const int at_once = room < 1 ? 1 : least(room, threads);
    const std::int64_t alone =
        at_once == 1 && threads > 1 ? 0 : call.count / at_once * at_once;
    parallel_for(alone, 1, at_once, [&](std::int64_t first, std::int64_t last) {
        Space space(call, 1);
        for (std::int64_t index = first; index < last; ++index) space.run(index);
    });
    if (alone == call.count) return;
    Space space(call, threads);
    for (std::int64_t index = alone; index < call.count; ++index) space.run(index);
}

}  // namespace fastlora::FASTLORA_ISA
