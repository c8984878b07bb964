// Threads share columns. A block of dY that fits the inner cache is scaled, summed and multiplied
// before the next one is read; only h is a sum over columns, of which each thread keeps its part.
#include "output_pass.hpp"

#include <cmath>

#include "packed.hpp"
#include "parallel.hpp"
#include "product.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

constexpr int STRIP = LANES == 4 ? 48 : 96;  // columns: many, a strip loads and stores all of h
constexpr int HEIGHT = 64;                   // and rows of a block
constexpr int VECTORS = 6;                   // summed up at a time

// A block of dY, from column `first` on, as a matrix of STRIP columns without gaps: rows of dY lie
// a power of two apart as often as not, and then few of them fit the inner cache at once. `width`
// of its columns are the matrix's, those beyond hold zeros.
struct Block {
    std::int64_t row, first;
    int height, width;
    float* values;
};

class Job {
public:
    Job(const OutputPass& call, int threads)
        : call_(call),
          ranks_(round_up(call.r)),
          length_(range_length(call.columns, STRIP, threads)),
          turned_(call.dc ? call.r * call.rows : 0),
          parts_(call.h ? (call.columns + length_ - 1) / length_ * call.rows * ranks_ : 0) {
        if (call.dc) transpose(call.t, call.t_stride, call.rows, call.r, turned_ + 0, call.rows);
    }

    void range(std::int64_t first, std::int64_t last) const {
        float* part = parts_ + first / length_ * call_.rows * ranks_;
        if (call_.h) zero(part, call_.rows * ranks_);
        for (; first < last; first += STRIP) strip(first, least(last - first, STRIP), part);
    }

    // h from the threads' parts, in order.
    void gather() const {
        const std::int64_t size = call_.rows * ranks_;
        for (std::int64_t m = 0; call_.h && m < call_.rows; ++m) {
            for (std::int64_t i = 0; i < ranks_; i += LANES) {
                Doubles total = {};
                for (std::int64_t at = 0; at * length_ < call_.columns; ++at) {
                    total += widen(load(parts_ + at * size + m * ranks_ + i));
                }
                const Floats all = __builtin_convertvector(call_.factor * total, Floats);
                std::memcpy(call_.h + m * call_.r + i, &all,
                            sizeof(float) * least(call_.r - i, LANES));
            }
        }
    }

private:
    void strip(std::int64_t first, int width, float* part) const {
        const bool whole = width == STRIP && ranks_ == call_.r;  // C can be read where it is
        Buffer<float> copy(call_.h && !whole ? STRIP * ranks_ : 0);
        const Right c = whole ? Right{call_.c + first * call_.c_stride, call_.c_stride, ranks_}
                              : Right{copy + 0, ranks_, ranks_};
        Buffer<float> own(2 * HEIGHT * STRIP);
        Buffer<float> dc(call_.dc ? call_.r * STRIP : 0);
        float g[STRIP] = {}, bias[STRIP] = {};
        double dots[STRIP] = {}, squares[STRIP] = {};
        for (int j = 0; j < width; ++j) {
            if (call_.g) g[j] = call_.g[first + j];
            if (call_.bias) bias[j] = call_.bias[first + j];
        }
        if (call_.h && !whole) fill(first, width, copy + 0);
        if (call_.dc) zero(dc + 0, call_.r * STRIP);
        for (std::int64_t row = 0; row < call_.rows; row += HEIGHT) {
            const Block block{row, first, least(call_.rows - row, HEIGHT), width, own + 0};
            take(call_.dy, call_.dy_stride, block, block.values);
            if (call_.read) sum_up(block, bias, dots, squares, own + HEIGHT * STRIP);
            if (call_.g && (call_.scaled || call_.h || call_.dc)) scale(block, g);
            if (call_.h) {
                add_product(block.values, STRIP, block.height, c, STRIP, part + row * ranks_);
            }
            if (call_.dc) {
                add_product(turned_ + row, call_.rows, call_.r, {block.values, STRIP, STRIP},
                            block.height, dc + 0);
            }
        }
        for (int j = 0; j < width; ++j) {
            if (call_.read) finish(first + j, dots[j], squares[j]);
            for (std::int64_t i = 0; call_.dc && i < call_.r; ++i) {
                call_.dc[(first + j) * call_.r + i] = dc[i * STRIP + j];
            }
        }
    }

