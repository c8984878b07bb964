// A matrix a thread, from a copy in panels. Every panel is read once for both products, Y = X V and
// XᵀY, while it is in the cache.
#include "block_lanczos.hpp"

#include <cmath>

#include "dense.hpp"
#include "packed.hpp"
#include "panel.hpp"
#include "parallel.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

constexpr int PASSES = 4;             // of an orthonormalisation at most
constexpr double SOUND = 0.03;        // pivots below this share of the whole: once more
constexpr double SHIFT = 1e-6;        // of the mean square, where pivots vanish
constexpr double ORTHONORMAL = 2e-6;  // what the results' Gram matrices may be off untouched
constexpr double REPAIRED = 0.05;     // and up to where one Cholesky pass repairs them
constexpr int CHECKING = 2;           // blocks of the check
constexpr std::int64_t SPREAD = 16;   // values between rows, so that they share no cache set
constexpr int GRAM_ROWS = 64;
constexpr int WIDEST = 32;            // vectors of a block
constexpr std::int64_t CHUNK = 256;   // rows at least whose share of XᵀY is summed by itself
constexpr std::int64_t CHUNKS = 8;    // at most
constexpr std::int64_t ROOM = std::int64_t{1} << 28;  // floats of the copies there are at once

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
// columns, a multiple of 8, are there already. `space`: [width, GRAM_ROWS], in which LANES columns of x
// lie together.
void gram_of_columns(Rows x, std::int64_t count, int known, int n, std::int64_t width, double* g,
                     double* space) {
    constexpr int TILE = 4;
    const int fresh = known / LANES * LANES;
    for (int i = 0; i < up_to(n, TILE); ++i) {
        for (std::int64_t j = i < fresh ? fresh : i / LANES * LANES; j < width; ++j) {
            g[i * width + j] = 0;
        }
    }
    for (std::int64_t first = 0; first < count; first += GRAM_ROWS) {
        const int some = least(count - first, GRAM_ROWS);
        for (int j = 0; j < n; j += LANES) {
            double* to = space + j * GRAM_ROWS;
            const int columns = least(n - j, LANES);
            for (int i = 0; i < some; ++i, to += LANES) {
                const float* row = x[first + i] + j;
                store(to, widen(columns == LANES ? load(row) : load_some(row, columns)));
            }
        }
        for (int i = 0; i < n; i += TILE) {
            const int place = i / LANES * LANES;
            for (std::int64_t j = place < fresh ? fresh : place; j < n; j += LANES) {
                Wide acc[TILE][2];
                for (int t = 0; t < TILE; ++t) {
                    for (int v = 0; v < 2; ++v) acc[t][v] = wide(g + (i + t) * width + j + v * WIDE);
                }
                const double* left = space + place * GRAM_ROWS + i - place;
                const double* right = space + j * GRAM_ROWS;
                for (int row = 0; row < some; ++row, left += LANES, right += LANES) {
                    const Wide one = wide(right), two = wide(right + WIDE);
                    for (int t = 0; t < TILE; ++t) {
                        acc[t][0] += left[t] * one;
                        acc[t][1] += left[t] * two;
                    }
                }
                for (int t = 0; t < TILE; ++t) {
                    for (int v = 0; v < 2; ++v) put(g + (i + t) * width + j + v * WIDE, acc[t][v]);
                }
            }
        }
    }
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < i; ++j) g[i * width + j] = g[j * width + i];
        for (std::int64_t j = n; j < width; ++j) g[i * width + j] = 0;
    }
}

// g [width, width] = w_c · w_d of `width` vectors, in float64.
void gram_of_rows(Rows w, int width, std::int64_t length, double* g) {
    for (int c = 0; c < width; ++c) {
        for (int from = 0; from <= c; from += GROUP) {
            const int some = least(c + 1 - from, GROUP);
            Doubles total[GROUP] = {};
            for (std::int64_t k = 0; k < length; k += LANES) {
                const Doubles own = widen(load(w[c] + k));
                for (int d = 0; d < some; ++d) total[d] += own * widen(load(w[from + d] + k));
            }
            for (int d = 0; d < some; ++d) {
                g[c * width + from + d] = g[(from + d) * width + c] = sum(total[d]);
            }
        }
    }
}

