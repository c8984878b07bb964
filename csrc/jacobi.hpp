// Jacobi's rotations for small dense matrices, written once for the CPU and for CUDA.
//
// A Number is a double or, on the CPU, a vector of doubles that holds one matrix a lane (its
// functions, those of cpu/pack.hpp, must be declared before this file). A Team runs the items of a
// phase in any order and waits for all of them: a thread block does so with its threads, a thread
// of the CPU in a loop. So no item may read what another one writes. A Team has
//   each(count, f)          f(i) for every item
//   each(rows, columns, f)  f(i)(j) for every item: f(i) fetches what a row has in common
//   any(count, f)           the same as the first, and whether f was true anywhere
//
// Pairs are rotated in the rounds of a tournament: the n/2 pairs of a round share no index, and
// after n - 1 rounds, a sweep, each pair has had its turn.
#pragma once

#include <cmath>
#include <cstdint>

#include "jacobi_calls.hpp"

#ifdef __CUDACC__
#define FASTLORA_BOTH __host__ __device__
#else
#define FASTLORA_BOTH
#endif

namespace fastlora {
namespace {  // compiled once for each instruction set: nothing here may be shared between objects

constexpr double EPSILON = 2.220446049250313e-16;
// Columns whose squares sum to less, of a matrix whose largest element is about 1, count as zero.
constexpr double DEAD = 1e-280;

// --- what a Number can do ----------------------------------------------------------------------

FASTLORA_BOTH inline bool any(bool mask) { return mask; }
FASTLORA_BOTH inline double root(double x) { return sqrt(x); }
FASTLORA_BOTH inline double select(bool mask, double yes, double no) { return mask ? yes : no; }

template <class Number>
FASTLORA_BOTH inline Number magnitude(Number x) {
    return select(x < Number{}, -x, x);
}

// --- order of the rotations --------------------------------------------------------------------

struct Pair {
    int low, high;
};

FASTLORA_BOTH inline int players(int n) { return n + n % 2; }

// Pair k of a round; where n is odd, one pair has high == n and rests.
FASTLORA_BOTH inline Pair pair_of(int round, int k, int n) {
    const int last = players(n) - 1;
    int one = round + k, other = k == 0 ? last : round - k;
    if (one >= last) one -= last;
    if (other < 0) other += last;
    return one < other ? Pair{one, other} : Pair{other, one};
}

// Of a symmetric matrix, the lower triangle is kept, row after row.
FASTLORA_BOTH inline int in_triangle(int i, int j) {
    return i >= j ? i * (i + 1) / 2 + j : j * (j + 1) / 2 + i;
}

// --- rotations ---------------------------------------------------------------------------------

// By the angle whose sine is s and the tangent of whose half is h. So written, what is rounded is as
// small as the angle, and long products of rotations stay orthogonal.
template <class Number>
struct Rotation {
    Number s, h;

