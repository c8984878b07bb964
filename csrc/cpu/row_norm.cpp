// n² = ‖W_j‖² + 2s B_j · u_j with u = W Aᵀ + B (s/2 A Aᵀ): two products onto one sum. One pass over W
// serves the first and, if it is not known, ‖W_j‖².
#include "row_norm.hpp"

#include <cmath>

#include "packed.hpp"
#include "parallel.hpp"
#include "product.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

constexpr std::int64_t RUN = 256;
constexpr int GRAIN = 64;  // rows of W at a time; a multiple of LANES
constexpr int LEAST = 16;  // rows that a thread takes at least; LANES or more, and divides GRAIN

double square_sum(const float* w, std::int64_t length) {
    Floats run = {};
    std::int64_t j = 0;
    for (; j + LANES <= length; j += LANES) run += load(w + j) * load(w + j);
    double total = sum(widen(run));
    for (; j < length; ++j) total += static_cast<double>(w[j]) * w[j];
    return total;
}

class Job {
public:
    explicit Job(const RowNorm& call)
        : call_(call),
          ranks_(round_up(call.r)),
          a_(call.k * ranks_),
          half_gram_(call.r * ranks_),
          squares_(ranks_) {
        pack(call.lora_A, call.a_stride, static_cast<int>(call.r), call.k,
             static_cast<int>(ranks_), a_ + 0);
        Buffer<double> gram(call.r * ranks_);
        zero(gram + 0, call.r * ranks_);
        for (std::int64_t from = 0; from < call.k; from += RUN) {
            add_product(call.lora_A + from, call.a_stride, call.r, packed(from),
                        least(call.k - from, RUN), gram + 0);
        }
        for (std::int64_t i = 0; i < call.r * ranks_; ++i) {
            half_gram_[i] = static_cast<float>(call.scaling / 2 * gram[i]);
        }
        for (std::int64_t i = 0; i < ranks_; ++i) {
            squares_[i] = i < call.r ? call.scaling * call.scaling * gram[i * ranks_ + i] : 0;
        }
    }

    // Rows first..last of W, at most GRAIN of them.
    void run(std::int64_t first, std::int64_t last) const {
        const int height = least(last - first, GRAIN);
        Buffer<double> sums(height * ranks_);
        Buffer<float> b(ranks_);
        double weight_sq[GRAIN] = {};
        zero(sums + 0, height * ranks_);
        if (call_.column == 1) {
            read(first, height, sums + 0, weight_sq);
        } else {
            read_transposed(first, height, sums + 0, weight_sq);
        }
        const float* own = call_.lora_B + first * call_.b_stride;
        add_product(own, call_.b_stride, height, {half_gram_ + 0, ranks_, ranks_}, call_.r,
                    sums + 0);
        zero(b + 0, ranks_);
        for (int i = 0; i < height; ++i) {
            for (std::int64_t v = 0; v < call_.r; ++v) b[v] = own[i * call_.b_stride + v];
            if (!call_.known_sq) call_.weight_sq[first + i] = weight_sq[i];
            finish(first + i, b + 0, sums + i * ranks_);
        }
    }

private:
    Right packed(std::int64_t from) const { return {a_ + from * ranks_, ranks_, ranks_}; }

    // sums [height, ranks] += W Aᵀ, and the squares if they are not known.
    void read(std::int64_t first, int height, double* sums, double* weight_sq) const {
        for (int top = 0; top < height; top += ROWS) {  // so many rows from end to end
            const int some = least(height - top, ROWS);
            for (std::int64_t from = 0; from < call_.k; from += RUN) {
                const int length = least(call_.k - from, RUN);
                const float* w = call_.weight + (first + top) * call_.row + from;
                add_product(w, call_.row, some, packed(from), length, sums + top * ranks_);
                for (int i = 0; i < some && !call_.known_sq; ++i) {
                    weight_sq[top + i] += square_sum(w + i * call_.row, length);
                }
            }
        }
    }

    // The same where W's columns are contiguous: a vector holds neighbouring rows of W instead of
    // ranks, so that the product comes out transposed and W need not be.
    void read_transposed(std::int64_t first, int height, double* sums, double* weight_sq) const {
        Buffer<double> turned(call_.r * GRAIN);
        Buffer<float> padded(RUN * GRAIN);
        zero(turned + 0, call_.r * GRAIN);
        for (std::int64_t from = 0; from < call_.k; from += RUN) {
            const int length = least(call_.k - from, RUN);
            Right w{call_.weight + from * call_.column + first, call_.column, GRAIN};
            if (height < GRAIN) {
                for (int j = 0; j < length; ++j) {
                    for (int i = 0; i < GRAIN; ++i) {
                        padded[j * GRAIN + i] = i < height ? w.values[j * w.stride + i] : 0;
                    }
                }
                w = {padded + 0, GRAIN, GRAIN};
            }
            add_product(call_.lora_A + from, call_.a_stride, call_.r, w, length, turned + 0);
            if (call_.known_sq) continue;
            for (int i = 0; i < GRAIN; i += LANES) {
                Floats squares = {};
                for (int j = 0; j < length; ++j) {
                    const Floats some = load(w.values + j * w.stride + i);
                    squares += some * some;
                }
                add_to(weight_sq + i, squares);
            }
        }
        for (int i = 0; i < height; ++i) {
            for (std::int64_t v = 0; v < call_.r; ++v) sums[i * ranks_ + v] = turned[v * GRAIN + i];
        }
    }

    // Row j's norm from b = B_j and u = u_j, both [ranks].
    void finish(std::int64_t j, const float* b, const double* u) const {
        const double sq = call_.known_sq ? call_.known_sq[j] : call_.weight_sq[j];
        Half dots = {}, sizes = {};
        for (std::int64_t v = 0; v < ranks_; v += LANES / 2) {
            const Half own = widen_half(b + v);
            dots += own * load_half(u + v);
            sizes += own * own * load_half(squares_ + v);
        }
        const double squared = sq + 2 * call_.scaling * sum(dots);
        const double terms = sq + sum(sizes);
        const double lowest = call_.floor * call_.floor;
        call_.norm[j] = static_cast<float>(std::sqrt(squared < lowest ? lowest : squared));
        // also lost where NaN
        call_.lost[j] = !(squared >= call_.cancellation * terms && squared < HUGE_VAL);
    }

    const RowNorm& call_;
    const std::int64_t ranks_;        // a multiple of LANES; what is beyond r is zero
    const Buffer<float> a_;           // Aᵀ [k, ranks], so that a vector holds neighbouring ranks
    const Buffer<float> half_gram_;   // s/2 A Aᵀ [r, ranks]
    const Buffer<double> squares_;    // s² ‖A_i‖² [ranks]
};

}  // namespace

std::int64_t row_norm(const RowNorm& call, int threads) {
    const Job job(call);
    parallel_for(call.n, LEAST, threads, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t j = first; j < last; j += GRAIN) {
            job.run(j, last - j < GRAIN ? last : j + GRAIN);
        }
    });
    std::int64_t lost = 0;
    for (std::int64_t j = 0; j < call.n; ++j) lost += call.lost[j];
    return lost;
}

}  // namespace fastlora::FASTLORA_ISA
