// Nothing but the other kernels one after another, on buffers of its own.
#include "adapter_linear.hpp"

#include "dropout.hpp"
#include "low_rank_update.hpp"
#include "output_pass.hpp"
#include "packed.hpp"
#include "sum_of_products.hpp"
#include "vector.hpp"

namespace fastlora::FASTLORA_ISA {

namespace {

class Layer {
public:
    Layer(const AdapterLinear& layer, int threads)
        : of_(layer),
          threads_(threads),
          words_(layer.threshold ? (layer.in + 15) / 16 : 0),
          bits_(layer.rows * words_) {}

    int threads(std::int64_t multiplies) const { return multiplies < of_.small ? 1 : threads_; }

    // x [rows, in] past the mask, which is drawn with it; x itself where there is none.
    Term dropped(const Buffer<float>& space) {
        if (!of_.threshold) return {of_.x, of_.x_stride, of_.in, nullptr, 0, 0, nullptr};
        draw(of_.x, of_.x_stride, space + 0);
        return {space + 0, of_.in, of_.in, nullptr, 0, 0, nullptr};
    }

    std::int64_t space() const { return of_.threshold ? of_.rows * of_.in : 0; }

    // The mask's bits, drawn now unless they are there; null where nothing is dropped.
    const std::uint16_t* bits() {
        if (!of_.threshold) return nullptr;
        if (!drawn_) draw(nullptr, 0, nullptr);
        return bits_ + 0;
    }

    // out [rows, columns] = Σ of terms + bias.
    template <int COUNT>
    void sum(float* out, std::int64_t rows, std::int64_t columns, const Term (&terms)[COUNT],
             const float* bias = nullptr) const {
        std::int64_t depth = 0;
        for (const Term& term : terms) depth += term.depth;
        sum_of_products({out, rows, columns, columns, terms, COUNT, nullptr, bias, of_.slice},
                        threads(rows * columns * depth));
    }

private:
    void draw(const float* x, std::int64_t stride, float* out) {
        constexpr std::int64_t DRAW = 8;  // multiply-adds that take as long: native.py's _DRAW
        dropout({x, of_.rows, of_.in, stride, out, of_.in, of_.seed, of_.threshold, bits_ + 0, drawn_},
                threads(of_.rows * of_.in * (drawn_ ? 1 : DRAW)));
        drawn_ = true;
    }

    const AdapterLinear& of_;
    const int threads_;
    const std::int64_t words_;
    const Buffer<std::uint16_t> bits_;
    bool drawn_ = false;
};

// a times a matrix, and a times its transpose.
inline Term times(Term a, const Matrix& b) {
    a.b = b.values;
    a.b_row = b.row;
    a.b_column = b.column;
    return a;
}

inline Term times_turned(const Term& a, const Matrix& b) {
    return times(a, {b.values, b.column, b.row});
}

}  // namespace

void adapter_linear_forward(const AdapterLinear& layer, const AdapterLinearForward& call,
                            int threads) {
    Layer own(layer, threads);
    {
        const Buffer<float> space(own.space());
        own.sum(call.t, layer.rows, layer.r, {times_turned(own.dropped(space), layer.a)});
    }
    for (std::int64_t i = 0; i < layer.rows * layer.r; ++i) call.t[i] *= layer.factor;
    const Term x{layer.x, layer.x_stride, layer.in, nullptr, 0, 0, nullptr};
    const Term t{call.t, layer.r, layer.r, nullptr, 0, 0, nullptr};
    own.sum(call.y, layer.rows, layer.out, {times_turned(x, layer.w), times_turned(t, layer.b)},
            call.bias);
}

void adapter_linear_backward(const AdapterLinear& layer, const AdapterLinearBackward& call,
                             int threads) {
    Layer own(layer, threads);
    const std::int64_t rows = layer.rows, in = layer.in, r = layer.r;
    const Buffer<float> h(call.dx || call.da ? rows * r : 0);
    OutputPass pass{};
    pass.dy = call.dy;
    pass.rows = rows;
    pass.columns = layer.out;
    pass.dy_stride = call.dy_stride;
    pass.r = r;
    pass.factor = layer.factor;
    if (call.dx || call.da) {
        pass.c = layer.b.values;
        pass.c_stride = layer.b.row;
        pass.h = h + 0;
    }
    if (call.db) {
        pass.t = call.t;
        pass.t_stride = r;
        pass.dc = call.db;
    }
    output_pass(pass, own.threads(rows * layer.out * r));
    if (call.da) {
        const Buffer<float> space(own.space()), turned(r * rows);
        transpose(h + 0, r, rows, r, turned + 0, rows);
        const Term x = own.dropped(space);
        own.sum(call.da, r, in, {{turned + 0, rows, rows, x.a, x.a_stride, 1, nullptr}});
    }
    if (!call.dx) return;
    const Term dy = times({call.dy, call.dy_stride, layer.out, nullptr, 0, 0, nullptr}, layer.w);
    const Term update = times({h + 0, r, r, nullptr, 0, 0, nullptr}, layer.a);
    const std::uint16_t* bits = own.bits();
    if (!bits) return own.sum(call.dx, rows, in, {dy, update});
    own.sum(call.dx, rows, in, {dy});
    low_rank_update({call.dx, rows, in, in, update.a, r, r, update.b, update.b_row, update.b_column,
                     nullptr, nullptr, bits},
                    own.threads(rows * in * r));
}

}  // namespace fastlora::FASTLORA_ISA