    FASTLORA_BOTH void turn(Number& x, Number& y) const {
        const Number was = x;
        x = was - s * (y + h * was);
        y = y + s * (was - h * y);
    }
};

// The tangent of the smaller angle that makes [x z; z y] diagonal. At least one of z and x - y must
// not be so small that its square vanishes.
template <class Number>
FASTLORA_BOTH inline Number tangent(Number x, Number y, Number z) {
    const Number half = 0.5 * (y - x);
    const Number length = root(half * half + z * z);
    return z / select(half < Number{}, half - length, half + length);
}

template <class Number>
FASTLORA_BOTH inline Rotation<Number> rotation(Number t) {
    const Number c = 1.0 / root(1.0 + t * t);
    return {t * c, t * c / (1.0 + c)};
}

// What a team shares for a round.
template <class Number>
struct Round {
    Rotation<Number>* rotations;  // [players / 2]
    Pair* pairs;                  // [players / 2]
    bool* moves;                  // [players / 2]
};

// Turns the rows of the pairs that move.
template <class Team, class Number>
FASTLORA_BOTH void turn_rows(const Team& team, int pairs, int length, Number* rows, int stride,
                             const Round<Number>& shared) {
    team.each(pairs, length, [=](int k) {
        const Pair pair = shared.pairs[k];
        const Rotation<Number> turn = shared.rotations[k];
        const bool moves = shared.moves[k];
        return [=](int j) {
            if (moves) turn.turn(rows[pair.low * stride + j], rows[pair.high * stride + j]);
        };
    });
}

template <class Team, class Number>
FASTLORA_BOTH void identity(const Team& team, int n, Number* rows, int stride) {
    team.each(n, n, [=](int i) {
        return [=](int j) { rows[i * stride + j] = Number{} + (i == j ? 1.0 : 0.0); };
    });
}

// --- symmetric eigenproblem --------------------------------------------------------------------

// Makes `a` [n (n+1) / 2] diagonal; row i of `vectors` [n, stride] becomes the eigenvector of a_ii.
// `line` [n] is scratch. Returns 1 in the lanes that had not converged after `sweeps`.
template <class Team, class Number>
FASTLORA_BOTH Number diagonalize(const Team& team, int n, int sweeps, Number* a, Number* vectors,
                                 int stride, Number* line, const Round<Number>& shared) {
    identity(team, n, vectors, stride);
    team.each(n, [=](int i) {
        Number total{};
        for (int j = 0; j < n; ++j) total += a[in_triangle(i, j)] * a[in_triangle(i, j)];
        line[i] = total;
    });
    Number squares{};
    for (int i = 0; i < n; ++i) squares += line[i];
    // all that is left off the diagonal then sums to less than a unit of the norm
    const Number least = root(squares) * (0.5 * EPSILON / n);

    const int half = players(n) / 2;
    for (int sweep = 0;; ++sweep) {
        bool moved = false;
        for (int round = 0; round < 2 * half - 1; ++round) {
            const bool moves = team.any(half, [=](int k) {
                const Pair pair = pair_of(round, k, n);
                shared.pairs[k] = pair;
                shared.moves[k] = false;
                shared.rotations[k] = {Number{}, Number{}};
                if (pair.high == n) return false;
                const Number x = a[in_triangle(pair.low, pair.low)];
                const Number y = a[in_triangle(pair.high, pair.high)];
                const Number z = a[in_triangle(pair.high, pair.low)];
                const auto turns = magnitude(z) > least;
                if (!any(turns)) return false;
                // elsewhere the angle is exactly zero: a lane does not notice the others
                const Number zero{};
                const Number t = select(turns, tangent(x, select(turns, y, x + 2.0), z), zero);
                shared.rotations[k] = rotation(t);
                if (sweep == sweeps) return true;  // one too many: only asked for
                a[in_triangle(pair.low, pair.low)] = x - t * z;
                a[in_triangle(pair.high, pair.high)] = y + t * z;
                a[in_triangle(pair.high, pair.low)] = select(turns, zero, z);
                shared.moves[k] = true;
                return true;
            });
            if (!moves) continue;
            moved = true;
            if (sweep == sweeps) break;
            // the 2 x 2 block of every two pairs
            team.each(half, half, [=](int k) {
                const Pair one = shared.pairs[k];
                const Rotation<Number> left = shared.rotations[k];
                const bool moving = shared.moves[k];
                return [=](int l) {
                    if (l >= k || !(moving || shared.moves[l])) return;
                    const Pair other = shared.pairs[l];
                    const Rotation<Number> right = shared.rotations[l];
                    Number& first = a[in_triangle(one.low, other.low)];
                    if (other.high == n) return left.turn(first, a[in_triangle(one.high, other.low)]);
                    Number& second = a[in_triangle(one.low, other.high)];
                    if (one.high == n) return right.turn(first, second);
                    Number& third = a[in_triangle(one.high, other.low)];
                    Number& fourth = a[in_triangle(one.high, other.high)];
                    Number w = first, x = second, y = third, z = fourth;
                    left.turn(w, y);
                    left.turn(x, z);
                    right.turn(w, x);
                    right.turn(y, z);
                    first = w, second = x, third = y, fourth = z;
                };
            });
            turn_rows(team, half, n, vectors, stride, shared);
        }
        if (!moved) return Number{};
        if (sweep == sweeps) break;
    }
    // whose matrices they are
    Number late{};
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < i; ++j) {
            late = select(magnitude(a[in_triangle(i, j)]) > least, Number{} + 1.0, late);
        }
    }
    return late;
}

// --- singular values ---------------------------------------------------------------------------

