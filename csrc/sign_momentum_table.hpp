// sign_momentum's lists, checked and turned into what its kernel takes (cpu/sign_momentum.hpp).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/isa.hpp"
#include "cpu/sign_momentum.hpp"
#include "tensor_lists.hpp"

namespace fastlora {

class SignMomentumTable {
public:
    SignMomentumTable(pybind11::object tensor, pybind11::object exchange)
        : reader_(std::move(tensor), std::move(exchange)) {}

    // Takes the lists, of which params and grads may be None; `by_row`: None, or a byte per tensor
    // whose rows matter. False, and nothing to run, where anything of it does not fit or is not
    // contiguous float32, bfloat16 or float16 on the CPU (momentum: float32, bfloat16 or EightBit).
    bool read(pybind11::object params, pybind11::object grads, pybind11::object momenta,
              pybind11::object by_row) {
        const List theta(params), g(grads), m(momenta);
        const std::int64_t count = m.size();
        if ((theta && theta.size() != count) || (g && g.size() != count)) return forget();
        std::string rows = by_row.is_none() ? std::string() : by_row.cast<std::string>();
        bool same = ready_ && size() == count && rows == by_row_;
        ready_ = false;
        by_row_.swap(rows);
        entries_.resize(static_cast<std::size_t>(count));
        for (std::int64_t i = 0; i < count; ++i) {
            for (const List* list : {&theta, &g, &m}) reader_.fetch(*list, i);
            Entry entry{};
            if (!read_entry(theta, g, m, i, entry)) return forget();
            same = same && alike(entries_[i], entry);
            entries_[i] = entry;
        }
        if (!same) {
            if (written_twice()) return forget();
            cut();
        }
        ready_ = true;
        return true;
    }

    std::int64_t size() const { return static_cast<std::int64_t>(entries_.size()); }

    // lr, decay and floor: one number each, or one a tensor. `relative`: None or a byte a tensor,
    // of 0, 1 (tensor) and 2 (rows). Addresses are null for what is not there.
    void run(double a, double b, double c, double d, const std::vector<double>& lr,
             const std::vector<double>& decay, const std::vector<double>& floor,
             pybind11::object relative, const std::vector<std::uintptr_t>& rows, bool mask_momentum,
             pybind11::object shrink, const std::vector<float>& centers, std::uintptr_t skip,
             std::uintptr_t lost, bool moves, const std::vector<std::uint32_t>& keys, int threads,
             const std::string& isa) const {
        const auto kernel = FASTLORA_PICK(find_isa(isa), sign_momentum);
        SignMomentum call{};
        call.entries = entries_.data();
        call.count = size();
        call.chunks = chunks_.data();
        call.chunk_count = static_cast<std::int64_t>(chunks_.size());
        call.a = static_cast<float>(a);
        call.b = static_cast<float>(b);
        call.c = static_cast<float>(c);
        call.d = static_cast<float>(d);
        call.lr = lr.data();
        call.decay = decay.data();
        call.floor = floor.data();
        call.many = lr.size() > 1;
        if (!relative.is_none()) {
            call.relative = reinterpret_cast<const Relative*>(PyBytes_AsString(relative.ptr()));
        }
        if (!rows.empty()) call.rows = reinterpret_cast<const std::uint8_t* const*>(rows.data());
        call.mask_momentum = mask_momentum;
        call.shrinks = !shrink.is_none();
        if (call.shrinks) call.shrink = shrink.cast<float>();
        call.centers = centers.data();
        call.skip = reinterpret_cast<const std::uint8_t*>(skip);
        call.lost = reinterpret_cast<std::uint8_t*>(lost);
        call.moves = moves;
        if (!keys.empty()) call.keys = keys.data();
        pybind11::gil_scoped_release released;
        kernel(call, threads);
    }

private:
    // About what stays in a core's second cache from the look at it to the update.
    static constexpr std::int64_t CHUNK = 32768;

