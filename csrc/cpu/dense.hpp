// Dense problems of a few hundred rows in float64, one at a time, by one thread. Matrices are stored by
// rows `stride` apart, stride a multiple of LANES, with zeros behind their columns. Included by
// kernel files only.
#pragma once

#include <cmath>

#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {
namespace {

// One register of doubles.
constexpr int WIDE = LANES / 2;
typedef double Wide __attribute__((vector_size(8 * WIDE)));

inline Wide wide(const double* from) {
    Wide values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline void put(double* to, Wide values) { std::memcpy(to, &values, sizeof values); }

inline double dot(const double* one, const double* other, std::int64_t from, std::int64_t to) {
    Wide low = {}, high = {};
    for (std::int64_t i = from; i < to; i += LANES) {
        low += wide(one + i) * wide(other + i);
        high += wide(one + i + WIDE) * wide(other + i + WIDE);
    }
    low += high;
    double total = 0;
    for (int lane = 0; lane < WIDE; ++lane) total += low[lane];
    return total;
}

inline void add(double* to, double factor, const double* what, std::int64_t from,
                std::int64_t end) {
    for (std::int64_t i = from; i < end; i += WIDE) {
        put(to + i, wide(to + i) + factor * wide(what + i));
    }
}

// a = L Lᵀ, L in the lower triangle; false where a pivot is not above `least`.
inline bool cholesky(double* a, int n, std::int64_t stride, double least) {
    for (int j = 0; j < n; ++j) {
        double* row = a + j * stride;
        for (int i = 0; i <= j; ++i) {
            const double* other = a + i * stride;
            double value = row[i];
            for (int k = 0; k < i; ++k) value -= row[k] * other[k];
            if (i < j) {
                row[i] = value / other[i];
            } else {
                if (!(value > least)) return false;
                row[j] = std::sqrt(value);
            }
        }
    }
    return true;
}

// The inverse of a lower triangular matrix [n, n], in its place.
inline void invert_lower(double* a, int n, std::int64_t stride) {
    for (int j = 0; j < n; ++j) {
        double* row = a + j * stride;
        const double pivot = 1 / row[j];
        for (int i = 0; i < j; ++i) {
            double value = 0;
            for (int k = i; k < j; ++k) value += row[k] * a[k * stride + i];
            row[i] = -pivot * value;
        }
        row[j] = pivot;
    }
}

// Eigenvalues w [n], unordered, of the symmetric a [n, n] by `values`, and after it eigenvectors of
// some by `vectors`: Householder's tridiagonal form, then implicit QL (Golub and Van Loan, 8.3), whose
// rotations are kept. What a held is lost.
class Symmetric {
public:
    Symmetric(int n, std::int64_t stride, double* a, double* w)
        : n_(n),
          stride_(stride),
          a_(a),
          w_(w),
          off_(stride),
          line_(stride),
          beta_(stride),
          turns_(2 * most_turns()),
          sweeps_(2 * most_sweeps()) {}

    bool values() {
        tridiagonalise();
        return iterate();
    }

    // x [n, width], width a multiple of WIDE: in column i < count the vector of w[order[i]].
    void vectors(const int* order, int count, std::int64_t width, double* x) const {
        zero(x, n_ * width);
        for (int i = 0; i < count; ++i) x[order[i] * width + i] = 1;
        std::int64_t column = 0;
        for (; column + AT_ONCE * WIDE <= width; column += AT_ONCE * WIDE) {
            back<AT_ONCE>(width, x + column);
        }
        for (; column < width; column += WIDE) back<1>(width, x + column);
    }

private:
    static constexpr int AT_ONCE = 4;  // vectors whose latencies hide each other

    // QL takes about two sweeps an eigenvalue; where it wants more than this, `values` is false.
    std::int64_t most_turns() const { return 4 * std::int64_t{n_} * n_; }
    std::int64_t most_sweeps() const { return 8 * std::int64_t{n_}; }

    // COUNT vectors of columns, all rotations and then all reflections backwards.
    template <int COUNT>
    void back(std::int64_t width, double* x) const {
        const double* turn = turns_ + 2 * turned_;
        for (std::int64_t sweep = swept_ - 1; sweep >= 0; --sweep) {
            const int last = sweeps_[2 * sweep], count = sweeps_[2 * sweep + 1];
            double* row = x + (last - count) * width;
            Wide low[COUNT];
            for (int v = 0; v < COUNT; ++v) low[v] = wide(row + v * WIDE);
            for (int i = 0; i < count; ++i, row += width) {
                turn -= 2;
                const double c = turn[0], s = turn[1];
                for (int v = 0; v < COUNT; ++v) {
                    const Wide high = wide(row + width + v * WIDE);
                    put(row + v * WIDE, c * low[v] + s * high);
                    low[v] = c * high - s * low[v];
                }
            }
            for (int v = 0; v < COUNT; ++v) put(row + v * WIDE, low[v]);
        }
        for (int k = n_ - 3; k >= 0; --k) {
            const double* reflector = a_ + k * stride_;  // zeros up to k
            Wide dots[COUNT] = {};
            double* row = x + (k + 1) * width;
            for (int i = k + 1; i < n_; ++i, row += width) {
                for (int v = 0; v < COUNT; ++v) dots[v] += reflector[i] * wide(row + v * WIDE);
            }
            for (int v = 0; v < COUNT; ++v) dots[v] *= beta_[k];
            row = x + (k + 1) * width;
            for (int i = k + 1; i < n_; ++i, row += width) {
                for (int v = 0; v < COUNT; ++v) {
                    put(row + v * WIDE, wide(row + v * WIDE) - reflector[i] * dots[v]);
                }
            }
        }
    }

    void tridiagonalise() {
        for (int k = 0; k + 2 < n_; ++k) {
            double* v = a_ + k * stride_;
            w_[k] = v[k];
            for (int j = 0; j <= k; ++j) v[j] = 0;
            const std::int64_t from = (k + 1) / LANES * LANES;
            const double length = std::sqrt(dot(v, v, from, stride_));
            const double alpha = v[k + 1] > 0 ? -length : length;
            off_[k] = alpha;
            if (length == 0) {
                beta_[k] = 0;
                continue;
            }
            v[k + 1] -= alpha;
            const double beta = 2 / dot(v, v, from, stride_);
            beta_[k] = beta;
            double* p = line_ + 0;
            for (std::int64_t i = from; i < stride_; ++i) p[i] = 0;
            for (int i = k + 1; i < n_; ++i) {
                p[i] = beta * dot(a_ + i * stride_, v, from, stride_);
            }
            add(p, -beta / 2 * dot(p, v, from, stride_), v, from, stride_);
            for (int i = k + 1; i < n_; ++i) {
                double* row = a_ + i * stride_;
                const double vi = v[i], pi = p[i];
                for (std::int64_t j = from; j < stride_; j += WIDE) {
                    put(row + j, wide(row + j) - vi * wide(p + j) - pi * wide(v + j));
                }
            }
        }
        for (int k = n_ < 2 ? 0 : n_ - 2; k < n_; ++k) {
            w_[k] = a_[k * stride_ + k];
            off_[k] = k + 1 < n_ ? a_[k * stride_ + k + 1] : 0;
        }
    }

    bool iterate() {
        turned_ = swept_ = 0;
        for (int l = 0; l < n_; ++l) {
            for (int rounds = 0;; ++rounds) {
                int m = l;
                for (; m + 1 < n_; ++m) {
                    const double size = std::fabs(w_[m]) + std::fabs(w_[m + 1]);
                    if (std::fabs(off_[m]) <= 1e-16 * size) break;
                }
                if (m == l) break;
                if (rounds == 60 || swept_ == most_sweeps() || turned_ + m - l > most_turns()) {
                    return false;
                }
                double g = (w_[l + 1] - w_[l]) / (2 * off_[l]);
                double r = std::sqrt(g * g + 1);
                g = w_[m] - w_[l] + off_[l] / (g + (g < 0 ? -r : r));
                double s = 1, c = 1, p = 0;
                int i = m - 1;
                double* turn = turns_ + 2 * turned_;
                for (; i >= l; --i) {
                    double f = s * off_[i];
                    const double b = c * off_[i];
                    r = std::sqrt(f * f + g * g);
                    off_[i + 1] = r;
                    if (r == 0) {
                        w_[i + 1] -= p;
                        off_[m] = 0;
                        break;
                    }
                    s = f / r;
                    c = g / r;
                    g = w_[i + 1] - p;
                    r = (w_[i] - g) * s + 2 * c * b;
                    p = s * r;
                    w_[i + 1] = g + p;
                    g = c * r - b;
                    *turn++ = c;
                    *turn++ = s;
                }
                sweeps_[2 * swept_] = m;
                sweeps_[2 * swept_ + 1] = m - 1 - i;
                turned_ += m - 1 - i;
                ++swept_;
                if (r == 0 && i >= l) continue;
                w_[l] -= p;
                off_[l] = g;
                off_[m] = 0;
            }
        }
        return true;
    }

    const int n_;
    const std::int64_t stride_;
    double* const a_;
    double* const w_;
    const Buffer<double> off_, line_, beta_;
    const Buffer<double> turns_;  // cosine and sine of every rotation
    const Buffer<int> sweeps_;    // of every sweep the row it begins at, and its rotations
    std::int64_t turned_ = 0, swept_ = 0;
};

}  // namespace
}  // namespace fastlora::FASTLORA_ISA
