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

// Eigenvalues w [n], unordered, of the symmetric a [n, n] by `values`, and after it eigenvectors by
// `vectors`: Householder's tridiagonal form, then implicit QL (Golub and Van Loan, 8.3). Vector i of the
// tridiagonal form is row i of z; `back` makes it a's. What a held is lost.
class Symmetric {
public:
    Symmetric(int n, std::int64_t stride, double* a, double* w, double* z)
        : n_(n),
          stride_(stride),
          a_(a),
          w_(w),
          z_(z),
          off_(stride),
          line_(stride),
          beta_(stride),
          form_(2 * stride) {}

    bool values() {
        tridiagonalise();
        std::memcpy(form_ + 0, w_, n_ * sizeof(double));
        std::memcpy(form_ + stride_, off_ + 0, n_ * sizeof(double));
        return iterate(false);
    }

    bool vectors() {
        std::memcpy(w_, form_ + 0, n_ * sizeof(double));
        std::memcpy(off_ + 0, form_ + stride_, n_ * sizeof(double));
        zero(z_, n_ * stride_);
        for (int i = 0; i < n_; ++i) z_[i * stride_ + i] = 1;
        return iterate(true);
    }

    // Row i of z in a's coordinates.
    void back(int i) const {
        double* z = z_ + i * stride_;
        for (int k = n_ - 3; k >= 0; --k) {
            const double* v = a_ + k * stride_;  // zeros up to k
            const std::int64_t from = (k + 1) / LANES * LANES;
            add(z, -beta_[k] * dot(v, z, from, stride_), v, from, stride_);
        }
    }

private:
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

    bool iterate(bool vectors) {
        for (int l = 0; l < n_; ++l) {
            for (int rounds = 0;; ++rounds) {
                int m = l;
                for (; m + 1 < n_; ++m) {
                    const double size = std::fabs(w_[m]) + std::fabs(w_[m + 1]);
                    if (std::fabs(off_[m]) <= 1e-16 * size) break;
                }
                if (m == l) break;
                if (rounds == 60) return false;
                double g = (w_[l + 1] - w_[l]) / (2 * off_[l]);
                double r = std::sqrt(g * g + 1);
                g = w_[m] - w_[l] + off_[l] / (g + (g < 0 ? -r : r));
                double s = 1, c = 1, p = 0;
                int i = m - 1;
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
                    if (vectors) rotate(z_ + i * stride_, z_ + (i + 1) * stride_, c, s);
                }
                if (r == 0 && i >= l) continue;
                w_[l] -= p;
                off_[l] = g;
                off_[m] = 0;
            }
        }
        return true;
    }

    void rotate(double* low, double* high, double c, double s) const {
        for (std::int64_t j = 0; j < stride_; j += WIDE) {
            const Wide one = wide(low + j), other = wide(high + j);
            put(high + j, s * one + c * other);
            put(low + j, c * one - s * other);
        }
    }

    const int n_;
    const std::int64_t stride_;
    double* const a_;
    double* const w_;
    double* const z_;
    const Buffer<double> off_, line_, beta_;
    const Buffer<double> form_;  // the tridiagonal form: diagonal, and what is beside it
};

}  // namespace
}  // namespace fastlora::FASTLORA_ISA