    static bool stored(char kind, Stored& out) {
        out = kind == 'f' ? Stored::f32 : kind == 'b' ? Stored::bf16 : Stored::f16;
        return kind != 'q';
    }

    bool forget() {
        entries_.clear();
        return false;
    }

    bool read_entry(const List& theta, const List& g, const List& m, std::int64_t i, Entry& entry) {
        if (!read_momentum(m[i], seen_, entry)) return false;
        entry.count = seen_.count;
        entry.row = seen_.row;
        if (theta) {
            if (!reader_.read(theta[i], other_) || other_.shape != seen_.shape) return false;
            if (!stored(other_.kind, entry.param_type)) return false;
            entry.param = other_.data;
        }
        if (g) {
            if (!reader_.read(g[i], other_) || other_.shape != seen_.shape) return false;
            if (!stored(other_.kind, entry.grad_type)) return false;
            entry.grad = other_.data;
        }
        return true;
    }

    // Whether what is written lies where it lay, and is cut as it was.
    static bool alike(const Entry& one, const Entry& other) {
        return one.param == other.param && one.momentum == other.momentum &&
               one.count == other.count && one.row == other.row &&
               one.momentum_type == other.momentum_type;
    }

    bool read_momentum(PyObject* momentum, PlainTensor& seen, Entry& entry) const {
        if (reader_.is_tensor(momentum)) {
            if (!reader_.read(momentum, seen) || seen.kind == 'h') return false;
            entry.momentum = seen.data;
            return stored(seen.kind, entry.momentum_type);
        }
        const pybind11::object scaled = attribute(momentum, scales_);
        const pybind11::object coded = attribute(momentum, codes_);
        PlainTensor scales;
        if (!scaled || !reader_.read(scaled.ptr(), scales) || scales.kind != 'f') return false;
        if (!coded || !reader_.read(coded.ptr(), seen) || seen.kind != 'q') return false;
        if (scales.count != (seen.count + Q8_BLOCK - 1) / Q8_BLOCK) return false;
        entry.momentum = seen.data;
        entry.scales = reinterpret_cast<float*>(scales.data);
        entry.momentum_type = Stored::q8;
        return true;
    }

    bool written_twice() {
        addresses_.clear();
        for (const Entry& entry : entries_) {
            if (!entry.count) continue;
            if (entry.param) addresses_.push_back(entry.param);
            addresses_.push_back(entry.momentum);
        }
        std::sort(addresses_.begin(), addresses_.end());
        return std::adjacent_find(addresses_.begin(), addresses_.end()) != addresses_.end();
    }

    void cut() {
        chunks_.clear();
        for (std::int64_t i = 0; i < size(); ++i) {
            const Entry& entry = entries_[i];
            if (!entry.count) continue;
            std::int64_t unit = Q8_BLOCK;
            if (!by_row_.empty() && by_row_[i]) {
                unit = entry.momentum_type == Stored::q8 ? common(entry.row, Q8_BLOCK) : entry.row;
            }
            const std::int64_t length = std::max<std::int64_t>(CHUNK / unit, 1) * unit;
            for (std::int64_t first = 0; first < entry.count; first += length) {
                chunks_.push_back({i, first, std::min(first + length, entry.count)});
            }
        }
    }

    static std::int64_t common(std::int64_t one, std::int64_t other) {
        std::int64_t a = one, b = other;
        while (b) {
            const std::int64_t rest = a % b;
            a = b;
            b = rest;
        }
        return one / a * other;
    }

    TensorReader reader_;
    const pybind11::str scales_{"scales"}, codes_{"codes"};
    PlainTensor seen_, other_;  // here for the memory of their shapes
    std::vector<Entry> entries_;
    std::string by_row_;  // as given to read
    bool ready_ = false;  // the last read went through, and all else here is of its lists
    std::vector<Chunk> chunks_;
    std::vector<const void*> addresses_;
};

}  // namespace fastlora
