// A matrix a thread. Every panel of its rows is read once for both products, Y = X V and XᵀY, while it
// is in the cache.
#include "block_lanczos.hpp"

#include <cmath>

#include "dense.hpp"
#include "panel.hpp"
#include "parallel.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

constexpr int PASSES = 4;             // of an orthonormalisation at most
constexpr double SOUND = 0.03;        // pivots below this share of what was taken out: once more
constexpr double SHIFT = 1e-6;        // of the mean square, where pivots vanish
constexpr double ORTHONORMAL = 2e-6;  // what the results' Gram matrices may be off untouched
constexpr double REPAIRED = 0.05;     // and up to where one Cholesky pass repairs them
constexpr int CHECKING = 2;           // blocks of the check
constexpr std::int64_t SPREAD = 16;   // values between rows, so that they share no cache set
constexpr int GRAM_ROWS = 32;

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

// g [n, n] = xᵀx of rows x [count, n padded], in float64, by rows `width` apart.
void gram_of_columns(Rows x, std::int64_t count, int n, std::int64_t width, double* g,
                     double* space) {
    constexpr int TILE = 4;
    const std::int64_t high = up_to(n, TILE);
    zero(g, high * width);
    for (std::int64_t first = 0; first < count; first += GRAM_ROWS) {
        const int some = least(count - first, GRAM_ROWS);
        for (int i = 0; i < some; ++i) {
            for (std::int64_t j = 0; j < width; j += LANES) {
                store(space + i * width + j,
                      widen(load_some(x[first + i] + j, j < n ? least(n - j, LANES) : 0)));
            }
        }
        for (int i = 0; i < n; i += TILE) {
            for (std::int64_t j = i / LANES * LANES; j < width; j += LANES) {
                Doubles acc[TILE];
                for (int t = 0; t < TILE; ++t) acc[t] = load(g + (i + t) * width + j);
                for (int row = 0; row < some; ++row) {
                    const double* left = space + row * width + i;
                    const Doubles right = load(space + row * width + j);
                    for (int t = 0; t < TILE; ++t) acc[t] += left[t] * right;
                }
                for (int t = 0; t < TILE; ++t) store(g + (i + t) * width + j, acc[t]);
            }
        }
    }
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < i; ++j) g[i * width + j] = g[j * width + i];
        for (std::int64_t j = n; j < width; ++j) g[i * width + j] = 0;
    }
}

// g [GROUP, GROUP] = w_c · w_d in float64.
void gram_of_group(Rows w, std::int64_t length, double* g) {
    for (int c = 0; c < GROUP; ++c) {
        Doubles total[GROUP] = {};
        for (std::int64_t k = 0; k < length; k += LANES) {
            const Doubles own = widen(load(w[c] + k));
            for (int d = 0; d <= c; ++d) total[d] += own * widen(load(w[d] + k));
        }
        for (int d = 0; d <= c; ++d) g[c * GROUP + d] = g[d * GROUP + c] = sum(total[d]);
    }
}

// w ← T w of GROUP vectors, T lower triangular.
void multiply_group(float* w, std::int64_t stride, std::int64_t length, const double* t) {
    float factor[GROUP][GROUP];
    for (int c = 0; c < GROUP; ++c) {
        for (int d = 0; d < GROUP; ++d) factor[c][d] = static_cast<float>(t[c * GROUP + d]);
    }
    for (std::int64_t k = 0; k < length; k += LANES) {
        Floats old[GROUP];
        for (int c = 0; c < GROUP; ++c) old[c] = load(w + c * stride + k);
        for (int c = 0; c < GROUP; ++c) {
            Floats value = factor[c][0] * old[0];
            for (int d = 1; d <= c; ++d) value += factor[c][d] * old[d];
            store(w + c * stride + k, value);
        }
    }
}

