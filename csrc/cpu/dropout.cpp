// Philox4x32-7 (Salmon et al., 2011), a call a lane: LANES calls are the draws of 8 LANES neighbouring
// elements, which become bits of the mask while they are in the first cache.
#include "dropout.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kept.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

constexpr int PHILOX_ROUNDS = 7;
constexpr int GROUP = 8;  // elements a call, two a word
constexpr int PIECE = GROUP * LANES;

typedef std::uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef std::uint64_t Pairs __attribute__((vector_size(4 * LANES)));
constexpr std::uint64_t LOW = 0xffffffffu;

// The products of the even words, 64 bits each.
inline Pairs multiply(Pairs words, std::uint32_t by) {
    const Pairs other = Pairs{} + by;
#if defined(__AVX512F__)
    return reinterpret_cast<Pairs>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(words),
                                                    reinterpret_cast<__m512i>(other)));
#elif defined(__AVX2__)
    return reinterpret_cast<Pairs>(_mm256_mul_epu32(reinterpret_cast<__m256i>(words),
                                                    reinterpret_cast<__m256i>(other)));
#else
    return (words & LOW) * other;
#endif
}

inline void multiply(Words words, std::uint32_t by, Words* low, Words* high) {
    const Pairs both = reinterpret_cast<Pairs>(words);
    const Pairs even = multiply(both, by), odd = multiply(both >> 32, by);
    *low = reinterpret_cast<Words>((even & LOW) | (odd << 32));
    *high = reinterpret_cast<Words>((even >> 32) | (odd & ~LOW));
}

// The draws of the calls first, first + 1, …: 16 bits for each of PIECE elements, in their order.
inline void draw(std::uint64_t first, std::uint64_t seed, std::uint16_t* draws) {
    Words c0;
    for (int lane = 0; lane < LANES; ++lane) c0[lane] = static_cast<std::uint32_t>(lane);
    const std::uint32_t begin = static_cast<std::uint32_t>(first);
    c0 += begin;
    const Words carried = reinterpret_cast<Words>(c0 < begin);  // all ones where the low word overflows
    Words c1 = static_cast<std::uint32_t>(first >> 32) - carried, c2 = {}, c3 = {};
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        Words low_a, high_a, low_b, high_b;
        multiply(c0, 0xD2511F53u, &low_a, &high_a);
        multiply(c2, 0xCD9E8D57u, &low_b, &high_b);
        c0 = high_b ^ c1 ^ k0;
        c1 = low_b;
        c2 = high_a ^ c3 ^ k1;
        c3 = low_a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    alignas(64) std::uint32_t words[4][LANES];
    std::memcpy(words[0], &c0, sizeof c0);
    std::memcpy(words[1], &c1, sizeof c1);
    std::memcpy(words[2], &c2, sizeof c2);
    std::memcpy(words[3], &c3, sizeof c3);
    for (int lane = 0; lane < LANES; ++lane) {
        for (int word = 0; word < 4; ++word) {  // the low half of a word is the first element's
            draws[GROUP * lane + 2 * word] = static_cast<std::uint16_t>(words[word][lane]);
            draws[GROUP * lane + 2 * word + 1] =
                static_cast<std::uint16_t>(words[word][lane] >> 16);
        }
    }
}

// Of sixteen draws, those that are not below the threshold.
inline std::uint16_t compare(const std::uint16_t* draws, std::uint32_t threshold) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m256i all = _mm256_load_si256(reinterpret_cast<const __m256i*>(draws));
    return _mm256_cmpge_epu16_mask(all, _mm256_set1_epi16(static_cast<short>(threshold)));
#elif defined(__AVX2__)
    const __m256i all = _mm256_load_si256(reinterpret_cast<const __m256i*>(draws));
    const __m256i least = _mm256_set1_epi16(static_cast<short>(threshold));
    const __m256i over = _mm256_cmpeq_epi16(_mm256_max_epu16(all, least), all);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(over),
                                          _mm256_extracti128_si256(over, 1));
    return static_cast<std::uint16_t>(_mm_movemask_epi8(bytes));
#else
    unsigned bits = 0;
    for (int j = 0; j < WORD; ++j) bits |= static_cast<unsigned>(draws[j] >= threshold) << j;
    return static_cast<std::uint16_t>(bits);
#endif
}

// A row's words.
void draw_row(std::uint64_t first, const Dropout& call, std::uint16_t* bits) {
    static_assert(PIECE % WORD == 0);
    const std::int64_t words = words_of(call.columns);
    for (std::int64_t from = 0; from < words; from += PIECE / WORD) {
        alignas(64) std::uint16_t draws[PIECE];
        draw(first + static_cast<std::uint64_t>(from * WORD / GROUP), call.seed, draws);
        for (int word = 0; word < PIECE / WORD && from + word < words; ++word) {
            bits[from + word] = compare(draws + word * WORD, call.threshold);
        }
    }
}

void drop_row(const float* x, const std::uint16_t* bits, std::int64_t columns, float* out) {
    std::int64_t j = 0;
    for (; j + LANES <= columns; j += LANES) store(out + j, kept(load(x + j), bits_at(bits, j)));
    for (; j < columns; ++j) out[j] = bits_at(bits, j) & 1u ? x[j] : 0;
}

}  // namespace

void dropout(const Dropout& call, int threads) {
    const std::int64_t groups = (call.columns + GROUP - 1) / GROUP, words = words_of(call.columns);
    parallel_for(call.rows, 1, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t row = first; row < last; ++row) {
            std::uint16_t* bits = call.bits + row * words;
            if (!call.drawn) draw_row(static_cast<std::uint64_t>(row * groups), call, bits);
            if (call.x) {
                drop_row(call.x + row * call.x_stride, bits, call.columns,
                         call.out + row * call.out_stride);
            }
        }
    });
}

}  // namespace fastlora::FASTLORA_ISA