// Makes the n rows of `a` [n, a_stride], each of m elements, orthogonal to each other by rotations,
// which `v` [n, v_stride] collects. Each dot is cut into `parts`; `dots` [players / 2, parts, 3]
// is scratch. Returns 1 in the lanes that had not converged after `sweeps`.
template <class Team, class Number>
FASTLORA_BOTH Number orthogonalize(const Team& team, int n, int m, int sweeps, Number* a,
                                   int a_stride, Number* v, int v_stride, int parts, Number* dots,
                                   const Round<Number>& shared) {
    identity(team, n, v, v_stride);
    const double cosine = EPSILON * sqrt(static_cast<double>(m));
    const int half = players(n) / 2;
    for (int sweep = 0;; ++sweep) {
        bool moved = false;
        Number late{};
        for (int round = 0; round < 2 * half - 1; ++round) {
            team.each(half, parts, [=](int k) {
                const Pair pair = pair_of(round, k, n);
                return [=](int part) {
                    if (pair.high == n) return;
                    const Number* x = a + pair.low * a_stride;
                    const Number* y = a + pair.high * a_stride;
                    Number xx{}, yy{}, xy{};
                    for (int i = part; i < m; i += parts) {
                        xx += x[i] * x[i];
                        yy += y[i] * y[i];
                        xy += x[i] * y[i];
                    }
                    Number* own = dots + (k * parts + part) * 3;
                    own[0] = xx, own[1] = yy, own[2] = xy;
                };
            });
            const bool moves = team.any(half, [=](int k) {
                const Pair pair = pair_of(round, k, n);
                shared.pairs[k] = pair;
                shared.moves[k] = false;
                if (pair.high == n) return false;
                Number xx{}, yy{}, xy{};
                for (int part = 0; part < parts; ++part) {
                    const Number* own = dots + (k * parts + part) * 3;
                    xx += own[0];
                    yy += own[1];
                    xy += own[2];
                }
                const auto turns = (magnitude(xy) > cosine * (root(xx) * root(yy))) &
                                   (xx > DEAD) & (yy > DEAD);
                if (!any(turns)) return false;
                const Number zero{}, one = Number{} + 1.0;
                const Number scale = 1.0 / select(turns, select(xx < yy, yy, xx), one);
                const Number t = select(
                    turns, tangent(xx * scale, select(turns, yy * scale, xx * scale + 2.0),
                                   xy * scale), zero);
                shared.rotations[k] = rotation(t);
                shared.moves[k] = true;
                return true;
            });
            if (!moves) continue;
            moved = true;
            if (sweep == sweeps) {
                for (int k = 0; k < half; ++k) {
                    if (!shared.moves[k]) continue;
                    const Number s = shared.rotations[k].s;
                    late = select((s < Number{}) | (s > Number{}), Number{} + 1.0, late);
                }
                continue;
            }
            turn_rows(team, half, m, a, a_stride, shared);
            turn_rows(team, half, n, v, v_stride, shared);
        }
        if (!moved) return Number{};
        if (sweep == sweeps) return late;
    }
}

// --- in and out --------------------------------------------------------------------------------

// The numbers of one matrix: `step` apart, for there is one in every lane.
struct Lane {
    double* from;
    int step;

    FASTLORA_BOTH double& operator[](int i) const { return from[i * step]; }
};

struct Scale {
    bool finite;
    double into, back;  // powers of two; `into` brings the largest element near 1
};

// Of a [rows, columns], or of its lower triangle. `line` [rows] is scratch.
template <class Team, class Value>
FASTLORA_BOTH Scale scale_of(const Team& team, const Value* a, int rows, int columns, bool lower,
                             const Lane& line) {
    team.each(rows, [=](int i) {
        double most = 0, trouble = 0;
        for (int j = 0; j < (lower ? i + 1 : columns); ++j) {
            const double value = magnitude(static_cast<double>(a[i * columns + j]));
            if (value > most) most = value;
            trouble += value * 0.0;  // NaN for NaN and infinity
        }
        line[i] = most + trouble;
    });
    double most = 0, trouble = 0;
    for (int i = 0; i < rows; ++i) {
        if (line[i] > most) most = line[i];
        trouble += line[i] * 0.0;
    }
    int exponent = 0;
    if (trouble == 0) frexp(most, &exponent);
    exponent = exponent > 1000 ? 1000 : exponent < -1000 ? -1000 : exponent;
    return {trouble == 0, ldexp(1.0, -exponent), ldexp(1.0, exponent)};
}

// The lower triangle of `source`, scaled.
template <class Team, class Value>
FASTLORA_BOTH void load_triangle(const Team& team, const Value* source, int n, double into,
                                 const Lane& a) {
    team.each(n, n, [=](int i) {
        return [=](int j) {
            if (j <= i) a[in_triangle(i, j)] = static_cast<double>(source[i * n + j]) * into;
        };
    });
}

