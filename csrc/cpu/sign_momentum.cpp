// One pass over memory. Compiled without contraction: every product and sum is rounded by itself,
// as torch's are, so that backends agree to the bit. What has to be known of a tensor before its
// update (its RMS, whether its gradient is finite) is read off the chunk right before, while the
// caches have it; of a tensor of several chunks, in a pass of its own.
#include "sign_momentum.hpp"

#include <cmath>
#include <cstring>

#include "parallel.hpp"
#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

typedef std::int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef std::uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Words bits(Floats values) { return reinterpret_cast<Words>(values); }
inline Floats floats(Words values) { return reinterpret_cast<Floats>(values); }
inline Words select(Ints where, Words yes, Words no) {
    const Words mask = reinterpret_cast<Words>(where);
    return (mask & yes) | (~mask & no);
}

// Random bits of contract.py's keys: 16 an element.
struct Random {
    std::uint32_t k0, k1;

    // Of elements first, first + stride, …
    Words operator()(std::uint32_t first, std::uint32_t stride = 1) const {
        Words h;
        for (int lane = 0; lane < LANES; ++lane) h[lane] = static_cast<std::uint32_t>(lane);
        h = h * stride + (first + k0);
        h ^= h >> 16;
        h *= 0x85ebca6bu;
        h ^= h >> 13;
        h ^= k1;
        h *= 0xc2b2ae35u;
        h ^= h >> 16;
        return h & 0xffffu;
    }
};

// --- how numbers are stored ----------------------------------------------------------------------

struct F32 {
    static constexpr int BYTES = 4;
    static constexpr bool ROUNDS = false;
    static Floats get(const char* from) { return load(reinterpret_cast<const float*>(from)); }
    static void put(char* to, Floats values) { store(reinterpret_cast<float*>(to), values); }
};

inline Words get_halves(const char* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, Words);
}

