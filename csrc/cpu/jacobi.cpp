// jacobi.hpp on the CPU: a thread works on as many matrices as a register has lanes.
#include "jacobi.hpp"

#include "pack.hpp"
// after pack.hpp, whose functions it calls
#include "../jacobi.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

// A team of one.
struct Alone {
    bool backwards;

    template <class Body>
    void each(int count, const Body& body) const {
        if (backwards) {
            for (int i = count; i-- > 0;) body(i);
        } else {
            for (int i = 0; i < count; ++i) body(i);
        }
    }

    template <class Body>
    void each(int rows, int columns, const Body& body) const {
        each(rows, [&](int i) { each(columns, body(i)); });
    }

    template <class Body>
    bool any(int count, const Body& body) const {
        bool found = false;
        each(count, [&](int i) { found |= body(i); });
        return found;
    }
};

struct Workspace {
    Workspace(int n, std::int64_t a_size)
        : a(a_size), v(n * n), line(LARGEST), spare(3 * LARGEST), rotations(n), pairs(n), moves(n),
          places(n) {}

    Round<Pack> round() const { return {rotations + 0, pairs + 0, moves + 0}; }
    static Lane lane(const Buffer<Pack>& packs, int index) {
        return {reinterpret_cast<double*>(packs + 0) + index, WIDTH};
    }

    Buffer<Pack> a, v, line, spare;
    Buffer<Rotation<Pack>> rotations;
    Buffer<Pair> pairs;
    Buffer<bool> moves;
    Buffer<int> places;
};

// Fills the lanes from `first` on by load(matrix, lane) -> Scale, has them solved by
// solve() -> Pack and stored by store(matrix, lane, back).
template <class Load, class Solve, class Store>
void pass(std::int64_t first, std::int64_t count, Outcome* outcomes, Workspace& space,
          std::int64_t a_size, const Load& load, const Solve& solve, const Store& store) {
    const int lanes = least(count - first, WIDTH);
    double back[WIDTH];
    for (int lane = 0; lane < WIDTH; ++lane) {
        bool finite = false;
        if (lane < lanes) {
            const Scale scale = load(first + lane, lane);
            finite = scale.finite;
            back[lane] = scale.back;
            outcomes[first + lane] = finite ? Outcome::solved : Outcome::not_finite;
        }
        if (finite) continue;
        const Lane zero = Workspace::lane(space.a, lane);
        for (int i = 0; i < a_size; ++i) zero[i] = 0;
    }
    const Pack late = solve();
    for (int lane = 0; lane < lanes; ++lane) {
        Outcome& outcome = outcomes[first + lane];
        if (outcome == Outcome::solved && late[lane] != 0) outcome = Outcome::not_converged;
        if (outcome == Outcome::solved) store(first + lane, lane, back[lane]);
    }
}

std::int64_t unsolved(std::int64_t count, const Outcome* outcomes) {
    std::int64_t found = 0;
    for (std::int64_t i = 0; i < count; ++i) found += outcomes[i] != Outcome::solved;
    return found;
}

template <class Value>
void eigen_range(const SymmetricEigen& call, Alone team, std::int64_t from, std::int64_t to) {
    const int n = call.n, size = n * (n + 1) / 2;
    Workspace space(n, size);
    const auto load = [&](std::int64_t matrix, int lane) {
        const Value* source = static_cast<const Value*>(call.a) + matrix * n * n;
        const Scale scale = scale_of(team, source, n, n, true, Workspace::lane(space.line, lane));
        load_triangle(team, source, n, scale.into, Workspace::lane(space.a, lane));
        return scale;
    };
    const auto solve = [&] {
        return diagonalize(team, n, call.sweeps, space.a + 0, space.v + 0, n, space.line + 0,
                           space.round());
    };
    const auto store = [&](std::int64_t matrix, int lane, double back) {
        store_eigen(team, n, Workspace::lane(space.a, lane), Workspace::lane(space.v, lane), n, back,
                    Workspace::lane(space.line, lane), space.places + 0,
                    static_cast<Value*>(call.w) + matrix * n,
                    static_cast<Value*>(call.v) + matrix * n * n);
    };
    for (std::int64_t first = from; first < to; first += WIDTH) {
        pass(first, to, call.outcomes, space, size, load, solve, store);
    }
}

template <class Value>
void svd_range(const Svd& call, Alone team, std::int64_t from, std::int64_t to) {
    const int n = call.n, m = call.m, size = n * m;
    Workspace space(n, size);
    const auto load = [&](std::int64_t matrix, int lane) {
        const Value* source = static_cast<const Value*>(call.a) + matrix * size;
        const Scale scale = scale_of(team, source, m, n, false, Workspace::lane(space.line, lane));
        load_columns(team, source, m, n, scale.into, Workspace::lane(space.a, lane), m);
        return scale;
    };
    const auto solve = [&] {
        return orthogonalize(team, n, m, call.sweeps, space.a + 0, m, space.v + 0, n, 1,
                             space.spare + 0, space.round());
    };
    const auto store = [&](std::int64_t matrix, int lane, double back) {
        store_svd(team, n, m, Workspace::lane(space.a, lane), m, Workspace::lane(space.v, lane), n,
                  back, Workspace::lane(space.line, lane), Workspace::lane(space.spare, lane),
                  space.places + 0, static_cast<Value*>(call.u) + matrix * size,
                  static_cast<Value*>(call.s) + matrix * n,
                  static_cast<Value*>(call.vh) + matrix * n * n);
    };
    for (std::int64_t first = from; first < to; first += WIDTH) {
        pass(first, to, call.outcomes, space, size, load, solve, store);
    }
}

}  // namespace

std::int64_t symmetric_eigen(const SymmetricEigen& call, bool backwards, int threads) {
    const auto range = call.wide ? &eigen_range<double> : &eigen_range<float>;
    parallel_for(call.count, WIDTH, threads, [&](std::int64_t first, std::int64_t last) {
        range(call, {backwards}, first, last);
    });
    return unsolved(call.count, call.outcomes);
}

std::int64_t svd(const Svd& call, bool backwards, int threads) {
    const auto range = call.wide ? &svd_range<double> : &svd_range<float>;
    parallel_for(call.count, WIDTH, threads, [&](std::int64_t first, std::int64_t last) {
        range(call, {backwards}, first, last);
    });
    return unsolved(call.count, call.outcomes);
}

}  // namespace fastlora::FASTLORA_ISA
