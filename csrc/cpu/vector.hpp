// Vectors of the width that this file's instruction set has. Included by kernel files only, which
// are compiled once for each set: everything here has internal linkage, or the linker might hand
// the code of one set to another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

namespace fastlora::FASTLORA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));  // two registers

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

inline Doubles widen(Floats values) { return __builtin_convertvector(values, Doubles); }

// Half of Doubles: what a register holds. Sums of Doubles go through memory.
typedef double Half __attribute__((vector_size(4 * LANES)));

inline Half load_half(const double* from) {
    Half values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

// LANES / 2 floats as doubles.
inline Half widen_half(const float* from) {
    typedef float Few __attribute__((vector_size(2 * LANES)));
    Few values;
    std::memcpy(&values, from, sizeof values);
    return __builtin_convertvector(values, Half);
}

// to[i] += values[i].
inline void add_to(float* to, Floats values) { store(to, load(to) + values); }

inline void add_to(double* to, Floats values) {
    const Doubles wide = widen(values);
    Half halves[2];
    std::memcpy(halves, &wide, sizeof wide);
    for (int i = 0; i < 2; ++i, to += LANES / 2) {
        const Half own = load_half(to) + halves[i];
        std::memcpy(to, &own, sizeof own);
    }
}

// Memory for values that are written before they are read, from the start of a cache line on: a
// vector that straddles two lines is loaded twice.
template <class T>
class Buffer {
public:
    explicit Buffer(std::int64_t count)
        : values_(static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), LINE))) {}
    ~Buffer() { ::operator delete(values_, LINE); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* operator+(std::int64_t offset) const { return values_ + offset; }
    T& operator[](std::int64_t index) const { return values_[index]; }

private:
    static constexpr std::align_val_t LINE{64};
    T* values_;
};

inline std::int64_t round_up(std::int64_t count) { return (count + LANES - 1) / LANES * LANES; }

inline int least(std::int64_t one, std::int64_t other) {
    return static_cast<int>(one < other ? one : other);
}

template <class T>
void zero(T* values, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) values[i] = 0;
}

inline double sum(Half values) {
    double total = 0;
    for (int lane = 0; lane < LANES / 2; ++lane) total += values[lane];
    return total;
}

inline double sum(Doubles values) {
    double total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += values[lane];
    return total;
}

}  // namespace
}  // namespace fastlora::FASTLORA_ISA
