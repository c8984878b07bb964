// row_norm with a memory: a layer's last norms, and what they were made from, value for value where
// that is cheap (fastlora/ops/weight_norm/cache.py says why versions are not enough).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/isa.hpp"
#include "cpu/row_norm.hpp"

namespace fastlora {

class NormMemory {
public:
    // (norms, how many recorded writes they have had, which are lost): those of `call`, computed into
    // `norm`, whose elements are at call.norm; or those kept, if all is as it was when they were. None
    // if another thread is computing. All in one answer, for between two calls threads may change.
    // lora_A and lora_B have contiguous rows; `version` counts recorded writes to the weight. Norms
    // of which none is lost are kept.
    pybind11::object update(RowNorm call, std::int64_t version, const pybind11::object& norm,
                            int threads, const std::string& isa) {
        if (busy_) return pybind11::none();
        const auto kernel = FASTLORA_PICK(find_isa(isa), row_norm);
        const bool same_weight = knows(call, version);
        if (same_weight && norm_ && holds(call)) return answer(norm_, version_, {});
        const Claim claim(busy_);  // to let go of a tensor may let another thread run
        forget();
        if (!same_weight) {
            weight_.values = nullptr;  // until its squares are there, whatever is thrown before
            probes_ = probe(call);
            weight_sq_.resize(static_cast<std::size_t>(call.n));
        }
        copy(call.lora_A, call.r, call.k, call.a_stride, lora_A_);
        copy(call.lora_B, call.n, call.r, call.b_stride, lora_B_);
        scaling_ = call.scaling;
        lost_.resize(static_cast<std::size_t>(call.n));
        call.known_sq = same_weight ? weight_sq_.data() : nullptr;
        call.weight_sq = weight_sq_.data();
        call.lost = lost_.data();
        std::int64_t count;
        {
            pybind11::gil_scoped_release released;
            count = kernel(call, threads);
        }
        weight_ = {call.weight, version, call.row, call.column, call.n, call.k};
        latest_ = norm;
        if (!count) keep(norm, 0);
        return answer(norm, 0, count ? lost() : std::vector<std::int64_t>());
    }

    // Keeps the norms that an update was given and its caller has completed, in which so many writes
    // are recorded; unless another update has come since.
    void keep(const pybind11::object& norm, std::int64_t version) {
        if (!latest_.is(norm)) return;
        norm_ = norm;
        version_ = version;
    }

    void forget() { norm_ = latest_ = pybind11::object(); }

private:
    static constexpr int PROBES = 64;

    struct Weight {
        const float* values;
        std::int64_t version, row, column, n, k;
    };

    // Marks a memory that is being written, while other threads may run.
    class Claim {
    public:
        explicit Claim(bool& busy) : busy_(busy) { busy_ = true; }
        ~Claim() { busy_ = false; }

    private:
        bool& busy_;
    };

    static pybind11::object answer(const pybind11::object& norm, std::int64_t version,
                                   const std::vector<std::int64_t>& lost) {
        return pybind11::make_tuple(norm, version, lost);
    }

    // The rows that the last update could not compute.
    std::vector<std::int64_t> lost() const {
        std::vector<std::int64_t> rows;
        for (std::size_t j = 0; j < lost_.size(); ++j) {
            if (lost_[j]) rows.push_back(static_cast<std::int64_t>(j));
        }
        return rows;
    }

    bool knows(const RowNorm& call, std::int64_t version) const {
        return weight_.values && weight_.values == call.weight && weight_.version == version &&
               weight_.row == call.row && weight_.column == call.column && weight_.n == call.n &&
               weight_.k == call.k && alike(probes_, probe(call));
    }

    bool holds(const RowNorm& call) const {
        return scaling_ == call.scaling && alike(lora_A_, call.lora_A, call.r, call.k, call.a_stride) &&
               alike(lora_B_, call.lora_B, call.n, call.r, call.b_stride);
    }

    // The weight at places spread over its rows and columns.
    static std::vector<float> probe(const RowNorm& call) {
        std::vector<float> values(PROBES);
        for (std::int64_t i = 0; i < PROBES; ++i) {
            // the golden ratio's multiples spread over the columns whatever k is
            const double turn = static_cast<double>(i) * 0.6180339887498949;
            const auto part = turn - static_cast<double>(static_cast<std::int64_t>(turn));
            const auto column = static_cast<std::int64_t>(part * static_cast<double>(call.k));
            values[i] = call.weight[i * call.n / PROBES * call.row + column * call.column];
        }
        return values;
    }

    // To the bit: a NaN is itself.
    static bool alike(const std::vector<float>& one, const std::vector<float>& other) {
        return std::memcmp(one.data(), other.data(), PROBES * sizeof(float)) == 0;
    }

    static bool alike(const std::vector<float>& copy, const float* from, std::int64_t rows,
                      std::int64_t columns, std::int64_t stride) {
        if (static_cast<std::int64_t>(copy.size()) != rows * columns) return false;
        const std::size_t bytes = static_cast<std::size_t>(columns) * sizeof(float);
        for (std::int64_t i = 0; i < rows; ++i) {
            if (std::memcmp(copy.data() + i * columns, from + i * stride, bytes) != 0) return false;
        }
        return true;
    }

    // `from` is a contiguous matrix in `to` afterwards.
    static void copy(const float*& from, std::int64_t rows, std::int64_t columns,
                     std::int64_t& stride, std::vector<float>& to) {
        to.resize(static_cast<std::size_t>(rows * columns));
        for (std::int64_t i = 0; i < rows; ++i) {
            std::memcpy(to.data() + i * columns, from + i * stride,
                        static_cast<std::size_t>(columns) * sizeof(float));
        }
        from = to.data();
        stride = columns;
    }

    bool busy_ = false;
    Weight weight_{};
    std::vector<float> probes_, lora_A_, lora_B_;
    std::vector<double> weight_sq_;
    std::vector<std::uint8_t> lost_;
    double scaling_ = 0;
    pybind11::object norm_, latest_;  // null: there is none
    std::int64_t version_ = 0;
};

}  // namespace fastlora
