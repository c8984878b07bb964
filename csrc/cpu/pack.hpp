// One register of doubles, as a Number for jacobi.hpp: a matrix in every lane. Included by kernel
// files only, as vector.hpp is.
#pragma once

#include <cmath>

namespace fastlora {
namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 8;
#elif defined(__AVX2__)
constexpr int WIDTH = 4;
#else
constexpr int WIDTH = 2;
#endif

typedef double Pack __attribute__((vector_size(8 * WIDTH)));
typedef decltype(Pack{} < Pack{}) Mask;

inline bool any(Mask mask) {
    bool found = false;
    for (int lane = 0; lane < WIDTH; ++lane) found |= mask[lane] != 0;
    return found;
}

inline Pack root(Pack x) {
    Pack roots;
    for (int lane = 0; lane < WIDTH; ++lane) roots[lane] = std::sqrt(x[lane]);
    return roots;
}

inline Pack select(Mask mask, Pack yes, Pack no) { return mask ? yes : no; }

}  // namespace
}  // namespace fastlora
