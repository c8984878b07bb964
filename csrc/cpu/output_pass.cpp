// Threads share columns. A block of dY that fits the inner cache is scaled, summed and multiplied
// before the next one is read; only h is a sum over columns, of which each thread keeps its part.
#include "output_pass.hpp"

#include <cmath>

#include "parallel.hpp"
#include "product.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

constexpr int STRIP = LANES == 4 ? 48 : 96;  // columns: many, a strip loads and stores all of h
constexpr int HEIGHT = 64;                   // and rows of a block
constexpr int VECTORS = 6;                   // summed up at a time

// A block of dY and of what is read beside it, from column `first` on. `width` columns of it are
// the matrix's; a narrower block than STRIP is a copy with zeros beyond them.
struct Block {
    std::int64_t row, first;
    int height, width;
    const float *dy, *read;
    std::int64_t dy_stride, read_stride;
    float* scaled;
    std::int64_t scaled_stride;
};

class Job {
public:
    Job(const OutputPass& call, int threads)
        : call_(call),
          ranks_(round_up(call.r)),
          length_(range_length(call.columns, STRIP, threads)),
          turned_(call.dc ? call.r * call.rows : 0),
          parts_(call.h ? (call.columns + length_ - 1) / length_ * call.rows * ranks_ : 0) {
        for (std::int64_t m = 0; call.dc && m < call.rows; ++m) {
            for (std::int64_t i = 0; i < call.r; ++i) {
                turned_[i * call.rows + m] = call.t[m * call.t_stride + i];
            }
        }
    }

    void range(std::int64_t first, std::int64_t last) const {
        double* part = parts_ + first / length_ * call_.rows * ranks_;
        if (call_.h) zero(part, call_.rows * ranks_);
        for (; first < last; first += STRIP) strip(first, least(last - first, STRIP), part);
    }

    // h from the threads' parts, in order.
    void gather() const {
        const std::int64_t size = call_.rows * ranks_;
        for (std::int64_t m = 0; call_.h && m < call_.rows; ++m) {
            for (std::int64_t i = 0; i < call_.r; ++i) {
                double total = 0;
                for (std::int64_t at = 0; at * length_ < call_.columns; ++at) {
                    total += parts_[at * size + m * ranks_ + i];
                }
                call_.h[m * call_.r + i] = static_cast<float>(call_.factor * total);
            }
        }
    }

private:
    void strip(std::int64_t first, int width, double* part) const {
        Buffer<float> c(call_.h ? STRIP * ranks_ : 0);
        Buffer<float> copies(width < STRIP ? 3 * HEIGHT * STRIP : 0);
        Buffer<double> dc(call_.dc ? call_.r * STRIP : 0);
        float g[STRIP] = {}, bias[STRIP] = {};
        double dots[STRIP] = {}, squares[STRIP] = {};
        for (int j = 0; j < width; ++j) {
            if (call_.g) g[j] = call_.g[first + j];
            if (call_.bias) bias[j] = call_.bias[first + j];
        }
        if (call_.h) fill(first, width, c + 0);
        if (call_.dc) zero(dc + 0, call_.r * STRIP);
        for (std::int64_t row = 0; row < call_.rows; row += HEIGHT) {
            const Block block = take(row, first, width, copies + 0);
            if (call_.scaled) scale(block, g);
            if (call_.read) sum_up(block, bias, dots, squares);
            const float* own = call_.scaled ? block.scaled : block.dy;
            const std::int64_t stride = call_.scaled ? block.scaled_stride : block.dy_stride;
            if (call_.h) {
                add_product(own, stride, block.height, {c + 0, ranks_, ranks_}, STRIP,
                            part + row * ranks_);
            }
            if (call_.dc) {
                add_product(turned_ + row, call_.rows, call_.r, {own, stride, STRIP}, block.height,
                            dc + 0);
            }
            if (width < STRIP && call_.scaled) give_back(block);
        }
        for (int j = 0; j < width; ++j) {
            if (call_.read) finish(first + j, dots[j], squares[j]);
            for (std::int64_t i = 0; call_.dc && i < call_.r; ++i) {
                call_.dc[(first + j) * call_.r + i] = static_cast<float>(dc[i * STRIP + j]);
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

    Block take(std::int64_t row, std::int64_t first, int width, float* copies) const {
        Block block{row, first, least(call_.rows - row, HEIGHT), width,
                    call_.dy + row * call_.dy_stride + first,
                    call_.read ? call_.read + row * call_.read_stride + first : nullptr,
                    call_.dy_stride, call_.read_stride,
                    call_.scaled ? call_.scaled + row * call_.columns + first : nullptr,
                    call_.columns};
        if (width == STRIP) return block;
        for (int m = 0; m < block.height; ++m) {
            for (int j = 0; j < STRIP; ++j) {
                float* to = copies + m * STRIP + j;
                *to = j < width ? block.dy[m * block.dy_stride + j] : 0;
                if (!call_.read) continue;
                to[HEIGHT * STRIP] = j < width ? block.read[m * block.read_stride + j] : 0;
            }
        }
        block.dy = copies;
        block.read = copies + HEIGHT * STRIP;
        block.scaled = copies + 2 * HEIGHT * STRIP;
        block.dy_stride = block.read_stride = block.scaled_stride = STRIP;
        return block;
    }

    static void scale(const Block& block, const float* g) {
        for (int m = 0; m < block.height; ++m) {
            for (int v = 0; v < STRIP; v += LANES) {
                store(block.scaled + m * block.scaled_stride + v,
                      load(block.dy + m * block.dy_stride + v) * load(g + v));
            }
        }
    }

    // dots += Σ_rows dY ∘ (read − bias), squares += Σ_rows (read − bias)².
    static void sum_up(const Block& block, const float* bias, double* dots, double* squares) {
        for (int j = 0; j < STRIP; j += VECTORS * LANES) {
            Floats dot[VECTORS] = {}, square[VECTORS] = {};
            for (int m = 0; m < block.height; ++m) {
                const float* dy = block.dy + m * block.dy_stride + j;
                const float* read = block.read + m * block.read_stride + j;
                for (int v = 0; v < VECTORS; ++v) {
                    const Floats z = load(read + v * LANES) - load(bias + j + v * LANES);
                    dot[v] += load(dy + v * LANES) * z;
                    square[v] += z * z;
                }
            }
            for (int v = 0; v < VECTORS; ++v) {
                double *to = dots + j + v * LANES, *also = squares + j + v * LANES;
                store(to, load(to) + widen(dot[v]));
                store(also, load(also) + widen(square[v]));
            }
        }
    }

    void give_back(const Block& block) const {
        float* scaled = call_.scaled + block.row * call_.columns + block.first;
        for (int m = 0; m < block.height; ++m) {
            for (int j = 0; j < block.width; ++j) {
                scaled[m * call_.columns + j] = block.scaled[m * STRIP + j];
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
    const Buffer<double> parts_;  // a thread's share of h [rows, ranks], one after the other
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