// The columns of `source` [m, n] as rows, scaled.
template <class Team, class Value>
FASTLORA_BOTH void load_columns(const Team& team, const Value* source, int m, int n, double into,
                                const Lane& a, int stride) {
    team.each(m, n, [=](int i) {
        return [=](int j) { a[j * stride + i] = static_cast<double>(source[i * n + j]) * into; };
    });
}

// How many of `values` come before each of them when they are sorted.
template <class Team>
FASTLORA_BOTH void rank(const Team& team, int n, bool descending, const Lane& values, int* places) {
    team.each(n, [=](int i) {
        int place = 0;
        for (int j = 0; j < n; ++j) {
            const bool before = descending ? values[j] > values[i] : values[j] < values[i];
            place += before || (values[j] == values[i] && j < i);
        }
        places[i] = place;
    });
}

// w [n] ascending and the eigenvectors as columns of v [n, n].
template <class Team, class Value>
FASTLORA_BOTH void store_eigen(const Team& team, int n, const Lane& a, const Lane& vectors,
                               int stride, double back, const Lane& line, int* places, Value* w,
                               Value* v) {
    team.each(n, [=](int i) { line[i] = a[in_triangle(i, i)]; });
    rank(team, n, false, line, places);
    team.each(n, [=](int i) { w[places[i]] = static_cast<Value>(line[i] * back); });
    team.each(n, n, [=](int i) {
        const int place = places[i];
        return [=](int j) { v[j * n + place] = static_cast<Value>(vectors[i * stride + j]); };
    });
}

// A unit vector for every row of `a` whose length in `line` is zero, orthogonal to all others. The
// unit vector that the others cover least is a good start: at least 1/m of its square is left.
// `spare` [m] is scratch.
template <class Team>
FASTLORA_BOTH void complete(const Team& team, int n, int m, const Lane& a, int stride,
                            const Lane& line, const Lane& spare) {
    for (int own = 0; own < n; ++own) {
        if (line[own] > 0) continue;
        const auto there = [=](int j) { return line[j] > 0 || j < own; };
        team.each(m, [=](int i) {
            double covered = 0;
            for (int j = 0; j < n; ++j) {
                if (there(j)) covered += a[j * stride + i] * a[j * stride + i];
            }
            spare[i] = covered;
        });
        int start = 0;
        for (int i = 1; i < m; ++i) {
            if (spare[i] < spare[start]) start = i;
        }
        team.each(m, [=](int i) { a[own * stride + i] = i == start ? 1.0 : 0.0; });
        for (int pass = 0; pass < 2; ++pass) {
            team.each(n, [=](int j) {
                double dot = 0;
                for (int i = 0; there(j) && i < m; ++i) dot += a[j * stride + i] * a[own * stride + i];
                spare[j] = dot;
            });
            team.each(m, [=](int i) {
                double part = 0;
                for (int j = 0; j < n; ++j) {
                    if (there(j)) part += spare[j] * a[j * stride + i];
                }
                a[own * stride + i] -= part;
            });
        }
        team.each(1, [=](int) {
            double square = 0;
            for (int i = 0; i < m; ++i) square += a[own * stride + i] * a[own * stride + i];
            spare[0] = 1 / sqrt(square);
        });
        team.each(m, [=](int i) { a[own * stride + i] *= spare[0]; });
    }
}

// u [m, n], s [n] descending and vh [n, n] from the orthogonal rows of `a` and from v.
template <class Team, class Value>
FASTLORA_BOTH void store_svd(const Team& team, int n, int m, const Lane& a, int a_stride,
                             const Lane& v, int v_stride, double back, const Lane& line,
                             const Lane& spare, int* places, Value* u, Value* s, Value* vh) {
    team.each(n, [=](int j) {
        double square = 0;
        for (int i = 0; i < m; ++i) square += a[j * a_stride + i] * a[j * a_stride + i];
        const double length = square > DEAD ? sqrt(square) : 0.0;
        line[j] = length;
        for (int i = 0; i < m && length > 0; ++i) a[j * a_stride + i] /= length;
    });
    complete(team, n, m, a, a_stride, line, spare);
    rank(team, n, true, line, places);
    team.each(n, [=](int j) { s[places[j]] = static_cast<Value>(line[j] * back); });
    team.each(n, m, [=](int j) {
        const int place = places[j];
        return [=](int i) { u[i * n + place] = static_cast<Value>(a[j * a_stride + i]); };
    });
    team.each(n, n, [=](int j) {
        const int place = places[j];
        return [=](int i) { vh[place * n + i] = static_cast<Value>(v[j * v_stride + i]); };
    });
}

}  // namespace
}  // namespace fastlora