// w ← T w of `width` vectors, T lower triangular.
void multiply_rows(float* w, int width, std::int64_t stride, std::int64_t length,
                   const double* t) {
    float factor[WIDEST * WIDEST];
    for (int i = 0; i < width * width; ++i) factor[i] = static_cast<float>(t[i]);
    for (std::int64_t k = 0; k < length; k += LANES) {
        Floats old[WIDEST];
        for (int c = 0; c < width; ++c) old[c] = load(w + c * stride + k);
        for (int c = 0; c < width; ++c) {
            Floats value = factor[c * width] * old[0];
            for (int d = 1; d <= c; ++d) value += factor[c * width + d] * old[d];
            store(w + c * stride + k, value);
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
          most_((call.blocks + CHECKING) * block_),
          width_(round_up(most_)),
          length_(up_to(call.columns, LANES)),
          stride_(length_ + SPREAD),
          wide_(up_to(call.q, GROUP)),
          basis_(most_ * stride_),
          image_(call.rows * width_),
          packed_(up_to(call.rows, TALL) * call.columns),
          chunks_(chunks(call.rows)),
          chunk_(up_to((call.rows + chunks_ - 1) / chunks_, TALL)),
          turned_(call.columns * block_),
          total_(call.columns * block_),
          sums_((threads > 1 ? chunks_ : 1) * call.columns * block_),
          squares_of_(chunks_),
          taken_(most_ * block_),
          gram_(up_to(most_, 4) * width_),
          work_(most_ * width_),
          vectors_(most_ * width_),
          values_(width_),
          rows_(GRAM_ROWS * width_),
          factor_(wide_ * width_),
          weights_(most_ * wide_),
          right_(wide_ * stride_),
          order_(most_) {}

    void run(std::int64_t index) {
        x_ = {call_.x[index], call_.stride};
        call_.checked[index] = -1;
        call_.found[index] = decompose(index);
    }

private:
    Found decompose(std::int64_t index) {
        read();
        call_.squares[index] = squares_;
        const double norm = std::sqrt(squares_);
        if (!(norm > call_.low && norm < call_.high)) return Found::extremes;
        std::frexp(squares_, &exponent_);
        if (!begin(0, call_.start)) return Found::nothing;
        for (int block = 0; block < call_.blocks; ++block) {
            const bool last = block + 1 == call_.blocks;
            multiply(block, !last);
            if (!last && !extend(block + 1)) return Found::nothing;
        }
        if (!ritz(static_cast<int>(call_.blocks), 0, false)) return Found::nothing;
        if (alike() && !check(index)) return Found::nothing;
        return triples(index) ? Found::triples : Found::nothing;
    }

    static std::int64_t chunks(std::int64_t rows) {
        const std::int64_t count = rows / CHUNK;
        return count < 1 ? 1 : count < CHUNKS ? count : CHUNKS;
    }

    float* block(int number) const { return basis_ + number * block_ * stride_; }

    // Block `number` from vectors at random.
    bool begin(int number, const float* from) {
        for (int c = 0; c < block_; ++c) {
            float* to = block(number) + c * stride_;
            std::memcpy(to, from + c * call_.columns, call_.columns * sizeof(float));
            for (std::int64_t k = call_.columns; k < stride_; ++k) to[k] = 0;
        }
        return orthonormalise(number);
    }

    // Calls body(chunk) for every chunk of rows, whoever of the threads takes it.
    template <class Body>
    void each_chunk(const Body& body) const {
        parallel_for(chunks_, 1, threads_, [&](std::int64_t from, std::int64_t to) {
            for (std::int64_t chunk = from; chunk < to; ++chunk) body(chunk);
        });
    }

    // The copy of X in panels, and ‖X‖².
    void read() {
        each_chunk([&](std::int64_t chunk) {
            const std::int64_t end = least((chunk + 1) * chunk_, call_.rows);
            squares_of_[chunk] = 0;
            for (std::int64_t first = chunk * chunk_; first < end; first += TALL) {
                const int some = least(end - first, TALL);
                for (int i = 0; i < some; ++i) {
                    squares_of_[chunk] += square_sum(x_[first + i], call_.columns);
                }
                pack(x_[first], x_.stride, some, call_.columns, packed_ + first * call_.columns);
            }
        });
        squares_ = 0;
        for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) squares_ += squares_of_[chunk];
    }

    // Y of a block, and Xᵀ Y into the next where `back`. Chunks of rows, however many threads share
    // them, are added up in one order.
    void multiply(int number, bool back) {
        const std::int64_t size = call_.columns * block_;
        const float* from = block(number);
        for (int c = 0; c < block_; ++c, from += stride_) {
            for (std::int64_t k = 0; k < call_.columns; ++k) turned_[k * block_ + c] = from[k];
        }
        if (threads_ == 1) {
            for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
                multiply(number, chunk, back ? sums_ + 0 : nullptr);
                if (back) gather(sums_ + 0, size, chunk);
            }
        } else {
            each_chunk([&](std::int64_t chunk) {
                multiply(number, chunk, back ? sums_ + chunk * size : nullptr);
            });
            for (std::int64_t chunk = 0; back && chunk < chunks_; ++chunk) {
                gather(sums_ + chunk * size, size, chunk);
            }
        }
        if (!back) return;
        float* to = block(number + 1);
        for (int c = 0; c < block_; ++c, to += stride_) {
            for (std::int64_t k = 0; k < call_.columns; ++k) to[k] = total_[k * block_ + c];
            for (std::int64_t k = call_.columns; k < stride_; ++k) to[k] = 0;
        }
    }

    void gather(const float* part, std::int64_t size, std::int64_t chunk) const {
        if (chunk == 0) {
            std::memcpy(total_ + 0, part, size * sizeof(float));
            return;
        }
        for (std::int64_t i = 0; i < size; ++i) total_[i] += part[i];
    }

    void multiply(int number, std::int64_t chunk, float* sums) const {
        const std::int64_t end = least((chunk + 1) * chunk_, call_.rows);
        if (sums) std::memset(sums, 0, call_.columns * block_ * sizeof(float));
        for (std::int64_t first = chunk * chunk_; first < end; first += TALL) {
            const int rows = least(end - first, TALL);
            const float* x = packed_ + first * call_.columns;
            alignas(64) float y[WIDEST * TALL], turned[TALL * WIDEST];
            along_packed(x, call_.columns, turned_ + 0, block_, y);
            for (int i = 0; i < TALL; ++i) {
                for (int c = 0; c < block_; ++c) turned[i * block_ + c] = y[c * TALL + i];
            }
            for (int i = 0; i < rows; ++i) {
                std::memcpy(image_ + (first + i) * width_ + number * block_, turned + i * block_,
                            block_ * sizeof(float));
            }
            if (sums) {
                const bool more = first + TALL < call_.rows;
                across_packed(x, call_.columns, turned, block_, sums,
                              more ? call_.columns * TALL : 0);
            }
        }
    }

    // Block `number` from XᵀY of the one before it, which lies in its place.
    bool extend(int number) {
        const float scale = static_cast<float>(std::ldexp(1.0, -exponent_));
        float* to = block(number);
        for (std::int64_t i = 0; i < block_ * stride_; ++i) to[i] *= scale;
        return orthonormalise(number);
    }

    bool orthonormalise(int number) {
        float* w = block(number);
        const int before = number * block_;
        for (int pass = 0; pass < PASSES; ++pass) {
            // All but rounding lies in the last two blocks. It goes first: taken out together with
            // the rest, it would carry over what the basis lacks in orthogonality, growing by steps.
            if (pass == 0 && before) project(w, number > 2 ? before - 2 * block_ : 0, before);
            const double out = before ? project(w, 0, before) : 0;
            double g[WIDEST * WIDEST], factor[WIDEST * WIDEST];
            gram_of_rows({w, stride_}, block_, length_, g);
            double trace = 0;
            for (int c = 0; c < block_; ++c) trace += g[c * block_ + c];
            const double mean = trace / block_;
            if (!(mean > 1e-60 && mean < 1e60)) return false;
            const std::size_t size = block_ * block_ * sizeof(double);
            std::memcpy(factor, g, size);
            bool sound = cholesky(factor, block_, block_, 100 * SHIFT * mean);
            if (!sound) {
                std::memcpy(factor, g, size);
                for (int c = 0; c < block_; ++c) factor[c * block_ + c] += SHIFT * trace;
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
            multiply_rows(w, block_, stride_, length_, factor);
            if (sound) return true;
        }
        return false;
    }

    // Takes out of w what lies in vectors first … last - 1; the squares of that.
    double project(float* w, int first, int last) {
        double out = 0;
        const int count = last - first;
        const Rows basis = Rows{basis_ + 0, stride_}.from(first);
        for (int group = 0; group < block_; group += GROUP) {
            const Rows some{w + group * stride_, stride_};
            for (int i = 0; i < count; i += PANEL) {
                along(basis.from(i), least(count - i, PANEL), some, length_, taken_ + i * GROUP,
                      GROUP);
            }
            for (int i = 0; i < count * GROUP; ++i) {
                out += static_cast<double>(taken_[i]) * taken_[i];
                taken_[i] = -taken_[i];
            }
            across(basis, count, length_, taken_ + 0, GROUP, w + group * stride_, stride_);
        }
        return out;
    }

    // Ritz values of the first blocks, of which `known` had theirs, and their order; unless the
    // values are alike and to be checked, the vectors too.
    bool ritz(int blocks, int known, bool checked) {
        count_ = blocks * block_;
        gram_of_columns({image_ + 0, width_}, call_.rows, known * block_, count_, width_,
                        gram_ + 0, rows_ + 0);
        std::memcpy(work_ + 0, gram_ + 0, count_ * width_ * sizeof(double));
        Symmetric solver(count_, width_, work_ + 0, values_ + 0, vectors_ + 0);
        if (!solver.values()) return false;
        for (int i = 0; i < count_; ++i) {
            int at = i;
            for (; at > 0 && values_[order_[at - 1]] < values_[i]; --at) order_[at] = order_[at - 1];
            order_[at] = i;
        }
        if (!(values_[order_[0]] < HUGE_VAL)) return false;
        if (!checked && alike()) return true;
        if (!solver.vectors()) return false;
        for (int i = 0; i < call_.q; ++i) solver.back(order_[i]);
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

    bool check(std::int64_t index) {
        const int blocks = static_cast<int>(call_.blocks);
        if (!begin(blocks, call_.start + block_ * call_.columns)) return false;
        multiply(blocks, true);
        if (!extend(blocks + 1)) return false;
        multiply(blocks + 1, false);
        if (!ritz(blocks + CHECKING, blocks, true)) return false;
        double energy = 0, found = 0;
        for (std::int64_t i = 0; i < call_.q; ++i) {
            const double* z = vectors_ + order_[i] * width_;
            double weight = 0;
            for (int j = blocks * block_; j < count_; ++j) weight += z[j] * z[j];
            energy += values_[order_[i]];
            found += values_[order_[i]] * weight;
        }
        const double left = squares_ - energy;
        call_.checked[index] = found / (left > 1e-6 * squares_ ? left : 1e-6 * squares_);
        return call_.checked[index] <= call_.share;
    }

    bool triples(std::int64_t index) {
        const std::int64_t q = call_.q;
        if (!(value(q - 1) > call_.least * value(0))) return false;
        double* s = call_.s + index * q;
        for (std::int64_t i = 0; i < wide_ * width_; ++i) factor_[i] = 0;
        for (std::int64_t i = 0; i < most_ * wide_; ++i) weights_[i] = 0;
        for (std::int64_t i = 0; i < q; ++i) {
            const double* z = vectors_ + order_[i] * width_;
            s[i] = value(i);
            for (int j = 0; j < count_; ++j) {
                factor_[i * width_ + j] = static_cast<float>(z[j] / s[i]);
                weights_[j * wide_ + i] = static_cast<float>(z[j]);
            }
        }
        return left(call_.u + index * call_.rows * q) && right(call_.vh + index * q * call_.columns);
    }

    // U = Y Z / s.
    bool left(float* u) {
        turn({image_ + 0, width_}, count_, u);
        Rows found{u, call_.q};
        gram_of_columns(found, call_.rows, 0, static_cast<int>(call_.q), width_, gram_ + 0,
                        rows_ + 0);
        const double off = off_identity();
        if (off <= ORTHONORMAL) return true;
        if (!(off <= REPAIRED) || !whitener()) return false;
        turn(found, static_cast<int>(call_.q), u);
        return true;
    }

    // to [rows, q] = from [rows, length] factor_ᵀ, which may be in place.
    void turn(Rows from, int length, float* to) const {
        Buffer<float> some(PANEL * wide_);
        for (std::int64_t first = 0; first < call_.rows; first += PANEL) {
            const int rows = least(call_.rows - first, PANEL);
            for (std::int64_t group = 0; group < wide_; group += GROUP) {
                along(from.from(first), rows, {factor_ + group * width_, width_}, length,
                      some + group, wide_);
            }
            for (int i = 0; i < rows; ++i) {
                std::memcpy(to + (first + i) * call_.q, some + i * wide_, call_.q * sizeof(float));
            }
        }
    }

    // Vh = Zᵀ Q.
    bool right(float* vh) {
        const std::int64_t q = call_.q;
        combine({basis_ + 0, stride_}, count_, right_ + 0);
        for (std::int64_t group = 0; group < wide_; group += GROUP) {
            for (std::int64_t i = 0; i < q; i += PANEL) {
                float some[PANEL * GROUP];
                const int rows = least(q - i, PANEL);
                along({right_ + i * stride_, stride_}, rows, {right_ + group * stride_, stride_},
                      length_, some, GROUP);
                for (int j = 0; j < rows; ++j) {
                    for (int c = 0; c < GROUP; ++c) {
                        gram_[(i + j) * width_ + group + c] = some[j * GROUP + c];
                    }
                }
            }
        }
        const double off = off_identity();
        if (off > ORTHONORMAL) {
            if (!(off <= REPAIRED) || !whitener()) return false;
            for (std::int64_t i = 0; i < q; ++i) {
                for (std::int64_t j = 0; j < wide_; ++j) {
                    weights_[i * wide_ + j] = j < q ? factor_[j * width_ + i] : 0;
                }
            }
            Buffer<float> old(q * stride_);
            std::memcpy(old + 0, right_ + 0, q * stride_ * sizeof(float));
            combine({old + 0, stride_}, static_cast<int>(q), right_ + 0);
        }
        for (std::int64_t i = 0; i < q; ++i) {
            std::memcpy(vh + i * call_.columns, right_ + i * stride_,
                        call_.columns * sizeof(float));
        }
        return true;
    }

    // to_j = Σ_i weights_ij from_i.
    void combine(Rows from, int count, float* to) const {
        for (std::int64_t i = 0; i < wide_ * stride_; ++i) to[i] = 0;
        for (std::int64_t group = 0; group < wide_; group += GROUP) {
            across(from, count, length_, weights_ + group, wide_, to + group * stride_, stride_);
        }
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

    // factor_ = L⁻¹ of gram_ = L Lᵀ, in its q rows and columns.
    bool whitener() {
        const int q = static_cast<int>(call_.q);
        if (!cholesky(gram_ + 0, q, width_, 0)) return false;
        invert_lower(gram_ + 0, q, width_);
        for (std::int64_t i = 0; i < wide_ * width_; ++i) factor_[i] = 0;
        for (int i = 0; i < q; ++i) {
            for (int j = 0; j <= i; ++j) {
                factor_[i * width_ + j] = static_cast<float>(gram_[i * width_ + j]);
            }
        }
        return true;
    }

    const BlockLanczos& call_;
    const int threads_, block_;
    const std::int64_t most_, width_, length_, stride_, wide_;
    const Buffer<float> basis_;  // Q, a vector a row
    const Buffer<float> image_;  // X Qᵀ, a vector a column
    const Buffer<float> packed_;  // X, see packed.hpp
    const std::int64_t chunks_, chunk_;
    const Buffer<float> turned_, total_;  // a block and XᵀY, an element of all vectors together
    const Buffer<float> sums_;  // XᵀY of a chunk, of every chunk where threads share them
    const Buffer<double> squares_of_;
    const Buffer<float> taken_;
    const Buffer<double> gram_, work_, vectors_, values_, rows_;
    const Buffer<float> factor_, weights_, right_;
    const Buffer<int> order_;
    Rows x_{};
    double squares_ = 0;
    int exponent_ = 0, count_ = 0;
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