    // C of a strip as [STRIP, ranks], zeros beyond what there is.
    void fill(std::int64_t first, int width, float* c) const {
        for (std::int64_t j = 0; j < STRIP; ++j) {
            for (std::int64_t i = 0; i < ranks_; ++i) {
                const bool there = j < width && i < call_.r;
                c[j * ranks_ + i] = there ? call_.c[(first + j) * call_.c_stride + i] : 0;
            }
        }
    }

    // The block's part of a matrix.
    static void take(const float* from, std::int64_t stride, const Block& block, float* to) {
        from += block.row * stride + block.first;
        for (int m = 0; m < block.height; ++m, from += stride, to += STRIP) {
            if (block.width == STRIP) {
                for (int v = 0; v < STRIP; v += LANES) store(to + v, load(from + v));
            } else {
                for (int j = 0; j < STRIP; ++j) to[j] = j < block.width ? from[j] : 0;
            }
        }
    }

    // The block times g, and where that is wanted beyond it.
    void scale(const Block& block, const float* g) const {
        float* own = block.values;
        for (int m = 0; m < block.height; ++m, own += STRIP) {
            for (int v = 0; v < STRIP; v += LANES) store(own + v, load(own + v) * load(g + v));
            if (!call_.scaled) continue;
            float* to = call_.scaled + (block.row + m) * call_.columns + block.first;
            if (block.width == STRIP) {
                for (int v = 0; v < STRIP; v += LANES) store(to + v, load(own + v));
            } else {
                for (int j = 0; j < block.width; ++j) to[j] = own[j];
            }
        }
    }

    // dots += Σ_rows dY ∘ (read − bias), squares += Σ_rows (read − bias)². `copy` is for a block
    // of `read` that is narrower than a strip.
    void sum_up(const Block& block, const float* bias, double* dots, double* squares,
                float* copy) const {
        const float* from = call_.read + block.row * call_.read_stride + block.first;
        std::int64_t stride = call_.read_stride;
        if (block.width < STRIP) {
            take(call_.read, call_.read_stride, block, copy);
            from = copy;
            stride = STRIP;
        }
        for (int j = 0; j < STRIP; j += VECTORS * LANES) {
            Floats dot[VECTORS] = {}, square[VECTORS] = {};
            for (int m = 0; m < block.height; ++m) {
                const float* dy = block.values + m * STRIP + j;
                const float* read = from + m * stride + j;
                for (int v = 0; v < VECTORS; ++v) {
                    const Floats z = load(read + v * LANES) - load(bias + j + v * LANES);
                    dot[v] += load(dy + v * LANES) * z;
                    square[v] += z * z;
                }
            }
            for (int v = 0; v < VECTORS; ++v) {
                add_to(dots + j + v * LANES, dot[v]);
                add_to(squares + j + v * LANES, square[v]);
            }
        }
    }

    void finish(std::int64_t column, double dots, double squares) const {
        if (!call_.unread) {
            call_.dg[column] = static_cast<float>(dots);
            return;
        }
        const double g = call_.g[column], size = std::fabs(g);
        call_.dg[column] = static_cast<float>(dots / g);
        bool sound = size >= call_.least && size <= call_.most;  // false for NaN
        if (call_.bias) {
            const double rows = call_.rows > 0 ? static_cast<double>(call_.rows) : 1;
            const double hides = std::sqrt(squares / rows) * call_.hidden;
            sound = sound && std::fabs(call_.bias[column]) <= hides;
        }
        call_.unread[column] = !sound;
    }

    const OutputPass& call_;
    const std::int64_t ranks_;   // r, rounded up to full vectors
    const std::int64_t length_;  // columns of a thread
    const Buffer<float> turned_;  // tᵀ [r, rows]
    const Buffer<float> parts_;  // a thread's share of h [rows, ranks], one after the other
};

}  // namespace

std::int64_t output_pass(const OutputPass& call, int threads) {
    const Job job(call, threads);
    parallel_for(call.columns, STRIP, threads,
                 [&](std::int64_t first, std::int64_t last) { job.range(first, last); });
    job.gather();
    std::int64_t unread = 0;
    for (std::int64_t j = 0; call.unread && j < call.columns; ++j) unread += call.unread[j];
    return unread;
}

}  // namespace fastlora::FASTLORA_ISA