inline void put_halves(char* to, Words values) {
    const Halves halves = __builtin_convertvector(values, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

struct Bf16 {
    static constexpr int BYTES = 2;
    static constexpr bool ROUNDS = true;  // may round stochastically
    static Floats get(const char* from) { return floats(get_halves(from) << 16); }
    static void put(char* to, Floats values) {
        const Words all = bits(values);
        put_halves(to, select(values == values, (all + 0x7fffu + ((all >> 16) & 1u)) >> 16,
                              (all >> 16) | 0x40u));
    }
    static void put(char* to, Floats values, Words random) {
        const Words all = bits(values);
        const Words nan = (all >> 16) | 0x40u;
        // an infinity has a low half of zeros, into which random bits do not carry
        put_halves(to, select(values == values, (all + random) >> 16, nan));
    }
};

struct F16 {
    static constexpr int BYTES = 2;
    static constexpr bool ROUNDS = false;
    static Floats get(const char* from) {
        const Words half = get_halves(from);
        // the exponent moves by a product, which makes subnormal halves normal on the way
        const Floats scale = floats(Words{} + ((127u + 112u) << 23));
        Words all = bits(floats((half & 0x7fffu) << 13) * scale);
        all = select((half & 0x7c00u) == 0x7c00u, all | 0x7f800000u, all);
        return floats(all | ((half & 0x8000u) << 16));
    }
    static void put(char* to, Floats values) {
        const Words all = bits(values), size = all & 0x7fffffffu;
        const Words normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
        // a sum whose last place is the last one of a subnormal half
        const Words magic = Words{} + (126u << 23);
        const Words subnormal = bits(floats(size) + floats(magic)) - magic;
        Words half = select(size < (113u << 23), subnormal, normal);
        half = select(size >= (143u << 23), Words{} + 0x7c00u, half);
        half = select(size > 0x7f800000u, Words{} + 0x7e00u, half);
        put_halves(to, half | ((all & 0x80000000u) >> 16));
    }
};

struct Nothing {
    static constexpr int BYTES = 0;
    static constexpr bool ROUNDS = false;
};

inline int bytes(Stored type) { return type == Stored::f32 ? 4 : type == Stored::q8 ? 1 : 2; }

// --- the update of contiguous elements ---------------------------------------------------------

struct Step {
    float a, b, c, d, eta, w;
    const Random* random;

    // ±η where v is not zero (nor NaN), with its sign.
    Floats signed_eta(Floats v) const {
        const Words moves = reinterpret_cast<Words>((v < 0) | (v > 0));
        const Words rate = bits(Floats{} + eta);
        return floats(((bits(v) & 0x80000000u) | rate) & moves);
    }
};

template <class A, class B>
inline constexpr bool same = false;
template <class A>
inline constexpr bool same<A, A> = true;

// One vector; `index` is its first element's place in the tensor.
template <class P, class G, class M>
inline void one(char* param, const char* grad, char* momentum, const Step& step,
                std::uint32_t index) {
    const Floats old = M::get(momentum);
    Floats v = old;
    if constexpr (!same<G, Nothing>) {
        const Floats g = G::get(grad);
        v = step.a * old + step.b * g;
        M::put(momentum, step.c * old + step.d * g);
    }
    if constexpr (!same<P, Nothing>) {
        const Floats moved = step.w * P::get(param) - step.signed_eta(v);
        if constexpr (P::ROUNDS) {
            if (step.random) {
                P::put(param, moved, (*step.random)(index));
                return;
            }
        }
        P::put(param, moved);
    }
}

// Asks the caches for what a stream reads some lines later. The processor does so by itself, but not
// over the end of a page, of which a tensor of 36 KiB has nine.
inline void fetch(const char* now) { __builtin_prefetch(now + 384); }

template <class P, class G, class M>
void update(char* param, const char* grad, char* momentum, std::int64_t count, const Step& given,
            std::int64_t index) {
    const Step step = given;  // a copy of its own, that stores cannot change
    std::int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        if (P::BYTES) fetch(param + i * P::BYTES);
        if (G::BYTES) fetch(grad + i * G::BYTES);
        fetch(momentum + i * M::BYTES);
        one<P, G, M>(param + i * P::BYTES, grad + i * G::BYTES, momentum + i * M::BYTES, step,
                     static_cast<std::uint32_t>(index + i));
    }
    if (const std::size_t rest = static_cast<std::size_t>(count - i)) {
        char p[4 * LANES] = {}, g[4 * LANES] = {}, m[4 * LANES] = {};
        if (P::BYTES) std::memcpy(p, param + i * P::BYTES, rest * P::BYTES);
        if (G::BYTES) std::memcpy(g, grad + i * G::BYTES, rest * G::BYTES);
        std::memcpy(m, momentum + i * M::BYTES, rest * M::BYTES);
        one<P, G, M>(p, g, m, step, static_cast<std::uint32_t>(index + i));
        if (P::BYTES) std::memcpy(param + i * P::BYTES, p, rest * P::BYTES);
        if (G::BYTES) std::memcpy(momentum + i * M::BYTES, m, rest * M::BYTES);
    }
}

constexpr bool LITTLE_ENDIAN_WORDS = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

// All of it in bfloat16: a word holds two neighbours, which need not be brought into other lanes. NaN
// needs no care either: its low half is zero, so no rounding carries out of it.
inline Words rounded(Floats values) {
    const Words all = bits(values);
    return all + 0x7fffu + ((all >> 16) & 1u);
}

inline Words pair(Words even, Words odd) { return (even >> 16) | (odd & 0xffff0000u); }

void update_pairs(char* param, const char* grad, char* momentum, std::int64_t count,
                  const Step& given, std::int64_t index) {
    constexpr int PAIRS = 2 * LANES;
    const Step step = given;
    std::int64_t i = 0;
    for (; i + PAIRS <= count; i += PAIRS) {
        fetch(param + 2 * i);
        fetch(grad + 2 * i);
        fetch(momentum + 2 * i);
        Words p, g, m;
        std::memcpy(&p, param + 2 * i, sizeof p);
        std::memcpy(&g, grad + 2 * i, sizeof g);
        std::memcpy(&m, momentum + 2 * i, sizeof m);
        Floats old[2] = {floats(m << 16), floats(m & 0xffff0000u)};
        Floats now[2] = {floats(g << 16), floats(g & 0xffff0000u)};
        Floats theta[2] = {floats(p << 16), floats(p & 0xffff0000u)};
        for (int half = 0; half < 2; ++half) {
            const Floats v = step.a * old[half] + step.b * now[half];
            old[half] = step.c * old[half] + step.d * now[half];
            theta[half] = step.w * theta[half] - step.signed_eta(v);
        }
        m = pair(rounded(old[0]), rounded(old[1]));
        if (step.random) {
            const std::uint32_t at = static_cast<std::uint32_t>(index + i);
            p = pair(bits(theta[0]) + (*step.random)(at, 2),
                     bits(theta[1]) + (*step.random)(at + 1, 2));
        } else {
            p = pair(rounded(theta[0]), rounded(theta[1]));
        }
        std::memcpy(momentum + 2 * i, &m, sizeof m);
        std::memcpy(param + 2 * i, &p, sizeof p);
    }
    update<Bf16, Bf16, Bf16>(param + 2 * i, grad + 2 * i, momentum + 2 * i, count - i, step,
                             index + i);
}

using Update = void (*)(char*, const char*, char*, std::int64_t, const Step&, std::int64_t);

template <class P, class G>
Update of_momentum(Stored momentum) {
    // codes have been decoded to float32
    return momentum == Stored::bf16 ? update<P, G, Bf16> : update<P, G, F32>;
}

template <class P>
Update of_grad(const Entry& entry, bool grads) {
    if constexpr (!same<P, Nothing>) {
        if (!grads) return of_momentum<P, Nothing>(entry.momentum_type);
    }
    switch (entry.grad_type) {
        case Stored::bf16: return of_momentum<P, Bf16>(entry.momentum_type);
        case Stored::f16: return of_momentum<P, F16>(entry.momentum_type);
        default: return of_momentum<P, F32>(entry.momentum_type);
    }
}

// What moves the parameter, or, without it, momentum only.
Update of(const Entry& entry, bool params, bool grads) {
    if (!params) return of_grad<Nothing>(entry, grads);
    if (grads && entry.param_type == Stored::bf16 && entry.grad_type == Stored::bf16 &&
        entry.momentum_type == Stored::bf16 && LITTLE_ENDIAN_WORDS) {
        return update_pairs;
    }
    switch (entry.param_type) {
        case Stored::bf16: return of_grad<Bf16>(entry, grads);
        case Stored::f16: return of_grad<F16>(entry, grads);
        default: return of_grad<F32>(entry, grads);
    }
}

// --- what is read off a tensor before -----------------------------------------------------------

// Calls with(vector of LANES) for all elements, the last one filled up with zeros.
template <class T, class With>
inline void read(const char* from, std::int64_t count, const With& with) {
    std::int64_t i = 0;
    for (; i + LANES <= count; i += LANES) with(T::get(from + i * T::BYTES), i);
    if (const std::size_t rest = static_cast<std::size_t>(count - i)) {
        char padded[4 * LANES] = {};
        std::memcpy(padded, from + i * T::BYTES, rest * T::BYTES);
        with(T::get(padded), i);
    }
}

template <class T>
bool finite_of(const char* from, std::int64_t count) {
    Ints bad = {};
    read<T>(from, count, [&](Floats values, std::int64_t) {
        bad |= (bits(values) & 0x7f800000u) == 0x7f800000u;
    });
    for (int lane = 0; lane < LANES; ++lane) {
        if (bad[lane]) return false;
    }
    return true;
}

bool finite(const char* from, Stored type, std::int64_t count) {
    return type == Stored::f32    ? finite_of<F32>(from, count)
           : type == Stored::bf16 ? finite_of<Bf16>(from, count)
                                  : finite_of<F16>(from, count);
}

// In sixteen sums, whatever the width of a vector, so that all instruction sets add up alike.
template <class T>
double squares_of(const char* from, std::int64_t count) {
    constexpr int SUMS = 16;
    Doubles parts[SUMS / LANES] = {};
    read<T>(from, count, [&](Floats values, std::int64_t i) {
        const Doubles wide = widen(values);
        parts[i / LANES % (SUMS / LANES)] += wide * wide;
    });
    double all[SUMS], total = 0;
    std::memcpy(all, parts, sizeof all);
    for (double part : all) total += part;
    return total;
}

double squares(const char* from, Stored type, std::int64_t count) {
    return type == Stored::f32    ? squares_of<F32>(from, count)
           : type == Stored::bf16 ? squares_of<Bf16>(from, count)
                                  : squares_of<F16>(from, count);
}

template <class P>
void shrink_of(char* param, std::int64_t count, float factor, float center, const Random* random,
               std::int64_t index) {
    const auto shrunk = [&](char* at, std::int64_t i) {
        const Floats moved = (P::get(at) - center) * factor + center;
        if constexpr (P::ROUNDS) {
            if (random) {
                P::put(at, moved, (*random)(static_cast<std::uint32_t>(index + i)));
                return;
            }
        }
        P::put(at, moved);
    };
    std::int64_t i = 0;
    for (; i + LANES <= count; i += LANES) shrunk(param + i * P::BYTES, i);
    if (const std::size_t rest = static_cast<std::size_t>(count - i)) {
        char padded[4 * LANES] = {};
        std::memcpy(padded, param + i * P::BYTES, rest * P::BYTES);
        shrunk(padded, i);
        std::memcpy(param + i * P::BYTES, padded, rest * P::BYTES);
    }
}

void shrink(Stored type, char* param, std::int64_t count, float factor, float center,
            const Random* random, std::int64_t index) {
    const auto how = type == Stored::f32    ? shrink_of<F32>
                     : type == Stored::bf16 ? shrink_of<Bf16>
                                            : shrink_of<F16>;
    how(param, count, factor, center, random, index);
}

// --- momentum in codes (eight_bit.py) --------------------------------------------------------------

constexpr float LEVELS = 127;
constexpr float STEP = 1.0 / (127 * 127);

void decode(const char* codes, float scale, int count, float* values) {
    for (int i = 0; i < count; ++i) {
        const float q = static_cast<signed char>(codes[i]);
        values[i] = q * std::fabs(q) * STEP * scale;
    }
}

void encode(const float* values, int count, char* codes, float* scale) {
    std::uint32_t largest = 0;  // the order of magnitudes is that of their bits, NaN above all
    for (int i = 0; i < count; ++i) {
        std::uint32_t size;
        std::memcpy(&size, values + i, 4);
        size &= 0x7fffffffu;
        largest = size > largest ? size : largest;
    }
    if (largest == 0 || largest >= 0x7f800000u) {
        *scale = largest == 0 ? 0.0f : __builtin_nanf("");
        std::memset(codes, 0, static_cast<std::size_t>(count));
        return;
    }
    float top;
    std::memcpy(&top, &largest, 4);
    *scale = top;
    constexpr float TO_NEAREST = 12582912;  // 1.5 · 2²³, whose last place is one
    for (int i = 0; i < count; ++i) {
        const float root = __builtin_sqrtf(std::fabs(values[i]) / top) * LEVELS;
        const int q = static_cast<int>(root + TO_NEAREST - TO_NEAREST);
        codes[i] = static_cast<char>(values[i] < 0 ? -q : q);
    }
}

// --- chunks -----------------------------------------------------------------------------------

struct Rates {
    float eta, w;
};

Rates rates(double lr, double decay) {
    return {static_cast<float>(lr), static_cast<float>(1 - lr * decay)};
}

Rates relative_rates(const SignMomentum& call, std::int64_t at, double square_sum,
                     std::int64_t count) {
    const float rms = static_cast<float>(std::sqrt(square_sum / static_cast<double>(count)));
    const double floor = call.floor[at];
    return rates(call.lr[at] * (rms < floor ? floor : rms), call.decay[at]);
}

class Job {
public:
    explicit Job(const SignMomentum& call)
        : call_(call), looks_(call.chunk_count), whole_(call.count) {}

    void run(int threads) {
        if (call_.shrinks || call_.relative) {
            parallel_each(call_.chunk_count, threads, [&](std::int64_t at) {
                if (!alone(call_.chunks[at])) looks_[at] = look(call_.chunks[at]);
            });
            for (std::int64_t at = 0; at < call_.chunk_count; ++at) {
                const Chunk& chunk = call_.chunks[at];
                if (alone(chunk)) continue;
                Look& all = whole_[chunk.entry];
                if (chunk.first == 0) all = {0, true};
                all.square_sum += looks_[at].square_sum;
                all.finite = all.finite && looks_[at].finite;
            }
        }
        parallel_each(call_.chunk_count, threads, [&](std::int64_t at) {
            update_chunk(call_.chunks[at]);
        });
    }

private:
    // What has to be known of all of a tensor before any of it is updated.
    struct Look {
        double square_sum;  // of the parameter, where its rate is relative to it
        bool finite;        // the gradient, where it matters
    };

    // A tensor in one chunk is looked at right before its update, any other before all updates.
    bool alone(const Chunk& chunk) const {
        return chunk.last - chunk.first == call_.entries[chunk.entry].count;
    }
    bool by_tensor(std::int64_t entry) const {
        return call_.moves && call_.relative && call_.relative[entry] == Relative::tensor;
    }

    Look look(const Chunk& chunk) const {
        const Entry& entry = call_.entries[chunk.entry];
        const std::int64_t count = chunk.last - chunk.first;
        Look seen{0, true};
        if (call_.shrinks && entry.grad) {
            seen.finite = finite(entry.grad + chunk.first * bytes(entry.grad_type),
                                 entry.grad_type, count);
        }
        if (by_tensor(chunk.entry)) {
            seen.square_sum = squares(entry.param + chunk.first * bytes(entry.param_type),
                                      entry.param_type, count);
        }
        return seen;
    }

    void update_chunk(const Chunk& chunk) const {
        const Entry& entry = call_.entries[chunk.entry];
        Look seen{0, true};
        if (call_.shrinks || by_tensor(chunk.entry)) {
            seen = alone(chunk) ? look(chunk) : whole_[chunk.entry];
        }
        Random random{};
        if (call_.keys) random = {call_.keys[2 * chunk.entry], call_.keys[2 * chunk.entry + 1]};
        const Random* drawn = call_.keys ? &random : nullptr;
        if (call_.shrinks) {
            if (chunk.first == 0) call_.lost[chunk.entry] = !seen.finite;
            if (!seen.finite) {
                shrink_chunk(chunk, drawn);
                return;
            }
        }
        const std::int64_t own = call_.many ? chunk.entry : 0;
        Rates all{};
        if (by_tensor(chunk.entry)) {
            all = relative_rates(call_, own, seen.square_sum, entry.count);
        } else if (call_.moves) {
            all = rates(call_.lr[own], call_.decay[own]);
        }
        Piece(call_, chunk, own, all, drawn).run();
    }

    void shrink_chunk(const Chunk& chunk, const Random* random) const {
        const Entry& entry = call_.entries[chunk.entry];
        if (!entry.param) return;
        const std::uint8_t* mask = call_.rows ? call_.rows[chunk.entry] : nullptr;
        const int size = bytes(entry.param_type);
        for (std::int64_t i = chunk.first; i < chunk.last;) {
            const std::int64_t end = mask ? i + entry.row : chunk.last;
            if (!mask || mask[i / entry.row]) {
                shrink(entry.param_type, entry.param + i * size, end - i, call_.shrink,
                       call_.centers[chunk.entry], random, i);
            }
            i = end;
        }
    }

    // A chunk's update, with what its tensor's looks have given.
    class Piece {
    public:
        Piece(const SignMomentum& call, const Chunk& chunk, std::int64_t own, Rates all,
              const Random* random)
            : call_(call),
              chunk_(chunk),
              entry_(call.entries[chunk.entry]),
              mask_(call.rows ? call.rows[chunk.entry] : nullptr),
              by_row_(call.relative && call.relative[chunk.entry] == Relative::rows),
              moves_(call.moves && !(call.skip && call.skip[chunk.entry])),
              first_row_(chunk.first / entry_.row),
              rates_(by_row_ ? (chunk.last - chunk.first) / entry_.row : 0),
              step_{call.a, call.b, call.c, call.d, all.eta, all.w, random},
              full_(of(entry_, moves_, entry_.grad)),
              fold_(entry_.grad ? of(entry_, false, true) : nullptr) {
            if (!by_row_ || !moves_) return;
            const int size = bytes(entry_.param_type);
            for (std::int64_t i = chunk.first; i < chunk.last; i += entry_.row) {
                rates_[i / entry_.row - first_row_] = relative_rates(
                    call, own, squares(entry_.param + i * size, entry_.param_type, entry_.row),
                    entry_.row);
            }
        }

        void run() {
            if (!moves_ && !fold_) return;
            if (entry_.momentum_type != Stored::q8) {
                const int size = bytes(entry_.momentum_type);
                stretch(chunk_.first, chunk_.last, entry_.momentum + chunk_.first * size, size);
                return;
            }
            float values[Q8_BLOCK];
            for (std::int64_t i = chunk_.first; i < chunk_.last; i += Q8_BLOCK) {
                const int count = least(chunk_.last - i, Q8_BLOCK);
                float* scale = entry_.scales + i / Q8_BLOCK;
                decode(entry_.momentum + i, *scale, count, values);
                const bool changed = stretch(i, i + count, reinterpret_cast<char*>(values), 4);
                if (changed) encode(values, count, entry_.momentum + i, scale);
            }
        }

    private:
        // Elements first..last, whose momentum is given; whether it has been written.
        bool stretch(std::int64_t first, std::int64_t last, char* momentum, int size) {
            if (!mask_ && !by_row_) {
                piece(first, last, momentum, true);
                return fold_;
            }
            bool changed = false;
            for (std::int64_t i = first; i < last;) {
                const std::int64_t row = i / entry_.row;
                const bool moves = !mask_ || mask_[row];
                if (by_row_) {
                    step_.eta = rates_[row - first_row_].eta;
                    step_.w = rates_[row - first_row_].w;
                }
                const std::int64_t end = (row + 1) * entry_.row;
                const std::int64_t stop = end < last ? end : last;
                changed |= piece(i, stop, momentum + (i - first) * size, moves);
                i = stop;
            }
            return changed;
        }

        bool piece(std::int64_t first, std::int64_t last, char* momentum, bool moves) {
            if (!moves && (!fold_ || call_.mask_momentum)) return false;
            const char* grad = entry_.grad + (fold_ ? first * bytes(entry_.grad_type) : 0);
            char* param = entry_.param + (moves_ ? first * bytes(entry_.param_type) : 0);
            (moves ? full_ : fold_)(param, grad, momentum, last - first, step_, first);
            return fold_;
        }

        const SignMomentum& call_;
        const Chunk& chunk_;
        const Entry& entry_;
        const std::uint8_t* const mask_;
        const bool by_row_, moves_;
        const std::int64_t first_row_;
        const Buffer<Rates> rates_;  // of the chunk's rows, all before the first has moved
        Step step_;
        const Update full_, fold_;
    };

    const SignMomentum& call_;
    const Buffer<Look> looks_;  // of chunks
    const Buffer<Look> whole_;  // of tensors
};

}  // namespace

void sign_momentum(const SignMomentum& call, int threads) { Job(call).run(threads); }

}  // namespace fastlora::FASTLORA_ISA