class Space {
public:
    explicit Space(const BlockLanczos& call)
        : call_(call),
          most_((call.blocks + CHECKING) * GROUP),
          width_(round_up(most_)),
          length_(up_to(call.columns, LANES)),
          stride_(length_ + SPREAD),
          wide_(up_to(call.q, GROUP)),
          panel_(least(call.columns > 4096 ? 12 : PANEL, PANEL)),
          basis_(most_ * stride_),
          image_(call.rows * width_),
          sums_(GROUP * stride_),
          taken_(most_ * GROUP),
          gram_(up_to(most_, 4) * width_),
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
        if (!begin(0, call_.start)) return Found::nothing;
        for (int block = 0; block < call_.blocks; ++block) {
            const bool last = block + 1 == call_.blocks;
            multiply(block, !last, block == 0);
            if (block == 0) {
                call_.squares[index] = squares_;
                const double norm = std::sqrt(squares_);
                if (!(norm > call_.low && norm < call_.high)) return Found::extremes;
                std::frexp(squares_, &exponent_);
            }
            if (!last && !extend(block + 1)) return Found::nothing;
        }
        int blocks = static_cast<int>(call_.blocks);
        if (!values(blocks)) return Found::nothing;
        if (alike()) {
            if (!check(index)) return Found::nothing;
            blocks += CHECKING;
        }
        return triples(index, blocks) ? Found::triples : Found::nothing;
    }

    float* block(int number) const { return basis_ + number * GROUP * stride_; }

    // Block `number` from vectors at random.
    bool begin(int number, const float* from) {
        for (int c = 0; c < GROUP; ++c) {
            float* to = block(number) + c * stride_;
            std::memcpy(to, from + c * call_.columns, call_.columns * sizeof(float));
            for (std::int64_t k = call_.columns; k < stride_; ++k) to[k] = 0;
        }
        return orthonormalise(number);
    }

    // Y of a block, Xᵀ Y where `back`, and ‖X‖² where `square`.
    void multiply(int number, bool back, bool square) {
        const Rows vectors{block(number), stride_};
        if (back) {
            for (std::int64_t i = 0; i < GROUP * stride_; ++i) sums_[i] = 0;
        }
        if (square) squares_ = 0;
        for (std::int64_t first = 0; first < call_.rows; first += panel_) {
            const int some = least(call_.rows - first, panel_);
            const Rows x = x_.from(first);
            float* y = image_ + first * width_ + number * GROUP;
            along(x, some, vectors, call_.columns, y, width_);
            if (square) {
                for (int i = 0; i < some; ++i) squares_ += square_sum(x[i], call_.columns);
            }
            if (back) {
                across(x, some, call_.columns, y, width_, sums_ + 0, stride_,
                       first + panel_ < call_.rows ? panel_ * call_.stride : 0);
            }
        }
    }

    // Block `number` from XᵀY of the one before it.
    bool extend(int number) {
        const float scale = static_cast<float>(std::ldexp(1.0, -exponent_));
        float* to = block(number);
        for (std::int64_t i = 0; i < GROUP * stride_; ++i) to[i] = sums_[i] * scale;
        return orthonormalise(number);
    }

    bool orthonormalise(int number) {
        float* w = block(number);
        const int before = number * GROUP;
        double g[GROUP * GROUP];
        for (int pass = 0; pass < PASSES; ++pass) {
            double out = 0;
            if (before) {
                for (int i = 0; i < before; i += PANEL) {
                    along(Rows{basis_ + i * stride_, stride_}, least(before - i, PANEL),
                          {w, stride_}, length_, taken_ + i * GROUP, GROUP);
                }
                for (int i = 0; i < before * GROUP; ++i) {
                    out += static_cast<double>(taken_[i]) * taken_[i];
                    taken_[i] = -taken_[i];
                }
                across({basis_ + 0, stride_}, before, length_, taken_ + 0, GROUP, w, stride_);
            }
            gram_of_group({w, stride_}, length_, g);
            double trace = 0;
            for (int c = 0; c < GROUP; ++c) trace += g[c * GROUP + c];
            const double mean = trace / GROUP;
            if (!(mean > 1e-60 && mean < 1e60)) return false;
            double factor[GROUP * GROUP];
            std::memcpy(factor, g, sizeof g);
            bool sound = cholesky(factor, GROUP, GROUP, 100 * SHIFT * mean);
            if (!sound) {
                std::memcpy(factor, g, sizeof g);
                for (int c = 0; c < GROUP; ++c) factor[c * GROUP + c] += SHIFT * trace;
                if (!cholesky(factor, GROUP, GROUP, 0)) return false;
            } else {
                double smallest = factor[0];
                for (int c = 1; c < GROUP; ++c) {
                    if (factor[c * GROUP + c] < smallest) smallest = factor[c * GROUP + c];
                }
                sound = smallest > SOUND * std::sqrt(mean) &&
                        smallest > SOUND * std::sqrt(out / GROUP);
            }
            invert_lower(factor, GROUP, GROUP);
            for (int c = 0; c < GROUP; ++c) {
                for (int d = c + 1; d < GROUP; ++d) factor[c * GROUP + d] = 0;
            }
            multiply_group(w, stride_, length_, factor);
            if (sound) return true;
        }
        return false;
    }

    // Ritz values of the first blocks, and their order.
    bool values(int blocks) {
        count_ = blocks * GROUP;
        gram_of_columns({image_ + 0, width_}, call_.rows, count_, width_, gram_ + 0, rows_ + 0);
        Symmetric solver(count_, width_, gram_ + 0, values_ + 0, vectors_ + 0);
        if (!solver.solve()) return false;
        for (int i = 0; i < count_; ++i) {
            int at = i;
            for (; at > 0 && values_[order_[at - 1]] < values_[i]; --at) order_[at] = order_[at - 1];
            order_[at] = i;
        }
        for (int i = 0; i < call_.q; ++i) solver.back(order_[i]);
        return values_[order_[0]] < HUGE_VAL;
    }

    double value(std::int64_t place) const {
        const double square = values_[order_[place]];
        return square > 0 ? std::sqrt(square) : 0;
    }

    // Whether so many neighbours lie so near that there may be more of them than a block can find.
    bool alike() const {
        for (std::int64_t i = 0; i + GROUP <= call_.q + GROUP / 2 && i + GROUP <= count_; ++i) {
            if (value(i) - value(i + GROUP - 1) < call_.alike * value(i)) return true;
        }
        return false;
    }

    bool check(std::int64_t index) {
        const int blocks = static_cast<int>(call_.blocks);
        if (!begin(blocks, call_.start + GROUP * call_.columns)) return false;
        multiply(blocks, true, false);
        if (!extend(blocks + 1)) return false;
        multiply(blocks + 1, false, false);
        if (!values(blocks + CHECKING)) return false;
        double energy = 0, found = 0;
        for (std::int64_t i = 0; i < call_.q; ++i) {
            const double* z = vectors_ + order_[i] * width_;
            double weight = 0;
            for (int j = blocks * GROUP; j < count_; ++j) weight += z[j] * z[j];
            energy += values_[order_[i]];
            found += values_[order_[i]] * weight;
        }
        const double left = squares_ - energy;
        call_.checked[index] = found / (left > 1e-6 * squares_ ? left : 1e-6 * squares_);
        return call_.checked[index] <= call_.share;
    }

    bool triples(std::int64_t index, int) {
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
        gram_of_columns(found, call_.rows, static_cast<int>(call_.q), width_, gram_ + 0, rows_ + 0);
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
    const std::int64_t most_, width_, length_, stride_, wide_;
    const int panel_;
    const Buffer<float> basis_;  // Q, a vector a row
    const Buffer<float> image_;  // X Qᵀ, a vector a column
    const Buffer<float> sums_, taken_;
    const Buffer<double> gram_, vectors_, values_, rows_;
    const Buffer<float> factor_, weights_, right_;
    const Buffer<int> order_;
    Rows x_{};
    double squares_ = 0;
    int exponent_ = 0, count_ = 0;
};

}  // namespace

void block_lanczos(const BlockLanczos& call, int threads) {
    parallel_for(call.count, 1, threads, [&](std::int64_t first, std::int64_t last) {
        Space space(call);
        for (std::int64_t index = first; index < last; ++index) space.run(index);
    });
}

}  // namespace fastlora::FASTLORA_ISA
